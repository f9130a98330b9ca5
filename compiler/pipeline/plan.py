"""The plan: every pass at every site with predicted bytes, made without loading a weight.

Planning runs the very rewrites that compiling keeps: the planned program has the final graph and
the exact shape and dtype of every packed parameter; solving only fills them.
"""

from __future__ import annotations

import os
from collections.abc import Iterable
from dataclasses import dataclass, field, replace
from typing import Any

from ..analysis.cost import CostModel
from ..analysis.linears import LinearSite
from ..analysis.migrate import MigrationSite
from ..ir.errors import GateError, UsageError
from ..ir.graph import Program, info
from ..ir.refusal import Refusal
from ..ir.scheme import Scheme, Transform, View
from ..ir.segments import refresh_segments
from ..ir.serial import to_json
from ..ir.verifier import verify, verify_interface
from . import order
from .analysis import Analysis
from .recipe import Call, Override, Recipe, at_site

FORMAT = 1


@dataclass(frozen=True)
class Migration:
    """One scale migration: where, and by which pass."""

    site: MigrationSite
    call: Call


@dataclass(frozen=True)
class Decision:
    """What becomes of one weight: its scheme, how it is solved, and which passes said so."""

    site: LinearSite
    scheme: Scheme
    options: dict[str, Any]
    passes: tuple[str, ...]

    @property
    def needs_gram(self) -> bool:
        """Whether the solve reads XᵀX (rtn and magnitude alone do not)."""
        o = self.options
        if o.get("sweeps"):
            return True
        calibrated = o.get("mask_solver") in ("sparsegpt", "wanda")
        return calibrated or o.get("grid_solver") == "gptq"


@dataclass
class Stage:
    """One round: passes between two barriers."""

    calls: tuple[Call, ...]
    migrations: list[Migration] = field(default_factory=list)
    decisions: dict[str, Decision] = field(default_factory=dict)

    @property
    def needing(self) -> list[str]:
        """Names of the passes that need calibration data here."""
        names = {m.call.name for m in self.migrations}
        names |= {n for d in self.decisions.values() if d.needs_gram for n in d.passes}
        return sorted(names)


@dataclass(frozen=True)
class Snapshot:
    """The graph after one pass, without tensors, and the parameters that the pass rewrote."""

    name: str
    graph: dict[str, Any]
    rewrote: tuple[str, ...]
    sites: int
    effect: str


