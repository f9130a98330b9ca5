"""Some rows of a weight: every canonical part that has a row of its own for each of them."""

from __future__ import annotations

import dataclasses

import torch

from ..compiler.ir import packing
from .problem import Parts, Problem

# Parts that have rows in each of their planes.
BY_PLANE = ("signs", "factors")
# Parts with a row of their own for each output feature.
_BY_ROW = ("codes", "scale", "zero", "meta", "bitmap", "left", "column_weights", "bias",
           "left_codes", "left_scale", "left_zero")  # fmt: skip


def order_rows(problem: Problem, parts: Parts) -> tuple[Problem, Parts]:
    """The parts as a kernel that joins rows in pairs reads them: eight rows of the first half
    before their eight of the second, so that one thread holds both of a pair.

    N grows to whole blocks of 16; rows that fill up repeat the last one and are never stored.
    """
    if not problem.pairs or problem.out_mixed:  # which mixes rows in their own order
        return problem, parts
    rows = problem.N // (problem.experts or 1)
    half = rows // 2
    at = torch.arange(-(-half // 8) * 8).clamp(max=half - 1).reshape(-1, 1, 8)
    order = (at + torch.tensor([[0], [half]])).flatten()
    if problem.experts:  # each of them by itself
        order = (order + rows * torch.arange(problem.experts)[:, None]).flatten()
    return take_rows(problem, parts, order)


def take_rows(problem: Problem, parts: Parts, order: torch.Tensor) -> tuple[Problem, Parts]:
    """The problem of some rows of W, by their numbers, and its parts."""
    moved = dict(parts)
    for name in _BY_ROW:
        if name in parts:
            moved[name] = parts[name][order.to(parts[name].device)]
    for name in BY_PLANE:
        if name in parts:
            moved[name] = parts[name][:, order.to(parts[name].device)]
    if "table" in parts and len(parts["table"]) == problem.N:
        moved["table"] = parts["table"][order.to(parts["table"].device)]
    if "values" in parts and not problem.bitmap:
        moved["values"] = parts["values"][order.to(parts["values"].device)]
    elif "values" in parts:
        kept = packing.unpack(parts["bitmap"], 1, problem.K).sum(1)
        moved["values"] = parts["values"][_runs(kept, order)]
    if "csr_starts" in parts:
        entries = parts["csr_starts"].diff()
        taken = _runs(entries, order)
        moved["csr_values"] = parts["csr_values"][taken]
        moved["csr_index"] = parts["csr_index"][taken]
        starts = entries[order.to(entries.device)].cumsum(0)
        moved["csr_starts"] = torch.nn.functional.pad(starts, (1, 0)).to(parts["csr_starts"].dtype)
    return dataclasses.replace(problem, N=len(order)), moved


def _runs(lengths: torch.Tensor, order: torch.Tensor) -> torch.Tensor:
    """Where the elements of runs of those lengths lie, run after run in the given order."""
    order = order.to(lengths.device)
    ends = lengths.cumsum(0)
    wanted = lengths[order]
    offset = torch.repeat_interleave(ends[order] - wanted - (wanted.cumsum(0) - wanted), wanted)
    return torch.arange(len(offset), device=lengths.device) + offset
