"""A placed mixture: two kernels over packed tensors of all experts, as a call and as a torch op.

`Runner`s call them directly; in a graph that is to be exported, compiled or packed by torch the
same call is `torch.ops.llmc.placed_mixture`, which has a fake kernel.
"""

from __future__ import annotations

import functools
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch._compile import _disable_dynamo

from ...compiler.ir.errors import UsageError, nearest
from .. import cpu as cpu_kernels
from ..kernels import row as row_named
from ..placed import read_problem, write_problem
from ..prepack import SIDES, Packed
from ..problem import Problem
from . import cpu

UP, DOWN = "up.", "down."
BROUGHT: tuple[str, ...] = ("residual", "index", "weight")
Given = Mapping[str, torch.Tensor]
Call = Callable[[torch.Tensor, Given, Given], torch.Tensor]
"""(x [T, H], what else is brought by name, packed tensors by name) -> y [T, O]."""


@dataclass(frozen=True)
class MixtureCall:
    """`llmc.fused` of a placed mixture: x, what else a call brings, then packed tensors.

    Attributes:
        kernels, problems: of gate and up, and of down.
        names: of the inputs in order: x, residual, index, weight, then tensors with a prefix.
        flat: whether y has a row for each token; else it is shaped as the residual, or as x.
    """

    target: str
    kernels: tuple[str, str]
    problems: tuple[Problem, Problem]
    names: tuple[str, ...]
    flat: bool

    def __call__(self, inputs: Sequence[torch.Tensor], *, body: str = "") -> torch.Tensor:
        given = dict(zip(self.names, inputs, strict=True))
        brought = {n: given.pop(n) for n in BROUGHT if n in given}
        return _shaped(self._call, given.pop("x"), brought, given, self.flat)

    @functools.cached_property
    def _call(self) -> Call:
        return resolve(self.target, self.kernels, tuple(map(write_problem, self.problems)), True)

    @property
    def op(self) -> Any:
        """The registered op that computes the same."""
        return torch.ops.llmc.placed_mixture.default

    def as_op(self, inputs: Sequence[Any]) -> tuple[tuple[Any, ...], dict[str, Any]]:
        """Arguments of the op for the inputs of the node."""
        given = dict(zip(self.names, inputs, strict=True))
        x, *brought = (given.pop(n, None) for n in ("x", "residual", "index", "weight"))
        how = {
            "target": self.target, "by": list(self.kernels), "names": list(given),
            "problems": [write_problem(p) for p in self.problems], "flat": self.flat,
        }  # fmt: skip
        return (x, *brought, list(given.values())), how


def _shaped(
    call: Call, x: torch.Tensor, brought: Given, tensors: Given, flat: bool
) -> torch.Tensor:
    residual = brought.get("residual")
    lead = x.shape[:-1] if residual is None else residual.shape[:-1]
    rows = {n: t.reshape(-1, t.shape[-1]) for n, t in brought.items()}
    y = call(x.reshape(-1, x.shape[-1]), rows, tensors)
    return y if flat and residual is None else y.reshape(*lead, y.shape[-1])


def resolve(target: str, kernels: tuple[str, ...], problems: tuple[str, ...], keep: bool) -> Call:
    """The call of two kernels by their names; UsageError where there is none of a name.

    keep: hold on to what is made of the tensors, for the next call.
    """
    up, down = (read_problem(p) for p in problems)
    if target == "triton":
        return OnTriton(kernels, up, down, keep)
    if target != "cpu":
        raise UsageError(f"expected target cpu or triton, found {target!r}")
    return OnCpu(kernels, up, down, keep)


class OnTriton:
    """Two kernel rows over prepacked tensors, which route by themselves or are told."""

    def __init__(self, kernels: tuple[str, ...], up: Problem, down: Problem, keep: bool) -> None:
        self.rows, self.problems, self.keep = [row_named(k) for k in kernels], (up, down), keep
        self._last: tuple[Packed, Packed] | None = None

    def __call__(self, x: torch.Tensor, brought: Given, tensors: Given) -> torch.Tensor:
        from .launch import fused_mixture

        both = self._last
        if both is None or not _holds(both, tensors):
            both = self._packed(0, UP, tensors), self._packed(1, DOWN, tensors)
            self._last = both if self.keep else None
        given: dict[str, Any] = {n: t.contiguous() for n, t in brought.items()}
        y: torch.Tensor = fused_mixture(*both, x.contiguous(), **given)
        return y

    def _packed(self, at: int, prefix: str, tensors: Given) -> Packed:
        mine = {n.removeprefix(prefix): t for n, t in tensors.items() if n.startswith(prefix)}
        sides = {n: mine.pop(n) for n in SIDES if n in mine}
        return Packed(self.rows[at], self.problems[at], mine, sides)


