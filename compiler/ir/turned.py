"""Weights seen through a rotation: steps of linear algebra, taken when a tensor is read."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass

import torch
from torch import Tensor

from .graph import Weights
from .ops.rotation import rotate

Step = Callable[[Tensor, Weights], Tensor]
"""(tensor, the weights before any rotation) -> tensor."""


@dataclass(frozen=True)
class TurnedWeights:
    """Another source of weights, some of them turned; nothing is read before.

    Attributes:
        base: where the tensors come from.
        steps: by parameter name, in order; computed at least in fp32.
        dtypes: in which each of these tensors is given.
    """

    base: Weights
    steps: Mapping[str, tuple[Step, ...]]
    dtypes: Mapping[str, torch.dtype]

    def load(self, name: str) -> Tensor:
        tensor = self.base.load(name)
        steps = self.steps.get(name, ())
        if not steps:
            return tensor
        tensor = wide(tensor)
        for step in steps:
            tensor = step(tensor, self.base)
        return tensor.to(self.dtypes[name])


def wide(tensor: Tensor) -> Tensor:
    """At least fp32."""
    return tensor.to(torch.promote_types(torch.float32, tensor.dtype))


@dataclass(frozen=True)
class Gain:
    """Times (offset + gain) along one axis: the gain of a norm, in what reads it."""

    axis: int
    gain: str
    offset: float

    def __call__(self, tensor: Tensor, base: Weights) -> Tensor:
        gain = wide(base.load(self.gain)) + self.offset
        return (tensor.movedim(self.axis, -1) * gain.to(tensor)).movedim(-1, self.axis)


@dataclass(frozen=True)
class Product:
    """Plus W b: what the bias b of a norm gives through the matrix that reads it."""

    weight: str
    bias: str

    def __call__(self, tensor: Tensor, base: Weights) -> Tensor:
        return tensor + wide(base.load(self.weight)) @ wide(base.load(self.bias))


@dataclass(frozen=True)
class Centre:
    """Minus the mean along one axis."""

    axis: int

    def __call__(self, tensor: Tensor, base: Weights) -> Tensor:
        return tensor - tensor.mean(self.axis, keepdim=True)


@dataclass(frozen=True, eq=False)
class Rotation:
    """Each run of entries along one axis rotated (see `rotate`).

    Attributes:
        signs: [n] of ±1. index: int64 [G, n], the entries of each run; None: all, in order.
    """

    axis: int
    signs: Tensor
    index: Tensor | None = None

    def __call__(self, tensor: Tensor, base: Weights) -> Tensor:
        moved, signs = tensor.movedim(self.axis, -1), self.signs.to(tensor.device)
        if self.index is None:
            moved = rotate(moved, signs)
        else:
            index = self.index.to(tensor.device)
            turned = rotate(moved[..., index], signs).flatten(-2)
            moved = moved.index_copy(-1, index.flatten(), turned)
        return moved.movedim(-1, self.axis).contiguous()
