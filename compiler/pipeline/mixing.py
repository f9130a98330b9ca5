"""Mixed precision: a grid pass per fused group, so that few bytes cost little loss.

Every option is solved everywhere once and judged on a held-out slice of the calibration text. What
its solves tell about each group (:mod:`.impact`) goes into a knapsack, whose answers are compiled
and judged in turn, beside one option everywhere. The outcome is an ordinary recipe with overrides.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass, field, replace
from typing import Any

from torch import Tensor

from ..ir.errors import GateError, UsageError, nearest
from ..ir.events import Event, Listener, silent
from ..ir.graph import Program
from ..solvers.knapsack import Frontier, frontier
from . import impact
from .candidates import Option, Table, planned
from .compile import Compiled, compile_plan
from .impact import MEASURES, Noted
from .measure import Options, loss
from .plan import Plan, make_plan
from .recipe import Recipe
from .target import Target

SENSITIVITY = ("auto", *MEASURES)
# Points of a frontier that the report keeps; tries that a search for a perplexity may take.
SHOWN, TRIES = 64, 8


def check_sensitivity(name: str) -> None:
    """Raises UsageError for an unknown measure, the nearest named."""
    if name not in SENSITIVITY:
        raise UsageError(
            f"--sensitivity: expected one of {', '.join(SENSITIVITY)}, found {name!r}",
            hint=nearest(name, SENSITIVITY),
        )


@dataclass(frozen=True)
class Slices:
    """Windows to choose on and windows to judge by, int64 [n, length], and where the latter lie."""

    tokens: Tensor
    held: Tensor
    record: dict[str, Any]


@dataclass(frozen=True)
class Mixture:
    """The recipe that was chosen, and how."""

    recipe: Recipe
    record: dict[str, Any]

    def plan(self, program: Program) -> Plan:
        """The recipe's plan, which knows how it was chosen."""
        return replace(make_plan(program, self.recipe), mixing=self.record)


@dataclass(frozen=True)
class Try:
    """One choice that was compiled: by what, its options, its mean loss on the held-out slice."""

    by: str
    choice: tuple[int, ...]
    bytes: int
    loss: float
    predicted: float | None = None


