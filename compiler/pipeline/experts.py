"""Stacked weights of experts: one Hessian and one solve per expert, one scheme for all of them.

A weight [E, R, C] is handled as the matrix [E·R, C], for rows are independent of each other in
every grid and mask that is let through here. Each expert is solved on the tokens that calibration
sent to it. One that saw none keeps the plain answer, and the record says so.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass, fields, replace
from functools import partial
from typing import Any

import torch
from torch import Tensor, fx

from ..analysis.linears import LinearSite
from ..ir.graph import Program
from ..ir.levels import WIDTHS
from ..ir.ops.semantic import experts
from ..ir.scheme import Codes
from ..solvers import NO_HESSIAN, Factor, Solution, prepare, solve
from ..solvers.double import ROWS, BilevelScales
from ..solvers.grid import Fit
from ..solvers.loss import exact_rows
from .base import Precondition
from .measure import check_finite
from .statistics import Collection, Gram

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


def read_by(site: LinearSite) -> tuple[str, ...]:
    """Names under which statistics of what a weight reads are kept: one, or one per expert."""
    if not site.stacked:
        return (site.reads,)
    return tuple(f"{site.reads}.{e}" for e in range(site.experts))


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


@dataclass(frozen=True)
class Stack:
    """The Gram matrices of a weight's experts, None where one is not asked for or saw no tokens.

    counts: tokens of each expert; empty where nothing was measured.
    """

    experts: int
    rows: int
    inputs: int
    grams: tuple[Tensor | None, ...]
    counts: tuple[int, ...]
    damp: float

    @property
    def diagonal(self) -> Tensor:
        """diag(XᵀX) of each row's expert, [E·R, n]; 0 where it saw no tokens."""
        like = next((g for g in self.grams if g is not None), torch.zeros(1, 1))
        none = like.new_zeros(self.inputs)
        found = [none if g is None else g.diagonal() for g in self.grams]
        return torch.stack(found).repeat_interleave(self.rows, 0)

    @property
    def tokens(self) -> int:
        return sum(self.counts)

    def unseen(self, expert: int) -> bool:
        """Whether calibration sent no token to an expert."""
        return bool(self.counts) and self.counts[expert] == 0

    def factor(self, expert: int, device: torch.device) -> Factor:
        return prepare(self.grams[expert], self.damp, inputs=self.inputs, device=device)


def stack_of(site: LinearSite, stats: Collection, needed: bool, damp: float) -> Stack:
    """What calibration says about each expert of a site."""
    grams: list[Tensor | None] = [None] * site.experts
    counts: list[int] = []
    for e, name in enumerate(read_by(site) if needed else ()):
        gram = stats.data[name, "gram"]
        assert isinstance(gram, Gram)
        grams[e] = gram.value
        counts.append(gram.tokens)
    rows = site.out_features // site.experts
    return Stack(site.experts, rows, site.in_features, tuple(grams), tuple(counts), damp)


def solve_stack(
    weight: Tensor, *, factor: Stack, keep: Tensor | None, extra: Tensor | None,
    sensitivity: Tensor | None, fit: Fit | None, **how: Any,
) -> tuple[Solution, list[dict[str, Any]]]:  # fmt: skip
    """Solve each expert of [E·R, n] alone, by :func:`~..solvers.solve`; and a record of each.

    An expert that saw no tokens takes the nearest codes and drops the smallest weights.
    """
    rows = factor.rows
    parts: list[Solution] = []
    records: list[dict[str, Any]] = []
    whole = lost = 0.0
    for e in range(factor.experts):
        at = slice(e * rows, (e + 1) * rows)
        mine, unseen = weight[at], factor.unseen(e)
        known = None if sensitivity is None else sensitivity[at]
        own = factor.factor(e, weight.device)
        one = solve(
            mine, factor=own, keep=None if keep is None else keep[at],
            extra=None if extra is None else extra[at],
            sensitivity=None if known is None or not bool(known.any()) else known,
            fit=None if fit is None else _columns(fit, at),
            **(how | (_plain(how) if unseen else {})),
        )  # fmt: skip
        size = 0.0 if unseen else float(exact_rows(mine.t(), own.hessian).sum())
        whole, lost = whole + size, lost + size * one.loss
        notes = [n for n in one.fallbacks if n != NO_HESSIAN]
        notes += [f"saw no tokens, {_done(how)}"] * unseen
        seen = {"tokens": factor.counts[e]} if factor.counts else {}
        records.append({**seen, "loss": None if unseen else one.loss, "fallbacks": notes})
        parts.append(replace(one, fallbacks=tuple(notes)))
    return replace(_joined(parts), loss=lost / whole if whole > 0 else 0.0), records


def _plain(how: dict[str, Any]) -> dict[str, Any]:
    """What an expert without a Hessian is solved with; a threshold is the sweep's own."""
    solver = "rtn" if how.get("threshold") is None else how["grid_solver"]
    return {"grid_solver": solver, "mask_solver": "magnitude", "sweeps": 0, "mask_search": False}


def _done(how: dict[str, Any]) -> str:
    told = ["smallest weights dropped"] * (how["mask"] is not None)
    return ", ".join(told + ["rounded to nearest"] * (how["grid"] is not None)) or "kept"


def _columns(fit: Fit, at: slice) -> Fit:
    """The fit of some rows of the matrix."""
    zero = None if fit.zero is None else fit.zero[..., at]
    return Fit(fit.scale[..., at], zero, fit.table)


def _joined(parts: list[Solution]) -> Solution:
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
