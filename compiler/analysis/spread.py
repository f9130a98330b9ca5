"""Units of one dimension, followed through splits, merges, repeats and concatenations.

A unit is what must go together: cutting a KV head takes its query heads, their rows of every
projection and the columns that read them. Starting at one class, each class that is reached gets an
index map: the unit of each of its elements. Where two elements turn out to be bound together, their
units become one.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from math import prod

import numpy as np
import numpy.typing as npt

from ..ir.dims import Dim
from .dimensions import Block, Dimensions, Relation

Map = npt.NDArray[np.int64]
FREE = -1


@dataclass(frozen=True)
class Spread:
    """Where the units of one class reach.

    Attributes:
        units: how many there are, numbered in the order of the first class.
        maps: by class id, the unit of each element of the axis (int64; -1: not cut with them). Of
            an axis of B·n elements only the n literal ones are listed.
        blocked: what stands in the way beside the classes' own blocks.
        kinds: of the relations on the way.
    """

    units: int
    maps: dict[int, Map]
    blocked: tuple[Block, ...]
    kinds: frozenset[str]


def extent(size: Dim) -> int:
    """The literal factor of a length: 12 of 12, 4 of 4·B, 1 of B."""
    if isinstance(size, int):
        return size
    factor, _ = size.as_coeff_Mul()
    return int(factor) if factor.is_Integer else 1


def spread(dims: Dimensions, root: int, across: Sequence[str] = ()) -> Spread:
    """Follow every element of a class as a unit of its own.

    Args:
        root: id of a class with a literal size.
        across: kinds of relations that are not followed (``repeat`` parts KV heads from queries).
    """
    return _Walk(dims, frozenset(across)).run(root)


class _Walk:
    def __init__(self, dims: Dimensions, stops: frozenset[str]) -> None:
        self.dims, self.stops = dims, stops
        self.maps: dict[int, Map] = {}
        self.blocked: dict[Block, None] = {}
        self.kinds: set[str] = set()
        self.unit: Map = np.empty(0, np.int64)

    def run(self, root: int) -> Spread:
        size = extent(self.dims.classes[root].size)
        self.unit = np.arange(size)
        self.maps[root] = np.arange(size)
        todo = [root]
        while todo:
            at = todo.pop()
            for relation in self.dims.touching(at):
                if relation.kind in self.stops:
                    continue
                for target, found in self._through(relation, at):
                    if self._meet(target, found):
                        todo.append(target)
        names, number = np.unique(self._whole(self.maps[root]), return_inverse=True)
        back = np.full(size + 1, FREE)
        back[self._whole(self.maps[root])] = number
        maps = {c: back[self._whole(m)] for c, m in self.maps.items()}
        return Spread(len(names), maps, tuple(self.blocked), frozenset(self.kinds))

    def _whole(self, units: Map) -> Map:
        """Units by their representative; -1 stays."""
        return np.where(units < 0, FREE, self.unit[units])

    def _join(self, a: Map, b: Map) -> None:
        """Make units of equal places one."""
        pairs = np.unique(np.stack([self._whole(a), self._whole(b)], 1), axis=0)
        for x, y in pairs[(pairs[:, 0] != pairs[:, 1]) & (pairs.min(1) >= 0)]:
            low, high = sorted((int(self.unit[x]), int(self.unit[y])))
            if low != high:
                self.unit[self.unit == high] = low

    def _meet(self, target: int, found: Map) -> bool:
        """Add a map of a class; True where it says something new."""
        have = self.maps.get(target)
        if have is None:
            self.maps[target] = found
            return bool((found >= 0).any())
        self._join(have, found)
        new = (have < 0) & (found >= 0)
        if new.any():
            self.maps[target] = np.where(new, found, have)
        return bool(new.any())

    # ** relations **

    def _through(self, r: Relation, at: int) -> Iterator[tuple[int, Map]]:
        mine = self.maps[at]
        self.kinds.add(r.kind)
        if r.kind == "pair":
            if len(mine) % 2:
                self._stop(r, "pairs an odd number of channels")
            else:
                self._join(*(mine.reshape(-1, 2).T if r.factor == 2 else mine.reshape(2, -1)))
        elif r.kind in ("split", "merge"):
            whole, parts = (r.ins[0], r.outs) if r.kind == "split" else (r.outs[0], r.ins)
            yield from self._factored(r, whole, parts, at)
        elif r.kind == "repeat":
            yield from self._repeated(r, at)
        elif r.kind == "twice":
            yield from self._doubled(r, at)
        else:
            part, whole = (r.ins[0], r.outs[0]) if r.kind == "concat" else (r.outs[0], r.ins[0])
            yield from self._placed(r, whole, part, at)

    def _stop(self, r: Relation, why: str) -> None:
        self.blocked[Block(r.node, f"{r.kind} {why}")] = None

    def _size(self, c: int) -> int:
        return extent(self.dims.classes[c].size)

    def _factored(
        self, r: Relation, whole: int, parts: tuple[int, ...], at: int
    ) -> Iterator[tuple[int, Map]]:
        sizes = [self._size(p) for p in parts]
        literal = [isinstance(self.dims.classes[p].size, int) for p in parts]
        if prod(sizes) != self._size(whole) or literal != sorted(literal):
            self._stop(r, "lays channels beside a length that is not literal")
            return
        if at in parts:
            for i in (i for i, p in enumerate(parts) if p == at):
                shape = [-1 if j == i else 1 for j in range(len(sizes))]
                yield whole, np.broadcast_to(self.maps[at].reshape(shape), sizes).reshape(-1)
        if at == whole:
            mine = self._whole(self.maps[whole]).reshape(sizes)
            axes = [i for i, n in enumerate(sizes) if n > 1]
            rows = [i for i in axes if _constant(mine, i)]
            # What no factor tells apart becomes whole units of the outermost one.
            axis = rows[0] if rows else axes[0] if axes else None
            if axis is None:
                return
            flat = np.moveaxis(mine, axis, 0).reshape(sizes[axis], -1)
            first = flat.max(1)
            if not rows:
                if (flat < 0).any() and (flat >= 0).any():
                    self._stop(r, "cuts a part of a unit")
                    return
                self._join(np.repeat(first, flat.shape[1]), flat.reshape(-1))
            yield parts[axis], first

    def _repeated(self, r: Relation, at: int) -> Iterator[tuple[int, Map]]:
        few, many = r.ins[0], r.outs[0]
        factor = self._size(many) // self._size(few)
        if at == few:
            yield many, np.repeat(self.maps[few], factor)
        # One head that all share is no tie between them.
        if at == many and self._size(few) > 1:
            groups = self.maps[many].reshape(-1, factor)
            self._join(np.repeat(groups[:, 0], factor), groups.reshape(-1))
            yield few, groups[:, 0]

    def _doubled(self, r: Relation, at: int) -> Iterator[tuple[int, Map]]:
        once, twice = r.ins[0], r.outs[0]
        if at == once:
            yield twice, np.tile(self.maps[once], 2)
        if at == twice:
            first, second = self.maps[twice].reshape(2, -1)
            self._join(first, second)
            yield once, np.maximum(first, second)

    def _placed(self, r: Relation, whole: int, part: int, at: int) -> Iterator[tuple[int, Map]]:
        if not all(isinstance(self.dims.classes[c].size, int) for c in (whole, part)):
            self._stop(r, "lays channels beside a length that is not literal")
            return
        low, high = r.offset, r.offset + self._size(part)
        if at == part:
            out = np.full(self._size(whole), FREE)
            out[low:high] = self.maps[part]
            yield whole, out
        if at == whole and (self.maps[whole][low:high] >= 0).any():
            yield part, self.maps[whole][low:high]


def _constant(units: Map, axis: int) -> bool:
    """Whether units depend on their place along one axis only."""
    first = np.moveaxis(units, axis, 0).reshape(units.shape[axis], -1)
    return bool((first == first[:, :1]).all())
