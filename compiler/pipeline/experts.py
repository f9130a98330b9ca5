"""Stacked weights of experts: one Hessian and one solve per expert, one scheme for all of them.

A weight [E, R, C] is handled as the matrix [E·R, C], for rows are independent of each other in
every grid and mask that is let through here. Each expert is solved on the tokens that calibration
sent to it. One that saw none keeps the plain answer, and the record says so.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator
from dataclasses import fields, replace
from functools import partial
from typing import TYPE_CHECKING, Any, NamedTuple

import torch
from torch import Tensor, fx

from ..analysis.linears import LinearSite
from ..ir.graph import Program
from ..ir.levels import WIDTHS
from ..ir.ops.semantic import experts
from ..ir.scheme import Codes, Scheme
from ..solvers import NO_HESSIAN, Factor, Solution, prepare
from ..solvers.double import ROWS, BilevelScales
from ..solvers.grid import Fit
from ..solvers.loss import exact_rows
from .base import Precondition
from .measure import check_finite
from .statistics import Collection, Gram

if TYPE_CHECKING:
    from .plan import Decision

# ** what a pass may ask for **

APART = ("uniform", "lut", "signs", "pairs", *WIDTHS)
"""Grids of which each row stores its own part."""


def _rows_apart(made: Any, site: LinearSite) -> str | None:
    codes: Codes | None = made.facts(site).get("codes") if site.stacked else None
    if codes is None:
        return None
    rows = site.out_features // site.experts
    if codes.grid not in APART:
        return f"experts are solved one by one, and {codes.short} has one table for all their rows"
    if codes.double:
        return "experts are solved one by one, and 8-bit scales have one mean for all their rows"
    if codes.bilevel and rows % ROWS:
        return f"{ROWS} rows share a range of scales, and experts have {rows} each"
    return None


def _read_plain(made: Any, site: LinearSite) -> str | None:
    if not site.stacked:
        return None
    facts = made.facts(site)
    if not facts:
        return "experts' stacked weights take codes and zeros"
    odd = sorted(set(facts) - {"codes", "mask", "sparse"})
    sparse = facts.get("sparse")
    if sparse is not None and sparse.kind == "columns":
        odd.append("outlier columns")
    if odd:
        what = " and ".join(_WORDS.get(name, name) for name in odd)
        return f"what single experts read is no value of the graph, where {what} would go"
    return None


_WORDS = {
    "input_grid": "an input grid", "t_in": "a transform", "t_out": "one of the outputs",
    "low_rank": "low rank",
}  # fmt: skip


def _ranked_by_tokens(made: Any, site: LinearSite) -> str | None:
    if site.stacked and "allocate" in made.solving(site):
        return "an expert that few windows reach has no gradients there to be ranked by"
    return None


STACKED = (
    Precondition("rows_apart", _rows_apart),
    Precondition("read_plain", _read_plain),
    Precondition("ranked_by_tokens", _ranked_by_tokens),
)
"""What a pass must leave alone to be solved expert by expert."""


# ** statistics **


def experts_of(d: Decision) -> range:
    """The experts that one solve takes."""
    return range(d.site.experts) if d.part is None else range(*d.part)


def read_by(d: Decision) -> tuple[str, ...]:
    """Names under which statistics of what a weight reads are kept: one, or one per expert."""
    if not d.site.stacked:
        return (d.site.reads,)
    return tuple(f"{d.site.reads}.{e}" for e in experts_of(d))


def fitting(d: Decision, budget: int) -> Iterator[Decision]:
    """The decision in parts whose experts' Hessians fit the budget (one always does)."""
    one = 4 * d.site.in_features**2
    most = max(1, budget // one)
    if not (d.site.stacked and d.needs_gram) or most >= d.site.experts:
        yield d
        return
    for e in range(0, d.site.experts, most):
        yield replace(d, part=(e, min(e + most, d.site.experts)))


def hessians(d: Decision) -> int:
    """fp32 bytes of the Hessians that one solve reads."""
    return 4 * len(experts_of(d)) * d.site.in_features**2 if d.needs_gram else 0


def routed(program: Program, names: Iterable[str]) -> dict[str, set[str]]:
    """The experts calls behind names of `read_by`, with those of the names that are theirs."""
    out: dict[str, set[str]] = {}
    for name in names:
        node, dot, _ = name.partition(".")
        if dot:
            out.setdefault(program.node(node).name, set()).add(name)
    return out


def watching(node: fx.Node, stats: Collection) -> Callable[..., Tensor]:
    """An experts call that hands the statistics what each expert reads."""
    wanted = stats.values()

    def seen(expert: int, x: Tensor, inner: Tensor) -> None:
        for role, value in (("gate_up", x), ("down", inner)):
            name = f"{node.name}.{role}.{expert}"
            if name in wanted:
                check_finite(node, value)
                stats.update(name, value)

    return partial(experts, seen=seen)


# ** solving **


class Given(NamedTuple):
    """A matrix [m, n] to solve, and what is known or decided about it; see :func:`..solvers.solve`.

    sensitivity, keep, extra: [m, n]; fit: of its rows.
    """

    weight: Tensor
    sensitivity: Tensor | None = None
    keep: Tensor | None = None
    extra: Tensor | None = None
    fit: Fit | None = None

    def rows(self, at: slice) -> Given:
        """The same of some rows. Information that is all zero is none."""
        *parts, fit = self
        weight, known, keep, extra = (None if t is None else t[at] for t in parts)
        if fit is not None:
            zero = None if fit.zero is None else fit.zero[..., at]
            fit = Fit(fit.scale[..., at], zero, fit.table)
        assert weight is not None
        known = known if known is not None and bool(known.any()) else None
        return Given(weight, known, keep, extra, fit)


class Solved(NamedTuple):
    """One expert: its solution, its tokens where measured, and tr(W H Wᵀ), the loss's weight."""

    solution: Solution
    tokens: int | None
    size: float


Answer = Callable[[Given, Factor, dict[str, Any]], Solution]
"""Solves one matrix, some of the decision's options replaced."""


def solve_stack(d: Decision, given: Given, stats: Collection, answer: Answer) -> list[Solved]:
    """Solve the experts of a decision's part, each alone on its own tokens.

    One that saw none takes the nearest codes and drops the smallest weights, and says so.
    """
    out: list[Solved] = []
    site, damp = d.site, d.options.get("damp", 0.01)
    rows, device = site.out_features // site.experts, given.weight.device
    for e in experts_of(d):
        gram = stats.data[f"{site.reads}.{e}", "gram"] if d.needs_gram else None
        assert gram is None or isinstance(gram, Gram)
        unseen = gram is not None and gram.tokens == 0
        value = None if gram is None else gram.value
        factor = prepare(value, damp, inputs=site.in_features, device=device)
        mine = given.rows(slice(e * rows, (e + 1) * rows))
        found = answer(mine, factor, _plain(d.options) if unseen else {})
        notes = [n for n in dict.fromkeys(found.fallbacks) if n != NO_HESSIAN]
        notes += [f"saw no tokens, {_told_plainly(d.scheme)}"] * unseen
        if given.sensitivity is not None and mine.sensitivity is None and not unseen:
            notes.append("saw no tokens of those whose gradients count, all weights count alike")
        size = 0.0 if unseen else float(exact_rows(mine.weight.t(), factor.hessian).sum())
        tokens = None if gram is None else gram.tokens
        out.append(Solved(replace(found, fallbacks=tuple(notes)), tokens, size))
    return out


def _plain(options: dict[str, Any]) -> dict[str, Any]:
    """What an expert without a Hessian is solved with; a threshold is the sweep's own."""
    solver = {} if "threshold" in options else {"grid_solver": "rtn"}
    return {**solver, "mask_solver": "magnitude", "sweeps": 0, "mask_search": False}


def _told_plainly(scheme: Scheme) -> str:
    told = ["smallest weights dropped"] * (scheme.mask is not None)
    return ", ".join(told + ["rounded to nearest"] * (scheme.codes is not None))


def joined(parts: list[Solved]) -> tuple[Solution, dict[str, Any]]:
    """The solution of the stacked matrix, and what its record tells beside it."""
    lost = sum(p.size * p.solution.loss for p in parts)
    whole = sum(p.size for p in parts)
    solution = _stacked([p.solution for p in parts])
    counts = [p.tokens for p in parts if p.tokens is not None]
    rows = [{"loss": None if p.tokens == 0 else p.solution.loss, "tokens": p.tokens} for p in parts]
    told = {"experts": rows, "tokens": sum(counts)}
    return replace(solution, loss=lost / whole if whole > 0 else 0.0), told


def _stacked(parts: list[Solution]) -> Solution:
    """Solutions of matrices that are stacked row by row; without their loss."""
    first, made = parts[0], dict[str, Any]()
    for name in (f.name for f in fields(Solution)):
        found = [getattr(p, name) for p in parts]
        if isinstance(found[0], Tensor):
            # Factors of signs are [bits, m, G]; of all else the rows come first.
            made[name] = torch.cat(found, 1 if name == "table" and found[0].ndim == 3 else 0)
        elif isinstance(found[0], BilevelScales):
            made[name] = BilevelScales(*(torch.cat(t, 1) for t in zip(*found, strict=True)))
    damp, kept = max(p.damp for p in parts), sum(p.rows_rtn for p in parts)
    return replace(first, **made, damp=damp, rows_rtn=kept, fallbacks=tuple(_told(parts)))


def _told(parts: list[Solution]) -> Iterator[str]:
    """Each fallback once, with the experts that it happened to."""
    found: dict[str, list[int]] = {}
    for e, one in enumerate(parts):
        for note in dict.fromkeys(one.fallbacks):
            found.setdefault(note, []).append(e)
    for note, at in found.items():
        yield f"expert{'s' * (len(at) > 1)} {', '.join(map(str, at))}: {note}"
