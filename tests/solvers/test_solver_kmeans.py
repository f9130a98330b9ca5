"""K-means in one dimension, tables per row, signed factors and outliers against their laws."""

from __future__ import annotations

import itertools
import math

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from llmc.compiler.solvers import Grid, rtn, solve
from llmc.compiler.solvers import kmeans as km
from llmc.compiler.solvers.bcq import BinaryGrid, sums
from llmc.compiler.solvers.lut import LutGrid
from llmc.compiler.solvers.outliers import by_density, by_size, largest, outlier_count

F32 = torch.float32


def draw(*shape: int, seed: int = 0) -> torch.Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def cost(values, weights, centres) -> torch.Tensor:
    """Weighted squared errors of each row."""
    near = centres.gather(1, km.assign(values, centres))
    return (weights * (values - near).square()).sum(1)


@settings(max_examples=25, deadline=None)
@given(n=st.integers(1, 9), k=st.integers(1, 4), seed=st.integers(0, 999))
def test_dynamic_programming_finds_the_best_clusters_there_are(n, k, seed):
    values = draw(2, n, seed=seed)
    weights = draw(2, n, seed=seed + 1).abs() + 0.01
    found = cost(values, weights, km.optimum(values, weights, k))
    for row in range(2):
        order = values[row].argsort()
        v, w = values[row][order], weights[row][order]
        best = math.inf
        for cuts in itertools.combinations_with_replacement(range(n + 1), k - 1):
            total = 0.0
            for a, b in itertools.pairwise((0, *cuts, n)):
                if b > a:
                    mean = (v[a:b] * w[a:b]).sum() / w[a:b].sum()
                    total += float((w[a:b] * (v[a:b] - mean).square()).sum())
            best = min(best, total)
        assert float(found[row]) == pytest.approx(best, rel=1e-9, abs=1e-12)


@settings(max_examples=20, deadline=None)
@given(k=st.sampled_from([2, 3, 8]), seed=st.integers(0, 99), n=st.sampled_from([20, 100]))
def test_no_run_of_lloyd_beats_dynamic_programming(k, seed, n):
    values, weights = draw(4, n, seed=seed), draw(4, n, seed=seed + 1).square()
    best = cost(values, weights, km.kmeans(values, weights, k))
    start = draw(4, k, seed=seed + 2).sort(1).values
    assert bool((best <= cost(values, weights, km.lloyd(values, weights, start, 30)) + 1e-12).all())


def test_lloyd_never_goes_uphill_and_never_loses_to_the_uniform_grid():
    values, weights = draw(6, 400), draw(6, 400, seed=1).square()
    r = rtn(values, Grid(3, None, symmetric=False, scale_dtype=F32))
    zero, scale = r.zero.double(), r.scale.double()
    centres = (torch.arange(8, dtype=torch.float64) - zero) * scale
    before = cost(values, weights, centres)
    assert bool((before <= (weights * (values - r.weight).square()).sum(1) + 1e-9).all())
    for _ in range(12):
        centres = km.lloyd(values, weights, centres, 1)
        after = cost(values, weights, centres)
        assert bool((after <= before + 1e-12).all())
        before = after
    # On bins, dynamic programming is no longer exact; with Lloyd behind it, it is as good.
    found = cost(values, weights, km.kmeans(values, weights, 8))
    assert float(found.sum()) <= 1.02 * float(before.sum())


@pytest.mark.parametrize("bits", [1, 2, 3, 4])
def test_few_distinct_values_are_kept_exactly(bits):
    g = torch.Generator().manual_seed(bits)
    known = torch.randn(6, 2**bits, generator=g).half().float()
    w = known.gather(1, torch.randint(0, 2**bits, (6, 100), generator=g))
    s = solve(w, grid=LutGrid(bits, None), grid_solver="rtn")
    assert torch.equal(s.weight, w)
    wide = known.gather(1, torch.randint(0, 2**bits, (6, 1000), generator=g))
    assert torch.equal(solve(wide, grid=LutGrid(bits, None), grid_solver="rtn").weight, wide)


def test_sensitivity_moves_levels_to_what_matters():
    w, f = draw(8, 256), draw(8, 256, seed=1).square().square()
    blind = solve(w, grid=LutGrid(2, None, scale_dtype=F32), grid_solver="rtn")
    aware = solve(w, grid=LutGrid(2, None, scale_dtype=F32), grid_solver="rtn", sensitivity=f)
    costs = [(f * (s.weight - w).square()).sum(1) for s in (aware, blind)]
    assert bool((costs[0] < costs[1]).all())
    nothing = torch.zeros_like(f)  # a row without sensitivity counts every weight alike
    same = solve(w, grid=LutGrid(2, None, scale_dtype=F32), grid_solver="rtn", sensitivity=nothing)
    torch.testing.assert_close(same.weight, blind.weight)


