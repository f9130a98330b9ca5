"""Where a captured parameter's tensor comes from: lazily loaded, stacked or transposed."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field, replace

import torch

from ..ir.errors import ModelError

Load = Callable[[], torch.Tensor]


@dataclass(eq=False)
class Leaf:
    """One stored tensor behind a graph input. Equal storage is one object: ties go by identity.

    Attributes:
        names: every name under which the model knows the tensor.
        shape, dtype: as stored.
        load: reads it.
        trained: a parameter, not a buffer.
        keep: stays in its stored dtype at run time.
        in_memory: loading costs nothing.
    """

    names: tuple[str, ...]
    shape: tuple[int, ...]
    dtype: torch.dtype
    load: Load
    trained: bool = True
    keep: bool = False
    in_memory: bool = False


@dataclass
class LeafWeights:
    """The weights of a captured program by parameter name; nothing is read before ``load``.

    Attributes:
        loads: how many tensors were read so far.
    """

    leaves: dict[str, Leaf] = field(default_factory=dict)
    loads: int = 0

    def load(self, name: str) -> torch.Tensor:
        leaf = self.leaves.get(name)
        if leaf is None:
            raise ModelError(f"expected a parameter named {name!r}, found none")
        self.loads += 1
        return leaf.load()


def constant(name: str, tensor: torch.Tensor) -> Leaf:
    """A leaf for a tensor in memory that no checkpoint holds, e.g. rotary frequencies."""
    kept = tensor.detach()
    return Leaf(
        (name,), tuple(kept.shape), kept.dtype, lambda: kept, trained=False, keep=True,
        in_memory=True,
    )  # fmt: skip


def transposed(leaf: Leaf) -> Leaf:
    """The leaf [a, b] read as [b, a]; the bytes stay as they are."""
    return replace(leaf, shape=leaf.shape[::-1], load=lambda: leaf.load().t())
