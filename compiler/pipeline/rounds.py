"""Rounds and waves: measure, decide and solve, block after block, on calibration data.

A round is one stage of the recipe. Within it one block's weights are loaded, the calibration tokens
run through it, exactly the declared statistics are collected, the block is solved, and its outputs
feed the next block. Peak memory is about one block plus the activations, whatever the depth.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, field
from itertools import groupby
from typing import Any

import torch
from torch import Tensor, fx

from ..ir.errors import ModelError, UsageError
from ..ir.graph import DictWeights, Program, Segment
from ..ir.interpret import Fetch, run_nodes
from . import encode
from .events import Event, Listener, silent
from .plan import Decision, Migration, Plan, Stage
from .solving import Work, fold, solve_group
from .statistics import Collection

Env = dict[fx.Node, Any]


@dataclass(frozen=True)
class Options:
    """How calibration runs.

    Attributes:
        batch: samples that run at once.
        propagate: what feeds the next block: ``compressed`` or ``dense`` outputs.
        true_sequential: solve a block in waves, each seeing its compressed predecessors.
        budget: bytes for the Hessians of one wave; more waves are made to fit.
        device: where blocks run and are solved.
    """

    batch: int = 8
    propagate: str = "compressed"
    true_sequential: bool = False
    budget: int = 4 << 30
    device: str = "cpu"

    def __post_init__(self) -> None:
        if self.propagate not in ("compressed", "dense"):
            raise UsageError(f"propagate: expected compressed or dense, found {self.propagate!r}")


@dataclass
class Compiled:
    """A solved plan: the final program with tensors, and a record per weight and per fold."""

    program: Program
    plan: Plan
    records: list[dict[str, Any]] = field(default_factory=list)
    folds: list[dict[str, Any]] = field(default_factory=list)

    @property
    def fallbacks(self) -> list[dict[str, Any]]:
        """Every weight whose solve fell back, with the reasons."""
        return [
            {"site": r["site"], "reasons": r["fallbacks"]} for r in self.records if r["fallbacks"]
        ]


def compile_plan(
    plan: Plan,
    tokens: Tensor | None,
    options: Options | None = None,
    listener: Listener = silent,
) -> Compiled:
    """Carry a plan out.

    Args:
        tokens: int64 [samples, length] for calibration; None when no pass needs any.
    Raises:
        UsageError: a pass needs calibration data and none is given.
        ModelError: a weight or an activation is not finite.
    """
    options = options or Options()
    if plan.needing and tokens is None:
        raise UsageError(f"expected calibration data for {', '.join(plan.needing)}, found none")
    work = Work(plan, torch.device(options.device))
    out = Compiled(plan.program, plan)
    total = len(plan.stages) * len(plan.source.segments)
    listener(Event("start", {"steps": total}))
    with torch.no_grad():
        for i, stage in enumerate(plan.stages):
            run = _Round(plan, stage, i, work, tokens, options, listener, out)
            run.run()
        _finish(plan, work, out)
    listener(Event("end", {"records": len(out.records)}))
    return out


class _Round:
    """One stage over all segments."""

    def __init__(
        self, plan: Plan, stage: Stage, index: int, work: Work, tokens: Tensor | None,
        options: Options, listener: Listener, out: Compiled,
    ) -> None:  # fmt: skip
        self.plan, self.stage, self.index, self.work = plan, stage, index, work
        self.options, self.listener, self.out = options, listener, out
        self.program = plan.source
        self.nodes = {n.name: n for n in self.program.graph.nodes}
        self.envs: list[Env] = []
        if stage.needing:
            assert tokens is not None
            self.envs = _batches(self.program, tokens, options)

    def run(self) -> None:
        later = _needed_later(self.program)
        for segment in self.program.segments:
            here = {"segment": segment.name, "round": self.index}
            self.listener(Event("block", here))
            folds = [m for m in self.stage.migrations if m.site.segment == segment.name]
            solves = [d for d in self.stage.decisions.values() if d.site.segment == segment.name]
            dense = self._dense_outputs(segment, bool(solves))
            for wave in self._waves(folds, solves):
                self._wave(segment, *wave)
            self._advance(segment, dense, later[segment.name])
            self.work.drop(segment, last=self.index == len(self.plan.stages) - 1)

    def _waves(
        self, folds: list[Migration], solves: list[Decision]
    ) -> Iterator[tuple[list[Migration], list[list[Decision]]]]:
        """A block's waves, each in parts whose Hessians fit the budget; folds go with the first."""
        ordered = sorted(solves, key=lambda d: d.site.wave)
        waves = [solves]
        if self.options.true_sequential and solves:
            waves = [list(g) for _, g in groupby(ordered, key=lambda d: d.site.wave)]
        if not solves and not folds:
            return
        for i, wave in enumerate(waves):
            yield (folds if i == 0 else []), list(self._fitting(wave)) or [[]]

    def _fitting(self, wave: list[Decision]) -> Iterator[list[Decision]]:
        held: list[Decision] = []
        values: dict[str, int] = {}
        for d in wave:
            size = 4 * d.site.in_features**2 if d.needs_gram else 0
            new = {**values, d.site.reads: size}
            if held and sum(new.values()) > self.options.budget:
                yield held
                held, new = [], {d.site.reads: size}
            held.append(d)
            values = new
        if held:
            yield held

    def _wave(self, segment: Segment, folds: list[Migration], parts: list[list[Decision]]) -> None:
        # Every part measures the block as it stood when the wave began, so that the budget
        # changes memory and never the answer.
        fetch: Fetch = self.work.fetch
        for i, part in enumerate(parts):
            stats = Collection()
            for m in folds if i == 0 else []:
                for need in m.call.made.needs:
                    stats.want(m.site.value, need)
            for d in part:
                if d.needs_gram:
                    stats.want(d.site.reads, "gram")
            if stats.data:
                self._collect(segment, stats, fetch)
            for m in folds if i == 0 else []:
                record = fold(self.work, m, stats)
                self.out.folds.append({**record, "round": self.index})
                self.listener(Event("fold", record))
            if i == 0 and len(parts) > 1:
                fetch = self.work.frozen()
            self._solve(part, stats)

    def _solve(self, part: list[Decision], stats: Collection) -> None:
        groups: dict[tuple[Any, ...], list[Decision]] = {}
        for d in part:
            key = (d.site.reads, repr(d.scheme.codes), repr(d.scheme.mask), repr(d.options))
            groups.setdefault(key, []).append(d)
        for members in groups.values():
            for record in solve_group(self.work, members, stats):
                self.out.records.append({**record, "round": self.index})
                self.listener(Event("site", record))

    def _collect(self, segment: Segment, stats: Collection, fetch: Fetch) -> None:
        wanted = {self.nodes[v] for v in stats.values()}
        outside = {n for n in wanted if n.name not in set(segment.nodes)}

        def observe(node: fx.Node, value: Any) -> None:
            if node in wanted:
                _check_finite(node, value)
                stats.update(node.name, value)

        nodes = [self.nodes[n] for n in segment.nodes if self.nodes[n].op != "output"]
        last = max(i for i, n in enumerate(nodes) if n in wanted) if wanted - outside else -1
        for env in self.envs:
            for n in outside:
                observe(n, env[n])
            run_nodes(nodes[: last + 1], dict(env), fetch, observe=observe, keep=())
            self.listener(Event("tick", {"segment": segment.name}))

    def _dense_outputs(self, segment: Segment, solved: bool) -> list[Env] | None:
        if self.options.propagate == "compressed" or not solved:
            return None
        return [self._outputs(segment, env) for env in self.envs]

    def _outputs(self, segment: Segment, env: Env) -> Env:
        nodes = [self.nodes[n] for n in segment.nodes if self.nodes[n].op != "output"]
        keep = [self.nodes[n] for n in segment.live_out if self.nodes[n].op != "output"]
        done = run_nodes(nodes, dict(env), self.work.fetch, keep=keep)
        return {n: done[n] for n in keep if n in done}

    def _advance(self, segment: Segment, dense: list[Env] | None, later: set[str]) -> None:
        """Replace each batch's environment by what later segments read."""
        if not any(n != "output" for n in later):
            self.envs = []
            return
        for i, env in enumerate(self.envs):
            new = dense[i] if dense is not None else self._outputs(segment, env)
            kept = {n: v for n, v in env.items() if n.name in later or n.op == "placeholder"}
            self.envs[i] = {**kept, **{n: v for n, v in new.items() if n.name in later}}


