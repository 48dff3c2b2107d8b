"""Elementwise nonlinearities of the MLPs."""

from variations.activation.elementwise import GELU, GELUTanh, Identity, ReLU, SiLU, SquaredReLU

ACTIVATIONS: dict[str, type] = {
    "gelu": GELU,
    "gelu_tanh": GELUTanh,
    "relu": ReLU,
    "relu2": SquaredReLU,
    "silu": SiLU,
    "identity": Identity,
}
