"""The door: every pair of solvers, exact storage, orderings of losses, refusals."""

from __future__ import annotations

import itertools

import pytest
import torch

from llmc.compiler.ir.errors import ModelError, UsageError
from llmc.compiler.solvers import GRID_SOLVERS, MASK_SOLVERS, Grid, MaskRule, prepare, rtn, solve

TWO_FOUR = MaskRule("nm", 2, 4)
HALF = MaskRule("unstructured", sparsity=0.5)


def rebuilt(solution, grid, n):
    """(codes - zero) * scale with the stored tensors alone."""
    group = grid.group or n
    zero = grid.implied_zero
    if solution.zero is not None:
        zero = solution.zero.float().repeat_interleave(group, 1)[:, :n]
    scale = solution.scale.float().repeat_interleave(group, 1)[:, :n]
    return (solution.codes.float() - zero) * scale


@pytest.mark.parametrize(
    ("grid_solver", "mask_solver", "rule"),
    list(itertools.product((None, *GRID_SOLVERS), (None, *MASK_SOLVERS), (TWO_FOUR, HALF))),
)
@pytest.mark.parametrize("symmetric", [True, False])
@pytest.mark.parametrize("act_order", [True, False])
def test_every_pair(problem, grid_solver, mask_solver, rule, symmetric, act_order):
    grid = Grid(4, 24, symmetric=symmetric) if grid_solver else None
    rule = rule if mask_solver else None
    s = solve(
        problem.weight.float(),
        problem.hessian.float(),
        grid=grid,
        mask=rule,
        grid_solver=grid_solver or "rtn",
        mask_solver=mask_solver or "magnitude",
        act_order=act_order,
    )
    m, n = problem.weight.shape
    assert s.weight.shape == (m, n)
    assert s.weight.dtype == torch.float32
    assert s.fallbacks == ()
    reference = problem.loss(torch.zeros(m, n))
    assert s.loss == pytest.approx(problem.loss(s.weight) / reference, rel=1e-3, abs=1e-9)
    if grid is None:
        assert s.codes is s.scale is s.zero is None
    else:
        assert s.scale.dtype == torch.float16
        assert s.scale.shape == (m, 3)
        assert torch.equal(rebuilt(s, grid, n), s.weight)
        assert int(s.codes.max()) < 16
    if rule is None:
        assert s.mask is None
    else:
        assert bool((s.weight[~s.mask] == 0).all())
        if rule is TWO_FOUR:
            assert bool((s.mask.view(m, -1, 4).sum(-1) == 2).all())
        else:
            assert int(s.mask.sum()) == m * n // 2
    if grid is None and rule is None:
        assert torch.equal(s.weight, problem.weight.float())
        assert s.loss == 0


def test_compensation_pays(problem):
    def loss(**options):
        return solve(problem.weight, problem.hessian, **options).loss

    grid = Grid(3, 16)
    assert loss(grid=grid) < 0.8 * loss(grid=grid, grid_solver="rtn")
    sparse = {solver: loss(mask=TWO_FOUR, mask_solver=solver) for solver in MASK_SOLVERS}
    assert sparse["sparsegpt"] < sparse["wanda"] < sparse["magnitude"]
    joint = loss(grid=grid, mask=TWO_FOUR)
    assert joint < loss(grid=grid, mask=TWO_FOUR, grid_solver="rtn")
    assert joint < loss(grid=grid, mask=TWO_FOUR, mask_solver="wanda")


@pytest.mark.parametrize("bits", [4, 3])
def test_joint_beats_sparsegpt_then_gptq_on_the_same_mask(build, bits):
    """On the sum of a few layers; single small ones can fall either way."""
    joint = two_steps = 0.0
    for seed in range(4):
        problem = build(64, 128, tokens=512, seed=seed)
        grid = Grid(bits, 64)
        joint += solve(problem.weight, problem.hessian, grid=grid, mask=TWO_FOUR).loss
        first = solve(problem.weight, problem.hessian, mask=TWO_FOUR)
        second = solve(first.weight, problem.hessian, grid=grid, keep=first.mask)
        assert torch.equal(second.mask, first.mask)
        whole = problem.loss(torch.zeros_like(problem.weight))
        two_steps += problem.loss(second.weight) / whole
    assert joint < two_steps


