"""The plan: every pass at every site with predicted bytes, made without loading a weight.

Planning runs the very rewrites that compiling keeps: the planned program has the final graph and
the exact shape and dtype of every packed parameter; solving only fills them. Structural passes come
first, on predicted choices; the rest is planned on the program that they leave.
"""

from __future__ import annotations

import time
from dataclasses import dataclass, field, replace
from math import prod
from typing import Any

from ..analysis.latents import renew_latents
from ..analysis.linears import LinearSite
from ..analysis.migrate import MigrationSite
from ..ir.errors import GateError, UsageError
from ..ir.events import Event, tell
from ..ir.graph import Program, info
from ..ir.refusal import Refusal
from ..ir.scheme import Scheme, Transform, View
from ..ir.segments import refresh_segments
from ..ir.serial import to_json
from ..ir.verifier import verify, verify_interface
from . import inputs, order
from .analysis import Analysis
from .equivalence import prepared
from .predict import predictions
from .recipe import Call, Recipe
from .restructure import Choose, Step, checks_on, own_call, take
from .snapshots import Snapshot, keep
from .structure import Choice, Structural

FORMAT = 1


@dataclass(frozen=True)
class Migration:
    """One scale migration: where, and by which pass."""

    site: MigrationSite
    call: Call


@dataclass(frozen=True)
class Decision:
    """What becomes of one weight: its scheme, how it is solved, and which passes said so.

    part: the experts, from and to, that are solved at once where not all of them fit in memory.
    """

    site: LinearSite
    scheme: Scheme
    options: dict[str, Any]
    passes: tuple[str, ...]
    part: tuple[int, int] | None = None

    @property
    def needs_gram(self) -> bool:
        """Whether the solve reads XᵀX (rtn and magnitude alone do not)."""
        o = self.options
        if o.get("sweeps") or o.get("clip") == "output" or o.get("residual") == "outputs":
            return True
        if o.get("rescale"):
            return True
        calibrated = o.get("mask_solver") in ("sparsegpt", "wanda") or o.get("weigh") == "gram"
        return calibrated or o.get("grid_solver") == "gptq"

    @property
    def needs(self) -> tuple[str, ...]:
        """Statistics of the value that it reads."""
        return ("gram",) * self.needs_gram + inputs.needs(self.scheme)

    @property
    def swept(self) -> bool:
        """Whether gradients of the whole model's loss decide its sparsity, or what counts."""
        return "allocate" in self.options or self.options.get("weigh") == "fisher"

    @property
    def trained(self) -> bool:
        """Whether the ranges of its grid are trained on the block's outputs."""
        return self.options.get("clip") == "learned"

    @property
    def bytes_are(self) -> str:
        """``exact``, or what the planned bytes are where the weights decide how much is stored."""
        sparse = self.scheme.sparse
        bound = ("csr", "columns")
        if sparse is not None and (
            sparse.kind in bound or {"density", "threshold"} & set(self.options)
        ):
            return "at most"
        if "fall" in self.options:
            return "at most"
        return "on average" if "allocate" in self.options else "exact"


@dataclass
class Stage:
    """One round: passes between two barriers; ``index`` is the recipe's number of it."""

    calls: tuple[Call, ...]
    index: int = 0
    migrations: list[Migration] = field(default_factory=list)
    decisions: dict[str, Decision] = field(default_factory=dict)

    @property
    def needing(self) -> list[str]:
        """Names of the passes that need calibration data here."""
        names = {m.call.name for m in self.migrations}
        decisions = [d for d in self.decisions.values() if d.needs or d.swept or d.trained]
        names |= {n for d in decisions for n in d.passes}
        return sorted(names)


