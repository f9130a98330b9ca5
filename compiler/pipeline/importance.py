"""Scores of the units of dependency groups, read from weights, statistics and gradients.

The glue between groups and :mod:`llmc.compiler.solvers.importance`: a score of each element of each
member is summed along the member's axis, gathered into units and combined over the members. Scores
that look at activations are taken where the group is read (:mod:`.readings`).
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from ..analysis.groups import Group
from ..analysis.ties import op_name
from ..ir.errors import ModelError
from ..ir.events import Listener, silent
from ..ir.graph import Program
from ..solvers import importance as score
from .measure import Options
from .readings import Reading, fitting, measured, readings
from .reverse import gradients

METHODS = ("flap", "taylor", "obs", "wanda", "michel", "magnitude", "random")
ACTIVATIONS = ("flap", "obs", "wanda", "michel")
"""Methods that look at the inputs of the matrices that read a group."""
GRADIENTS = ("taylor", "michel")
ADDITIVE = ("taylor",)
"""Methods whose scores estimate the whole model's loss and so compare between groups as they are;
all others are standardised within each group first."""

_DECODED = (
    "llmc.dequantize", "llmc.lookup", "llmc.sum_signs", "llmc.expand_nm", "llmc.expand_bitmap",
    "llmc.fused",
)  # fmt: skip


@dataclass(frozen=True)
class Scoring:
    """How units are scored.

    Attributes:
        method: of :data:`METHODS`; order: of the Taylor expansion; reduce: over a unit's members.
        samples: calibration windows whose gradients are taken.
        damp: relative to the mean diagonal of XᵀX; seed: of ``random``.
    """

    method: str
    order: str = "first"
    reduce: str = "sum"
    samples: int = 10
    damp: float = 0.01
    seed: int = 0


@dataclass(frozen=True, eq=False)
class Scores:
    """Scores of one group's units: fp64 [units], at least 0; low scores may go.

    Attributes:
        spread: deviation that scores are measured in where groups compete. FLAP standardises the
            channels of a layer and then averages over a head, so there it is the channels'.
    """

    values: Tensor
    spread: float

    def standard(self) -> Tensor:
        """Scores that compare between groups: fp64 [units]."""
        return score.standardise(self.values, self.spread)


def why_not(program: Program, group: Group, method: str) -> str | None:
    """Why a method cannot score a group, None where it can."""
    if method not in ACTIVATIONS:
        return None
    reads = readings(program, group)
    if not reads:
        return (
            f"{method} looks at the inputs of the matrix that reads a unit, and no such matrix "
            f"reads {group.id}; taylor, magnitude and random need none"
        )
    if method == "obs" and any(r.kind == "inside" for r in reads):
        return f"obs would need XᵀX over the neurons of all experts for {group.id}; flap needs none"
    return None


def quantised(program: Program) -> str | None:
    """The first call that decodes packed weights, which have no gradient; None in a dense graph."""
    return next((n.name for n in program.calls() if op_name(n) in _DECODED), None)


def scores(
    program: Program,
    groups: Sequence[Group],
    how: Scoring,
    tokens: Tensor | None,
    options: Options,
    listener: Listener = silent,
) -> dict[str, Scores]:
    """Scores of the units by group id, on the CPU.

    Raises:
        ModelError: a score or an activation is not finite.
    """
    spreads: dict[str, float] = {}
    if how.method == "random":
        found = {g.id: score.random(g.units, how.seed * 1_000_003 + i)
                 for i, g in enumerate(groups)}  # fmt: skip
    elif how.method == "magnitude":
        found = {g.id: _magnitude(program, g, how.reduce) for g in groups}
    else:
        assert tokens is not None
        if how.method == "taylor":
            found = _taylor(program, groups, how, tokens, options)
        elif how.method == "michel":
            found = _michel(program, groups, how, tokens, options)
        else:
            found, spreads = _by_inputs(program, groups, how, tokens, options, listener)
    for name, value in found.items():
        if not bool(torch.isfinite(value).all()):
            raise ModelError("expected finite scores, found NaN or Inf", where=name)
    return {
        name: Scores(value.cpu(), spreads.get(name, float(value.std(correction=0))))
        for name, value in ((g.id, found[g.id]) for g in groups)
    }


def _trained(program: Program, group: Group) -> Iterator[tuple[str, int, Tensor]]:
    """(parameter, axis, unit of each index) of every trained member."""
    for m in group.members:
        if program.params[m.param].trained:
            yield m.param, m.axis, m.unit_of


def _magnitude(program: Program, group: Group, reduction: str) -> Tensor:
    parts = []
    for name, axis, unit_of in _trained(program, group):
        weight = program.weights.load(name)
        along = score.along(score.magnitude(weight), axis)
        parts.append(score.per_unit(along, unit_of, group.units))
    return score.combine(parts, reduction)


def _by_inputs(
    program: Program, groups: Sequence[Group], how: Scoring, tokens: Tensor, options: Options,
    listener: Listener,
) -> tuple[dict[str, Tensor], dict[str, float]]:  # fmt: skip
    """flap, wanda and obs: from the moments or XᵀX of what each reading matrix reads.

    The second result is the deviation of a group's channels, where its scores are means of them.
    """
    statistic = "gram" if how.method == "obs" else "moments"
    out: dict[str, Tensor] = {}
    spreads: dict[str, float] = {}
    for part in fitting(program, groups, statistic, options.budget):
        reads = {g.id: readings(program, g) for g in part}
        every = [r for rs in reads.values() for r in rs]
        stats = measured(program, every, [statistic], tokens, options, listener)
        for g in part:
            parts = []
            for r in reads[g.id]:
                units, channels = _read(program, r, how, g.units, stats.get(r.value, statistic))
                parts.append(units)
                if channels is not None and len(reads[g.id]) == 1:
                    spreads[g.id] = float(channels.std(correction=0))
            out[g.id] = score.combine(parts, how.reduce)
    return out, spreads


def _read(
    program: Program, at: Reading, how: Scoring, units: int, stat: Any
) -> tuple[Tensor, Tensor | None]:  # fmt: skip
    """Scores of a group's units at one reading matrix; of its channels where units are means."""
    found = stat.value if how.method == "obs" else stat.variance
    weight = at.matrix(program.weights.load(at.param.name).to(found.device))
    if how.method == "obs":
        return score.obs(weight, found / stat.tokens, at.unit_of, units, how.damp), None
    if how.method == "flap":
        each = score.fluctuation(weight, found)
        return score.per_unit(each, at.unit_of, units, mean=True), each[at.unit_of >= 0]
    rms = (found + stat.mean.square()).sqrt()
    return score.per_unit(score.along(score.wanda(weight, rms), 1), at.unit_of, units), None


