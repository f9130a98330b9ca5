"""Rounds and waves: measure, decide and solve, block after block, on calibration data.

A round is one stage of the recipe. Within it one block's weights are loaded, the calibration tokens
run through it, exactly the declared statistics are collected, the block is solved, and its outputs
feed the next block. Peak memory is about one block plus the activations, whatever the depth.
"""

from __future__ import annotations

from collections import ChainMap
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from itertools import groupby
from typing import Any

import torch
from torch import Tensor, fx

from ..ir.events import Event, Listener
from ..ir.graph import DictWeights, Segment
from ..ir.interpret import Fetch, run_nodes
from . import encode, experts
from .allocate import allocate
from .equivalence import Move
from .granularity import choose_groups
from .learning import Learner, is_learned, scales_of, settle
from .measure import Env, Options, Walk, batches, check_finite
from .plan import Decision, Migration, Plan, Stage
from .sensitivity import inform
from .solving import Work, fold, solve_group
from .statistics import Collection


@dataclass
class Solved:
    """What the rounds did: a record per weight and per fold."""

    records: list[dict[str, Any]] = field(default_factory=list)
    folds: list[dict[str, Any]] = field(default_factory=list)


def run_rounds(
    plan: Plan, tokens: Tensor | None, options: Options, listener: Listener
) -> Solved:  # fmt: skip
    """Solve every round of a plan and give the planned program its tensors.

    Raises:
        ModelError: a weight or an activation is not finite.
    """
    work, out = Work(plan, torch.device(options.device)), Solved()
    with torch.no_grad():
        for stage in plan.stages:
            choose_groups(plan, stage, work)
            if tokens is not None:
                allocate(plan, stage, work, tokens, listener)
                inform(stage, work, tokens, listener)
            _Round(plan, stage, work, tokens, options, listener, out).run()
        _finish(plan, work)
    return out


Part = tuple[list[Migration], list[Decision]]
"""Folds and solves that are measured together."""


