"""In which order a sweep walks over inputs, and how it batches the updates between them.

Order: natural, or "act-order" (most important inputs first). Act-order moves whole M-blocks when
an N:M mask exists and whole groups when
scales are grouped, and sorts inside each group; so groups and M-blocks stay what they are in
storage and no index is needed at inference.

Batches: *blocks* of about 128 inputs, brought up to date by one GEMM each; inside a block the
range is halved again and again
down to leaves of 32 inputs, and each left half updates its right half by one GEMM. A group is
always a node of that tree, so its weights are
fully up to date when its scale is fitted (no lag, unlike the usual lazy batch).
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

import torch
from torch import Tensor

LEAF = 32


@dataclass(frozen=True)
class Step:
    """One step inside a block; ranges are relative to the block's start.

    kind "open", "close": inputs a..b of ``group`` begin (fit its scale) and end; a row without
    groups has one such pair in every block. "leaf": settle a..b one by one. "update": errors of
    a..b reach b..c.
    """

    kind: str
    a: int
    b: int
    c: int = 0
    group: int = 0


@dataclass(frozen=True)
class Block:
    """Inputs start..end in processing order and the steps that settle them."""

    start: int
    end: int
    steps: tuple[Step, ...]


@dataclass(frozen=True)
class Schedule:
    """The whole walk.

    order: ``[n]`` int64, None for the natural one. groups: storage index of each group in
    processing order. blocks: what is settled between two big updates.
    """

    order: Tensor | None
    groups: tuple[int, ...]
    blocks: tuple[Block, ...]


def make_schedule(
    spans: list[tuple[int, int]],
    *,
    unit: int,
    block: int,
    importance: Tensor | None = None,
) -> Schedule:
    """Plan a sweep over n inputs.

    spans: the groups (half-open ranges of storage order); one span means "no group boundary".
    unit: inputs that stay together (the M of N:M).
    block: target block width. importance: ``[n]``, turns act-order on.
    """
    order, groups = None, tuple(range(len(spans)))
    if importance is not None:
        order, groups = _act_order(spans, unit, importance.double())
    widths = [spans[g][1] - spans[g][0] for g in groups]
    if len(spans) == 1:
        size = max(unit, block // unit * unit)
        n = widths[0]
        cuts = [(a, min(a + size, n)) for a in range(0, n, size)]
        blocks = tuple(Block(a, b, tuple(_tree([(0, b - a, 0)], unit))) for a, b in cuts)
        return Schedule(order, groups, blocks)
    return Schedule(order, groups, tuple(_pack(widths, groups, unit, block)))


def _act_order(
    spans: list[tuple[int, int]], unit: int, importance: Tensor
) -> tuple[Tensor, tuple[int, ...]]:
    inside, weight = [], []
    for a, b in spans:
        bundles = importance[a:b].view(-1, unit).sum(1)
        best = bundles.argsort(descending=True, stable=True)
        step = torch.arange(unit, device=importance.device)
        inside.append((a + best[:, None] * unit + step).view(-1))
        weight.append(float(importance[a:b].mean()))
    groups = sorted(range(len(spans)), key=lambda g: -weight[g])
    return torch.cat([inside[g] for g in groups]), tuple(groups)


def _pack(widths: list[int], groups: tuple[int, ...], unit: int, block: int) -> Iterator[Block]:
    start = i = 0
    members: list[tuple[int, int, int]]
    while i < len(widths):
        members, end = [], start
        while i < len(widths) and (not members or end - start + widths[i] <= block):
            members.append((end - start, end - start + widths[i], groups[i]))
            end += widths[i]
            i += 1
        yield Block(start, end, tuple(_tree(members, unit)))
        start = end


def _tree(members: list[tuple[int, int, int]], unit: int) -> Iterator[Step]:
    if len(members) == 1:
        a, b, index = members[0]
        yield Step("open", a, b, 0, index)
        yield from _leaves(a, b, unit)
        yield Step("close", a, b, 0, index)
        return
    half = len(members) // 2
    yield from _tree(members[:half], unit)
    yield Step("update", members[0][0], members[half][0], members[-1][1])
    yield from _tree(members[half:], unit)


def _leaves(a: int, b: int, unit: int) -> Iterator[Step]:
    leaf = max(unit, LEAF // unit * unit)
    count = -(-(b - a) // leaf)
    if count <= 1:
        yield Step("leaf", a, b)
        return
    middle = a + count // 2 * leaf
    yield from _leaves(a, middle, unit)
    yield Step("update", a, middle, b)
    yield from _leaves(middle, b, unit)
