"""Extra passes: never uphill, exact storage, exact masks, and a real gain."""

from __future__ import annotations

import pytest
import torch

from llmc.compiler.ir.errors import UsageError
from llmc.compiler.solvers import Grid, MaskRule, prepare, solve
from llmc.compiler.solvers.answer import Answer
from llmc.compiler.solvers.grid import rtn_t
from llmc.compiler.solvers.masks import pick_nm
from llmc.compiler.solvers.refine import Refiner
from llmc.compiler.solvers.schedule import make_schedule

TWO_FOUR = MaskRule("nm", 2, 4)


def start(problem, grid, rule):
    """Round to nearest on a magnitude mask: far from any optimum."""
    wt = problem.weight.t().contiguous()
    keep = pick_nm(wt.abs(), rule.n, rule.m) if rule else None
    if grid is None:
        return wt, Answer(wt * keep, keep=keep)
    value, centred, fit = rtn_t(wt, grid, keep=keep)
    return wt, Answer(value, centred, fit.scale, fit.zero, keep)


@pytest.mark.parametrize(
    ("grid", "rule"),
    [
        (Grid(4, 16), None),
        (Grid(2, 24, symmetric=False), None),
        (Grid(3, None, clip="mse"), None),
        (None, TWO_FOUR),
        (Grid(4, 16), TWO_FOUR),
        (Grid(4, None), MaskRule("nm", 1, 4)),
    ],
)
@pytest.mark.parametrize("scales", [False, True])
@pytest.mark.parametrize("mask", [False, True])
def test_no_pass_goes_uphill_in_any_row(problem, grid, rule, scales, mask):
    wt, answer = start(problem, grid, rule)
    n = len(wt)
    factor = prepare(problem.hessian)
    h = factor.hessian + factor.ridge * torch.eye(n, dtype=torch.float64)
    schedule = make_schedule(
        grid.spans(n) if grid else [(0, n)], unit=rule.unit if rule else 1, block=32
    )
    refiner = Refiner(wt, h, schedule, answer, grid=grid, rule=rule, scales=scales, mask=mask)

    def rows():
        d = wt - answer.value
        return (d * (h @ d)).sum(0)

    before = first = rows()
    for _ in range(5):
        refiner.run()
        after = rows()
        assert bool((after <= before * (1 + 1e-12)).all())
        before = after
    assert float(before.sum()) < 0.9 * float(first.sum())
    if grid is not None:
        scale = grid.spread(answer.scale, n)
        assert torch.equal(answer.value, answer.centred * scale)
        assert torch.equal(answer.scale, answer.scale.half().double())
    if rule is not None:
        assert bool((answer.value[~answer.keep] == 0).all())
        assert bool((answer.keep.view(-1, rule.m, wt.shape[1]).sum(1) == rule.n).all())


def test_a_pass_stops_at_a_coordinate_wise_optimum(problem):
    """At a fixed point no single code can move and lower the loss."""
    grid = Grid(3, 16)
    wt, answer = start(problem, grid, None)
    h = prepare(problem.hessian).hessian
    schedule = make_schedule(grid.spans(64), unit=1, block=32)
    refiner = Refiner(wt, h, schedule, answer, grid=grid)
    for _ in range(200):
        before = answer.centred.clone()
        refiner.run()
        if torch.equal(before, answer.centred):
            break
    else:
        pytest.fail("no fixed point in 200 passes")
    d = wt - answer.value
    slope, curve = h @ d, h.diagonal()[:, None]
    scale = grid.spread(answer.scale, 64)
    for step in (-1.0, 1.0):
        change = -2 * step * scale * slope + (step * scale).square() * curve
        allowed = (answer.centred + step).clamp(-4, 3) == answer.centred + step
        assert bool((change[allowed] >= -1e-9).all())


def test_passes_without_a_grid_reach_least_squares_on_the_mask(problem):
    wt, answer = start(problem, None, TWO_FOUR)
    factor = prepare(problem.hessian)
    h = factor.hessian + factor.ridge * torch.eye(64, dtype=torch.float64)
    refiner = Refiner(wt, h, make_schedule([(0, 64)], unit=4, block=32), answer)
    for _ in range(400):
        refiner.run()
    for row in range(4):
        kept = answer.keep[:, row]
        best = torch.linalg.solve(h[kept][:, kept], h[kept] @ wt[:, row])
        torch.testing.assert_close(answer.value[kept, row], best, rtol=1e-5, atol=1e-7)


def test_sweeps_pay_at_the_door(problem):
    def loss(**options):
        s = solve(problem.weight, problem.hessian, **options)
        assert s.loss == pytest.approx(
            problem.loss(s.weight) / problem.loss(torch.zeros_like(problem.weight)), rel=1e-4
        )
        return s.loss

    joint = {"grid": Grid(4, 16), "mask": TWO_FOUR}
    losses = [
        loss(**joint),
        loss(**joint, sweeps=1),
        loss(**joint, sweeps=3),
        loss(**joint, sweeps=3, mask_search=True),
    ]
    assert losses == sorted(losses, reverse=True)
    assert losses[2] < 0.95 * losses[0]
    assert loss(grid=Grid(4, 16), sweeps=2) < loss(grid=Grid(4, 16), sweeps=2, refit=False)
    with pytest.raises(UsageError, match="sweeps"):
        solve(problem.weight, problem.hessian, grid=Grid(4), sweeps=-1)


def test_dead_and_duplicate_inputs(build):
    problem = build(dead=True)
    h = problem.hessian.clone()
    h[9], h[:, 9] = h[8], h[:, 8]
    h[9, 9] = h[8, 8]
    for options in ({}, {"damp": 0.0}):
        s = solve(
            problem.weight,
            h,
            grid=Grid(4, 16),
            mask=TWO_FOUR,
            sweeps=2,
            mask_search=True,
            **options,
        )
        assert bool(torch.isfinite(s.weight).all())
        assert bool((s.mask.view(24, -1, 4).sum(-1) == 2).all())
