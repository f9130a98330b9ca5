"""Calls of one kernel that differ in addresses alone: dispatched by Triton once, then by handle.

Triton's own dispatch binds, specialises and looks up every argument anew. A `Call` is made for one
set of what the specialisation depends on (dtypes, strides, sizes and alignment of addresses), so
the handle that its first launch compiled serves all others. A version of Triton that gives no such
handle, and the interpreter, are called the plain way each time.
"""

from __future__ import annotations

import contextlib
from collections.abc import Sequence
from typing import Any

import torch

ALIGNED = 16  # bytes to which Triton specialises addresses
Kind = tuple[torch.dtype, bool] | None


def kind(tensor: torch.Tensor | None) -> Kind:
    """What the compiled code depends on: dtype, and whether the address is a multiple of 16."""
    return None if tensor is None else (tensor.dtype, tensor.data_ptr() % ALIGNED == 0)


def on(device: torch.device) -> contextlib.AbstractContextManager[Any]:
    """Where Triton launches on ``device``: it takes the current one, wherever its tensors lie."""
    if device.type != "cuda" or device.index == torch.cuda.current_device():
        return contextlib.nullcontext()
    return torch.cuda.device(device)


class Call:
    """One launch but for its tensors.

    Args:
        function: Triton's jit function. grid: programs, three numbers. tail: what follows the
            tensors in its signature, compile-time constants too. options: of the compiler.
            device: that of its tensors.
    """

    def __init__(
        self, function: Any, grid: tuple[int, ...], tail: Sequence[Any], options: dict[str, int],
        device: torch.device,
    ) -> None:  # fmt: skip
        self.function, self.grid, self.device = function, (*grid, 1, 1)[:3], device
        self.tail, self.options = tuple(tail), options
        self.handle: Any = None

    def __call__(self, tensors: Sequence[torch.Tensor | None]) -> None:
        """Launch on the current stream of the tensors' device."""
        with on(self.device):
            if self.handle is not None:
                self.handle(*tensors, *self.tail)
                return
            kernel = self.function[self.grid](*tensors, *self.tail, **self.options)
            if hasattr(kernel, "__getitem__"):
                self.handle = kernel[self.grid]
