"""How many and which units of each dependency group stay: targets, exact counts, the two rankings.

Counts follow from shapes alone, so that a plan knows every size before a weight is loaded. A share
counts the parameters of the repeated blocks; embeddings and head count only in ``params``.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import NoReturn

import torch
from torch import Tensor

from ..analysis.blocks import is_block
from ..analysis.groups import Group
from ..ir.errors import UsageError
from ..ir.graph import Program

UNITS: dict[str, tuple[str, ...]] = {
    "neuron": ("neuron",),
    "head": ("head", "kv_group"),
    "hidden": ("hidden",),
    "expert": ("expert",),
}
"""Units by the word that a user says, and the kinds of group that it means."""

UNIT_OF = {kind: unit for unit, kinds in UNITS.items() for kind in kinds}
ROUNDED = ("neuron", "hidden")
"""Units whose counts are rounded to a multiple; heads and experts are whole tiles already."""


@dataclass(frozen=True)
class Target:
    """What is asked for: one of the three.

    Attributes:
        remove: share of the parameters in repeated blocks that goes, above 0 and below 1.
        params: how many parameters the whole program keeps at most.
        kept: how many units each group keeps, by unit.
    """

    remove: float | None = None
    params: int | None = None
    kept: Mapping[str, int] = field(default_factory=dict)


@dataclass(frozen=True)
class Rounding:
    """Steps in which units go.

    Attributes:
        multiple: neurons and hidden channels are kept in multiples of it.
        everywhere: False leaves groups of fewer than eight multiples to single units.
    """

    multiple: int = 1
    everywhere: bool = True

    def step(self, group: Group) -> int:
        """Units of the group that go together."""
        small = not self.everywhere and group.units < 8 * self.multiple
        return 1 if UNIT_OF[group.kind] not in ROUNDED or small else self.multiple


def inside_blocks(program: Program) -> set[str]:
    """Names of the trained parameters of repeated blocks, which are what a share counts."""
    inside = {n for s in program.segments if is_block(s.name) for n in s.nodes}
    params = (program.param_of(n) for n in program.graph.nodes if n.name in inside)
    return {p.name for p in params if p is not None and p.trained}


class Ledger:
    """Parameters of a program as a function of how many units each group keeps.

    A parameter that two groups cut along two axes shrinks by the product, as it will be.
    """

    def __init__(self, program: Program, groups: Sequence[Group], rounding: Rounding) -> None:
        self.groups = {g.id: g for g in groups}
        self.steps = {g.id: rounding.step(g) for g in groups}
        # An expert layer keeps as many as each token chooses.
        floor = {g.id: max(self.steps[g.id], g.least) for g in groups}
        self.floor = {g.id: min(floor[g.id], g.units) for g in groups}
        self.shapes: dict[str, tuple[int, ...]] = {}
        for node in program.graph.nodes:
            param = program.param_of(node)
            if param is not None and param.trained:
                self.shapes[param.name] = param.shape
        self.inside = inside_blocks(program)
        self.cuts: dict[str, dict[tuple[int, str], float]] = {}
        for g in groups:
            for m in g.members:
                if m.param in self.shapes:
                    width = int((m.unit_of >= 0).sum()) / g.units
                    self.cuts.setdefault(m.param, {})[m.axis, g.id] = width

    def count(self, kept: Mapping[str, float], *, inside: bool) -> float:
        """Parameters that are left, in repeated blocks or in all."""
        return sum(
            self._numel(name, shape, kept)
            for name, shape in self.shapes.items()
            if not inside or name in self.inside
        )

    def _numel(self, name: str, shape: tuple[int, ...], kept: Mapping[str, float]) -> float:
        left = list(map(float, shape))
        for (axis, group), width in self.cuts.get(name, {}).items():
            left[axis] -= width * (self.groups[group].units - kept.get(group, self.units(group)))
        out = 1.0
        for size in left:
            out *= size
        return out

    def units(self, group: str) -> int:
        """Units that the group has."""
        return self.groups[group].units

    def cost(self, group: str, *, inside: bool) -> float:
        """Parameters that one unit takes while nothing else is cut."""
        return self.count({}, inside=inside) - self.count(
            {group: self.units(group) - 1}, inside=inside
        )

    def round(self, group: str, wanted: float) -> int:
        """The nearest count that the group may keep."""
        step, top = self.steps[group], self.units(group)
        return min(max(int(wanted / step + 0.5) * step, self.floor[group]), top)

    def wanted(self, target: Target) -> tuple[float, bool]:
        """(parameters that are to be left, whether only those in blocks count).

        Raises:
            UsageError: the target asks for more than what may go, or for growth.
        """
        inside = target.params is None
        full = self.count({}, inside=inside)
        low = self.count(dict(self.floor), inside=inside)
        if target.params is not None:
            if not low <= target.params <= full:
                raise UsageError(
                    f"params: expected {low:.0f} to {full:.0f} parameters, found {target.params}",
                    hint="below that a layer would be empty; add units= or drop protection",
                )
            return float(target.params), False
        assert target.remove is not None
        most = (full - low) / full if full else 0.0
        if target.remove > most:
            kinds = "+".join(sorted({UNIT_OF[g.kind] for g in self.groups.values()}))
            raise UsageError(
                f"remove: expected at most {int(most * 1000) / 1000:g} of the blocks' parameters "
                f"over {kinds or 'nothing'}, found {target.remove:g}: a layer would be empty"
            )
        return full * (1 - target.remove), True


def counts(ledger: Ledger, target: Target) -> dict[str, int]:
    """How many units each group keeps, one share for all, rounded kind by kind.

    The coarsest kind is rounded first; what its rounding gave or took, the finer ones make up.

    Raises:
        UsageError: a target out of reach, or more units than a group has.
    """
    if target.kept:
        return _absolute(ledger, target.kept)
    wanted, inside = ledger.wanted(target)
    kinds = _by_unit(ledger)

    def coarseness(kind: str) -> float:
        return max(ledger.steps[g] * ledger.cost(g, inside=inside) for g in kinds[kind])

    done: dict[str, int] = {}
    for kind in sorted(kinds, key=lambda k: (-coarseness(k), k)):
        share = _share(ledger, done, wanted, inside=inside)
        for g in kinds[kind]:
            done[g] = ledger.round(g, (1 - share) * ledger.units(g))
    if all(done[g] == ledger.units(g) for g in done):
        _too_little(ledger, target, len(done))
    if not inside:
        for kind in sorted(kinds, key=coarseness):
            _lower(ledger, done, kinds[kind], wanted)
    return {g: done[g] for g in ledger.groups}


def _lower(ledger: Ledger, done: dict[str, int], names: Sequence[str], wanted: float) -> None:
    """Take one more step in all of a kind's groups for as long as more is left than wanted."""
    while ledger.count(done, inside=False) > wanted:
        less = {
            g: max(ledger.floor[g], (done[g] - 1) // ledger.steps[g] * ledger.steps[g])
            for g in names
        }
        if all(done[g] == less[g] for g in names):
            break
        done.update(less)


def _too_little(ledger: Ledger, target: Target, together: int) -> NoReturn:
    """A target that rounds to nothing is a mistake: nothing would happen, and nobody would know."""
    inside = target.params is None
    step = min(ledger.steps[g] * ledger.cost(g, inside=inside) for g in ledger.groups)
    full = ledger.count({}, inside=inside)
    if inside:
        least = f"remove: expected at least {step * together / 2 / full:.3g}"
    else:
        least = f"params: expected at most {full - step * together / 2:.0f}"
    found = target.remove if inside else target.params
    raise UsageError(f"{least}, half a step of the finest unit, found {found}: nothing would go")


def _share(
    ledger: Ledger, done: Mapping[str, int], wanted: float, *, inside: bool
) -> float:  # fmt: skip
    """The share of every group not done yet that leaves ``wanted`` parameters, by bisection."""
    low, high = 0.0, 1.0
    rest = [g for g in ledger.groups if g not in done]
    for _ in range(60):
        share = (low + high) / 2
        kept = {g: max(float(ledger.floor[g]), (1 - share) * ledger.units(g)) for g in rest}
        if ledger.count({**kept, **done}, inside=inside) > wanted:
            low = share
        else:
            high = share
    return high


def _absolute(ledger: Ledger, kept: Mapping[str, int]) -> dict[str, int]:
    out = {g: ledger.units(g) for g in ledger.groups}
    for unit, count in kept.items():
        mine = [g for g in ledger.groups.values() if UNIT_OF[g.kind] == unit]
        for g in mine:
            if not g.least <= count <= g.units:
                raise UsageError(
                    f"{plural(unit)}: expected {g.least} to {g.units} kept, found {count}",
                    where=g.id,
                )
            out[g.id] = count
        if not mine:
            raise UsageError(f"{plural(unit)}: expected such a group to cut, found none")
    return out


def plural(unit: str) -> str:
    """The knob that counts a unit: neurons, heads, hidden, experts."""
    return unit if unit == "hidden" else unit + "s"


def smallest(score: Tensor, count: int) -> Tensor:
    """The ``count`` units that score lowest, in that order; among equals the later goes first."""
    order = torch.argsort(score.flip(0), stable=True)
    return (len(score) - 1 - order)[:count]


def local(score: Tensor, count: int) -> Tensor:
    """The ``count`` best units of one group: int64, ascending."""
    gone = smallest(score, len(score) - count)
    stays = torch.ones(len(score), dtype=torch.bool)
    stays[gone] = False
    return stays.nonzero().view(-1)


@dataclass(frozen=True)
class _Packet:
    """Units that go at once: some of one group, or of every group of a kind."""

    priority: float
    cost: float
    units: tuple[tuple[str, Tensor], ...]


def ranked(
    ledger: Ledger, target: Target, priority: Mapping[str, Tensor], *, together: bool = False
) -> dict[str, Tensor]:  # fmt: skip
    """Units that stay when groups compete: lowest priority goes first, until the target.

    Args:
        priority: by group id, comparable between groups, [units].
        together: groups of one kind lose equally many units, so that only kinds compete.
    Returns:
        int64 ascending by group id.
    Raises:
        UsageError: a target out of reach, groups whose costs do not add, or groups of one kind
            but of several widths beside ``together``.
    """
    check_costs(ledger)
    wanted, inside = ledger.wanted(target)
    excess = ledger.count({}, inside=inside) - wanted
    rows = {name: _packets(ledger, name, priority[name], inside=inside) for name in ledger.groups}
    packets = [p for row in rows.values() for p in row]
    if together:
        # Only blocks are to end up equal: what lies outside them competes by itself.
        kinds = [
            [g for g in kind if ledger.cost(g, inside=True) > 0]
            for kind in _by_unit(ledger).values()
        ]
        equal = {g for kind in kinds for g in kind}
        packets = [p for g, row in rows.items() if g not in equal for p in row]
        packets += [p for kind in kinds if kind for p in _merged(rows, kind)]
    stays = {g: torch.ones(ledger.units(g), dtype=torch.bool) for g in ledger.groups}
    # What costs nothing brings the target no nearer.
    for packet in sorted((p for p in packets if p.cost > 0), key=lambda p: p.priority):
        # A share is met to the nearest step, a number of parameters is not passed.
        if excess < packet.cost / 2 if inside else excess <= 0:
            continue  # a smaller packet further on may still fit
        for name, part in packet.units:
            stays[name][part] = False
        excess -= packet.cost
    if all(bool(mask.all()) for mask in stays.values()):
        _too_little(ledger, target, 1)
    return {g: mask.nonzero().view(-1) for g, mask in stays.items()}


def _packets(ledger: Ledger, name: str, score: Tensor, *, inside: bool) -> list[_Packet]:
    """One group's units in the order in which they go."""
    order = smallest(score, ledger.units(name) - ledger.floor[name])
    cost = ledger.cost(name, inside=inside)
    return [
        _Packet(float(score[part].double().mean()), cost * len(part), ((name, part),))
        for part in _parts(order, ledger.units(name), ledger.steps[name])
    ]


def _merged(rows: Mapping[str, list[_Packet]], names: Sequence[str]) -> Iterator[_Packet]:
    """Packets that take the same step in every group of a kind."""
    sizes = {len(rows[n]) for n in names}
    if len(sizes) > 1:
        raise UsageError(
            f"uniform: expected groups of one width, found {names[0]} and others that differ",
            hint="give uniform=false",
        )
    for step in zip(*(rows[n] for n in names), strict=True):
        cost = sum(p.cost for p in step)
        mean = sum(p.priority * p.cost for p in step) / cost
        yield _Packet(mean, cost, tuple(u for p in step for u in p.units))


def _by_unit(ledger: Ledger) -> dict[str, list[str]]:
    out: dict[str, list[str]] = {}
    for g in ledger.groups.values():
        out.setdefault(UNIT_OF[g.kind], []).append(g.id)
    return out


def _parts(order: Tensor, units: int, step: int) -> Iterable[Tensor]:
    """Units in the order in which they go, so many at once that multiples of ``step`` stay."""
    first = units % step or step
    return (p for p in (order[:first], *order[first:].split(step)) if len(p))


def check_costs(ledger: Ledger) -> None:
    """Raises UsageError where two groups cut one parameter along two axes: costs do not add."""
    for cuts in ledger.cuts.values():
        first, last = min(cuts), max(cuts)
        if first[0] != last[0]:
            raise UsageError(
                f"ranking: expected groups whose costs add, found {first[1]} and {last[1]} on one "
                "parameter", hint="give ranking=local, or one of the two units",
            )  # fmt: skip


def check_uniform(program: Program, counts: Mapping[str, int], groups: Sequence[Group]) -> None:
    """Raises UsageError where blocks would end up of different widths."""
    widths: dict[str, list[tuple[str, int]]] = {
        s.name: [] for s in program.segments if is_block(s.name)
    }
    for g in groups:
        if g.segment in widths:
            widths[g.segment].append((UNIT_OF[g.kind], counts[g.id]))
    first = next(iter(widths), "")
    for name, mine in widths.items():
        if sorted(mine) != sorted(widths[first]):
            shown = [", ".join(f"{n} {plural(u)}" for u, n in sorted(w)) or "what it has"
                     for w in (widths[first], mine)]  # fmt: skip
            raise UsageError(
                f"uniform: expected one width in all blocks, found {shown[0]} in {first} and "
                f"{shown[1]} in {name}", hint="give uniform=false",
            )  # fmt: skip
