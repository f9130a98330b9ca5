"""Mixed precision, what there is to choose: options of the grid pass, fused groups, exact bytes.

Linears that read one value are one group and keep one scheme, because engines that serve a model
fuse them. What the recipe's own overrides say about the grid pass stays as they say it.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Any

from ..analysis.linears import LinearSite
from ..ir.errors import GateError, UsageError
from ..ir.graph import Program
from . import order
from .analysis import Analysis
from .plan import Plan, Stage, lay_out
from .recipe import Call, Override, Recipe, at_site, call_text, parse_passes
from .registry import find
from .structure import Choice, Structural

DENSE = "dense"
GRID, BESIDE = "grid", "compensation"


@dataclass(frozen=True)
class Option:
    """What may become of a group: a grid pass, or none, so that it stays as it is."""

    call: Call | None

    @property
    def text(self) -> str:
        """As in ``--candidates``: ``w3:group=32``, or ``dense``."""
        return DENSE if self.call is None else call_text(self.call)


@dataclass(frozen=True)
class Fused:
    """Sites that read one value and keep one scheme.

    ``bytes`` are stored bytes by option, None where it has no place; ``weights`` their number.
    """

    id: str
    sites: tuple[LinearSite, ...]
    bytes: tuple[int | None, ...]
    weights: int

    @property
    def allowed(self) -> list[int]:
        """Indices of the options that have a place here."""
        return [i for i, size in enumerate(self.bytes) if size is not None]

    def size(self, option: int) -> int:
        """Stored bytes with that option."""
        found = self.bytes[option]
        assert found is not None
        return found


@dataclass(frozen=True)
class Table:
    """Groups × options of one recipe on one program.

    Attributes:
        base: the grid pass as the recipe asks for it, in stage ``stage`` of the recipe.
        rest: bytes of the model that no choice changes. whole: bytes of the captured model.
        source: the program whose linears are chosen for.
    """

    recipe: Recipe
    base: Call
    stage: int
    options: tuple[Option, ...]
    groups: tuple[Fused, ...]
    rest: int
    whole: int
    source: Program

    @property
    def weights(self) -> int:
        """Weights that the grid pass speaks about."""
        return sum(g.weights for g in self.groups)

    def size(self, choice: Sequence[int]) -> int:
        """Stored bytes of the groups with an option each."""
        return sum(g.size(i) for g, i in zip(self.groups, choice, strict=True))

    def uniform(self, option: int) -> list[int] | None:
        """One option everywhere but where the recipe fixes another; None where it has no place."""
        out = []
        for g in self.groups:
            if option not in g.allowed and len(g.allowed) > 1:
                return None
            out.append(option if option in g.allowed else g.allowed[0])
        return out

    def recipe_of(self, choice: Sequence[int]) -> Recipe:
        """The recipe in which each group has its option."""
        return self.recipe_with([self.options[i] for i in choice])

    def recipe_with(self, chosen: Sequence[Option]) -> Recipe:
        """The recipe with an override for every option that is not its own grid pass."""
        more = []
        for option in dict.fromkeys(chosen):
            groups = [g for g, c in zip(self.groups, chosen, strict=True) if c == option]
            if option.call != self.base:
                sites = tuple(s.id for g in groups for s in g.sites)
                more.append(_override(self.recipe, self.base, option, sites))
        return replace(self.recipe, overrides=(*self.recipe.overrides, *more))


def grid_call(recipe: Recipe, flag: str) -> tuple[int, Call]:
    """The recipe's stage and its pass whose grid is chosen for.

    Raises:
        UsageError: no pass writes codes, or one changes shapes; ``flag`` is what asked.
    """
    found = [(i, c) for i, s in enumerate(recipe.stages) for c in s if c.made.stage == GRID]
    if not found:
        raise UsageError(
            f"{flag}: expected a pass that writes codes in the recipe, found {recipe.text()}",
            hint="--passes w4",
        )
    for call in recipe.calls:
        if isinstance(call.made, Structural) and call.made.stage not in order.LATE:
            raise UsageError(
                f"{flag}: expected passes that keep every shape, found {call.name!r}",
                hint=f"compile {call.name} alone, export the result, and mix its widths then",
            )
    return found[-1]


def options_for(base: Call, given: str | None, flag: str) -> tuple[Option, ...]:
    """The options: those given, else the widths of the recipe's grid pass, and dense.

    Args:
        given: passes with knobs as in ``--passes``, and ``dense``; knobs that are not said are
            those that the recipe gives its own grid pass, where the pass is one of its widths.
    Raises:
        UsageError: a grid pass of one width and nothing given, or what is no grid pass.
    """
    widths = _widths(base)
    if given is None:
        if len(widths) < 2:
            raise UsageError(
                f"{flag}: expected a grid pass of several widths, found {base.name!r}",
                hint=f"--candidates {base.name},w3,w8,dense, or --passes w4 or nf4",
            )
        return (*(Option(_like(base, name, {})) for name in widths), Option(None))
    found: list[Option] = []
    for name, knobs in parse_passes(given):
        if name == DENSE and not knobs:
            option = Option(None)
        else:
            made = find(name)
            if made.stage != GRID:
                raise UsageError(
                    f"--candidates: expected passes that write codes, or dense, found {name!r}"
                )
            option = Option(
                _like(base, name, knobs) if name in widths else Call(name, made.build(name, knobs))
            )
        if option in found:
            raise UsageError(f"--candidates: expected {option.text!r} once")
        found.append(option)
    if len(found) < 2:
        raise UsageError(f"--candidates: expected at least two, found {given!r}")
    return tuple(found)


def _widths(base: Call) -> list[str]:
    """Names of the pass that differ in ``bits`` alone, fewest first."""
    variants = type(base.made).variants
    keys = set(base.preset)
    named = {n: p["bits"] for n, p in variants.items() if set(p) == keys and "bits" in p}
    same = {k: v for k, v in base.preset.items() if k != "bits"}
    fits = [n for n in named if {k: v for k, v in variants[n].items() if k != "bits"} == same]
    return sorted(fits, key=named.__getitem__)


def _like(base: Call, name: str, knobs: dict[str, Any]) -> Call:
    """The width of that name, with the knobs that were given to the base but for ``knobs``."""
    kept = {k: v for k, v in base.made.values().items() if base.made.explicit(k)}
    return Call(name, find(name).build(name, kept | knobs))


def _override(recipe: Recipe, base: Call, option: Option, sites: tuple[str, ...]) -> Override:
    if option.call is None:
        beside = [c.name for s in recipe.stages if base in s for c in s if c.made.stage == BESIDE]
        return Override(sites=sites, skip=(base.name, *beside))
    made = option.call.made
    knobs = {k: v for k, v in made.values().items() if made.explicit(k)}
    return Override(sites=sites, use=((base.name, option.call.name, tuple(sorted(knobs.items()))),))


def tabulate(program: Program, recipe: Recipe, given: str | None, flag: str) -> Table:
    """What there is to choose and what each choice stores. Loads no weight.

    Raises:
        UsageError: a recipe that leaves nothing to choose. GateError: no place for its grid pass.
    """
    stage, base = grid_call(recipe, flag)
    options = options_for(base, given, flag)
    plan = planned(program, recipe)
    analysis = Analysis(plan.source)
    mine = _decided(plan, stage, base.name)
    groups: dict[str, list[LinearSite]] = {}
    for site in mine:
        groups.setdefault(site.group, []).append(site)
    if not groups:
        why = plan.refusals[0].reason if plan.refusals else "the graph has no such place"
        raise GateError(f"expected a place for {base.name}, found none: {why}")
    blocks = len(analysis.blocks)

    def fixed(site: LinearSite) -> bool:
        block = analysis.block_of(site.segment)
        return at_site(base, recipe.overrides, site.id, site.role, block, blocks) != base

    free = {name: not any(map(fixed, sites)) for name, sites in groups.items()}
    plans = [planned(program, _everywhere(recipe, base, o)) for o in options]
    stored = [p.program.stored_bytes() for p in plans]
    taken = [
        mine if o.call is None else _decided(p, stage, o.call.name)
        for p, o in zip(plans, options, strict=True)
    ]
    has = [{s.id for s in sites} for sites in taken]
    out = []
    own = plan.program.stored_bytes()
    if not all(free.values()) and Option(base) not in options:
        options = (*options, Option(base))
    for name, sites in groups.items():
        sizes = [
            sum(stored[i][s.param] for s in sites)
            if free[name] and all(s.id in has[i] for s in sites)
            else None
            for i in range(len(plans))
        ]
        sizes += [None] * (len(options) - len(sizes))
        if not free[name]:
            sizes[options.index(Option(base))] = sum(own[s.param] for s in sites)
        weights = sum(s.in_features * s.out_features for s in sites)
        out.append(Fused(name, tuple(sites), tuple(sizes), weights))
    rest = [p.program.weight_bytes() - sum(b[s.param] for s in mine)
            for p, b in zip(plans, stored, strict=True)]  # fmt: skip
    return Table(
        recipe, base, stage, options, tuple(out), max(rest), plan.captured.weight_bytes(),
        plan.source,
    )  # fmt: skip


def _everywhere(recipe: Recipe, base: Call, option: Option) -> Recipe:
    if option.call == base:
        return recipe
    return replace(recipe, overrides=(*recipe.overrides, _override(recipe, base, option, ())))


def _decided(plan: Plan, stage: int, name: str) -> list[LinearSite]:
    rounds: list[Stage] = [s for s in plan.stages if s.index == stage]
    return [d.site for s in rounds for d in s.decisions.values() if name in d.passes]


def planned(program: Program, recipe: Recipe) -> Plan:
    """The plan of a recipe that keeps every shape; it may leave everything as it is."""

    def choose(call: Call, analysis: Analysis, sites: list[Any]) -> Choice:
        assert isinstance(call.made, Structural)
        return call.made.predict(analysis, sites)

    return lay_out(program, early(recipe), choose)


def early(recipe: Recipe) -> Recipe:
    """The recipe without caches and exits, which come on top of finished weights."""
    stages = [tuple(c for c in s if c.made.stage not in order.LATE) for s in recipe.stages]
    return replace(recipe, stages=tuple(stages))
