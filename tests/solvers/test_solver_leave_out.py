"""Leave-one-out fits of SpQR: against every weight of a group by turns, and what they gain."""

from __future__ import annotations

import math

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from llmc.compiler.solvers import Grid, prepare, solve
from llmc.compiler.solvers.bilevel import BilevelGrid
from llmc.compiler.solvers.leave_out import costly_ends
from llmc.compiler.solvers.task import Task

TWO = BilevelGrid(3, 16, False, scale_dtype=torch.float32)


def by_turns(wt, grid, cost, limit):
    """The definition, an end of the range at a time: fit the others, round the others."""
    found = torch.zeros_like(wt, dtype=torch.bool)
    for a, b in grid.spans(len(wt)):
        for row in range(wt.shape[1]):
            w, c = wt[a:b, row : row + 1], cost[a:b, None]

            def error(keep, w=w, c=c):
                fit = grid.fit(w, keep=keep)
                e = w - grid.centred(w, fit) * fit.scale
                return float((e.square() * c * keep).sum())

            everything = error(torch.ones_like(w, dtype=torch.bool))
            for i in range(b - a):
                keep = torch.ones_like(w, dtype=torch.bool)
                keep[i] = False
                moved = 0 < float(w[i]) == float(w.max()) or 0 > float(w[i]) == float(w.min())
                found[a + i, row] = moved and everything - error(keep) > limit
    return found


@settings(max_examples=20, deadline=None)
@given(st.integers(0, 10**6), st.booleans(), st.sampled_from([6, 8, 20]))
def test_the_ends_are_what_each_weight_by_turns_gives(seed, symmetric, group):
    g = torch.Generator().manual_seed(seed)
    wt = torch.randn(20, 5, generator=g, dtype=torch.float64)
    wt[7, 2] *= 8
    cost = torch.rand(20, generator=g, dtype=torch.float64) + 0.1
    grid = Grid(3, group, symmetric, scale_dtype=torch.float32)
    for limit in (0.0, 0.02, 0.5):
        assert torch.equal(costly_ends(wt, grid, cost, limit, 100), by_turns(wt, grid, cost, limit))


def test_a_weight_inside_the_range_gains_nothing_for_the_others():
    """Why the ends are enough: without any other weight the fit is the same."""
    w = torch.tensor([-1.0, 0.3, -0.2, 0.7, 0.1, 2.0])[:, None]
    grid = Grid(3, None, False)
    for i in (1, 2, 3, 4):
        keep = torch.ones_like(w, dtype=torch.bool)
        keep[i] = False
        assert torch.equal(grid.fit(w, keep=keep).scale, grid.fit(w).scale)


def test_one_far_weight_is_left_out_and_the_range_is_that_of_the_rest():
    g = torch.Generator().manual_seed(0)
    w = torch.randn(64, 64, generator=g)
    w[5, 20] = 40.0
    found = costly_ends(w.t(), TWO, torch.ones(64), 1.0, 100)
    assert bool(found[20, 5])
    assert int(found[16:32, 5].sum()) == int(found.sum()) <= 2
    done = solve(w, torch.eye(64), grid=TWO, threshold=1.0, damp=0.0)
    assert done.extra.nonzero().tolist() == [[5, 20]]
    assert float(done.weight[5, 20]) == 40.0
    wide = solve(w, torch.eye(64), grid=TWO, damp=0.0)
    assert float(done.scale[5, 1]) < 1 < 5 < float(wide.scale[5, 1])


def test_no_more_are_left_out_than_may_stay():
    g = torch.Generator().manual_seed(1)
    w = torch.randn(32, 48, generator=g, dtype=torch.float64)
    cost = torch.ones(32, dtype=torch.float64)
    every = costly_ends(w, TWO, cost, 0.0, 10**6)
    few = costly_ends(w, TWO, cost, 0.0, 7)
    assert int(every.sum()) > 7 == int(few.sum())
    assert bool((few <= every).all())
    assert not bool(costly_ends(w, TWO, cost, math.inf, 100).any())


@pytest.mark.parametrize("bits", [2, 3])
@pytest.mark.parametrize("act_order", [False, True])
def test_the_layers_loss_falls_by_a_tenth(build, monkeypatch, bits, act_order):
    """On a layer problem with few bits, by a wide margin."""
    problem = build(128, 256, tokens=1024)
    grid = BilevelGrid(bits, 16, False, scale_dtype=torch.float32)
    factor = prepare(problem.hessian.float(), 0.01)
    how = {"grid": grid, "threshold": 0.1, "most": 0.03, "act_order": act_order}
    done = solve(problem.weight.float(), factor=factor, **how)
    monkeypatch.setattr(Task, "_leave_out", lambda task: None)
    plain = solve(problem.weight.float(), factor=factor, **how)
    assert done.loss < 0.9 * plain.loss
