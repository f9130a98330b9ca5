"""Factors of a program's weights: metrics measured block by block, then each weight truncated.

The dense model's activations flow through every block once; where the factors are to see what the
factors before them leave, a second stream runs beside it through what is factored already.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import Any

import torch
from torch import Tensor, fx

from ..analysis.linears import LinearSite
from ..ir.errors import ModelError
from ..ir.events import Event, Listener, silent
from ..ir.graph import Program, Segment
from ..ir.interpret import Fetch, run_nodes
from ..solvers import factor as solver
from ..solvers.factor import Factored, Root
from ..solvers.low_rank import LowRankFactors
from ..solvers.ranks import Part, Ranks, step_of
from .factored import names
from .measure import Env, Options, Walk, batches, check_finite
from .reverse import gradients, value_gradients
from .statistics import Collection

METRICS = {"weights": None, "fisher": None, "absmean": "absmean", "gram": "gram64"}
"""What the error of a weight is weighed by, and the statistic of its input that this takes."""


@dataclass(frozen=True)
class How:
    """How weights are factored.

    Attributes:
        metric: of :data:`METRICS`; alpha: power of the mean |x|; jitter: relative, of XᵀX.
        solver, seed: of :func:`..solvers.factor.factor`.
        samples: windows whose gradients are taken.
        update: move A to the least squares of the dense outputs on what the factors read.
        sequential: metrics, too, are of what the factors read.
    """

    metric: str
    alpha: float = 0.5
    jitter: float = 0.0
    solver: str = "auto"
    seed: int = 0
    samples: int = 16
    update: bool = False
    sequential: bool = False


@dataclass(frozen=True)
class Unit:
    """The linears that share one right factor, mostly one alone; they read one value."""

    sites: tuple[LinearSite, ...]
    part: Part

    @property
    def value(self) -> str:
        return self.sites[0].reads

    @cached_property
    def params(self) -> tuple[str, ...]:
        return tuple(s.param for s in self.sites)


def units(
    program: Program, sites: Sequence[LinearSite], multiple: int, *, share: bool, exact: bool
) -> list[Unit]:
    """Sites in graph order, alone or with those that read the same value in the same dtype.

    multiple: of ranks; ``exact`` keeps it for small weights too.
    """
    groups: dict[Any, list[LinearSite]] = {}
    for s in sites:
        key = (s.segment, s.reads, program.params[s.param].dtype) if share else s.id
        groups.setdefault(key, []).append(s)
    out = []
    for members in groups.values():
        rows, columns = sum(s.out_features for s in members), members[0].in_features
        step = multiple if exact else step_of(rows, columns, multiple)
        width = program.params[members[0].param].dtype.itemsize
        part = Part("+".join(s.id for s in members), rows, columns, width, step)
        out.append(Unit(tuple(members), part))
    return out


@dataclass(frozen=True)
class Solved:
    """One unit's factors as stored, by parameter name, and the row that tells of them."""

    tensors: dict[str, Tensor]
    record: dict[str, Any]


@dataclass
class _Seen:
    """What was measured of one value: a statistic of it, or the Grams of both streams."""

    statistic: Any = None
    dense: Tensor | None = None
    reads: Tensor | None = None
    crossed: Tensor | None = None