@dataclass
class _Search:
    """What is known so far; ``judged`` are the tries by choice."""

    program: Program
    table: Table
    slices: Slices
    options: Options
    listener: Listener
    judged: dict[tuple[int, ...], Try] = field(default_factory=dict)
    dense: float = 0.0
    rises: dict[str, list[list[float | None]]] = field(default_factory=dict)
    frontiers: dict[str, Frontier] = field(default_factory=dict)

    # ** measuring **

    def judge(self, program: Program) -> float:
        return loss(program, self.slices.held, self.options)

    def compiled(self, choice: Sequence[int], by: str, listener: Listener) -> Compiled:
        self.listener(Event("mix", {"by": by, "bits": self.bits(choice)}))
        plan = planned(self.program, self.table.recipe_of(choice))
        return compile_plan(plan, self.slices.tokens, self.options, listener)

    def bits(self, choice: Sequence[int]) -> float:
        return 8 * self.table.size(choice) / self.table.weights

    def trial(self, choice: Sequence[int], by: str, predicted: float | None = None) -> Try:
        """The choice compiled and judged, once."""
        key = tuple(choice)
        if key not in self.judged:
            found = self.judge(self.compiled(key, by, self.listener).program)
            self.judged[key] = Try(by, key, self.table.size(key), found, predicted)
        return self.judged[key]

    def survey(self, measures: Sequence[str]) -> None:
        """Solve every option everywhere, judge it, and predict what it costs in each group."""
        table, slices = self.table, self.slices
        self.listener(Event("mix", {"by": "the model as it is", "bits": 0.0}))
        self.dense = self.judge(table.source)
        sites = [s for g in table.groups for s in g.sites]
        known = None
        if "fisher" in measures:
            known = impact.information(
                table.source, slices.tokens, sites, self.options, self.listener
            )
        self.rises = {m: [[None] * len(table.options) for _ in table.groups] for m in measures}
        alone = _Alone(self) if "loss" in measures else None
        for i, option in enumerate(table.options):
            everywhere = table.uniform(i)
            choice = everywhere or self._nearly(i)
            noted = Noted(self.listener)
            done = self.compiled(choice, f"{option.text} everywhere", noted)
            if everywhere is not None:
                key = tuple(choice)
                found = self.judge(done.program)
                self.judged[key] = Try(
                    f"{option.text} everywhere", key, table.size(key), found
                )  # fmt: skip
            for k, group in enumerate(table.groups):
                if choice[k] != i:
                    continue
                for m in measures:
                    if m == "loss":
                        assert alone is not None
                        self.rises[m][k][i] = alone.rise(done.program, k, i)
                    else:
                        info = known if m == "fisher" else None
                        self.rises[m][k][i] = impact.predicted(noted, group.sites, info)

    def _nearly(self, option: int) -> list[int]:
        """The option wherever it has a place, else what is first allowed."""
        return [option if option in g.allowed else g.allowed[0] for g in self.table.groups]

    def solve(self, measure: str) -> Frontier:
        """The frontier of one measure's predictions."""
        if measure not in self.frontiers:
            rows = self.rises[measure]
            groups = [
                [(g.size(i), _known(row[i])) for i in g.allowed]
                for g, row in zip(self.table.groups, rows, strict=True)
            ]
            self.frontiers[measure] = frontier(groups)
        return self.frontiers[measure]

    def at(self, measure: str, point: int) -> tuple[int, ...]:
        """The options of a frontier's point, counted as the table does."""
        chosen = self.solve(measure).choice(point)
        return tuple(g.allowed[c] for g, c in zip(self.table.groups, chosen, strict=True))

    # ** choosing **

    def within(self, budget: int) -> Try:
        """The try of least loss on the slice that fits: one option everywhere, or a mixture."""
        for m in self.rises:
            front = self.solve(m)
            point = front.index(budget)
            self.trial(self.at(m, point), m, float(front.loss[point]))
        fits = [t for t in self.judged.values() if t.bytes <= budget]
        return min(fits, key=lambda t: (t.loss, t.bytes))

    def reaching(self, wanted: float) -> Try:
        """The try of fewest bytes whose loss on the slice is at most ``wanted``.

        Bisection along the frontier of the first measure; the first points are those where the
        prediction, then the prediction corrected by what was measured, meets what is wanted.
        Raises:
            GateError: not even the option that stores most reaches it.
        """
        measure = next(iter(self.rises))
        front = self.solve(measure)
        fine = [t for t in self.judged.values() if t.loss <= wanted]
        low = -1
        high = min((front.index(t.bytes) for t in fine if t.bytes >= front.least),
                   default=len(front))  # fmt: skip
        factor = 1.0
        for i in range(TRIES):
            if high - low <= 1:
                break
            aim = low + 1 + int((front.loss[low + 1 : high] * factor > wanted - self.dense).sum())
            point = min(aim, high - 1) if i < 2 else (low + high) // 2
            predicted = float(front.loss[point])
            done = self.trial(self.at(measure, point), measure, predicted)
            if predicted > 0 and done.loss > self.dense:
                factor = (done.loss - self.dense) / predicted
            low, high = (low, point) if done.loss <= wanted else (point, high)
        if high == len(front):
            self.trial(self.at(measure, high - 1), measure, float(front.loss[-1]))
        fine = [t for t in self.judged.values() if t.loss <= wanted]
        if not fine:
            best = min(self.judged.values(), key=lambda t: t.loss)
            raise GateError(
                f"--budget: expected perplexity {math.exp(wanted):.4f} on the held-out slice, "
                f"reached {math.exp(best.loss):.4f} with {best.by} at {self.bits(best.choice):.4g} "
                f"bits per weight; the model as it is has {math.exp(self.dense):.4f}",
                hint="a larger --budget, or dense among --candidates",
            )
        return min(fine, key=lambda t: (t.bytes, t.loss))


def _known(rise: float | None) -> float:
    assert rise is not None
    return rise


