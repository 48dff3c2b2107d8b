"""Comparisons with other libraries in float64, whatever they say of float32."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

import pytest
import torch
from torch import Tensor


@contextmanager
def doubled(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """Makes whatever says float32 mean float64: norms, softmaxes and tables of both sides."""
    before = torch.get_default_dtype()
    with monkeypatch.context() as patch:
        patch.setattr(torch, "float32", torch.float64)
        patch.setattr(torch, "float", torch.float64)
        patch.setattr(Tensor, "float", Tensor.double)
        torch.set_default_dtype(torch.float64)
        try:
            yield
        finally:
            torch.set_default_dtype(before)