class Factoring:
    """Measures and factors the units of one segmented program.

    Raises:
        ModelError: an activation, a weight or a factor that is not finite.
    """

    def __init__(
        self, program: Program, found: Sequence[Unit], how: How, tokens: Tensor | None,
        options: Options, listener: Listener = silent,
    ) -> None:  # fmt: skip
        self.program, self.how, self.tokens = program, how, tokens
        self.units, self.options, self.listener = list(found), options, listener
        self.walk = Walk(program, device=options.device)
        self._effective: dict[str, Tensor] = {}

    def spectra(self) -> dict[str, Tensor]:
        """Singular values of each unit's weight in the metric of the dense inputs, by part id."""
        found = {}
        for unit, _, root in self.measured(self.units):
            found[unit.part.id] = solver.spectrum(self.weight(unit), root).cpu()
        return found

    def solve(self, ranks: Ranks) -> dict[str, Solved]:
        """Factors of the units that ``ranks`` names, by part id."""
        chosen = [u for u in self.units if u.part.id in ranks]
        out = {}
        for unit, seen, root in self.measured(chosen, streams=True):
            rank = ranks[unit.part.id]
            made = solver.factor(
                self.weight(unit), root, rank, solver=self.how.solver, seed=self.how.seed
            )
            out[unit.part.id] = self._finished(unit, made, seen)
        return out

    def weight(self, unit: Unit) -> Tensor:
        """The unit's weights, one below the other, as stored: [rows, columns]."""
        parts = [self.program.weights.load(p).to(self.options.device) for p in unit.params]
        return parts[0] if len(parts) == 1 else torch.cat(parts)

    # ** measuring **

    def measured(
        self, chosen: Sequence[Unit], *, streams: bool = False
    ) -> Iterator[tuple[Unit, _Seen, Root]]:  # fmt: skip
        """Each unit with what was measured of its input and its metric, in graph order.

        streams: update and run sequentially where that is asked for.
        """
        how = self.how
        beside = streams and (how.update or how.sequential)
        if METRICS[how.metric] is None and not beside:
            for unit in chosen:
                self.listener(Event("tick", {"where": unit.sites[0].segment}))
                yield unit, _Seen(), self._root(unit, _Seen())
            return
        assert self.tokens is not None
        mine = {s: [u for u in chosen if u.sites[0].segment == s]
                for s in dict.fromkeys(u.sites[0].segment for u in chosen)}  # fmt: skip
        last = max((i for i, s in enumerate(self.walk.segments) if s.name in mine), default=-1)
        dense = None if streams and how.sequential and not how.update else self._start()
        cut = self._start() if beside else None
        for segment in self.walk.segments[: last + 1]:
            self.listener(Event("tick", {"where": segment.name}))
            here = mine.get(segment.name, [])
            for now in _waves(here) if beside else [here]:
                seen = self._measure(segment, now, dense, cut)
                roots: dict[str, Root] = {}
                for unit in now:
                    root = roots.get(unit.value) or self._root(unit, seen[unit.value])
                    if how.metric != "fisher":
                        roots[unit.value] = root
                    seen[unit.value].statistic = None
                    yield unit, seen[unit.value], root
            dense = self._behind(segment, dense, self.walk.fetch)
            cut = self._behind(segment, cut, self._fetch)
            self.walk.forget()
            self._effective.clear()

    def _start(self) -> list[Env]:
        assert self.tokens is not None
        with torch.no_grad():
            return batches(self.program, self.tokens, self.options)

    def _fetch(self, name: str) -> Tensor:
        """A parameter as the factors before make it."""
        found = self._effective.get(name)
        return self.walk.fetch(name) if found is None else found

    def _behind(self, segment: Segment, envs: list[Env] | None, fetch: Fetch) -> list[Env] | None:
        if envs is None:
            return None
        walk = self.walk
        for i, env in enumerate(envs):
            with torch.no_grad():
                envs[i] = walk.advanced(segment, env, walk.outputs(segment, env, fetch=fetch))
        return envs

    def _measure(
        self, segment: Segment, here: Sequence[Unit], dense: list[Env] | None,
        cut: list[Env] | None,
    ) -> dict[str, _Seen]:  # fmt: skip
        """What the units' metric and update take, of the values that they read."""
        seen = {u.value: _Seen() for u in here}
        if not seen:
            return seen
        how, stats = self.how, Collection()
        statistic = METRICS[how.metric]
        both = dense is not None and cut is not None
        if statistic is not None:
            for value in seen:
                stats.want(value, statistic)
        for i in range(len(dense or cut or [])):
            x = {} if dense is None else self._values(segment, dense[i], seen, self.walk.fetch)
            y = {} if cut is None else self._values(segment, cut[i], seen, self._fetch)
            for value, told in seen.items():
                if statistic is not None:
                    stats.update(value, (y if how.sequential and cut is not None else x)[value])
                if both and how.update:
                    _add(told, x[value], y[value])
        if statistic is not None:
            for value, told in seen.items():
                told.statistic = stats.get(value, statistic)
        return seen

    def _values(
        self, segment: Segment, env: Env, wanted: Iterable[str], fetch: Fetch
    ) -> dict[str, Tensor]:
        """Values [tokens, n] that the segment reads or makes, of one batch."""
        asked = {self.program.node(v) for v in wanted}
        found: dict[str, Tensor] = {}

        def observe(node: fx.Node, value: object) -> None:
            if node in asked:
                assert isinstance(value, Tensor)
                check_finite(node, value)
                found[node.name] = value.reshape(-1, value.shape[-1])

        for node in asked:
            if node in env:
                observe(node, env[node])
        nodes = self.walk.calls(segment)
        last = max((i for i, n in enumerate(nodes) if n in asked), default=-1)
        with torch.no_grad():
            run_nodes(nodes[: last + 1], dict(env), fetch, observe=observe, keep=())
        return found

    @cached_property
    def _information(self) -> dict[str, Tensor]:
        """Fisher information of each weight's columns, its rows added: fp64 [columns]."""
        assert self.tokens is not None
        wanted = [p for u in self.units for p in u.params]
        out: dict[str, Tensor] = {}
        for sample in self.tokens[: self.how.samples].split(1):
            _, found = gradients(self.program, sample, wanted)
            for name, grad in found.items():
                part = grad.double().square().sum(0)
                out[name] = part + out[name] if name in out else part
        return out

    def _root(self, unit: Unit, seen: _Seen) -> Root:
        how = self.how
        if how.metric == "weights":
            return solver.identity()
        if how.metric == "fisher":
            found = [self._information[p] for p in unit.params if p in self._information]
            total = torch.stack(found).sum(0) if found else torch.zeros(unit.part.columns)
            return solver.diagonal(total.sqrt().to(self.options.device))
        if how.metric == "absmean":
            return solver.diagonal(seen.statistic.value.double() ** how.alpha)
        return solver.whitening(seen.statistic.value, how.jitter)

    # ** finishing **

    def _finished(self, unit: Unit, made: Factored, seen: _Seen) -> Solved:
        """The factors as they are stored; the second stream runs through them from here on."""
        pair, notes, told = made.factors, list(made.notes), dict[str, Any]()
        weight = self.weight(unit)
        if seen.reads is not None:
            pair, told = _updated(weight, pair, seen)
        right, lefts = names(self.program, unit.sites)
        dtype = self.program.params[unit.params[0]].dtype
        sizes = [s.out_features for s in unit.sites]
        a, b = (t.to(dtype).contiguous() for t in pair)
        if not all(bool(torch.isfinite(t).all()) for t in (a, b)):
            raise ModelError(f"expected finite factors in {dtype}, found NaN or Inf",
                             where=unit.part.id)  # fmt: skip
        tensors = {right: b.cpu()}
        for name, param, block in zip(lefts, unit.params, a.split(sizes), strict=True):
            tensors[name] = block.cpu().contiguous()
            if self.how.update or self.how.sequential:
                kind = self.program.param_type(self.program.params[param]).dtype
                self._effective[param] = block.to(kind) @ b.to(kind)
        record = {
            "site": unit.part.id, "rank": made.rank, "full": unit.part.full,
            "bytes_before": unit.part.bytes(None), "bytes_after": unit.part.bytes(made.rank),
            "loss": made.dropped / made.whole if made.whole > 0 else 0.0,
            "solver": made.solver, "fallbacks": notes, **told,
        }  # fmt: skip
        return Solved(tensors, record)


