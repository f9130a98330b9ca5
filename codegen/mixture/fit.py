"""What a problem of experts must be for a kernel to serve it, and the bytes that a call moves.

A tile of weights is of one expert, so an expert's rows are whole tiles; a tile of tokens is of one
expert too, so there are more of them than tokens alone would fill.
"""

from __future__ import annotations

from dataclasses import replace
from typing import Any

from ..problem import EXPERTS, Problem
from .choice import Choice, read_choice
from .choice import unfit as choice_unfit

MOST_EXPERTS = 1024
WHOLE = 64  # rows of a prepacked tile
WORDS = 1 << 31  # 32-bit words of all experts' codes: offsets are of 32 bits
# What a kernel of experts has no place for, with what it must be.
_ALONE: dict[str, Any] = {
    "rank": 0, "sparse": False, "smooth": False, "outliers": 0, "rounds": "", "out_norm": False,
    "centred": False, "bias": False, "spans": "", "bitmap": False,
}  # fmt: skip


def among(problem: Problem) -> int:
    """Experts that tokens choose among."""
    return problem.experts - problem.always


def picked(problem: Problem) -> int:
    """Experts that a token chooses."""
    return problem.chosen - problem.always


def router_rows(problem: Problem) -> int:
    """Rows of the router: of experts that are chosen from, and of what weighs the others."""
    choice = read_choice(problem.route)
    return among(problem) + (choice is not None and choice.gated)


def unfit(problem: Problem) -> list[tuple[str, str]]:
    """Fields of a problem of experts that are not what kernels need, each with what is."""
    p, found = problem, list[tuple[str, str]]()
    if not p.routed:
        names = [n for n in ("experts", "chosen", "route", "always") if getattr(p, n)]
        return [(n, "none where it is one linear") for n in names]
    if not 1 <= p.experts <= MOST_EXPERTS:
        return [("experts", f"1 to {MOST_EXPERTS}")]
    if p.N % p.experts or p.N // p.experts % WHOLE:
        found.append(("N", f"a multiple of {WHOLE} rows for each of {p.experts} experts"))
    if p.weights != "dense" and p.N * p.columns * p.bits >= 32 * WORDS:
        found.append(("N", f"fewer than {WORDS} words of codes"))
    if not 1 <= p.chosen <= p.experts:
        found.append(("chosen", f"1 to {p.experts}, the experts"))
    elif not 0 <= p.always < p.chosen:
        found.append(("always", f"fewer than the {p.chosen} experts of a token"))
    found += [
        (n, f"{no or 'none'} among experts") for n, no in _ALONE.items() if getattr(p, n) != no
    ]
    if p.routed == "up":
        if p.pairs != "gate":
            found.append(("pairs", "gate where experts read tokens"))
        if p.residual:
            found.append(("residual", "False where experts read tokens"))
        choice = read_choice(p.route) or Choice()
        if expected := choice_unfit(choice, among(p), picked(p)):
            found.append(("route", expected))
        if choice.gated and not p.always:
            found.append(("always", "1 or more where they are weighed"))
        if p.norm and not p.route:
            found.append(("norm", "False where a kernel is told the experts"))
    else:
        for n in ("pairs", "act", "norm", "route"):
            if getattr(p, n):
                found.append((n, f"{'False' if n == 'norm' else 'none'} where experts are summed"))
    return found


def tiles(problem: Problem, M: int, BM: int) -> int:
    """Tiles of BM pairs, each of one expert, that any choice of ``M`` tokens may need."""
    pairs = M * problem.chosen
    touched = touched_experts(problem, M)
    return touched + (pairs - touched) // BM


def touched_experts(problem: Problem, M: int) -> int:
    """Experts that ``M`` tokens go to at most."""
    return min(among(problem), M * picked(problem)) + (problem.always if M else 0)


def rows_of(problem: Problem) -> int:
    """Rows of one expert."""
    return problem.N // problem.experts


def tokens_of(problem: Problem, M: int) -> int:
    """Pairs of an expert where ``M`` tokens spread evenly."""
    return -(-M * problem.chosen // problem.experts)


def touched(problem: Problem, M: int) -> Problem:
    """One linear of the rows that a call of ``M`` tokens reads at most."""
    N = rows_of(problem) * touched_experts(problem, M)
    return replace(problem.without("residual", "kept", *EXPERTS), N=N)


def around(problem: Problem, M: int) -> int:
    """Bytes of a call beside weights: tokens, router, what experts make, their weighted sum."""
    width = 4 if problem.x_dtype == "fp32" else 2
    pairs = M * problem.chosen
    if problem.routed == "up":
        router = router_rows(problem) * problem.K * (4 if problem.wide_router else width)
        router = router + 4 * among(problem) * problem.corrected if problem.route else 0
        return width * (M * problem.K + pairs * problem.outputs) + router
    sums = 8 * pairs * problem.outputs  # in fp32, written once and read once
    return width * (pairs * problem.K + M * problem.outputs * (1 + problem.residual)) + sums
