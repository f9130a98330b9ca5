"""Ranks by share, by the best split and by threshold: sizes, optimality, and what never loses."""

from __future__ import annotations

from itertools import product

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from llmc.compiler.ir.errors import UsageError
from llmc.compiler.solvers.factor import tail
from llmc.compiler.solvers.ranks import (
    Part,
    below,
    best,
    predicted,
    step_of,
    stored,
    uniform,
)

PARTS = [Part("q", 32, 32), Part("k", 16, 32), Part("up", 96, 32), Part("down", 32, 96)]


def tails(seed: int, parts=PARTS):
    g = torch.Generator().manual_seed(seed)
    found = {}
    for p in parts:
        power = 2 * float(torch.rand(1, generator=g))
        spectrum = torch.rand(1, generator=g) * torch.arange(1, p.full + 1) ** -power
        found[p.id] = tail(spectrum)
    return found


def test_a_part_knows_which_ranks_save():
    part = Part("a", 12, 8, width=4)
    assert part.full == 8
    assert part.most == 4
    assert part.bytes(4) == 320 < part.bytes(None) == 384 < part.bytes(5)
    assert Part("b", 4, 4, step=2).most == 0
    # 16 numbers of two directions are no saving.
    assert Part("c", 4, 4).most == 1
    assert Part("d", 1, 9).most == 0


@pytest.mark.parametrize(("rows", "step"), [(256, 8), (64, 8), (63, 4), (16, 2), (8, 1), (1, 1)])
def test_small_weights_take_smaller_steps(rows, step):
    assert step_of(rows, 4096, 8) == step_of(4096, rows, 8) == step


@given(st.floats(0.02, 0.95), st.sampled_from([1, 2, 4]))
@settings(max_examples=100, deadline=None)
def test_a_share_is_kept_to_one_step_in_sum(remove, step):
    parts = [Part(p.id, p.rows, p.columns, step=step) for p in PARTS]
    total = sum(p.dense for p in parts)
    if sum(p.each * step for p in parts) > (1 - remove) * total:
        with pytest.raises(UsageError, match="share of at most"):
            uniform(parts, 1 - remove)
        return
    ranks = uniform(parts, 1 - remove)
    took = sum(ranks[p.id] * p.each for p in parts)
    assert took <= (1 - remove) * total * (1 + 1e-9)
    assert all(ranks[p.id] % step == 0 and step <= ranks[p.id] <= p.most for p in parts)
    for p in parts:
        exact = (1 - remove) * p.dense / p.each
        if all((1 - remove) * q.dense >= step * q.each for q in parts):
            assert abs(ranks[p.id] - min(exact, p.most)) < step


@given(st.integers(0, 200), st.floats(0.05, 0.8))
@settings(max_examples=60, deadline=None)
def test_the_best_split_never_loses_to_one_share(seed, remove):
    falls, weighs = tails(seed), {p.id: 1.0 + i for i, p in enumerate(PARTS)}
    start = uniform(PARTS, 1 - remove)
    found = best(PARTS, falls, weighs, start)
    assert stored(PARTS, found) <= stored(PARTS, start)
    before, after = (predicted(PARTS, falls, weighs, r) for r in (start, found))
    assert after <= before
    assert all(1 <= k <= p.most for p in PARTS if (k := found.get(p.id)) is not None)


def test_the_best_split_is_that_of_brute_force():
    parts = PARTS[:3]
    falls, weighs = tails(5, parts), dict.fromkeys(["q", "k", "up"], 1.0)
    start = uniform(parts, 0.6)
    budget = stored(parts, start)
    every = product(*([None, *range(1, p.most + 1)] for p in parts))
    picks = ({p.id: k for p, k in zip(parts, pick, strict=True) if k} for pick in every)
    least = min(predicted(parts, falls, weighs, r) for r in picks if stored(parts, r) <= budget)
    assert predicted(parts, falls, weighs, best(parts, falls, weighs, start)) == pytest.approx(
        least
    )


def test_a_weight_that_resists_stays_dense():
    """A flat spectrum loses with every direction, a falling one pays for it."""
    parts = [Part("flat", 64, 64), Part("steep", 64, 64)]
    falls = {"flat": tail(torch.ones(64)), "steep": tail(0.5 ** torch.arange(64.0))}
    start = uniform(parts, 0.8)
    found = best(parts, falls, {"flat": 1.0, "steep": 1.0}, start)
    assert set(found) == {"steep"}
    assert stored(parts, found) <= stored(parts, start)


def test_the_threshold_is_the_lowest_that_fits():
    parts = [Part("a", 8, 8, width=1), Part("b", 8, 8, width=1)]
    losses = {"a": {1: 5.0, 2: 3.0, 3: 1.0}, "b": {1: 2.0, 2: 1.5, 3: 1.2}}
    assert below(parts, losses, 64 + 48) == ({"a": 3}, 1.0)
    assert below(parts, losses, 96) == ({"a": 3, "b": 3}, 1.2)
    assert below(parts, losses, 64) == ({"a": 3, "b": 1}, 2.0)
    # At 3.0 a takes two directions.
    assert below(parts, losses, 50) == ({"a": 2, "b": 1}, 3.0)
    with pytest.raises(UsageError, match="within 20 bytes"):
        below(parts, losses, 20)