class _Alone:
    """Programs in which one group alone is as an option leaves it, and all others stay.

    Raises:
        UsageError: scales move between layers, otherwise with each option, so that what one option
            solved does not fit beside what another did.
    """

    def __init__(self, search: _Search) -> None:
        self.search, self.table = search, search.table
        plan = self._plan([Option(None)] * len(self.table.groups))
        if any(s.migrations for s in plan.stages):
            raise UsageError(
                "--sensitivity loss: expected a recipe that moves no scales between layers, found "
                f"{self.table.recipe.text()}", hint="--sensitivity fisher",
            )  # fmt: skip
        self.rest = compile_plan(plan, search.slices.tokens, search.options).program
        self.held = search.slices.held[: impact.WINDOWS]
        self.base = loss(self.rest, self.held, search.options)

    def _plan(self, chosen: Sequence[Option]) -> Plan:
        return planned(self.search.program, self.table.recipe_with(chosen))

    def rise(self, solved: Program, group: int, option: int) -> float:
        """The rise of the loss with the tensors that ``solved`` holds for one group."""
        chosen = [Option(None)] * len(self.table.groups)
        chosen[group] = self.table.options[option]
        program = self._plan(chosen).program
        sources = {s.param for s in self.table.groups[group].sites}
        for name, param in list(program.params.items()):
            here = param.source in sources or name not in self.rest.params
            program.set_tensor(name, (solved if here else self.rest).weights.load(name))
        self.search.listener(Event("tick", {"where": self.table.groups[group].id}))
        return max(0.0, loss(program, self.held, self.search.options) - self.base)


def mix(
    program: Program,
    table: Table,
    target: Target,
    slices: Slices,
    options: Options,
    sensitivity: str = "auto",
    listener: Listener = silent,
) -> Mixture:
    """Choose an option for each group of a table.

    Args:
        sensitivity: the measure whose predictions are solved for; ``auto`` tries fisher and proxy
            and takes what loses less on the slice.
    Raises:
        UsageError: a target out of range. GateError: a perplexity that no choice reaches.
    """
    budget = None if target.kind == "budget" else target.bytes(table)
    measures: tuple[str, ...] = (sensitivity,)
    if sensitivity == "auto":
        measures = ("fisher",) if budget is None else ("fisher", "proxy")
    search = _Search(program, table, slices, options, listener)
    search.survey(measures)
    wanted = target.loss(search.dense) if budget is None else math.inf
    best = search.reaching(wanted) if budget is None else search.within(budget)
    return Mixture(table.recipe_of(best.choice), _record(search, target, budget, best))


def _record(search: _Search, target: Target, budget: int | None, best: Try) -> dict[str, Any]:
    """How the choice came about, as data: the table, the frontiers, everything that was judged."""
    table, dense = search.table, search.dense
    rows = []
    for k, (group, i) in enumerate(zip(table.groups, best.choice, strict=True)):
        rises = {m: r[k][i] for m, r in search.rises.items()}
        rows.append({
            "group": group.id, "sites": [s.id for s in group.sites],
            "roles": sorted({s.role for s in group.sites}), "option": table.options[i].text,
            "bytes": group.size(i), "bits": 8 * group.size(i) / group.weights,
            "predicted": rises,
        })  # fmt: skip
    tries = [
        {"by": t.by, "bytes": t.bytes, "bits": search.bits(t.choice), "loss": t.loss,
         "perplexity": math.exp(t.loss), "predicted_rise": t.predicted, "rise": t.loss - dense,
         "fits": budget is None or t.bytes <= budget, "chosen": t is best}
        for t in sorted(search.judged.values(), key=lambda t: t.bytes)
    ]  # fmt: skip
    return {
        "target": target.flag,
        "options": [o.text for o in table.options],
        "measures": list(search.rises),
        "held_out": search.slices.record,
        "dense": {"loss": dense, "perplexity": math.exp(dense)},
        "weights": table.weights,
        "budget_bytes": budget,
        "bytes": best.bytes,
        "bits": search.bits(best.choice),
        "model_bytes": table.rest + best.bytes,
        "model_share": (table.rest + best.bytes) / table.whole,
        "by": best.by,
        "table": rows,
        "frontier": {m: _points(f) for m, f in search.frontiers.items()},
        "tries": tries,
        "recipe": table.recipe_of(best.choice).to_mapping(),
    }


def _points(found: Frontier) -> dict[str, Any]:
    """At most :data:`SHOWN` points of a frontier, its ends among them."""
    last = len(found) - 1
    shown = sorted({round(i * last / (SHOWN - 1)) for i in range(SHOWN)})
    return {
        "exact": found.exact, "points": len(found),
        "bytes": found.bytes[shown].tolist(), "predicted": found.loss[shown].tolist(),
    }  # fmt: skip