def _holds(both: tuple[Packed, Packed], tensors: Given) -> bool:
    held = {
        prefix + name: t
        for prefix, p in zip((UP, DOWN), both, strict=True)
        for name, t in {**p.tensors, **p.sides}.items()
    }
    return held.keys() == tensors.keys() and all(held[n] is t for n, t in tensors.items())


class OnCpu:
    """Each chosen expert's linears by CPU kernels; index and weight are told."""

    def __init__(self, kernels: tuple[str, ...], up: Problem, down: Problem, keep: bool) -> None:
        self.products = [
            cpu.Product(_cpu_kernel(n), p) for n, p in zip(kernels, (up, down), strict=True)
        ]
        self.count, self.keep = up.experts, keep
        self._last: tuple[dict[str, torch.Tensor], list[cpu.Linear]] | None = None

    def __call__(self, x: torch.Tensor, brought: Given, tensors: Given) -> torch.Tensor:
        held = self._last
        same = held is not None and all(held[0].get(n) is t for n, t in tensors.items())
        if held is None or not same:
            held = dict(tensors), [
                product.over({
                    n.removeprefix(prefix): t for n, t in tensors.items() if n.startswith(prefix)
                })
                for product, prefix in zip(self.products, (UP, DOWN), strict=True)
            ]  # fmt: skip
            self._last = held if self.keep else None
        up, down = held[1]
        y = cpu.call(up, down, x, brought["index"], brought["weight"], self.count)
        return y if "residual" not in brought else y + brought["residual"]


def _cpu_kernel(name: str) -> cpu_kernels.CpuKernel:
    names = [k.name for k in cpu_kernels.KERNELS]
    found = next((k for k in cpu_kernels.KERNELS if k.name == name), None)
    if found is None:
        raise UsageError(f"no CPU kernel {name!r}", hint=nearest(name, names))
    return found


_LIBRARY = torch.library.Library("llmc", "FRAGMENT")
_LIBRARY.define(
    "placed_mixture(Tensor x, Tensor? residual, Tensor? index, Tensor? weight, Tensor[] tensors, "
    "*, str target, str[] by, str[] problems, str[] names, bool flat) -> Tensor"
)


@functools.lru_cache(256)
def _resolved(target: str, by: tuple[str, ...], problems: tuple[str, ...]) -> Call:
    return resolve(target, by, problems, False)


def _placed(
    x: torch.Tensor, residual: torch.Tensor | None, index: torch.Tensor | None,
    weight: torch.Tensor | None, tensors: Sequence[torch.Tensor], *, target: str,
    by: Sequence[str], problems: Sequence[str], names: Sequence[str], flat: bool,
) -> torch.Tensor:  # fmt: skip
    every = {"residual": residual, "index": index, "weight": weight}
    brought = {n: t for n, t in every.items() if t is not None}
    packed = dict(zip(names, tensors, strict=True))
    call = _resolved(target, tuple(by), tuple(problems))
    # What a fake kernel says of strides must hold, and no op gives back what it was given.
    return _shaped(call, x, brought, packed, flat).contiguous()


def _fake(
    x: torch.Tensor, residual: torch.Tensor | None, *rest: Any, problems: Sequence[str],
    flat: bool, **how: Any,
) -> torch.Tensor:  # fmt: skip
    if residual is not None:
        return x.new_empty(residual.shape)
    lead = (x.numel() // x.shape[-1],) if flat else x.shape[:-1]
    return x.new_empty(*lead, read_problem(problems[1]).outputs)


_LIBRARY.impl("placed_mixture", _disable_dynamo(_placed), "CompositeExplicitAutograd")
torch.library.register_fake("llmc::placed_mixture", _fake, lib=_LIBRARY)
