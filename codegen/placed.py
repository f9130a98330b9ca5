"""A placed node: a fused op over tensors in a kernel's own layout, as a call and as a torch op.

`Runner`s call the kernel directly. Where a graph is to be exported, compiled or packed by torch,
the same call is `torch.ops.llmc.placed`, which has a fake kernel: what it computes stands in its
attributes, so that nothing but tensors flows.
"""

from __future__ import annotations

import functools
import json
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass
from typing import Any

import torch
from torch._compile import _disable_dynamo

from ..compiler.ir.errors import UsageError, nearest
from . import cpu
from .kernels import row as row_named
from .prepack import SIDES, Packed
from .problem import DEFAULTS, Problem

Call = Callable[[torch.Tensor, "torch.Tensor | None", dict[str, torch.Tensor]], torch.Tensor]
"""(x, what is added or None, packed tensors by name) -> y."""


@dataclass(frozen=True)
class Implementation:
    """`llmc.fused` of a placed node: its inputs are x, what is added, then packed tensors.

    names: of the inputs, in order.
    """

    target: str
    kernel: str
    problem: Problem
    names: tuple[str, ...]

    def __call__(self, inputs: Sequence[torch.Tensor], *, body: str = "") -> torch.Tensor:
        given = dict(zip(self.names, inputs, strict=True))
        return self._call(given.pop("x"), given.pop("residual", None), given)

    @functools.cached_property
    def _call(self) -> Call:
        if self.target == "triton":
            return OnTriton(self.kernel, self.problem, True)
        return resolve(self.target, self.kernel, write_problem(self.problem))

    @property
    def op(self) -> Any:
        """The registered op that computes the same."""
        return torch.ops.llmc.placed.default

    def as_op(self, inputs: Sequence[Any]) -> tuple[tuple[Any, ...], dict[str, Any]]:
        """Arguments of `torch.ops.llmc.placed` for the inputs of the node."""
        given = dict(zip(self.names, inputs, strict=True))
        x, residual = given.pop("x"), given.pop("residual", None)
        how = {"target": self.target, "by": self.kernel, "names": list(given)}
        how["problem"] = write_problem(self.problem)
        return (x, residual, list(given.values())), how


@dataclass(frozen=True)
class OwnCall(Implementation):
    """One whose call holds what no graph can, such as compiled code; as an op it is plain."""

    own: Call

    def __call__(self, inputs: Sequence[torch.Tensor], *, body: str = "") -> torch.Tensor:
        given = dict(zip(self.names, inputs, strict=True))
        return self.own(given.pop("x"), given.pop("residual", None), given)


def write_problem(problem: Problem) -> str:
    """A problem as JSON, without what stands at its default."""
    found = asdict(problem).items()
    return json.dumps({k: v for k, v in found if k in ("N", "K") or v != DEFAULTS[k]})


@functools.lru_cache(4096)
def read_problem(text: str) -> Problem:
    """Inverse of :func:`write_problem`; UsageError on another text."""
    try:
        return Problem(**json.loads(text))
    except (ValueError, TypeError) as e:
        raise UsageError(f"expected a problem, found {text[:60]!r} ({e})") from None


@functools.lru_cache(4096)
def resolve(target: str, kernel: str, problem: str) -> Call:
    """The call of a kernel by its name; UsageError where there is none of that name."""
    wanted = read_problem(problem)
    if target == "triton":
        return OnTriton(kernel, wanted, False)
    if target != "cpu":
        raise UsageError(f"expected target cpu or triton, found {target!r}")
    names = [k.name for k in cpu.KERNELS]
    found = next((k for k in cpu.KERNELS if k.name == kernel), None)
    if found is None:
        raise UsageError(f"no CPU kernel {kernel!r}", hint=nearest(kernel, names))
    choice = cpu.ways_by_tokens(found, wanted)

    def call(
        x: torch.Tensor, residual: torch.Tensor | None, packed: dict[str, torch.Tensor]
    ) -> torch.Tensor:
        return cpu.call(found, wanted, packed, x, residual, choice)

    return call


class OnTriton:
    """A kernel row over prepacked tensors; columns of x and residual are made contiguous.

    keep: hold on to the packed weight, so that what launches keep beside it lasts.
    """

    def __init__(self, kernel: str, problem: Problem, keep: bool) -> None:
        self.row, self.problem, self.keep = row_named(kernel), problem, keep
        self._last: Packed | None = None

    def __call__(
        self, x: torch.Tensor, residual: torch.Tensor | None, tensors: dict[str, torch.Tensor]
    ) -> torch.Tensor:
        from . import launch

        packed = self._last
        if packed is None or not _holds(packed, tensors):
            sides = {n: t for n, t in tensors.items() if n in SIDES}
            held = {n: t for n, t in tensors.items() if n not in SIDES}
            packed = Packed(self.row, self.problem, held, sides)
            self._last = packed if self.keep else None
        if residual is None:
            return launch.fused_linear(packed, _columns(x))
        return launch.fused_linear(packed, _columns(x), residual=_columns(residual))


def _holds(packed: Packed, tensors: dict[str, torch.Tensor]) -> bool:
    both = {**packed.tensors, **packed.sides}
    return both.keys() == tensors.keys() and all(both[n] is t for n, t in tensors.items())


def _columns(x: torch.Tensor) -> torch.Tensor:
    return x if x.stride(-1) == 1 else x.contiguous()


_LIBRARY = torch.library.Library("llmc", "FRAGMENT")
_LIBRARY.define(
    "placed(Tensor x, Tensor? residual, Tensor[] tensors, *, str target, str by, "
    "str problem, str[] names) -> Tensor"
)


def _placed(
    x: torch.Tensor, residual: torch.Tensor | None, tensors: Sequence[torch.Tensor], *,
    target: str, by: str, problem: str, names: Sequence[str],
) -> torch.Tensor:  # fmt: skip
    packed = dict(zip(names, tensors, strict=True))
    y = resolve(target, by, problem)(x, residual, packed)
    # What a fake kernel says of strides must hold, and no op gives back what it was given.
    return y.contiguous()


def _fake(x: torch.Tensor, *rest: Any, problem: str, **how: Any) -> torch.Tensor:
    return x.new_empty(*x.shape[:-1], read_problem(problem).outputs)


_LIBRARY.impl("placed", _disable_dynamo(_placed), "CompositeExplicitAutograd")
torch.library.register_fake("llmc::placed", _fake, lib=_LIBRARY)