def _chunks(program: Program, names: Iterable[str], budget: int, copies: int) -> list[list[str]]:
    """Parameters in parts of which so many fp32 copies fit the budget (one always does)."""
    out: list[list[str]] = []
    size = 0
    for name in dict.fromkeys(names):
        mine = copies * 4 * torch.Size(program.params[name].shape).numel()
        if not out or size + mine > budget:
            out.append([])
            size = 0
        out[-1].append(name)
        size += mine
    return out


def _samples(
    program: Program, tokens: Tensor, how: Scoring, names: Sequence[str], options: Options
) -> Iterator[Mapping[str, Tensor]]:
    """Gradients of each sample's mean loss by parameter, fp32."""
    device = torch.device(options.device)

    def fetch(name: str) -> Tensor:
        return program.fetch(name).to(device)

    for sample in tokens[: how.samples].split(1):
        _, grads = gradients(program, sample.to(device), names, fetch)
        yield {n: g.float() if g.dtype != torch.float64 else g for n, g in grads.items()}


def _taylor(
    program: Program, groups: Sequence[Group], how: Scoring, tokens: Tensor, options: Options
) -> dict[str, Tensor]:
    members = [(g, *m) for g in groups for m in _trained(program, g)]
    parts: dict[str, list[Tensor]] = {g.id: [] for g in groups}
    for names in _chunks(program, (m[1] for m in members), options.budget, 4):
        mean: dict[str, Tensor] = {}
        square: dict[str, Tensor] = {}
        count = min(how.samples, len(tokens))
        for grads in _samples(program, tokens, how, names, options):
            for name, g in grads.items():
                mean[name] = mean[name] + g / count if name in mean else g / count
                more = g.square() / count
                square[name] = square[name] + more if name in square else more
        for group, name, axis, unit_of in members:
            if name in mean:
                weight = program.weights.load(name).to(mean[name].device)
                along = score.taylor(weight, mean[name], square[name], how.order, axis)
                parts[group.id].append(score.per_unit(along, unit_of, group.units))
    return {g.id: score.combine(parts[g.id], how.reduce) for g in groups}


def _michel(
    program: Program, groups: Sequence[Group], how: Scoring, tokens: Tensor, options: Options
) -> dict[str, Tensor]:
    """Mean over samples of |∂loss/∂m|, one mask m per unit at everything that reads it."""
    reads = [
        (g, r) for g in groups for r in {r.param.name: r for r in readings(program, g)}.values()
    ]
    slopes: dict[str, list[Tensor]] = {g.id: [] for g in groups}
    for names in _chunks(program, (r.param.name for _, r in reads), options.budget, 2):
        for i, grads in enumerate(_samples(program, tokens, how, names, options)):
            for group, r in reads:
                if r.param.name not in grads:
                    continue
                grad = grads[r.param.name]
                weight = program.weights.load(r.param.name).to(grad.device)
                along = score.masked_slope(r.matrix(weight), r.matrix(grad), 1)
                mine = score.per_unit(along, r.unit_of, group.units)
                known = slopes[group.id]
                if i < len(known):
                    known[i] = known[i] + mine
                else:
                    known.append(mine)
    return {name: torch.stack(each).abs().mean(0) for name, each in slopes.items()}