@dataclass
class Plan:
    """What compiling will do. ``program`` is the final graph, its new parameters still empty."""

    source: Program
    program: Program
    recipe: Recipe
    stages: list[Stage]
    refusals: list[Refusal]
    snapshots: list[Snapshot]
    schemes: dict[str, Scheme]

    @property
    def needing(self) -> list[str]:
        """Names of the passes that need calibration data."""
        return sorted({name for stage in self.stages for name in stage.needing})

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
                note = _short_group(d)
                if note:
                    row["note"] = note
        return list(merged.values())

    def bits_per_weight(self) -> float | None:
        """Stored bits per weight over the weights that passes speak about."""
        rows = self.rows()
        weights = sum(r["shape"][0] * r["shape"][1] for r in rows)
        return 8 * sum(r["bytes_after"] for r in rows) / weights if weights else None

    def predictions(self, tokens: int, length: int) -> dict[str, Any]:
        """Bytes of the artefact's weights, peak RAM and operations of the calibration.

        Args:
            tokens: of all calibration windows together; length: of one.
        """
        widest, grams = 0, 0
        for segment in self.source.segments:
            nodes = [self.source.node(n) for n in segment.nodes]
            held = [p for n in nodes if (p := self.source.param_of(n)) is not None]
            widest = max(widest, sum(4 * p.bytes // p.dtype.itemsize for p in held))
        for stage in self.stages:
            by_block: dict[str, dict[str, int]] = {}
            for d in stage.decisions.values():
                if d.needs_gram:
                    by_block.setdefault(d.site.segment, {})[d.site.reads] = (
                        d.site.in_features**2 * 4
                    )
            grams = max([grams, *(sum(v.values()) for v in by_block.values())])
        flops, stream = self._forward(tokens // length, length) if tokens and length else (0, 0)
        return {
            "bytes_before": self.source.weight_bytes(),
            "bytes_after": self.program.weight_bytes(),
            "ram_bound": widest + 3 * grams + 2 * stream,
            "calibration_flops": 2 * flops * len(self.stages),
            "calibration_tokens": tokens,
        }

    def _forward(self, windows: int, length: int) -> tuple[int, int]:
        """(operations of one forward over all windows, bytes that flow between two blocks)."""
        costs = CostModel(self.source, max(windows, 1), length)
        between = self.source.segments[1].live_in if len(self.source.segments) > 1 else ()
        stream = sum(costs.bytes_of(self.source.node(n)) for n in between)
        return costs.table()["total"]["flops"], stream

    def to_json(self, tokens: int = 0, length: int = 0) -> dict[str, Any]:
        """The plan as data; ``path`` fields are provenance, everything else is name-free."""
        return {
            "format_version": FORMAT,
            "recipe": self.recipe.to_json(),
            "order": [
                {"pass": c.name, "stage": i, "why": order.reason(c.made.stage)}
                for i, s in enumerate(self.stages)
                for c in s.calls
            ],
            "sites": self.rows(),
            "migrations": [
                {"site": m.site.id, "kind": m.site.kind, "channels": m.site.channels,
                 "scales": m.site.n_scales, "pass": m.call.name}
                for s in self.stages for m in s.migrations
            ],
            "refusals": [r.to_json() for r in self.refusals],
            "predicted": self.predictions(tokens, length),
            "bits_per_weight": self.bits_per_weight(),
        }  # fmt: skip


def _short_group(d: Decision) -> str:
    codes = d.scheme.codes
    if codes is None or codes.group is None or d.site.in_features % codes.group == 0:
        return ""
    return f"last group of {d.site.in_features % codes.group} of {d.site.in_features} inputs"


def checks_on() -> bool:
    """Whether the verifier runs after each pass (on unless LLMC_CHECK=0)."""
    return os.environ.get("LLMC_CHECK", "1") != "0"


def make_plan(program: Program, recipe: Recipe) -> Plan:
    """Plan a recipe for a captured program; nothing is loaded and the program is not changed.

    Raises:
        UsageError: passes that disagree about a weight, or a knob that a site cannot take.
        GateError: nothing to do anywhere.
    """
    source = program.clone()
    analysis = Analysis(source)
    final = source.clone()
    plan = Plan(source, final, recipe, [], [], [], {})
    plan.snapshots.append(Snapshot("captured", to_json(final), (), 0, ""))
    touched = 0
    for calls in recipe.stages:
        stage = Stage(calls)
        for call in calls:
            sites, refused = call.made.sites(analysis)
            plan.refusals += [replace(r, by=call.name) for r in refused]
            rewrote: list[str] = []
            here = 0
            for site in sites:
                own = _own_call(call, recipe.overrides, site, analysis, plan.refusals)
                if own is None:
                    continue
                here += 1
                rewrote += own.made.rewrite(final, site)
                _state(plan, stage, own, site)
            refresh_segments(final)
            if checks_on():
                verify(final)
                verify_interface(source, final)
            touched += here
            snap = Snapshot(call.name, to_json(final), tuple(rewrote), here, str(call.made.effect))
            plan.snapshots.append(snap)
        plan.stages.append(stage)
    if not touched:
        why = plan.refusals[0].reason if plan.refusals else "the graph has no such place"
        raise GateError(f"expected a place for {recipe.text()}, found none: {why}")
    _unused_overrides(recipe.overrides, analysis)
    return plan


def _own_call(
    call: Call, overrides: Iterable[Override], site: Any, analysis: Analysis, out: list[Refusal]
) -> Call | None:
    role = getattr(site, "role", getattr(site, "kind", ""))
    block = analysis.block_of(site.segment)
    own = at_site(call, list(overrides), site.id, role, block, len(analysis.blocks))
    if own is None:
        node = getattr(site, "node", getattr(site, "value", site.id))
        out.append(Refusal(call.name, node, "the recipe skips it here", "override"))
        return None
    again = own.made.test(site) if own is not call else None
    if again is not None:
        out.append(again)
        return None
    return own


def _state(plan: Plan, stage: Stage, call: Call, site: Any) -> None:
    """Add what the pass says about the site to the stage."""
    if isinstance(site, MigrationSite):
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
    before = stage.decisions.get(site.node)
    options = dict(before.options) if before else {}
    for key, value in call.made.solving(site).items():
        if key in options and options[key] != value:
            raise UsageError(f"expected one value of {key}, found {options[key]} and {value}")
        options[key] = value
    passes = (*(before.passes if before else ()), call.name)
    stage.decisions[site.node] = Decision(site, scheme, options, passes)


def _blocks_fit(call: Call, site: LinearSite, scheme: Scheme) -> None:
    m, c = scheme.mask, scheme.codes
    if m is None or c is None or not m.structured or c.group is None or c.group % m.m == 0:
        return
    raise UsageError(
        f"{call.name}:group: expected a multiple of {m.m} beside {m.n}:{m.m} zeros, "
        f"found {c.group}", where=site.id,
    )  # fmt: skip


def _unused_overrides(overrides: Iterable[Override], analysis: Analysis) -> None:
    """An override that names no site is a mistake in the recipe.

    Raises:
        UsageError: naming the override by its place.
    """
    sites = [s for s in analysis.linears if isinstance(s, LinearSite)]
    kinds = [s for s in analysis.migrations if isinstance(s, MigrationSite)]
    known = [(s.id, s.role, s.segment) for s in sites] + [(s.id, s.kind, s.segment) for s in kinds]
    for i, o in enumerate(overrides):
        blocks = len(analysis.blocks)
        if not any(o.covers(s, r, analysis.block_of(g), blocks) for s, r, g in known):
            roles = sorted({r for _, r, _ in known})
            raise UsageError(
                f"overrides.{i}.where: expected at least one site, found none",
                hint=f"roles here: {', '.join(roles)}; blocks 0..{blocks - 1}",
            )