def test_one_table_stops_where_absolute_errors_stop_falling():
    w = draw(16, 64)
    flat = w.reshape(1, -1)
    found = km.stopped_by_l1(flat, 8)
    error = (flat - found.gather(1, km.assign(flat, found))).abs().sum()
    at = ((torch.arange(8) + 0.5) * flat.shape[1] / 8).long()
    start = flat.sort(1).values[:, at]
    assert error <= (flat - start.gather(1, km.assign(flat, start))).abs().sum()
    s = solve(w, grid=LutGrid(3, None, shared=True), grid_solver="rtn")
    assert s.table.shape == (1, 8)
    assert len(s.weight.unique()) <= 8


def test_turns_of_factors_and_signs_never_lose_to_the_greedy_start():
    w = draw(12, 64)
    for bits in (1, 2, 3):
        rest = w.clone()
        for _ in range(bits):
            rest -= rest.abs().mean(1, keepdim=True) * torch.where(rest >= 0, 1.0, -1.0)
        s = solve(w, grid=BinaryGrid(bits, None, scale_dtype=F32), grid_solver="rtn")
        found = (s.weight - w).square().sum(1)
        assert bool((found <= rest.square().sum(1) * (1 + 1e-6)).all())
        assert s.table.shape == (bits, 12, 1)
    assert float(found.sum()) < 0.9 * float(rest.square().sum())


def test_sums_of_signs_are_exact_where_the_weight_is_one():
    factors = torch.tensor([1.0, 0.25, 0.0625], dtype=torch.float64)[:, None].expand(3, 4)
    every = sums(factors)
    assert torch.equal(every[0], torch.full((4,), -1.3125, dtype=torch.float64))
    assert torch.equal(every[0b011], torch.full((4,), 1.1875, dtype=torch.float64))
    w = every[torch.randint(0, 8, (4, 60), generator=torch.Generator().manual_seed(0)), 0].double()
    s = solve(w, grid=BinaryGrid(3, None), grid_solver="rtn")
    assert float((s.weight - w).abs().max()) < 1e-3


@pytest.mark.parametrize("grid", [LutGrid(3, None), Grid(4, 16), BinaryGrid(2, 16)])
@pytest.mark.parametrize("solver", ["rtn", "gptq"])
def test_outliers_stay_exact_and_cost_less(grid, solver, problem):
    w = problem.weight.clone()
    w[3, 5], w[7, 40] = 9.0, -7.0
    off = by_size(w, torch.zeros_like(w), 0.01, 0.0)
    assert bool(off[3, 5])
    assert bool(off[7, 40])
    assert int(off.sum()) == outlier_count(0.01, w.numel())
    s = solve(w, problem.hessian, grid=grid, grid_solver=solver, extra=off)
    plain = solve(w, problem.hessian, grid=grid, grid_solver=solver)
    if solver == "rtn":
        assert torch.equal(s.weight[off], w[off].float())
    assert s.loss < plain.loss
    assert (s.weight - w).square().sum() < (plain.weight - w).square().sum()
    assert s.mask is None
    assert torch.equal(s.extra, off)
    if s.under is not None:
        assert bool((s.under[off].abs() <= s.under.abs().max()).all())


def test_everything_off_the_grid_is_the_weight_itself(problem):
    every = torch.ones_like(problem.weight, dtype=torch.bool)
    s = solve(problem.weight, problem.hessian, grid=LutGrid(2, None), extra=every)
    assert torch.equal(s.weight, problem.weight.float())


def test_counts_of_outliers_are_exact_whatever_ties():
    score = torch.tensor([[3.0, 1.0, 3.0], [3.0, 0.0, 2.0]])
    assert largest(score, 2).tolist() == [[True, False, True], [False, False, False]]
    assert int(largest(score, 0).sum()) == 0
    assert bool(largest(score, 6).all())
    w, f = draw(20, 50), draw(20, 50, seed=1).abs()
    both = by_size(w, f, 0.02, 0.01)
    assert int(both.sum()) == 30
    big = largest(w.abs(), 20)
    assert bool(both[big].all())
    assert float(f[both & ~big].min()) >= float(f[~both].max())


def test_unlikely_weights_follow_the_matrix_own_gaussian():
    w = 0.02 * draw(64, 64)
    w[0, 0] = 0.5
    found = by_density(w, -4.0, 0.01)
    assert bool(found[0, 0])
    mean, spread = w.mean(), w.std(correction=0)
    z = ((w - mean) / spread).square() / 2 + torch.log(spread) + 0.5 * math.log(2 * math.pi)
    assert torch.equal(found, z > 4.0)
    assert int(by_density(w, 4.0, 0.01).sum()) == outlier_count(0.01, w.numel())
    assert not bool(by_density(torch.ones(4, 4), -4.0, 0.5).any())