def _check_finite(node: fx.Node, value: Tensor) -> None:
    # NaN and Inf survive a sum, which is one pass and no temporary; in 16 bits it could overflow.
    total = value.sum(dtype=torch.promote_types(value.dtype, torch.float32))
    if not bool(torch.isfinite(total)):
        raise ModelError(
            "expected finite activations on calibration data, found NaN or Inf",
            where=f"node {node.name}", hint="check the checkpoint and the calibration tokens",
        )  # fmt: skip


def _needed_later(program: Program) -> dict[str, set[str]]:
    """For each segment, the values that later segments read."""
    out: dict[str, set[str]] = {}
    later: set[str] = set()
    for segment in reversed(program.segments):
        out[segment.name] = set(later)
        later |= set(segment.live_in)
    return out


def _batches(program: Program, tokens: Tensor, options: Options) -> list[Env]:
    """Input environments of the calibration batches."""
    nodes = {n.name: n for n in program.inputs}
    out: list[Env] = []
    for ids in tokens.split(options.batch):
        made = model_inputs(ids.to(options.device))
        unknown = sorted(set(nodes) - set(made))
        if unknown:
            raise UsageError(
                f"expected a model that reads token ids, found inputs {unknown}",
                hint="calibrate in Python and pass the statistics' inputs yourself",
            )
        out.append({nodes[k]: v for k, v in made.items() if k in nodes})
    return out


def model_inputs(ids: Tensor) -> dict[str, Tensor]:
    """The named inputs of a language model for full windows of token ids int64 [B, S]."""
    positions = torch.arange(ids.shape[1], device=ids.device).expand(*ids.shape)
    return {
        "input_ids": ids,
        "position_ids": positions,
        "attention_mask": torch.ones_like(ids, dtype=torch.bool),
    }


def _finish(plan: Plan, work: Work, out: Compiled) -> None:
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
