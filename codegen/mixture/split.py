"""Weights of experts below each other, taken apart: the canonical parts of one of them."""

from __future__ import annotations

from dataclasses import replace

import torch

from ..by_row import take_rows
from ..problem import EXPERTS, Parts, Problem

SHARED = ("gain", "shift", "router", "correction", "columns")


def one(problem: Problem) -> Problem:
    """The linear of a single expert, without what lies around the layer."""
    count = problem.experts
    alone = problem.without("norm", "centred", "eps", "residual", "kept", *EXPERTS)
    return replace(alone, N=problem.N // count)


def part_of(problem: Problem, parts: Parts, expert: int) -> Parts:
    """Canonical parts of one expert's linear, of those of all."""
    rows = problem.N // problem.experts
    own = {role: t for role, t in parts.items() if role not in SHARED}
    return take_rows(problem, own, torch.arange(expert * rows, (expert + 1) * rows))[1]
