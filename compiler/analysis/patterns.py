"""Scale patterns: which scale divides which element of a value, carried back through moves.

A pattern of a value of rank r is an int64 tensor of rank r. Each axis has size 1 (the scale does
not depend on it) or the value's own size. Entries are labels of scales; -1 means unscaled.
"""

from __future__ import annotations

import torch
from torch import fx

from .ties import Axis, as_int, operands, shape_of, ties_of

UNSCALED = -1


def last_axis(value: fx.Node) -> torch.Tensor | None:
    """One scale for each index of the last axis; None where its size is symbolic."""
    shape = shape_of(value)
    n = as_int(shape[-1]) if shape else None
    if shape is None or n is None:
        return None
    return torch.arange(n).reshape([1] * (len(shape) - 1) + [n])


def only_on(pattern: torch.Tensor, axes: tuple[int, ...]) -> bool:
    """Whether the pattern depends on no other axis than these."""
    return all(n == 1 or a in axes for a, n in enumerate(pattern.shape))


def pull_back(
    node: fx.Node, pattern: torch.Tensor, part: int = 0
) -> tuple[Axis, torch.Tensor] | None:
    """Pattern that a move's first argument must have so that its result has ``pattern``.

    Returns (the argument as an axis 0 of a value, its pattern), None where there is none: the ties
    mix axes, or a scaled axis has a symbolic size.
    """
    ties = ties_of(node)
    source = next((o for o in operands(node) if isinstance(o, tuple)), None)
    if ties is None or source is None:
        return None
    ties = [t for t in ties if t.outs and t.outs[0].part == part and t.ins]
    if ties:
        source = (ties[0].ins[0].node, ties[0].ins[0].part)
    value, which = source
    shape, result = shape_of(value, which), shape_of(node, part)
    if shape is None or result is None:
        return None
    order: list[int] = []
    into: list[int] = []
    sizes: list[int] = []
    grow = list(pattern.shape)
    cuts: list[tuple[int, int, int]] = []  # (axis of the argument, offset, its full size)
    for tie in ties:
        ins = [a.axis for a in tie.ins if (a.node, a.part) == source]
        outs = [a.axis for a in tie.outs]
        if not ins or any(o in order for o in outs):
            return None
        order += outs
        touched = any(pattern.shape[o] > 1 for o in outs)
        if tie.kind == "same":
            ins = ins[:1]
            sizes.append(pattern.shape[outs[0]])
        elif tie.kind == "split":
            for o in outs if touched else ():
                n = as_int(result[o])
                if n is None:
                    return None
                grow[o] = n
            sizes.append(-1 if touched else 1)
        elif tie.kind == "merge":
            dims = [as_int(shape[a]) if touched else 1 for a in ins]
            if any(d is None for d in dims):
                return None
            sizes += [d for d in dims if d is not None]
        elif tie.kind == "slice":
            n, m = as_int(shape[ins[0]]), as_int(result[outs[0]])
            if n is None or m is None:
                return None
            grow[outs[0]] = m
            sizes.append(m)
            cuts.append((ins[0], tie.offset, n))
        else:
            return None
        into += ins
    free = [a for a in range(pattern.dim()) if a not in order]
    if any(pattern.shape[a] > 1 for a in free) or len(set(into)) != len(into):
        return None
    moved = pattern.expand(grow).permute(*order, *free)
    # One axis at a time may be -1 in a reshape, so the merged sizes are worked out here.
    full, at = [], 0
    for tie, s in zip(ties, _per_tie(ties, sizes), strict=True):
        count = 1
        for _ in tie.outs:
            count *= moved.shape[at]
            at += 1
        full += [count] if s == [-1] else s
    moved = moved.reshape(full)
    back = moved.permute([into.index(a) for a in sorted(into)])
    laid, k = [], 0
    for a in range(len(shape)):
        laid.append(back.shape[k] if a in into else 1)
        k += a in into
    out = back.reshape(laid)
    for axis, offset, n in cuts:
        wide = list(out.shape)
        wide[axis] = n
        whole = torch.full(wide, UNSCALED)
        whole.narrow(axis, offset, out.shape[axis]).copy_(out)
        out = whole
    return Axis(value, 0, which), out


def _per_tie(ties: list, sizes: list[int]) -> list[list[int]]:  # type: ignore[type-arg]
    out, at = [], 0
    for tie in ties:
        n = len(tie.ins) if tie.kind == "merge" else 1
        out.append(sizes[at : at + n])
        at += n
    return out


def seen_through(node: fx.Node, source: fx.Node, pattern: torch.Tensor, part: int = 0) -> bool:
    """Whether a cut of ``source`` reads unscaled entries only."""
    ties = ties_of(node)
    if ties is None:
        return False
    for tie in ties:
        for a in tie.ins:
            if a.node is source and a.part == part and tie.kind == "slice":
                n = as_int((shape_of(node, tie.outs[0].part) or ())[tie.outs[0].axis])
                if n is None or pattern.shape[a.axis] == 1:
                    return False
                if bool((pattern.narrow(a.axis, tie.offset, n) == UNSCALED).all()):
                    return True
    return False


class Labels:
    """Scales that must be equal, as a union-find over their labels."""

    def __init__(self, count: int) -> None:
        self.parent = list(range(count))

    def find(self, a: int) -> int:
        while self.parent[a] != a:
            self.parent[a] = self.parent[self.parent[a]]
            a = self.parent[a]
        return a

    def copy(self) -> Labels:
        out = Labels(0)
        out.parent = list(self.parent)
        return out

    def constant_over(self, pattern: torch.Tensor, axis: int) -> torch.Tensor | None:
        """The pattern with the scales along an axis equated; None if only some are scaled."""
        n = pattern.shape[axis]
        first = pattern.narrow(axis, 0, 1)
        for i in range(1, n):
            other = pattern.narrow(axis, i, 1)
            if bool(((first == UNSCALED) != (other == UNSCALED)).any()):
                return None
            for a, b in zip(first.flatten().tolist(), other.flatten().tolist(), strict=True):
                if a != UNSCALED:
                    self.parent[self.find(b)] = self.find(a)
        return first

    def compact(self) -> tuple[int, torch.Tensor]:
        """(number of distinct scales, label -> scale index)."""
        roots: dict[int, int] = {}
        index = [roots.setdefault(self.find(a), len(roots)) for a in range(len(self.parent))]
        return len(roots), torch.tensor(index, dtype=torch.long)
