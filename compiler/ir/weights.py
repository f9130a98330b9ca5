"""Weights seen through a cut: kept indices of some axes, selected when a tensor is read."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

import torch

from .graph import Weights


@dataclass(frozen=True)
class CutWeights:
    """Another source of weights with parts of some tensors left out; nothing is read before.

    Attributes:
        base: where the whole tensors come from.
        kept: by parameter name and axis, int64 ascending indices that stay.
    """

    base: Weights
    kept: Mapping[str, Mapping[int, torch.Tensor]]

    def load(self, name: str) -> torch.Tensor:
        tensor = self.base.load(name)
        for axis, index in self.kept.get(name, {}).items():
            tensor = tensor.index_select(axis, index.to(tensor.device))
        return tensor
