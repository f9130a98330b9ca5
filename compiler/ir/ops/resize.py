"""Fitting the size literals of a call to a cut of its axes.

A row whose calls hold sizes names one of these rules. A rule gets what stays of each axis and the
call's arguments, and returns new arguments; the shape rule then checks that they fit.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, Protocol

import torch
from torch import fx

from ..errors import ModelError

Arguments = tuple[tuple[Any, ...], dict[str, Any]]
Resize = Callable[..., Arguments]


class Keep(Protocol):
    """What a cut leaves of the axes around one call: bool masks, None for an axis left whole."""

    def out(self, axis: int, part: int = 0) -> torch.Tensor | None:
        """Of an axis of the result (of element ``part`` where it is a tuple)."""

    def arg(self, index: int, axis: int) -> torch.Tensor | None:
        """Of an axis of an operand; ``index`` counts as in ties."""


def sizes_at(place: int, first: int = 0) -> Resize:
    """Argument ``place`` lists sizes of the result's axes from ``first`` on."""

    def resize(keep: Keep, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Arguments:
        start = first if isinstance(first, int) else 0
        sizes = list(args[place])
        for i, size in enumerate(sizes):
            mask = keep.out(start + i)
            if mask is None or size == -1:
                continue
            if isinstance(size, fx.Node):
                if any(isinstance(s, int) and s == -1 for s in sizes):
                    raise ModelError("expected one length to work out, found two", hint=_HINT)
                sizes[i] = -1
            else:
                sizes[i] = int(mask.sum())
        return (*args[:place], sizes, *args[place + 1 :]), kwargs

    return resize


def repeated(keep: Keep, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Arguments:
    """repeat(x, counts): copies of an axis of one entry are counted by the cut."""
    x, counts = args[0], list(args[1])
    lead = len(counts) - len(x.meta["llmc"].type.shape)
    for a in range(len(counts)):
        mask = keep.out(a)
        if mask is not None and (a < lead or keep.arg(0, a - lead) is None):
            counts[a] = int(mask.sum())
    return (x, counts, *args[2:]), kwargs


_HINT = "write the reshape with literal channel sizes"


def _axis(x: Any, where: int) -> int:
    rank = len(x.meta["llmc"].type.shape)
    return where % rank


def unflattened(keep: Keep, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Arguments:
    """unflatten(x, axis, sizes)."""
    return sizes_at(2, _axis(args[0], args[1]))(keep, args, kwargs)


def sliced(keep: Keep, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Arguments:
    """slice(x, axis, start, end): bounds move down by what is cut below them."""
    given: list[Any] = [*args, *[0, None, None][len(args) - 1 :]]
    x, where, start, end, *rest = given
    mask = keep.arg(0, _axis(x, where))
    if mask is None:
        return args, kwargs
    if isinstance(start, fx.Node) or isinstance(end, fx.Node):
        raise ModelError("expected literal bounds of a slice of a cut axis, found a length")
    low, high, _ = slice(start, end).indices(len(mask))
    below = [int(mask[:i].sum()) for i in (low, max(high, low))]
    return (x, where, *below, *rest), kwargs


def split_into(keep: Keep, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Arguments:
    """split_with_sizes(x, sizes, axis)."""
    at = _axis(args[0], args[2] if len(args) > 2 else kwargs.get("dim", 0))
    kept = [keep.out(at, i) for i in range(len(args[1]))]
    sizes = [s if m is None else int(m.sum()) for s, m in zip(args[1], kept, strict=True)]
    return (args[0], sizes, *args[2:]), kwargs


def split_evenly(keep: Keep, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Arguments:
    """split(x, size, axis): pieces must stay of one size."""
    at = _axis(args[0], args[2] if len(args) > 2 else kwargs.get("dim", 0))
    whole = keep.arg(0, at)
    if whole is None:
        return args, kwargs
    return (args[0], _even(keep, at, whole, int(args[1])), *args[2:]), kwargs


def chunked(keep: Keep, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Arguments:
    """chunk(x, count, axis): the count stays, so pieces must stay of one size."""
    at = _axis(args[0], args[2] if len(args) > 2 else kwargs.get("dim", 0))
    whole = keep.arg(0, at)
    if whole is not None:
        _even(keep, at, whole, -(-len(whole) // int(args[1])))
    return args, kwargs


def _even(keep: Keep, at: int, whole: torch.Tensor, size: int) -> int:
    """What a cut leaves of each of the equal pieces of ``size`` along an axis."""
    masks = [keep.out(at, i) for i in range(-(-len(whole) // size))]
    left = {-1 if m is None else int(m.sum()) for m in masks}
    if len(left) != 1 or len(whole) % size or -1 in left:
        raise ModelError("expected pieces of one size after the cut, found several")
    return left.pop()


def counted(keep: Keep, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Arguments:
    """A norm over the last axis keeps the whole axis as its divisor."""
    mask = keep.arg(0, _axis(args[0], -1))
    if mask is None or kwargs.get("count") is not None:
        return args, kwargs
    return args, {**kwargs, "count": len(mask)}