def test_a_given_mask_is_kept(problem):
    keep = torch.rand(problem.weight.shape, generator=torch.Generator().manual_seed(0)) > 0.6
    for grid in (None, Grid(4, 16)):
        s = solve(problem.weight, problem.hessian, grid=grid, keep=keep)
        assert torch.equal(s.mask, keep)
        assert bool((s.weight[~keep] == 0).all())


def test_rows_are_independent_and_a_factor_is_shared(problem):
    factor = prepare(problem.hessian.float())
    w = problem.weight.float()
    for rule in (None, TWO_FOUR):
        whole = solve(w, factor=factor, grid=Grid(4, 16), mask=rule)
        parts = [solve(p, factor=factor, grid=Grid(4, 16), mask=rule) for p in w.split(12)]
        assert torch.equal(whole.codes, torch.cat([p.codes for p in parts]))
        assert torch.equal(whole.scale, torch.cat([p.scale for p in parts]))


def test_inputs_are_left_alone_and_answers_repeat(problem):
    w, h = problem.weight.float(), problem.hessian.float()
    w0, h0 = w.clone(), h.clone()
    a, b = (solve(w, h, grid=Grid(4, 16), mask=TWO_FOUR, act_order=True) for _ in range(2))
    assert torch.equal(w, w0)
    assert torch.equal(h, h0)
    assert torch.equal(a.codes, b.codes)
    assert a.loss == b.loss


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_low_precision_checkpoints(problem, dtype):
    s = solve(problem.weight.to(dtype), problem.hessian.float(), grid=Grid(4, 16))
    assert s.weight.dtype == torch.float32
    assert s.loss < 0.05


def test_scale_of_the_hessian_does_not_matter(problem):
    base = solve(problem.weight, problem.hessian, grid=Grid(4, 16))
    for factor in (2.0**-70, 2.0**70, 2.0**-10):
        s = solve(problem.weight, problem.hessian * factor, grid=Grid(4, 16))
        assert torch.equal(s.codes, base.codes)


def test_inputs_permuted_with_the_hessian(problem):
    """Whole groups permuted with act-order on: the same answer, permuted."""
    order = torch.arange(64).view(4, 16)[torch.tensor([2, 0, 3, 1])].view(-1)
    base = solve(problem.weight, problem.hessian, grid=Grid(4, 16), act_order=True)
    moved = solve(
        problem.weight[:, order],
        problem.hessian[order][:, order],
        grid=Grid(4, 16),
        act_order=True,
    )
    assert torch.equal(moved.codes, base.codes[:, order])


@pytest.mark.parametrize(
    ("options", "word"),
    [
        ({"mask": MaskRule("nm", 2, 5)}, "multiples of 5"),
        ({"mask": TWO_FOUR, "grid": Grid(4, 18)}, "multiple of 4"),
        ({"grid_solver": "best"}, "grid_solver"),
        ({"mask_solver": "best"}, "mask_solver"),
        ({"block": 0}, "block"),
        ({"damp": -1.0}, "damp"),
        ({"keep": torch.ones(2, 2, dtype=torch.bool)}, "keep"),
    ],
)
def test_options_that_do_not_fit_are_refused(problem, options, word):
    with pytest.raises(UsageError, match=word):
        solve(problem.weight, problem.hessian, **options)


def test_shapes_and_weights_that_do_not_fit_are_refused(problem):
    with pytest.raises(UsageError, match="weight"):
        solve(torch.ones(3), problem.hessian)
    with pytest.raises(UsageError, match="hessian"):
        solve(torch.ones(3, 8), problem.hessian)
    with pytest.raises(UsageError, match="hessian"):
        prepare(torch.ones(3, 4))
    bad = problem.weight.clone()
    bad[0, 0] = torch.nan
    with pytest.raises(ModelError, match="NaN"):
        solve(bad, problem.hessian)


def test_without_a_hessian_it_is_round_to_nearest_and_says_so(problem):
    s = solve(problem.weight.float(), grid=Grid(4, 16))
    assert torch.equal(s.weight, rtn(problem.weight.float(), Grid(4, 16)).weight)
    assert any("none given" in f for f in s.fallbacks)
