"""Weights stored in eight bits, against the formula written out number by number."""

from __future__ import annotations

import math
from typing import Any

import pytest
import torch
from torch import Tensor

from convert.mapping import Tensors
from convert.quantised import Dequantised, dequantised


def stored(shape: tuple[int, ...], block: tuple[int, int], seed: int = 0) -> tuple[Tensor, Tensor]:
    """A weight in eight bits and its scales."""
    g = torch.Generator().manual_seed(seed)
    weight = (torch.randn(shape, generator=g) * 20).to(torch.float8_e4m3fn)
    blocks = (*shape[:-2], math.ceil(shape[-2] / block[0]), math.ceil(shape[-1] / block[1]))
    return weight, torch.rand(blocks, generator=g) + 0.5


def by_hand(weight: Tensor, scale: Tensor, block: tuple[int, int]) -> list[list[float]]:
    """The formula, one number after another, of a matrix."""
    return [
        [float(weight[i, j].float() * scale[i // block[0], j // block[1]]) for j in range(weight.shape[1])]
        for i in range(weight.shape[0])
    ]


@pytest.mark.parametrize(
    ("shape", "block"), [((8, 12), (4, 4)), ((7, 9), (4, 4)), ((3, 5), (128, 128)), ((6, 4), (2, 3))]
)
def test_every_number_has_the_scale_of_its_block(shape: tuple[int, int], block: tuple[int, int]) -> None:
    weight, scale = stored(shape, block)
    before = weight.clone()
    source = Dequantised(Tensors({"a.weight": weight, "a.weight_scale_inv": scale, "b": torch.ones(2)}), block)
    assert source.names() == ["a.weight", "b"]
    made = source.get("a.weight")
    assert made.dtype == source.meta("a.weight").dtype == torch.float32 and made.shape == source.meta("a.weight").shape
    assert made.tolist() == by_hand(weight, scale, block), "the product of two float32 numbers has one rounding"
    assert torch.equal(source.get("b"), torch.ones(2)) and torch.equal(weight.float(), before.float())


def test_experts_have_scales_of_their_own() -> None:
    weight, scale = stored((3, 6, 10), (4, 4))
    made = Dequantised(Tensors({"e": weight, "e_scale_inv": scale}), (4, 4)).get("e")
    for e in range(3):
        assert made[e].tolist() == by_hand(weight[e], scale[e], (4, 4))


def test_one_number_may_be_for_all() -> None:
    weight, _ = stored((4, 4), (128, 128))
    made = Dequantised(Tensors({"w": weight, "w_scale_inv": torch.tensor([0.5])})).get("w")
    assert torch.equal(made, weight.float() * 0.5)


@pytest.mark.parametrize(
    ("tensors", "told"),
    [
        ({"w": torch.zeros(4, 4).to(torch.float8_e4m3fn)}, "w is stored in eight bits and has no w_scale_inv"),
        ({"w_scale_inv": torch.ones(1, 1)}, "w_scale_inv is the scale of a weight that there is not"),
        (
            {"w": torch.zeros(200, 4).to(torch.float8_e5m2), "w_scale_inv": torch.ones(1, 1, 1)},
            r"w_scale_inv is \[1, 1, 1\], and for a weight \[200, 4\] should be \[2, 1\]",
        ),
    ],
)
def test_scales_that_do_not_fit(tensors: dict[str, Tensor], told: str) -> None:
    with pytest.raises(ValueError, match=told):
        Dequantised(Tensors(tensors))


@pytest.mark.parametrize(
    ("how", "told"),
    [
        ({"quant_method": "gptq"}, "the method 'gptq' cannot be read"),
        ({"quant_method": "fp8", "weight_block_size": [0, 4]}, "weight_block_size"),
        ({"quant_method": "fp8", "weight_block_size": [4]}, "weight_block_size"),
    ],
)
def test_methods_that_are_not_read(how: dict[str, Any], told: str) -> None:
    with pytest.raises(ValueError, match=told):
        dequantised(Tensors({}), {"quantization_config": how})


def test_what_a_configuration_asks_for() -> None:
    weight, scale = stored((8, 8), (4, 4))
    source = Tensors({"w": weight, "w_scale_inv": scale})
    assert dequantised(source, {}) is source
    made = dequantised(source, {"quantization_config": {"quant_method": "fp8", "weight_block_size": [4, 4]}})
    assert made.get("w").tolist() == by_hand(weight, scale, (4, 4))