@dataclass
class Plan:
    """What compiling will do. ``program`` is the final graph, its new parameters still empty.

    Attributes:
        captured: the model as it came.
        source: what the rounds work on: the captured program after the structural passes.
        steps: the structural passes in applied order; caches and exits, which come last, end it.
        mixing: how its overrides were chosen, where mixed precision did (see :mod:`.mixing`).
    """

    captured: Program
    source: Program
    program: Program
    recipe: Recipe
    stages: list[Stage] = field(default_factory=list)
    refusals: list[Refusal] = field(default_factory=list)
    snapshots: list[Snapshot] = field(default_factory=list)
    schemes: dict[str, Scheme] = field(default_factory=dict)
    steps: list[Step] = field(default_factory=list)
    mixing: dict[str, Any] | None = None

    @property
    def needing(self) -> list[str]:
        """Names of the passes that need calibration data."""
        names = {name for stage in self.stages for name in stage.needing}
        steps = {s.call.name for s in self.steps if _structural(s.call).calibrated()}
        return sorted(names | steps)

    @property
    def applied(self) -> list[tuple[int, Call]]:
        """Every pass in applied order, with the recipe's stage in which it was asked for."""
        rounds = [(s.index, c) for s in self.stages for c in s.calls]
        early = [(s.stage, s.call) for s in self.steps if s.call.made.stage not in order.LATE]
        late = [(s.stage, s.call) for s in self.steps if s.call.made.stage in order.LATE]
        return [*early, *rounds, *late]

    @property
    def exact(self) -> bool:
        """Whether the planned bytes are those that compiling gives."""
        found = {d.bytes_are for s in self.stages for d in s.decisions.values()}
        return found <= {"exact"} and all(step.choice.exact for step in self.steps)

    def rows(self) -> list[dict[str, Any]]:
        """One row per weight that some pass speaks about, in graph order."""
        merged: dict[str, dict[str, Any]] = {}
        after = self.program.stored_bytes()
        for stage in self.stages:
            for d in stage.decisions.values():
                before = self.source.params[d.site.param]
                row = merged.setdefault(d.site.id, {
                    "site": d.site.id, "role": d.site.role, "shape": list(before.shape),
                    "passes": [], "bytes_before": before.bytes,
                    "bytes_after": after[d.site.param],
                    "path": info(self.source.node(d.site.node)).path,
                })  # fmt: skip
                row["passes"] += list(d.passes)
                row["scheme"] = self.schemes[d.site.param].short
                row["solver"] = {k: v for k, v in d.options.items() if k.endswith("solver")}
                row["bytes_are"] = d.bytes_are
                note = _short_group(d)
                if note:
                    row["note"] = note
        return list(merged.values())

    def bits_per_weight(self) -> float | None:
        """Stored bits per weight over the weights that passes speak about."""
        rows = self.rows()
        weights = sum(prod(r["shape"]) for r in rows)
        return 8 * sum(r["bytes_after"] for r in rows) / weights if weights else None

    def predictions(self, tokens: int, length: int) -> dict[str, Any]:
        """What compiling will cost; see :func:`.predict.predictions`."""
        return predictions(self, tokens, length)

    def to_json(self, tokens: int = 0, length: int = 0) -> dict[str, Any]:
        """The plan as data; ``path`` fields are provenance, everything else is name-free."""
        return {
            "format_version": FORMAT,
            "recipe": self.recipe.to_json(),
            "order": [
                {"pass": c.name, "stage": i, "why": order.reason(c.made.stage)}
                for i, c in self.applied
            ],
            "structure": [s.to_json() for s in self.steps],
            "sites": self.rows(),
            "migrations": [
                {"site": m.site.id, "kind": m.site.kind, "channels": m.site.channels,
                 "scales": m.site.n_scales, "pass": m.call.name}
                for s in self.stages for m in s.migrations
            ],
            "refusals": [r.to_json() for r in self.refusals],
            "predicted": self.predictions(tokens, length),
            "bits_per_weight": self.bits_per_weight(),
            **({} if self.mixing is None else {"mixed": self.mixing}),
        }  # fmt: skip


def _short_group(d: Decision) -> str:
    codes = d.scheme.codes
    if codes is None or codes.group is None or d.site.in_features % codes.group == 0:
        return ""
    return f"last group of {d.site.in_features % codes.group} of {d.site.in_features} inputs"


def make_plan(program: Program, recipe: Recipe) -> Plan:
    """Plan a recipe for a captured program; nothing is loaded and the program is not changed.

    What structural passes will choose is predicted.
    Raises:
        UsageError: passes that disagree about a weight, or a knob that a site cannot take.
        GateError: nothing to do anywhere.
    """

    def choose(call: Call, analysis: Analysis, sites: list[Any]) -> Choice:
        return _structural(call).predict(analysis, sites)

    plan = lay_out(program, recipe, choose)
    add_late(plan, choose)
    if not any(snapshot.sites for snapshot in plan.snapshots):
        why = plan.refusals[0].reason if plan.refusals else "the graph has no such place"
        raise GateError(f"expected a place for {recipe.text()}, found none: {why}")
    _unused_overrides(plan)
    tell(Event("laid", {"plan": plan, "decided": False}))
    return plan


def _structural(call: Call) -> Structural:
    assert isinstance(call.made, Structural)
    return call.made


def lay_out(program: Program, recipe: Recipe, choose: Choose) -> Plan:
    """The plan of everything but caches and exits, which are chosen on the finished program."""
    captured = program.clone()
    Analysis(captured)
    plan = Plan(captured, captured, captured, recipe)
    plan.snapshots.append(Snapshot("captured", to_json(captured), (), 0, ""))
    staged = [(i, c) for i, calls in enumerate(recipe.stages) for c in calls]
    for i, call in staged:
        if isinstance(call.made, Structural) and call.made.stage not in order.LATE:
            _take(plan, i, call, choose)
    moving = (c.made for calls in recipe.stages for c in calls if c.made.stage == "equivalence")
    plan.source = prepared(plan.program, moving)
    plan.program = plan.source.clone()
    analysis = Analysis(plan.source)
    for i, calls in enumerate(recipe.stages):
        rest = tuple(c for c in calls if not isinstance(c.made, Structural))
        if rest:
            plan.stages.append(Stage(rest, i))
            _round(plan, plan.stages[-1], analysis)
    return plan


