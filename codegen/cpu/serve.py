"""A whole fused linear on a CPU kernel: what surrounds the product, in the order of `meaning`."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import replace

import torch

from ...compiler.ir.ops.semantic import activation, gated
from ...compiler.ir.ops.sparse import csr_linear
from ..meaning import normed, rounded
from ..problem import Parts, Problem
from ..sparse import csr_linear as mkl_csr_linear
from .kernel import CpuKernel, Tensors
from .table import Choice, ways_by_tokens

# Parts that a call reads as they are stored.
SIDES = (
    "bias", "gain", "shift", "smooth", "in_scale", "left", "right", "columns",
    "column_weights", "csr_values", "csr_index", "csr_starts",
)  # fmt: skip


def pack(kernel: CpuKernel, problem: Problem, parts: Parts) -> Tensors:
    """The tensors of a fused linear as `call` reads them: the weight's, and those beside it."""
    beside = {name: parts[name] for name in SIDES if name in parts}
    return beside | kernel.pack(problem, parts)


def call(
    kernel: CpuKernel,
    problem: Problem,
    packed: Mapping[str, torch.Tensor],
    x: torch.Tensor,
    residual: torch.Tensor | None = None,
    choice: Choice | None = None,
) -> torch.Tensor:
    """y [..., outputs] of x [..., K] and residual [..., outputs], in x's dtype."""
    shape, dtype = (*x.shape[:-1], problem.outputs), x.dtype
    h = x.reshape(-1, problem.K)
    if not len(h):
        return x.new_empty(shape)
    if problem.norm:
        h = normed(problem, packed, h)
    if problem.smooth:
        h = h * packed["smooth"].to(dtype)
    apart = None
    if problem.outliers:
        columns = packed["columns"].long()
        apart = h[:, columns] @ packed["column_weights"].to(dtype).t()
        h = h.index_fill(1, columns, 0.0)
    # Only a kernel of integers needs no floats on the grid; low rank and rows beside it do.
    beside = bool((problem.rank and problem.weights != "factors") or problem.sparse)
    given = h
    if problem.rounds and (beside or not kernel.grid):
        given = rounded(problem, packed, h)
        h = h if kernel.grid else given
    way = (choice or ways_by_tokens(kernel, problem)).at(len(h))
    y = kernel.ways[way](problem, h, packed).to(dtype)
    if apart is not None:
        y = y + apart
    if problem.rank and problem.weights != "factors":
        low = torch.nn.functional.linear(given, packed["right"].to(dtype))
        y = torch.addmm(y, low, packed["left"].to(dtype).t())
    if problem.sparse:
        add = mkl_csr_linear if torch.backends.mkl.is_available() else csr_linear
        rows = packed["csr_values"].to(dtype), packed["csr_index"], packed["csr_starts"]
        y = add(y, given, *rows)
    if problem.bias:
        y = y + packed["bias"].to(dtype)
    if problem.pairs == "gate":
        if y.shape[1] != problem.outputs:  # else the way has joined them
            gate, up = y.split(problem.outputs, -1)
            y = gated(gate, up, act=problem.act)
    elif problem.act:
        y = activation(y, act=problem.act)
    y = y.reshape(shape)
    return y if residual is None else y + residual


def implementation(
    kernel: CpuKernel, problem: Problem, packed: Mapping[str, torch.Tensor]
) -> Callable[..., torch.Tensor]:
    """(x, residual) -> y over packed tensors; which way is taken is looked up once."""
    choice = ways_by_tokens(kernel, problem)

    def run(x: torch.Tensor, residual: torch.Tensor | None = None) -> torch.Tensor:
        return call(kernel, problem, packed, x, residual, choice)

    return run


def with_limit(problem: Problem, limit: float) -> Problem:
    """The problem with the number of its input's limit in its words."""
    if not limit or "limit=" in problem.rounded:
        return problem
    words = problem.rounded.removesuffix(" limit")
    return replace(problem, rounded=f"{words} limit={limit!r}")
