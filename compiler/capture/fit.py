"""The config that says what a program computes: found by search, proved by comparing graphs.

No table and no field name: a field is a candidate because it holds the size that changed. Models
are built without weights to see which shapes a change gives; what fits is captured and walked
beside the program, and only equality, op by op, is accepted.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import fx

from ..ir.errors import ModelError, UsageError
from ..ir.graph import Program, tensor_type
from .bisimulate import Difference, Match, bisimulate
from .configs import Captured, Changes, Family, Path, Shapes, at, say
from .explain import Barred, refusal
from .folds import fold_counts, move_eps, move_scale

Tell = Callable[[str], None]
_BUILDS, _CAPTURES, _BRANCHES = 400, 12, 6
# A model that lacks a parameter altogether is further off than one with an axis of another length.
_ABSENT = 8


@dataclass
class Fitted:
    """A program and the model that computes the same.

    Attributes:
        given: the program as it was.
        program: it after exact folds.
        family, changes: the model class, and the fields that differ from the source's.
        captured: the model's own program.
        match: which value belongs into which of its parameters.
    """

    given: Program
    program: Program
    family: Family
    changes: Changes
    captured: Captured
    match: Match


def fit(given: Program, tell: Tell = lambda text: None) -> Fitted:
    """Find the config under which the source's model class computes what ``given`` does.

    Args:
        given: captured from a model of transformers, then rewritten; it is not changed.
        tell: hears what is tried.
    Raises:
        UsageError: there is none; says which layer, and which size, bias or op does not fit.
    """
    program = given.clone()
    fold_counts(program)
    return _Search(given, program, Family.of(program.facts), tell).run()


@dataclass
class _Search:
    given: Program
    program: Program
    family: Family
    tell: Tell
    wanted: Shapes = field(default_factory=dict)
    biased: dict[str, int] = field(default_factory=dict)
    tried: set[str] = field(default_factory=set)
    near: list[tuple[int, int, Changes]] = field(default_factory=list)
    barred: dict[str, Barred] = field(default_factory=dict)

    def run(self) -> Fitted:
        changes = self._depth()
        captured, match = self._look(changes)
        if match.differences:
            if self._keep_eps(captured, match.differences):
                match = bisimulate(captured.program, self.program, captured.stored)
            self._want(captured, match)
            changes += self._eps(match.differences)
            found = self._reach(changes, match.differences)
            if found is None and self._explicit(changes, captured):
                self.tried.clear()
                found = self._reach(changes, match.differences)
            changes, captured, match = self._nearest() if found is None else self._take(found)
            if self._adjust(match.differences):
                match = bisimulate(captured.program, self.program, captured.stored)
        if match.differences:
            raise self._told(refusal(self.program, match.differences, self._given_sizes(changes),
                                     self.barred.values()))  # fmt: skip
        return Fitted(self.given, self.program, self.family, changes, captured, match)

    def _told(self, why: UsageError) -> UsageError:
        """The refusal, which says so where the search ended before every config was tried."""
        built, seen = self.family.builds, self.family.captures
        if built < _BUILDS and seen < _CAPTURES:
            return why
        stop = f"the search stopped after {built} configs built and {seen} captured"
        hint = f"{why.hint}; {stop}" if why.hint else stop
        return UsageError(why.message, where=why.where, hint=hint)

    # ** depth **

    def _depth(self) -> Changes:
        """Fields for the blocks that are left, found by the module lists that hold them."""
        model, _ = self.family.make()
        names = {n for p in self.program.params.values() for n in _bases(p.name, p.names)}
        for path, module in model.named_modules():
            if not isinstance(module, torch.nn.ModuleList) or len(module) < 2:
                continue
            own = [{f"{path}.{i}.{n}" for n, _ in child.named_parameters()}
                   for i, child in enumerate(module)]  # fmt: skip
            if not all(own):
                continue
            kept = [i for i, some in enumerate(own) if not some.isdisjoint(names)]
            if len(kept) < len(own):
                return self._shallower(path, len(own), kept)
        return ()

    def _shallower(self, path: str, count: int, kept: list[int]) -> Changes:
        lists: Changes = tuple(
            (p, [v[i] for i in kept]) for p, v in self.family.numbers(list) if len(v) == count
        )
        for place, value in self.family.numbers(int):
            if value != count:
                continue
            changes: Changes = ((place, len(kept)), *lists)
            shapes = self.family.shapes(changes) or {}
            held = {
                n[len(path) + 1 :].partition(".")[0] for n in shapes if n.startswith(path + ".")
            }
            if len(held) == len(kept):
                return changes
        raise UsageError(
            f"expected a config field for the number of blocks, found none that turns {count} "
            f"into {len(kept)}", where=path,
        )  # fmt: skip

    # ** search **

    def _look(self, changes: Changes) -> tuple[Captured, Match]:
        if changes:
            self.tell("capturing with " + ", ".join(say(changes)))
        captured = self.family.capture(changes)
        return captured, bisimulate(captured.program, self.program, captured.stored)

    def _want(self, captured: Captured, match: Match) -> None:
        """The shapes that the model's parameters should have, and the biases it should add."""
        for name, node in match.values.items():
            shape = captured.as_stored(name, _shape(node))
            for known in captured.program.params[name].names:
                self.wanted[known] = shape
        for d in match.differences:
            if d.kind == "bias":
                self.biased[d.name] = int(d.ours.shape[-1])

    def _keep_eps(self, captured: Captured, differences: list[Difference]) -> bool:
        """Give the few norms whose fold changed their eps that of the many others back."""
        eps = Counter(n.kwargs["eps"] for n in captured.program.calls("llmc.rms_norm"))
        found = [d for d in differences if d.kind == "number" and d.theirs in eps]
        few = {e for e in eps if 2 * sum(d.theirs == e for d in found) < eps[e]}
        moved = [move_eps(self.program, d.node, d.theirs) for d in found if d.theirs in few]
        return any(moved)

    def _eps(self, differences: list[Difference]) -> Changes:
        """The change of a fold's eps, where one field alone can be meant."""
        pairs = Counter((d.theirs, d.ours) for d in differences if d.kind == "number")
        for (old, new), _ in pairs.most_common(1):
            places = [p for p, v in self.family.numbers(float) if v == old]
            if len(places) == 1:
                return ((places[0], new),)
        return ()

    def _miss(self, changes: Changes) -> int | None:
        """By how much the shapes under these fields miss the wanted ones; None: no model."""
        if self.family.builds >= _BUILDS:
            return None
        shapes = self.family.shapes(changes)
        if shapes is None:
            return None
        missed = 0
        for name, want in self.wanted.items():
            have = shapes.get(name)
            if have is None or len(have) != len(want):
                missed += _ABSENT
            else:
                missed += sum(a != b for a, b in zip(have, want, strict=True))
        return missed + sum(not _has_bias(shapes, n, size) for n, size in self.biased.items())

    def _reach(
        self, changes: Changes, differences: list[Difference], guessed: bool = False
    ) -> Changes | None:
        """Changes under which the graphs agree, searched depth first, likelier ones first.

        A refusal is told from the nearest config that no guess led to.
        """
        key = repr(sorted(changes, key=repr))
        if key in self.tried:
            return None
        self.tried.add(key)
        now = self._miss(changes)
        if now is None:
            return None
        if not guessed:
            self.near.append((now, len(differences), changes))
        if now == 0:
            if self.family.captures >= _CAPTURES:
                return None
            try:
                found = self._look(changes)[1].differences
            except ModelError:
                # Fields that build may still not trace; others are tried.
                return None
            if not guessed:
                self.near.append((now, len(found), changes))
            if not found or all(_adjustable(d) for d in found):
                return changes
            differences = found
        ranked = []
        for rank, path, value in self._options(changes, differences):
            more = (*changes, (path, value))
            missed = self._miss(more)
            if missed is None and rank == 0:
                (change,) = say(((path, value),))
                old = at(self.family.fields, path)
                barred = Barred(change, old, value, self.family.why_not(more))
                self.barred.setdefault(change, barred)
            # A size that no parameter has, a number of heads say, shows in a captured graph only.
            if missed is not None and (missed < now or (missed == now == 0 and rank == 0)):
                ranked.append((rank, missed, len(path), more))
        ranked.sort(key=lambda r: r[:3])
        for rank, *_, more in ranked[:_BRANCHES]:
            reached = self._reach(more, differences, guessed or rank == 1)
            if reached is not None:
                return reached
        return None

    def _take(self, changes: Changes) -> tuple[Changes, Captured, Match]:
        return (changes, *self._look(changes))

    def _nearest(self) -> tuple[Changes, Captured, Match]:
        """The tried config that a refusal is told from; the first one of all does trace."""
        order = sorted(self.near, key=lambda n: n[:2])
        for *_, changes in order[:2]:
            try:
                return self._take(changes)
            except ModelError:
                continue
        return self._take(self.near[0][-1])

    def _options(
        self, changes: Changes, differences: list[Difference]
    ) -> Iterator[tuple[int, Path, Any]]:
        """(rank, field, new value): fields that hold a size that differs, or a factor of one."""
        done = {p for p, _ in changes}
        sizes = {(d.theirs, d.ours) for d in differences if d.kind == "size"}
        floats = {(d.theirs, d.ours) for d in differences if d.kind == "number"}
        for path, value in self.family.numbers(int):
            if path in done:
                continue
            for old, new in sizes:
                if value == old:
                    yield 0, path, new
                elif value > 1 and old % value == 0 and (new * value) % old == 0:
                    yield 1, path, new * value // old
        for path, value in self.family.numbers(float):
            yield from ((0, path, new) for old, new in floats if path not in done and value == old)
        if self.biased:
            for path, value in self.family.numbers(bool):
                if path not in done:
                    yield 2, path, not value

    def _explicit(self, changes: Changes, captured: Captured) -> bool:
        """Write out fields that the config leaves open, so that a size does not follow another.

        A field counts when one value leaves every shape as it is and others do not.
        """
        before = self.family.shapes(changes)
        numbers = sorted(_numbers(captured.program), reverse=True)
        added = False
        for path in self.family.unset():
            absent = 2 * max(numbers) + 2
            if self.family.shapes((*changes, (path, absent))) == before:
                continue
            same = [n for n in numbers if self.family.shapes((*changes, (path, n))) == before]
            if len(same) == 1:
                self.family.set(path, same[0])
                added = True
        return added

    # ** afterwards **

    def _adjust(self, differences: list[Difference]) -> bool:
        """Fold what the found config still says otherwise; whether anything was folded."""
        done = False
        for d in differences:
            if d.kind == "number":
                done |= move_eps(self.program, d.node, d.theirs)
            elif d.kind == "constant":
                done |= move_scale(self.program, d.node, d.theirs)
        return done

    def _given_sizes(self, changes: Changes) -> dict[str, tuple[Any, Any]]:
        """Wanted and given shape of each parameter under the nearest config."""
        shapes = self.family.shapes(changes) or {}
        return {name: (want, shapes.get(name)) for name, want in self.wanted.items()}


def _adjustable(d: Difference) -> bool:
    return d.kind in ("number", "constant")


def _bases(name: str, names: tuple[str, ...]) -> Iterator[str]:
    """The source's names of the weight that a parameter is, or is a packed part of."""
    suffix = name[len(name.partition(".")[0]) :]
    return (n.removesuffix(suffix) for n in names)


def _shape(node: fx.Node) -> tuple[int, ...]:
    return tuple(int(d) for d in tensor_type(node).shape)


def _has_bias(shapes: Shapes, weight: str, size: int) -> bool:
    home = weight.rpartition(".")[0]
    return any(
        n != weight and n.rpartition(".")[0] == home and s == (size,) for n, s in shapes.items()
    )


def _numbers(program: Program) -> set[int]:
    """Every size that a graph speaks of."""
    out = {n for p in program.params.values() for n in p.shape if n > 0}

    def collect(value: Any) -> None:
        if isinstance(value, (list, tuple)):
            for v in value:
                collect(v)
        elif isinstance(value, int) and not isinstance(value, bool) and 0 < value < 1 << 31:
            out.add(value)

    for node in program.calls():
        collect(node.args)
    return out
