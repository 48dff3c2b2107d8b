"""Initial values: what fills one logical matrix. Residual scaling and PKL's like-for-like factor are applied on top."""

from variations.init.distributions import Kaiming, Normal, Ones, Orthogonal, TruncatedNormal, Uniform, Xavier, Zeros

INITS: dict[str, type] = {
    "normal": Normal,
    "truncated_normal": TruncatedNormal,
    "uniform": Uniform,
    "xavier": Xavier,
    "kaiming": Kaiming,
    "orthogonal": Orthogonal,
    "zeros": Zeros,
    "ones": Ones,
}
