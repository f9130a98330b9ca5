"""Experts on the CPU: each one's linears as the CPU's kernels take them; the others stay untouched.

What an expert packs is stacked over experts, so a layer has no more tensors than a linear.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping

import torch

from ...compiler.ir.errors import ModelError
from .. import cpu
from ..problem import Parts, Problem
from .split import one, part_of

Tensors = dict[str, torch.Tensor]


def accept(problem: Problem) -> str | None:
    """Why torch has no CPU kernel for a single expert; None when it has one."""
    return cpu.choose(one(problem))[1] or None


def pack(kernel: cpu.CpuKernel, problem: Problem, parts: Parts) -> Tensors:
    """The tensors of all experts as `call` reads them, [E, ...].

    ModelError where experts' tensors differ in size.
    """
    single = one(problem)
    out: Tensors = {}
    for e in range(problem.experts):
        for name, tensor in cpu.pack(kernel, single, part_of(problem, parts, e)).items():
            if e == 0:
                out[name] = tensor.new_empty((problem.experts, *tensor.shape))
            if out[name].shape[1:] != tensor.shape:
                sizes = f"{list(out[name].shape[1:])} and {list(tensor.shape)}"
                raise ModelError(f"expected experts of one size, found {name} of {sizes}")
            out[name][e] = tensor
    return out


Linear = Callable[[int, torch.Tensor], torch.Tensor]
"""(expert, x [n, K]) -> y [n, outputs]."""


class Product:
    """A product of single experts, by one kernel over tensors that `pack` made."""

    def __init__(self, kernel: cpu.CpuKernel, problem: Problem) -> None:
        self.kernel, self.problem = kernel, one(problem)
        self.choice = cpu.ways_by_tokens(kernel, self.problem)

    def over(self, tensors: Mapping[str, torch.Tensor]) -> Linear:
        """The product over some tensors, whose parts of an expert are cut out once."""
        views: dict[int, Tensors] = {}

        def run(expert: int, x: torch.Tensor) -> torch.Tensor:
            held = views.get(expert)
            if held is None:
                held = views[expert] = {name: t[expert] for name, t in tensors.items()}
            return cpu.call(self.kernel, self.problem, held, x, None, self.choice)

        return run


def call(
    up: Linear, down: Linear, x: torch.Tensor, index: torch.Tensor, weight: torch.Tensor, count: int
) -> torch.Tensor:
    """y [T, O] of x [T, H], with index and weight [T, k]: tokens in the order of their experts."""
    tokens, chosen = index.shape
    if not tokens:
        return up(0, x).new_empty(0, down(0, up(0, x)).shape[1])
    flat = index.reshape(-1)
    order = flat.argsort(stable=True)
    given = x[order // chosen] if tokens > 1 else x.expand(chosen, -1)
    at, parts = 0, []
    for expert, many in enumerate(torch.bincount(flat, minlength=count).tolist()):
        if many:
            parts.append(down(expert, up(expert, given[at : at + many])))
            at += many
    found = torch.cat(parts)
    y = torch.empty_like(found)
    y[order] = found
    return torch.einsum("tko,tk->to", y.view(tokens, chosen, -1), weight.to(y.dtype))
