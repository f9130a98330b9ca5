"""Calls of one kernel that differ in addresses alone: dispatched by Triton once, then by handle.

Triton's own dispatch binds, specialises and looks up every argument anew. A `Call` is made for one
set of what the specialisation depends on (dtypes, strides, sizes and alignment of addresses), so
the handle that its first launch compiled serves all others. A version of Triton that gives no such
handle, and the interpreter, are called the plain way each time.
"""

from __future__ import annotations

import contextlib
from collections.abc import Iterator, Sequence
from typing import Any

import torch

from ..compiler.ir.errors import ResourceError
from .counters import forget

_CPU = torch.device("cpu")
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


@contextlib.contextmanager
def compiling(function: Any) -> Iterator[None]:
    """ResourceError for what Triton's compiler or a device refuses of a kernel: a tile that takes
    more shared memory than there is, code that its assembler does not take."""
    try:
        yield
    except BaseException as error:
        forget(_CPU)  # an interpreted launch that breaks off leaves any numbers there
        kinds = {c.__name__ for c in type(error).__mro__}
        if "TritonError" not in kinds or "InterpreterError" in kinds:
            raise
        name = getattr(function, "__name__", "a kernel")
        what = " ".join(str(error).split())[:300]
        raise ResourceError(
            f"cannot compile {name} for this GPU: {what}", hint="use target cpu or reference"
        ) from error


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
        # Asked once: no launch of a step pays for a choice among devices where there is none.
        self.alone = device.type != "cuda" or torch.cuda.device_count() == 1

    def __call__(self, tensors: Sequence[torch.Tensor | None]) -> None:
        """Launch on the current stream of the tensors' device."""
        if self.handle is not None and self.alone:
            self.handle(*tensors, *self.tail)
            return
        with on(self.device):
            if self.handle is not None:
                self.handle(*tensors, *self.tail)
                return
            with compiling(self.function):
                kernel = self.function[self.grid](*tensors, *self.tail, **self.options)
            if hasattr(kernel, "__getitem__"):
                self.handle = kernel[self.grid]
