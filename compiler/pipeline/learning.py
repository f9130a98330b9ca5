"""Training a block's clips and scales on what the block puts out, before anything is rounded.

Learned are shares of each group's range (clip=learned) and the scales of edges whose pass learns
them; every matrix is rounded straight-through on its own grid. The student's inputs come through
what is solved already, the teacher's through the dense model; their outputs are compared. The state
that is kept is the best one on windows that were not trained on, the untrained one included, so
that learning never hurts there. Source: OmniQuant (arXiv 2308.13137).
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Any

import torch
from torch import Tensor, fx

from ..analysis.migrate import migrated
from ..ir.graph import Segment
from ..ir.interpret import Fetch, run_nodes
from ..solvers import Grid
from ..solvers.grid import fits_t, rtn_t
from ..solvers.learned import learned_fit, rounded, through
from .equivalence import Equivalence
from .griding import grid_of
from .measure import Env, Options, Walk, batches
from .plan import Decision, Migration, Stage
from .solving import Work

LEAST, MOST = 0.05, 0.982
"""Shares that training begins within; the paper starts all at the upper end (a logit of 4)."""
RATES = {"clip": 1e-2, "scale": 5e-3}


@dataclass
class State:
    """What is learned: per weight the logits of its two shares [2, G, m], per site log s [n]."""

    clips: dict[str, Tensor] = field(default_factory=dict)
    scales: dict[str, Tensor] = field(default_factory=dict)

    def shares(self, param: str, like: tuple[int, int], device: torch.device) -> Tensor:
        """Both shares [2, G, m]; 1 where nothing is learned."""
        found = self.clips.get(param)
        return torch.ones(2, *like, device=device) if found is None else found.sigmoid()

    def copy(self) -> State:
        return State(*({k: v.detach().clone() for k, v in d.items()}
                       for d in (self.clips, self.scales)))  # fmt: skip


def is_learned(m: Migration) -> bool:
    """Whether a pass leaves its scales to training."""
    return isinstance(m.call.made, Equivalence) and m.call.made.learned


class Learner:
    """Two streams of windows through the model, and the training of one block after another."""

    def __init__(self, stage: Stage, work: Work, walk: Walk, tokens: Tensor, options: Options):
        asked = [d.options for d in stage.decisions.values() if d.trained]
        asked += [m.call.made.values() for m in stage.migrations if is_learned(m)]
        self.epochs = max(int(o["epochs"]) for o in asked)
        windows = max(int(o["windows"]) for o in asked)
        held = max(1, windows // 4)
        # A single window is trained on and judged by.
        self.count = min(windows, max(1, len(tokens) - held))
        used = tokens[: self.count + held]
        alone = replace(options, batch=1)
        self.work, self.walk, self.options = work, walk, options
        self.teacher: list[Env] = batches(work.program, used, alone)
        self.student: list[Env] = batches(work.program, used, alone)

    @staticmethod
    def wanted(stage: Stage) -> bool:
        """Whether anything in the stage is learned."""
        clips = any(d.trained for d in stage.decisions.values())
        return clips or any(is_learned(m) for m in stage.migrations)

    def learn(
        self, segment: Segment, folds: Sequence[Migration], solves: Sequence[Decision]
    ) -> tuple[State, dict[str, Any]]:
        """Train one block's clips and scales; returns the best state and a record."""
        block = _Block(self, segment, folds, [d for d in solves if d.scheme.codes is not None])
        return block.train()

    def advance(self, segment: Segment) -> None:
        """Take both streams past a finished block."""
        walk, dense = self.walk, self.options.propagate == "dense"
        loaded: dict[str, Tensor] = {}

        def original(name: str) -> Tensor:
            if name not in loaded:
                loaded[name] = self.work.program.fetch(name).to(self.work.device)
            return loaded[name]

        plain = Walk(walk.program, original)
        for i, env in enumerate(self.teacher):
            new = plain.outputs(segment, env)
            mine = new if dense else walk.outputs(segment, self.student[i])
            self.student[i] = walk.advanced(segment, self.student[i], mine)
            self.teacher[i] = walk.advanced(segment, env, new)


