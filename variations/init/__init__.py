"""Initial values: what fills one logical matrix. Residual scaling and PKL's like-for-like factor are applied on top."""

from variations.init.distributions import (
    Identity,
    Kaiming,
    Mup,
    Normal,
    Ones,
    Orthogonal,
    TruncatedNormal,
    Uniform,
    Xavier,
    Zeros,
)

INITS: dict[str, type] = {
    "normal": Normal,
    "truncated_normal": TruncatedNormal,
    "uniform": Uniform,
    "xavier": Xavier,
    "kaiming": Kaiming,
    "orthogonal": Orthogonal,
    "identity": Identity,
    "mup": Mup,
    "zeros": Zeros,
    "ones": Ones,
}
