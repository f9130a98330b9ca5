"""The knapsack's frontier: brute force on small cases, and the laws of a thinned one."""

from __future__ import annotations

from itertools import product

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from llmc.compiler.ir.errors import LlmcError
from llmc.compiler.solvers.knapsack import frontier

# Losses on a grid of eighths: sums of them are exact, so that brute force may be compared exactly.
OPTION = st.tuples(st.integers(0, 40), st.integers(-8, 80).map(lambda n: n / 8))
GROUPS = st.lists(st.lists(OPTION, min_size=1, max_size=4), min_size=0, max_size=5)


def total(groups, chosen):
    picked = [group[i] for group, i in zip(groups, chosen, strict=True)]
    return sum(b for b, _ in picked), sum(x for _, x in picked)


@given(GROUPS, st.integers(0, 200))
@settings(max_examples=150, deadline=None)
def test_the_best_within_a_budget_is_that_of_brute_force(groups, budget):
    found = frontier(groups)
    every = [total(groups, pick) for pick in product(*(range(len(g)) for g in groups))]
    within = [loss for size, loss in every if size <= budget]
    assert found.exact
    assert found.least == min(size for size, _ in every)
    assert found.loss[-1] == min(loss for _, loss in every)
    if within:
        size, loss = total(groups, found.best(budget))
        assert size <= budget
        assert loss == min(within)
    else:
        with pytest.raises(LlmcError, match="at least"):
            found.best(budget)


@given(GROUPS, st.integers(1, 12))
@settings(max_examples=150, deadline=None)
def test_a_thinned_frontier_never_loses_more_with_more_bytes(groups, limit):
    found, whole = frontier(groups, limit=limit), frontier(groups)
    assert all(a < b for a, b in zip(found.bytes, found.bytes[1:], strict=False))
    assert all(a > b for a, b in zip(found.loss, found.loss[1:], strict=False))
    for point in range(len(found)):
        assert total(groups, found.choice(point)) == (found.bytes[point], found.loss[point])
    assert found.least == whole.least
    step = max(1, -(-(sum(max(b for b, _ in g) - min(b for b, _ in g) for g in groups)) // limit))
    for point in range(len(whole)):
        budget = int(whole.bytes[point]) + step * len(groups)
        assert found.loss[found.index(budget)] <= whole.loss[point]


def test_a_group_without_options_or_with_an_infinite_loss_is_refused():
    for group in ([], [(1, float("nan"))], [(1, float("inf"))]):
        with pytest.raises(LlmcError, match="group 1"):
            frontier([[(1, 0.0)], group])
