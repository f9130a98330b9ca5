"""Outliers beside a mask: no place in it is theirs, they stay exact, counts stay."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from llmc.compiler.solvers import Grid, MaskRule, prepare, solve
from llmc.compiler.solvers.lut import LutGrid
from llmc.compiler.solvers.masks import apart, pick_nm, static_mask

TWO_FOUR = MaskRule("nm", 2, 4)
HALF = MaskRule("unstructured", sparsity=0.5)
SOLVERS = ["sparsegpt", "wanda", "magnitude"]
GRIDS = [
    Grid(4, 16),
    Grid(3, None, symmetric=False),
    LutGrid(3, None),
    LutGrid(3, None, shared=True),
]


def few(weight, share=0.1):
    """Scattered outliers, never more than two in four."""
    g = torch.Generator().manual_seed(5)
    some = torch.rand(weight.shape, generator=g) < share
    full = some.view(len(weight), -1, 4).sum(-1, keepdim=True) > 2
    return (some.view(len(weight), -1, 4) & ~full).view(weight.shape)


def blocks(mask):
    return mask.view(len(mask), -1, 4).sum(-1)


@pytest.mark.parametrize("order", [False, True])
@pytest.mark.parametrize("solver", SOLVERS)
@pytest.mark.parametrize("how", ["gptq", "rtn"])
@pytest.mark.parametrize("grid", GRIDS)
def test_two_of_four_others_are_kept(problem, grid, how, solver, order):
    w = problem.weight.float()
    extra = few(w)
    done = solve(
        w, problem.hessian.float(), grid=grid, mask=TWO_FOUR, extra=extra, grid_solver=how,
        mask_solver=solver, act_order=order, sweeps=1,
    )  # fmt: skip
    assert bool((blocks(done.mask) == 2).all())
    assert not bool((done.mask & extra).any())
    assert torch.equal(done.extra, extra)
    assert not bool(done.weight[~(done.mask | extra)].any())
    assert bool(done.weight[extra].all())
    if solver != "sparsegpt" and how == "rtn":
        plain = solve(
            w, problem.hessian.float(), grid=grid, mask=TWO_FOUR, extra=extra, grid_solver=how,
            mask_solver=solver,
        )  # fmt: skip
        assert torch.equal(plain.weight[extra], w[extra])


@pytest.mark.parametrize("solver", SOLVERS)
@pytest.mark.parametrize("grid", [Grid(4, 16), Grid(4, None), LutGrid(3, None, pinned=True)])
def test_the_share_of_zeros_falls_on_others(problem, grid, solver):
    w = problem.weight.float()
    extra = few(w)
    done = solve(w, problem.hessian.float(), grid=grid, mask=HALF, extra=extra, mask_solver=solver)
    zeros = ~(done.mask | extra)
    assert int(zeros.sum()) == w.numel() // 2
    assert not bool(done.weight[zeros].any())
    assert bool(done.weight[extra].all())
    if solver == "wanda":
        assert bool((zeros.sum(1) == w.shape[1] // 2).all())


@pytest.mark.parametrize("grid", [Grid(4, 16), LutGrid(3, None)])
def test_a_block_of_outliers_alone_keeps_its_count_and_no_code_counts(problem, grid):
    """Whole columns: blocks where three of four are outliers still name two kept places."""
    w = problem.weight.float()
    extra = torch.zeros_like(w, dtype=torch.bool)
    extra[:, [4, 5, 6, 12]] = True
    done = solve(w, problem.hessian.float(), grid=grid, mask=TWO_FOUR, extra=extra)
    assert bool((blocks(done.mask) == 2).all())
    assert bool(done.mask[:, 7].all())
    assert bool((done.mask[:, 4:7].sum(1) == 1).all())
    assert not bool(done.mask[:, 12].any())
    below = done.weight if done.under is None else done.weight - done.under
    assert bool(below[extra].all())
    if done.under is None:
        assert bool((done.codes[:, 4:7] == 8).all())


@pytest.mark.parametrize("grid", GRIDS[:2])
def test_exact_weights_beside_the_mask_lower_the_layers_loss(problem, grid):
    w, h = problem.weight.float(), problem.hessian.float()
    big = w.abs() >= w.abs().flatten().kthvalue(int(0.95 * w.numel())).values
    plain = solve(w, h, grid=grid, mask=TWO_FOUR)
    assert solve(w, h, grid=grid, mask=TWO_FOUR, extra=big).loss < plain.loss


def test_no_outlier_is_no_difference(problem):
    w, h = problem.weight.float(), problem.hessian.float()
    none = torch.zeros_like(w, dtype=torch.bool)
    for rule in (TWO_FOUR, HALF):
        a = solve(w, h, grid=GRIDS[0], mask=rule)
        b = solve(w, h, grid=GRIDS[0], mask=rule, extra=none)
        assert torch.equal(a.weight, b.weight)
        assert torch.equal(a.mask, b.mask)


@settings(max_examples=30, deadline=None)
@given(st.integers(0, 10**6), st.sampled_from([(1, 4), (2, 4), (4, 8)]))
def test_the_rest_of_each_block_is_picked_as_if_outliers_were_not_there(seed, size):
    """The kept places of a block are the best of its other weights, by enumeration."""
    n, m = size
    g = torch.Generator().manual_seed(seed)
    w = torch.randn(32, 6, generator=g)
    beside = torch.rand(32, 6, generator=g) < 0.3
    rule = MaskRule("nm", n, m)
    keep = static_mask(rule, "magnitude", w, torch.ones(32), beside)
    for row in range(6):
        for a in range(0, 32, m):
            others = [i for i in range(a, a + m) if not beside[i, row]]
            best = sorted(others, key=lambda i: -float(w[i, row].abs()))[:n]
            found = [i for i in range(a, a + m) if keep[i, row]]
            assert len(found) == n
            assert set(best) <= set(found)
    assert torch.equal(pick_nm(apart(w.abs(), None, rule), n, m), pick_nm(w.abs(), n, m))


@pytest.mark.parametrize("rule", [TWO_FOUR, HALF])
def test_a_threshold_finds_outliers_before_the_mask(problem, rule):
    """They are those of the sweep without a mask; without a threshold nothing changes."""
    w, factor = problem.weight.float(), prepare(problem.hessian.float(), 1.0)
    alone = solve(w, factor=factor, grid=GRIDS[0], threshold=0.05, most=0.05)
    done = solve(w, factor=factor, grid=GRIDS[0], threshold=0.05, most=0.05, mask=rule)
    assert bool(alone.extra.any())
    assert torch.equal(done.extra, alone.extra)
    never = solve(w, factor=factor, grid=GRIDS[0], threshold=1e9, mask=rule)
    assert torch.equal(never.weight, solve(w, factor=factor, grid=GRIDS[0], mask=rule).weight)


def test_what_an_earlier_round_dropped_stays_dropped(problem):
    h = problem.hessian.float()
    first = solve(problem.weight.float(), h, mask=TWO_FOUR)
    for threshold, extra in ((0.05, None), (None, few(first.weight) & first.mask)):
        done = solve(
            first.weight, h, grid=GRIDS[0], keep=first.mask, threshold=threshold, extra=extra
        )
        assert bool(done.extra.any())
        assert bool((done.extra <= first.mask).all())
        assert torch.equal(done.mask, first.mask)
        assert not bool(done.weight[~first.mask].any())


def test_a_searched_mask_stays_exact_beside_outliers(problem):
    w, h = problem.weight.float(), problem.hessian.float()
    extra = few(w)
    start = solve(w, h, grid=GRIDS[0], mask=TWO_FOUR, extra=extra)
    done = solve(w, h, grid=GRIDS[0], mask=TWO_FOUR, extra=extra, sweeps=2, mask_search=True)
    assert bool((blocks(done.mask) == 2).all())
    assert not bool((done.mask & extra).any())
    assert done.loss <= start.loss
    held = blocks(extra) > 0
    assert torch.equal(done.mask.view(len(w), -1, 4)[held], start.mask.view(len(w), -1, 4)[held])


@pytest.mark.parametrize("shared", [False, True])
def test_a_pinned_table_holds_zero_and_few_levels_are_exact(shared):
    """With at most 2**b - 1 distinct survivors and scattered zeros nothing is lost."""
    g = torch.Generator().manual_seed(0)
    levels = torch.tensor([-2.0, -1.0, -0.5, 0.25, 0.5, 1.0, 3.0])
    w = levels[torch.randint(0, 7, (6, 40), generator=g)]
    keep = torch.rand(6, 40, generator=g) < 0.6
    grid = LutGrid(3, None, shared=shared, pinned=True)
    done = solve(w, grid=grid, keep=keep, grid_solver="rtn")
    assert bool((done.table == 0).any(1).all())
    assert not bool(done.weight[~keep].any())
    if not shared:
        assert torch.equal(done.weight, w * keep)
