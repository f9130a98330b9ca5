"""Weights recovered beside an N:M mask (WRP): the method's oracles, and exactness on a grid."""

from __future__ import annotations

import itertools

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from llmc.compiler.ir.errors import UsageError
from llmc.compiler.solvers import Grid, MaskRule, Solution, prepare, solve
from llmc.compiler.solvers.masks import (
    pick_nm,
    recover_bound,
    recover_count,
    static_mask,
    static_score,
    top_per_row,
)

SOLVERS = ["wanda", "magnitude", "sparsegpt"]
GRIDS = [None, Grid(4, 16, scale_dtype=torch.float32), Grid(3, None, symmetric=False)]


def recovered(problem, share: float, solver: str = "wanda", **options) -> Solution:
    rule = MaskRule("nm", 2, 4, recover=share)
    return solve(problem.weight, problem.hessian, mask=rule, mask_solver=solver, **options)


def diagonal_loss(problem, found: torch.Tensor) -> float:
    d = problem.weight - found.double()
    return float((d.square() * problem.hessian.diagonal()).sum())


@pytest.mark.parametrize("solver", SOLVERS)
@pytest.mark.parametrize("grid", GRIDS)
def test_nothing_recovered_is_the_mask_alone_to_the_bit(problem, solver, grid):
    plain = solve(
        problem.weight, problem.hessian, mask=MaskRule("nm", 2, 4), mask_solver=solver, grid=grid
    )
    found = recovered(problem, 0.0, solver, grid=grid)
    assert found.extra is None
    assert torch.equal(found.weight, plain.weight)
    assert torch.equal(found.mask, plain.mask)


@pytest.mark.parametrize("solver", SOLVERS)
def test_everything_recovered_is_the_dense_weight_exactly(problem, solver):
    found = recovered(problem, 1.0, solver)
    assert torch.equal(found.weight, problem.weight.float())
    assert bool((found.mask ^ found.extra).all())
    assert found.loss == 0


@pytest.mark.parametrize("solver", ["wanda", "magnitude"])
def test_loss_falls_with_the_share_in_the_objective_of_wanda(problem, solver):
    """Each larger share brings back a superset, and nothing else moves."""
    steps = [recovered(problem, a, solver) for a in (0.0, 0.1, 0.25, 0.5, 0.75, 1.0)]
    losses = [diagonal_loss(problem, s.weight) for s in steps]
    assert all(b < a for a, b in itertools.pairwise(losses))
    for a, b in itertools.pairwise(steps[1:]):
        assert bool((a.extra <= b.extra).all())
        assert torch.equal(a.mask, b.mask)


@pytest.mark.parametrize("solver", SOLVERS)
@pytest.mark.parametrize("grid", GRIDS)
def test_supports_are_disjoint_and_nothing_else_is_there(problem, solver, grid):
    found = recovered(problem, 0.3, solver, grid=grid, sweeps=1)
    assert bool((found.mask.view(24, -1, 4).sum(-1) == 2).all())
    assert not bool((found.mask & found.extra).any())
    assert int(found.extra.sum()) > 0
    assert not bool(found.weight[~(found.mask | found.extra)].any())


@pytest.mark.parametrize("solver", ["wanda", "magnitude"])
def test_recovered_weights_are_the_dropped_ones_of_the_best(problem, solver):
    found = recovered(problem, 0.3, solver)
    score = static_score(solver, problem.weight.T, problem.hessian.diagonal())
    kept = static_mask(MaskRule("nm", 2, 4), solver, problem.weight.T, problem.hessian.diagonal())
    best = score.argsort(0, descending=True)[: recover_count(0.3, 64)]
    top = torch.zeros_like(kept).scatter(0, best, True)
    assert torch.equal(found.extra, (top & ~kept).T)
    assert torch.equal(found.weight, (problem.weight * (found.mask | found.extra)).float())


