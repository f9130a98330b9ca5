"""What reports say of mixtures: kernels, launches, and the bytes of the experts that are chosen."""

from __future__ import annotations

from dataclasses import asdict, replace
from typing import Any

from torch import fx

from ...compiler.ir.graph import Program
from .. import cpu as cpu_kernels
from ..gains import asked
from ..kernels import choose
from ..problem import Problem
from .plan import FusedMixture
from .split import one

LAUNCHES = 2


def told(
    fused: FusedMixture, kernels: tuple[str, str], problems: tuple[Problem, Problem]
) -> dict[str, Any]:
    """What a report says of a mixture's node, kernels and problems."""
    return {
        "node": fused.node, "path": fused.path, "kernel": " + ".join(dict.fromkeys(kernels)),
        "kernels": list(kernels), "parts": list(fused.ops), "linears": list(fused.linears),
        "problem": asdict(problems[0]), "down": asdict(problems[1]),
    }  # fmt: skip


def moved_cpu(up: Problem, down: Problem, tokens: int) -> int:
    """Bytes that a call moves on the CPU, as `survey` counts those of a linear there."""
    total = 0
    for problem in (up, down):
        single, touched = one(problem), min(problem.experts, tokens * problem.chosen)
        weight = single.N * single.K * single.bits // 8 + 4 * single.N * single.groups
        total += touched * weight + 2 * tokens * problem.chosen * (single.N + single.K)
    return total


def surveyed(
    program: Program, fused: FusedMixture, target: str, tokens: int, dtype: str, bandwidth: float
) -> dict[str, Any]:
    """A row of `survey` from types alone: kernels, bytes of a call of so many tokens, floor."""
    up, down = (replace(p, x_dtype=dtype) for p in (fused.up, fused.down))
    inputs: list[fx.Node] = list(program.node(fused.node).args[0])  # type: ignore[arg-type]
    stored = sum(p.bytes for n in inputs if (p := program.param_of(n)) is not None)
    more: dict[str, Any] = {}
    if target == "cpu":
        kernels = [cpu_kernels.choose(one(p))[0] for p in (fused.up, fused.down)]
        names = [k.name for k in kernels if k is not None]
        total = moved_cpu(up, down, tokens)
        ways = [
            cpu_kernels.ways_by_tokens(k, one(p))
            for k, p in zip(kernels, (fused.up, fused.down), strict=True) if k is not None
        ]  # fmt: skip
        more = {
            "way": " + ".join(dict.fromkeys(w.at(1) for w in ways)),
            "ways": "; ".join(dict.fromkeys(map(str, ways))),
            "note": "; ".join(dict.fromkeys(k.note for k in kernels if k is not None)),
            "timed": [asdict(one(p)) for p in (up, down)],
        }
    else:
        up, down = asked(up), asked(down)
        rows = [row for row in (choose(up)[0], choose(down)[0]) if row is not None]
        names = [r.name for r in rows]
        total = sum(r.bytes_moved(p, tokens) for r, p in zip(rows, (up, down), strict=True))
        more = {"timed": []}  # tiles of experts are not measured
    return told(fused, (names[0], names[1]), (up, down)) | {
        "sections": [fused.up.N, fused.down.N], "bytes": total, "stored_bytes": stored,
        "launches": LAUNCHES, "floor_us": 1e6 * total / bandwidth, **more,
    }  # fmt: skip
