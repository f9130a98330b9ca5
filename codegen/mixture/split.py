"""Weights of experts below each other, taken apart: the canonical parts of one of them."""

from __future__ import annotations

from dataclasses import replace

import torch

from ...compiler.ir import packing
from ..problem import Parts, Problem

ROWS = ("codes", "scale", "zero", "meta", "bitmap")
SHARED = ("gain", "shift", "router", "columns")


def one(problem: Problem) -> Problem:
    """The linear of a single expert, without what lies around the layer."""
    count = problem.experts
    return replace(
        problem, N=problem.N // count, kept=0, experts=0, chosen=0, routed="", route="",
        norm=False, centred=False, eps=0.0, residual=False,
    )  # fmt: skip


def part_of(problem: Problem, parts: Parts, expert: int) -> dict[str, torch.Tensor]:
    """Canonical parts of one expert's linear, of those of all: rows, or what belongs to them."""
    rows = problem.N // problem.experts
    begin, end = expert * rows, (expert + 1) * rows
    out: dict[str, torch.Tensor] = {}
    for role, value in parts.items():
        if role in SHARED:
            continue
        if role in ROWS or (role == "values" and not problem.bitmap):
            out[role] = value[begin:end]
        elif role == "table":
            out[role] = value[begin:end] if problem.table == "row" else value
        elif role == "values":
            ends = packing.unpack(parts["bitmap"], 1, problem.K).sum(1).cumsum(0).tolist()
            out[role] = value[(ends[begin - 1] if begin else 0) : ends[end - 1]]
    if "csr_starts" in parts:
        starts = parts["csr_starts"]
        first, last = int(starts[begin]), int(starts[end])
        out["csr_starts"] = starts[begin : end + 1] - first
        out |= {r: parts[r][first:last] for r in ("csr_index", "csr_values")}
    return out