@pytest.mark.parametrize("solver", SOLVERS)
@pytest.mark.parametrize("act_order", [False, True])
def test_compensation_counts_recovered_weights(problem, solver, act_order):
    """A sweep beside codes is no worse than rounding, and recovering helps it."""
    grid = GRIDS[1]
    kept = recovered(problem, 0.3, solver, grid=grid, act_order=act_order)
    rtn = recovered(problem, 0.3, "magnitude", grid=grid, grid_solver="rtn")
    none = recovered(problem, 0.0, solver, grid=grid, act_order=act_order)
    assert kept.loss < none.loss
    assert problem.loss(kept.weight) <= problem.loss(rtn.weight)


@pytest.mark.parametrize("grid", GRIDS[1:])
@pytest.mark.parametrize("grid_solver", ["gptq", "rtn"])
def test_codes_give_the_mask_and_recovered_weights_are_off_the_grid(problem, grid, grid_solver):
    found = recovered(problem, 0.3, "wanda", grid=grid, grid_solver=grid_solver)
    width = grid.group or 64
    zero = grid.implied_zero if found.zero is None else found.zero.repeat_interleave(width, 1)
    decoded = (found.codes.float() - zero) * found.scale.float().repeat_interleave(width, 1)
    assert torch.equal(decoded * ~found.extra, found.weight * ~found.extra)
    assert not bool(decoded[~found.mask].any())
    if grid_solver == "rtn":
        assert torch.equal(found.weight[found.extra], problem.weight[found.extra].float())


@pytest.mark.parametrize("solver", SOLVERS)
def test_more_sweeps_never_raise_the_damped_loss(problem, solver):
    ridge = prepare(problem.hessian, 0.01).ridge
    losses = [
        problem.loss(recovered(problem, 0.3, solver, grid=GRIDS[1], sweeps=s).weight, ridge)
        for s in (0, 1, 3)
    ]
    assert losses[1] <= losses[0] * (1 + 1e-6)
    assert losses[2] <= losses[1] * (1 + 1e-6)


@pytest.mark.parametrize("grid", GRIDS)
def test_a_frozen_pair_of_masks_stays(problem, grid):
    first = recovered(problem, 0.3, "wanda")
    again = solve(
        first.weight, problem.hessian, grid=grid, keep=first.mask, extra=first.extra,
        mask_solver="wanda",
    )  # fmt: skip
    assert torch.equal(again.mask, first.mask)
    assert torch.equal(again.extra, first.extra)
    assert not bool(again.weight[~(first.mask | first.extra)].any())


@settings(max_examples=60, deadline=None)
@given(
    nm=st.sampled_from([(1, 4), (2, 4), (4, 8), (3, 8), (1, 2)]),
    blocks=st.integers(1, 6), share=st.floats(0, 1), seed=st.integers(0, 99),
    levels=st.sampled_from([2, 4, 1000]),
)  # fmt: skip
def test_no_row_brings_back_more_than_the_bound(nm, blocks, share, seed, levels):
    n, m = nm
    g = torch.Generator().manual_seed(seed)
    score = torch.randint(levels, (blocks * m, 9), generator=g).float()
    back = top_per_row(score, share) & ~pick_nm(score, n, m)
    assert int(back.sum(0).max()) <= recover_bound(share, n, m, blocks * m, True)
    other = torch.randint(levels, (blocks * m, 9), generator=g).float()
    back = top_per_row(score, share) & ~pick_nm(other, n, m)
    assert int(back.sum(0).max()) <= recover_bound(share, n, m, blocks * m, False)


def test_the_bound_is_reached():
    """All of the best in as few blocks as they fit into."""
    score = torch.arange(32, 0, -1.0)[:, None]
    back = top_per_row(score, 0.34) & ~pick_nm(score, 2, 4)
    assert int(back.sum()) == recover_bound(0.34, 2, 4, 32, True) == 5


def test_what_does_not_fit_together_is_refused(problem):
    for build in (
        lambda: MaskRule("unstructured", recover=0.1),
        lambda: MaskRule("nm", 2, 4, recover=1.1),
        lambda: recovered(problem, 0.1, mask_search=True, sweeps=1),
        lambda: solve(problem.weight, extra=torch.ones(24, 64, dtype=torch.bool)),
        lambda: recovered(problem, 0.1, grid=GRIDS[1], extra=torch.ones(24, 64).bool()),
    ):
        with pytest.raises(UsageError):
            build()