def add_late(plan: Plan, choose: Choose) -> bool:
    """Take the passes of caches and exits on the program that all else has left, in place.

    Returns whether there are any.
    """
    late = [
        (i, c) for i, s in enumerate(plan.recipe.stages) for c in s if c.made.stage in order.LATE
    ]
    for i, call in late:
        _take(plan, i, call, choose)
    return bool(late)


def _take(plan: Plan, stage: int, call: Call, choose: Choose) -> None:
    """One structural pass on the plan's program."""
    began = time.perf_counter()
    taken = take(plan.program, call, stage, plan.recipe.overrides, choose)
    plan.program = taken.program
    plan.steps.append(taken.step)
    plan.refusals += taken.refusals
    step, new = taken.step, taken.program
    plan.snapshots.append(keep(call, new, step.resized, step.sites, taken.refusals, began))


def _round(plan: Plan, stage: Stage, analysis: Analysis) -> None:
    """The passes of one round on the plan's program, in place."""
    final = plan.program
    for call in stage.calls:
        began, known = time.perf_counter(), len(plan.refusals)
        sites, refused = call.made.sites(analysis)
        plan.refusals += [replace(r, by=call.name) for r in refused]
        rewrote: list[str] = []
        here = 0
        for site in sites:
            own = own_call(call, plan.recipe.overrides, site, analysis, plan.refusals)
            if own is None:
                continue
            here += 1
            _state(plan, stage, own, site)
            rewrote += own.made.rewrite(final, site)
        renew_latents(final, call.name)
        refresh_segments(final)
        if checks_on():
            verify(final)
            verify_interface(plan.source, final)
        refused = plan.refusals[known:]
        plan.snapshots.append(keep(call, final, tuple(rewrote), here, refused, began))


def _state(plan: Plan, stage: Stage, call: Call, site: Any) -> None:
    """Add what the pass says about the site to the stage."""
    if isinstance(site, MigrationSite):
        _one_per_edge(stage, call, site)
        stage.migrations.append(Migration(site, call))
        folded = Transform("diagonal", folded=True)
        rows = {a.param for a in site.absorbers if len(plan.source.params[a.param].shape) == 2}
        for name, part in [(p, "t_in") for _, p, _ in site.consumers] + [
            (p, "t_out") for p in rows
        ]:
            old = plan.schemes.get(name, Scheme(View(name)))
            plan.schemes[name] = old.merge(**{part: folded})
        return
    old = plan.schemes.get(site.param, Scheme(View(site.param)))
    scheme = old.merge(**call.made.facts(site))
    scheme.require_built()
    _blocks_fit(call, site, scheme)
    plan.schemes[site.param] = scheme
    before = stage.decisions.get(site.param)
    options = dict(before.options) if before else {}
    for key, value in call.made.solving(site).items():
        if key in options and options[key] != value:
            raise UsageError(f"expected one value of {key}, found {options[key]} and {value}")
        options[key] = value
    passes = (*(before.passes if before else ()), call.name)
    stage.decisions[site.param] = Decision(site, scheme, options, passes)


def _one_per_edge(stage: Stage, call: Call, site: MigrationSite) -> None:
    other = next((m.call.name for m in stage.migrations if m.site.id == site.id), None)
    if other is not None:
        raise UsageError(
            f"expected one pass that writes scales on an edge, found {other!r} and {call.name!r} "
            f"on {site.id}: both would be measured on the same activations, and only scales that "
            "are measured after the first ones multiply",
            hint=f"--passes {other} --passes {call.name}, or overrides that part their sites",
        )


def _blocks_fit(call: Call, site: LinearSite, scheme: Scheme) -> None:
    m, c = scheme.mask, scheme.codes
    if m is None or c is None or not m.structured or c.group is None or c.group % m.m == 0:
        return
    raise UsageError(
        f"{call.name}:group: expected a multiple of {m.m} beside {m.n}:{m.m} zeros, "
        f"found {c.group}", where=site.id,
    )  # fmt: skip


def _unused_overrides(plan: Plan) -> None:
    """An override that names no site is a mistake in the recipe.

    Raises:
        UsageError: naming the override by its place.
    """
    analysis = Analysis(plan.source)
    blocks = len(analysis.blocks)
    sites = [s for s in analysis.weights if isinstance(s, LinearSite)]
    kinds = [s for s in analysis.migrations if isinstance(s, MigrationSite)]
    known = [(s.id, s.role, analysis.block_of(s.segment), blocks) for s in sites]
    known += [(s.id, s.kind, analysis.block_of(s.segment), blocks) for s in kinds]
    known += [one for step in plan.steps for one in step.covers]
    for i, o in enumerate(plan.recipe.overrides):
        if not any(o.covers(*one) for one in known):
            roles = sorted({r for _, r, _, _ in known})
            raise UsageError(
                f"overrides.{i}.where: expected at least one site, found none",
                hint=f"roles here: {', '.join(roles)}; blocks 0..{blocks - 1}",
            )