class _Block:
    def __init__(
        self, learner: Learner, segment: Segment, folds: Sequence[Migration],
        solves: Sequence[Decision],
    ) -> None:  # fmt: skip
        self.learner, self.work, self.walk = learner, learner.work, learner.walk
        self.segment, self.folds, self.solves = segment, folds, solves
        names = [n for n in segment.live_out if self.walk.program.node(n).op != "output"]
        self.outs = [self.walk.program.node(n) for n in names]
        self.grids: dict[str, Grid] = {}
        for d in solves:
            grid = grid_of(d.scheme.codes, d.options)
            assert grid is not None
            self.grids[d.site.param] = grid
        self.implementations = dict(self.work.implementations)

    def train(self) -> tuple[State, dict[str, Any]]:
        learner, count = self.learner, self.learner.count
        targets = [self._targets(env) for env in learner.teacher]
        held = range(count, len(targets)) if count < len(targets) else range(len(targets))

        def judged(state: State) -> float:
            return sum(float(self._loss(state, i, targets[i])) for i in held) / len(held)

        best, state = State(), self._first()
        start = lowest = judged(best)
        record = {"loss_start": start, "epochs": learner.epochs, "skipped": 0}
        # A block that nothing rounds, or whose outputs nothing reads, has nothing to teach.
        if learner.epochs and self.grids and self.outs and (state.clips or state.scales):
            groups = [
                {"params": list(v.values()), "lr": RATES[k]}
                for k, v in (("clip", state.clips), ("scale", state.scales))
                if v
            ]
            optimizer = torch.optim.AdamW(groups, weight_decay=0.0)
            found = judged(state)
            if found < lowest:
                lowest, best = found, state.copy()
            for _ in range(learner.epochs):
                for i in range(count):
                    record["skipped"] += not self._step(state, optimizer, i, targets[i])
                found = judged(state)
                if found < lowest:
                    lowest, best = found, state.copy()
        return best, record | {"loss_learned": lowest}

    def _first(self) -> State:
        state = State()
        for d in self.solves:
            if d.trained:
                state.clips[d.site.param] = self._searched(d.site.param)
        for m in self.folds:
            state.scales[m.site.id] = torch.zeros(m.site.n_scales, device=self.work.device)
        for leaf in (*state.clips.values(), *state.scales.values()):
            leaf.requires_grad_()
        return state

    def _searched(self, param: str) -> Tensor:
        """Logits [2, G, m] of the shares of each range that cost least: what training begins at."""
        grid = self.grids[param]
        wt = self.work.weight(param).flatten(0, -2).t()
        whole, best = (fits_t(wt, replace(grid, clip=clip)).scale for clip in ("absmax", "mse"))
        # A share at its end has no gradient left to move it.
        share = (best / whole).clamp(LEAST, MOST)
        return torch.logit(share).expand(2, *share.shape).clone()

    def _step(self, state: State, optimizer: Any, i: int, target: dict[fx.Node, Tensor]) -> bool:
        """One window; False where its loss or a gradient was not finite and nothing moved."""
        leaves = [*state.clips.values(), *state.scales.values()]
        optimizer.zero_grad()
        with torch.enable_grad():
            loss = self._loss(state, i, target)
            if not math.isfinite(float(loss.detach())):
                return False
            loss.backward()
        if not all(v.grad is None or bool(torch.isfinite(v.grad).all()) for v in leaves):
            return False
        optimizer.step()
        return True

    def _targets(self, env: Env) -> dict[fx.Node, Tensor]:
        """What the dense block makes of the teacher's stream."""
        program = self.work.program
        found = self._run(env, lambda name: program.fetch(name).to(self.work.device), {})
        return {n: v for n, v in found.items() if isinstance(v, Tensor) and v.is_floating_point()}

    def _run(self, env: Env, fetch: Fetch, implementations: Mapping[str, Any]) -> Env:
        calls = self.walk.calls(self.segment)
        done = run_nodes(calls, dict(env), fetch, implementations=implementations, keep=self.outs)
        return {n: done[n] for n in self.outs}

    def _loss(self, state: State, i: int, target: dict[fx.Node, Tensor]) -> Tensor:
        """Squared error of the rounded block's outputs relative to the dense ones."""
        made = self.weights(state)
        program = self.work.program

        def fetch(name: str) -> Tensor:
            if name in made:
                return made[name].to(program.param_type(program.params[name]).dtype)
            return self.work.fetch(name)

        out = self._run(self.learner.student[i], fetch, self.implementations)
        total = torch.zeros((), device=self.work.device)
        for node, dense in target.items():
            got = out[node]
            assert isinstance(got, Tensor)
            wide = dense.float()
            total = total + (got.float() - wide).square().mean() / wide.square().mean().clamp(1e-30)
        return total

    def weights(self, state: State) -> dict[str, Tensor]:
        """The block's rewritten parameters, by name, on their grids; gradients reach the state."""
        made: dict[str, Tensor] = {}
        view = replace(self.work.program, weights=_Over(self.work, made))
        for m in self.folds:
            if m.site.id in state.scales:
                made.update(migrated(view, m.site, scales_of(m, state, self.work)))
        for param, grid in self.grids.items():
            weight = made[param] if param in made else self.work.weight(param)
            wt = weight.flatten(0, -2).t()
            if type(grid) is Grid and grid.clip == "absmax" and not grid.whole:
                shape = (len(grid.spans(len(wt))), wt.shape[1])
                fit = learned_fit(wt, grid, *state.shares(param, shape, wt.device))
                made[param] = rounded(wt, grid, fit).t().reshape(weight.shape)
            else:
                on_grid = through(wt, rtn_t(wt.detach(), grid)[0])
                made[param] = on_grid.t().reshape(weight.shape)
        return made


@dataclass
class _Over:
    """A source of weights in which some have been replaced."""

    work: Work
    made: dict[str, Tensor]

    def load(self, name: str) -> Tensor:
        return self.made[name] if name in self.made else self.work.load(name)


def scales_of(m: Migration, state: State, work: Work) -> Tensor:
    """s of one edge [n_scales] as it is folded; 1 where nothing was learned."""
    found = state.scales.get(m.site.id)
    if found is None:
        return torch.ones(m.site.n_scales, device=work.device)
    made = m.call.made
    assert isinstance(made, Equivalence)
    s = found.clamp(-11.5, 9.2).exp()
    return through(s, made.rounded(s.detach(), work.rescaled_as(m.site)))


def settle(work: Work, state: State, solves: Sequence[Decision], record: dict[str, Any]) -> None:
    """Leave the ranges that were learned for the solves, on the weights as they now are."""
    for d in solves:
        if d.trained:
            grid = grid_of(d.scheme.codes, d.options)
            assert grid is not None
            wt = work.weight(d.site.param).flatten(0, -2).t()
            shape = (len(grid.spans(len(wt))), wt.shape[1])
            shares = state.shares(d.site.param, shape, wt.device)
            work.fits[d.site.param] = learned_fit(wt, grid, *shares)
            work.learned[d.site.param] = record
