"""What stands behind a product that is mixed back, section by section, as its templates read it."""

from __future__ import annotations

import re
from itertools import groupby
from typing import Any

import torch

from .mixing import mixing
from .problem import Problem

MOST_ENDERS = 64


def terms(problem: Problem) -> dict[str, Any]:
    """What a template must know of all that is behind a product that is mixed back; else nothing.

    Sections of one width that follow each other are one group.
    """
    if not problem.out_mixed:
        return {}
    groups, start, shift = [], 0, 0
    for width, some in groupby(problem.out_sections):
        count, found = len(list(some)), mixing(width)
        assert found is not None
        one = found.terms()
        one["blocks"] = one["run"] // one["columns"]
        one["tiles"] = -(-count * width // (one["tile"] * one["wide"]))
        groups.append({**one, "start": start, "count": count, "shift": shift})
        start, shift = start + count * width, shift + one["tiles"]
    kept = {n: getattr(problem, n) for n in ("bias", "residual", "pairs", "out_norm", "outputs")}
    twice = any(g["rest"] > 1 for g in groups)
    return {**kept, "rows": problem.N, "groups": groups, "twice": twice}


def enders(problem: Problem, BM: int, columns: int, room: int) -> int:
    """How many programs of a block of BM tokens mix, a power of two: no more than come, than have
    something to do, and than `room`."""
    jobs = BM * sum(g["tiles"] for g in terms(problem)["groups"])
    hands = max(1, min(jobs, columns, room, MOST_ENDERS))
    return 1 << (hands.bit_length() - 1)


def units_of(problem: Problem) -> torch.Tensor:
    """[N], fp64: what a kernel's sums with signs lack, 1 / sqrt(width) of each section."""
    widths = torch.tensor(problem.out_sections)
    return torch.repeat_interleave(widths.double().rsqrt(), widths)


class Sections(tuple[object, ...]):
    """Choices of `out_mixed`: none, or any widths (what they must be, every row asks)."""

    def __new__(cls) -> Sections:
        return super().__new__(cls, ("", "widths of sections"))

    def __contains__(self, text: object) -> bool:
        return text == "" or bool(re.fullmatch(r"[1-9]\d*( [1-9]\d*)*", str(text)))