class _Round:
    """One stage over all segments."""

    def __init__(
        self, plan: Plan, stage: Stage, work: Work, tokens: Tensor | None, options: Options,
        listener: Listener, out: Solved,
    ) -> None:  # fmt: skip
        self.stage, self.index, self.work = stage, stage.index, work
        self.last = stage is plan.stages[-1]
        self.options, self.listener, self.out = options, listener, out
        # What this round or a later one makes of each reader; the earliest counts.
        self.planned = ChainMap(*(s.decisions for s in plan.stages if s.index >= stage.index))
        self.walk = Walk(plan.source, work.fetch, implementations=work.implementations)
        self.envs: list[Env] = []
        # Linears that were solved before the wave and read rounded values, by node name.
        self.given: dict[str, Callable[..., Any]] = {}
        self.learner: Learner | None = None
        if stage.needing:
            assert tokens is not None
            if Learner.wanted(stage):
                self.learner = Learner(stage, work, self.walk, tokens, options)
            self.envs = batches(plan.source, tokens, options)

    def run(self) -> None:
        for segment in self.walk.segments:
            here = {"segment": segment.name, "round": self.index}
            self.listener(Event("block", here))
            folds = [m for m in self.stage.migrations if m.site.segment == segment.name]
            solves = [d for d in self.stage.decisions.values() if d.site.segment == segment.name]
            dense = self._dense_outputs(segment, bool(solves))
            self._learn(segment, folds, solves)
            for wave in self._waves([m for m in folds if not is_learned(m)], solves):
                self._wave(segment, wave)
            self._advance(segment, dense)
            if self.learner is not None:
                self.learner.advance(segment)
            self.work.drop(segment, self.last)

    def _learn(
        self, segment: Segment, folds: list[Migration], solves: list[Decision]
    ) -> None:  # fmt: skip
        """Train the block's clips and scales and fold the latter, before anything is measured."""
        trained = [m for m in folds if is_learned(m)]
        if self.learner is None or not (trained or solves):
            return
        state, record = self.learner.learn(segment, trained, solves)
        for m in trained:
            move = Move(scales_of(m, state, self.work), record=record)
            self.out.folds.append(
                {**fold(self.work, m, Collection(), move=move), "round": self.index}
            )
            self.listener(Event("fold", self.out.folds[-1]))
        settle(self.work, state, solves, record)

    def _waves(self, folds: list[Migration], solves: list[Decision]) -> Iterator[list[Part]]:
        """A block's waves, each in parts whose Hessians fit the budget; folds go with the first."""
        ordered = sorted(solves, key=lambda d: d.site.wave)
        waves = [solves]
        if self.options.true_sequential and solves:
            waves = [list(g) for _, g in groupby(ordered, key=lambda d: d.site.wave)]
        if not solves and not folds:
            return
        for i, wave in enumerate(waves):
            yield list(self._fitting(folds if i == 0 else [], wave))

    def _fitting(self, folds: list[Migration], wave: list[Decision]) -> Iterator[Part]:
        """Folds that need more than one part come before all that is solved."""
        values: dict[str, int] = {}
        moved: list[Migration] = []
        parted = False
        for m in folds:
            own = {m.site.value: _hessians(m)}
            if moved and sum((values | own).values()) > self.options.budget:
                yield moved, []
                moved, values, parted = [], {}, True
            moved.append(m)
            values |= own
        if parted or not wave:
            yield moved, []
            moved, values = [], {}
        held: list[Decision] = []
        for d in (part for one in wave for part in experts.fitting(one, self.options.budget)):
            size, key = experts.hessians(d), experts.read_by(d)[0]
            new = {**values, key: max(size, values.get(key, 0))}
            if (held or moved) and sum(new.values()) > self.options.budget:
                yield moved, held
                moved, held, new = [], [], {key: size}
            held.append(d)
            values = new
        if held:
            yield moved, held

    def _wave(self, segment: Segment, parts: list[Part]) -> None:
        # Every part measures the block as it stood when the wave began, so that the budget
        # changes memory and never the answer: folds before any, solves behind all folds.
        last = max((i for i, (folds, _) in enumerate(parts) if folds), default=0)
        fetch: Fetch = self.work.frozen() if last else self.work.fetch
        self.given = dict(self.work.implementations)
        for i, (folds, part) in enumerate(parts):
            stats, moved = Collection(), False
            for m in folds:
                for need in m.call.made.needs:
                    stats.want(m.site.value, need)
            _want(stats, part)
            if stats.data:
                self._collect(segment, stats, fetch)
            for m in folds:
                record = fold(self.work, m, stats, self.planned)
                moved = moved or "shifted" in record or _reach(m, part)
                self.out.folds.append({**record, "round": self.index})
                self.listener(Event("fold", record))
            if i == last:
                fetch = self.work.frozen() if len(parts) > 1 else self.work.fetch
            if moved:
                # No statistic follows a shift but those that know the mean, and those of experts
                # follow no scales: measure again.
                stats, moved = Collection(), False
                _want(stats, part)
                if stats.data:
                    self._collect(segment, stats, fetch)
            self._solve(part, stats)

    def _solve(self, part: list[Decision], stats: Collection) -> None:
        groups: dict[tuple[Any, ...], list[Decision]] = {}
        for d in part:
            s = d.scheme
            how = (s.codes, s.mask, s.sparse, s.low_rank, s.input_grid, s.t_in, d.options)
            key = (d.site.reads, *map(repr, how))
            groups.setdefault(key, []).append(d)
        for members in groups.values():
            for record in solve_group(self.work, members, stats):
                self.listener(Event("site", record))
                kept = {k: v for k, v in record.items() if k != "rows"}
                self.out.records.append({**kept, "round": self.index})

    def _collect(self, segment: Segment, stats: Collection, fetch: Fetch) -> None:
        nodes = self.walk.calls(segment)
        program = self.walk.program
        inside = experts.routed(program, stats.values())
        beyond = {v for names in inside.values() for v in names}
        wanted = {program.node(v) for v in stats.values() - beyond}
        # What experts read is no value of the graph: their calls tell it themselves.
        told = {n: experts.watching(program.node(n), stats) for n in inside}
        outside = {n for n in wanted if n.name not in set(segment.nodes)}

        def observe(node: fx.Node, value: Any) -> None:
            if node in wanted:
                check_finite(node, value)
                stats.update(node.name, value)

        last = max((i for i, n in enumerate(nodes) if n in wanted or n.name in told), default=-1)
        for env in self.envs:
            for n in outside:
                observe(n, env[n])
            run_nodes(
                nodes[: last + 1], dict(env), fetch, implementations=self.given | told,
                observe=observe, keep=(),
            )  # fmt: skip
            self.listener(Event("tick", {"segment": segment.name}))

    def _dense_outputs(self, segment: Segment, solved: bool) -> list[Env] | None:
        if self.options.propagate == "compressed" or not solved:
            return None
        return [self.walk.outputs(segment, env) for env in self.envs]

    def _advance(self, segment: Segment, dense: list[Env] | None) -> None:
        """Replace each batch's environment by what later segments read."""
        if not self.walk.is_read_after(segment):
            self.envs = []
            return
        for i, env in enumerate(self.envs):
            new = dense[i] if dense is not None else self.walk.outputs(segment, env)
            self.envs[i] = self.walk.advanced(segment, env, new)


def _want(stats: Collection, part: list[Decision]) -> None:
    for d in part:
        for value in experts.read_by(d):
            for need in d.needs:
                stats.want(value, need)


def _hessians(m: Migration) -> int:
    """Bytes of the Hessians that a fold reads."""
    sizes = {"gram": 4, "gram64": 8}
    return sum(sizes.get(need, 0) for need in m.call.made.needs) * m.site.channels**2


def _reach(m: Migration, part: list[Decision]) -> bool:
    """Whether scales of an edge change what the experts of the part read."""
    params = {param for _, param, _ in m.site.consumers}
    return any(d.site.stacked and d.site.param in params and d.needs for d in part)


def _finish(plan: Plan, work: Work) -> None:
    """Give the planned program its tensors."""
    final = plan.program
    if not isinstance(final.weights, DictWeights):
        final.weights = DictWeights({}, final.weights)
    for name, param in list(final.params.items()):
        made = work.packed.get(name)
        if made is None and name in work.dense:
            made = work.dense[name].to(param.dtype)
        if made is not None:
            final.set_tensor(name, made.cpu().contiguous())
    encode.refresh_types(final)