def _waves(here: Sequence[Unit]) -> list[list[Unit]]:
    """Units of one segment, those first that others read."""
    found: dict[int, list[Unit]] = {}
    for unit in here:
        found.setdefault(unit.sites[0].wave, []).append(unit)
    return [found[wave] for wave in sorted(found)]


def _add(told: _Seen, x: Tensor, y: Tensor) -> None:
    x, y = x.double(), y.double()
    for name, one, other in (("dense", x, x), ("reads", y, y), ("crossed", x, y)):
        part = one.t() @ other
        before = getattr(told, name)
        setattr(told, name, part if before is None else before.add_(part))


def _updated(
    weight: Tensor, pair: LowRankFactors, seen: _Seen
) -> tuple[LowRankFactors, dict[str, float]]:  # fmt: skip
    """The refitted factors, and the error of the dense outputs before and after, as a share."""
    assert seen.dense is not None
    assert seen.reads is not None
    grams = seen.dense, seen.reads, seen.crossed
    now = solver.refit(weight, pair, seen.reads, seen.crossed)
    whole = solver.output_loss(weight, torch.zeros_like(weight), seen.dense)
    before, after = (solver.output_loss(weight, p.product, *grams) for p in (pair, now))
    unit = 1.0 / whole if whole > 0 else 0.0
    return now, {"read_before_update": before * unit, "read_after_update": after * unit}


def output_information(
    program: Program, sites: Sequence[LinearSite], tokens: Tensor
) -> dict[str, float]:
    """What a squared error of each site's output costs the loss: mean of ∂loss/∂y², by node.

    tokens: int64 [samples, length]; one sample is swept at a time.
    """
    out = {s.node: 0.0 for s in sites}

    def seen(name: str, value: Tensor, gradient: Tensor) -> None:
        out[name] += float(gradient.double().square().mean())

    for sample in tokens.split(1):
        value_gradients(program, sample, out, seen=seen)
    return out


def tails(spectra: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Squared error at every rank, by part."""
    return {name: solver.tail(s) for name, s in spectra.items()}
