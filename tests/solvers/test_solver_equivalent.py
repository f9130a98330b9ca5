"""Searched scales, output clips and learned ranges against their definitions, in fp64."""

import itertools

import pytest
import torch

from llmc.compiler.solvers import Grid, solve
from llmc.compiler.solvers.equivalent import Reader, output_loss, powers, search
from llmc.compiler.solvers.grid import OUTPUT_SHRINKS, fits_t, rtn_t
from llmc.compiler.solvers.learned import learned_fit, rounded, through

WIDE = torch.float64
ALPHAS = [i / 20 for i in range(20)]


def problem(tokens: int = 200, n: int = 48, m: int = 24, seed: int = 0):
    """Correlated inputs with a loud, a constant and a dead channel; a weight with equal rows."""
    g = torch.Generator().manual_seed(seed)
    x = torch.randn(tokens, n, generator=g, dtype=WIDE)
    x = x @ torch.randn(n, n, generator=g, dtype=WIDE) * torch.logspace(0, -2, n, dtype=WIDE)
    x[:, 3] *= 50
    x[:, 5], x[:, 7] = 1.5, 0.0
    w = torch.randn(m, n, generator=g, dtype=WIDE)
    w[1] = w[0]
    return x, w


def test_powers_are_normalised_and_leave_dead_channels() -> None:
    x, _ = problem()
    size = x.abs().mean(0)
    s = powers(size, ALPHAS)
    assert torch.equal(s[0], torch.ones_like(s[0]))
    assert (s[:, 7] == 1).all()
    alive = s[:, size > 0]
    torch.testing.assert_close(alive.amax(1) * alive.amin(1), torch.ones(20, dtype=WIDE))
    assert torch.equal(powers(torch.zeros(4), ALPHAS), torch.ones(20, 4))


GRIDS = [Grid(3, 16), Grid(4, 20, symmetric=False, clip="mse"), Grid(2, None, clip="output")]


@pytest.mark.parametrize("grid", GRIDS)
@pytest.mark.parametrize("tokens", [200, 20])
def test_the_closed_form_is_the_error_of_the_outputs(grid: Grid, tokens: int) -> None:
    """Fewer tokens than channels, dead and constant channels included."""
    x, w = problem(tokens)
    s, h = powers(x.abs().mean(0), ALPHAS), x.T @ x
    got = output_loss(Reader(w, grid, weighed=False), h, s)
    for one, loss in zip(s, got, strict=True):
        seen = (x / one).T @ (x / one) if grid.clip == "output" else None
        q = rtn_t((w * one).T.contiguous(), grid, importance=seen)[0].T
        want = ((x / one) @ q.T - x @ w.T).square().sum()
        assert float(loss) == pytest.approx(float(want), rel=1e-9)


@pytest.mark.parametrize(("grid", "weighed"), list(itertools.product(GRIDS, [False, True])))
def test_the_search_never_loses_to_no_scales(grid: Grid, weighed: bool) -> None:
    for seed in range(5):
        x, w = problem(seed=seed)
        both = [Reader(w, grid, weighed), Reader(w.flip(0)[:7] * 3, grid, weighed)]
        s = powers(x.abs().mean(0), ALPHAS)
        found = search(both, x.T @ x, s)
        every = sum(output_loss(r, x.T @ x, s) for r in both)
        assert found.base == pytest.approx(float(every[0]))
        assert found.loss == pytest.approx(float(every.min()))
        assert found.index == int(every.argmin())
        assert found.loss <= found.base


def test_the_search_protects_a_loud_channel() -> None:
    x, w = problem()
    found = search([Reader(w, Grid(3, 16))], x.T @ x, powers(x.abs().mean(0), ALPHAS))
    assert found.loss < 0.5 * found.base


def test_some_rows_rank_and_all_rows_judge() -> None:
    x, _ = problem()
    w = torch.randn(500, 48, generator=torch.Generator().manual_seed(1), dtype=WIDE)
    s = powers(x.abs().mean(0), ALPHAS)
    reader = Reader(w, Grid(3, 16))
    found = search([reader], x.T @ x, s, rows=16)
    exact = output_loss(reader, x.T @ x, s[[0, found.index]])
    assert [found.base, found.loss] == pytest.approx(exact.tolist())
    assert found.loss <= found.base


@pytest.mark.parametrize(
    ("group", "symmetric"), list(itertools.product([16, 20, None], [True, False]))
)
def test_an_output_clip_never_hurts_its_own_objective(group: int | None, symmetric: bool) -> None:
    x, w = problem()
    h, wt = x.T @ x, w.T.contiguous()
    plain, clipped = (Grid(3, group, symmetric, clip=c) for c in ("absmax", "output"))
    before, after = (wt - rtn_t(wt, g, importance=h)[0] for g in (plain, clipped))
    for a, b in plain.spans(48):
        block = h[a:b, a:b]
        was, now = ((block @ d[a:b] * d[a:b]).sum(0) for d in (before, after))
        assert (now <= was * (1 + 1e-12)).all()
    assert not torch.equal(before, after)
    # Nothing in the grid of shrinks does better for any row of any group.
    fit = fits_t(wt, clipped, importance=h)
    for i, (a, b) in enumerate(clipped.spans(48)):
        got = (h[a:b, a:b] @ after[a:b] * after[a:b]).sum(0)
        low, high = wt[a:b].amin(0).clamp(max=0), wt[a:b].amax(0).clamp(min=0)
        for c in (1.0, *OUTPUT_SHRINKS):
            trial = clipped.ranged(low * c, high * c)
            e = wt[a:b] - clipped.centred(wt[a:b], trial) * trial.scale
            assert (got <= (h[a:b, a:b] @ e * e).sum(0) * (1 + 1e-9)).all()
        assert fit.scale[i].shape == (24,)


def test_an_output_clip_serves_both_solvers() -> None:
    x, w = problem()
    h = x.T @ x
    loss = {
        (c, s): solve(w, h, grid=Grid(3, 16, clip=c), grid_solver=s).loss
        for c, s in itertools.product(("absmax", "output"), ("rtn", "gptq"))
    }
    assert loss["output", "rtn"] < loss["absmax", "rtn"]
    assert loss["output", "gptq"] < loss["output", "rtn"]


@pytest.mark.parametrize(
    ("group", "symmetric"), list(itertools.product([16, 20, None], [True, False]))
)
def test_whole_learned_ranges_are_round_to_nearest(group: int | None, symmetric: bool) -> None:
    """σ = 1 ⇒ RTN, to the bit; a decided fit is what the solve uses."""
    x, w = problem()
    grid = Grid(3, group, symmetric)
    wt = w.T.contiguous()
    share = torch.ones(2, len(grid.spans(48)), 24, dtype=WIDE, requires_grad=True)
    fit = learned_fit(wt, grid, *share)
    value, _, plain = rtn_t(wt, grid)
    assert torch.equal(fit.scale, plain.scale)
    made = rounded(wt, grid, fit)
    assert torch.equal(made, value)
    ((made - wt) @ w).square().sum().backward()
    assert share.grad is not None
    assert (share.grad.abs().sum((1, 2)) > 0).all() or symmetric
    decided = solve(w, x.T @ x, grid=grid, grid_solver="rtn", fit=plain)
    assert torch.equal(decided.weight, solve(w, x.T @ x, grid=grid, grid_solver="rtn").weight)
    half = learned_fit(wt, grid, *(0.5 * share.detach()))
    got = solve(w, x.T @ x, grid=grid, grid_solver="rtn", fit=half)
    assert torch.equal(got.weight, rounded(wt, grid, half).T.float())


def test_gradients_pass_straight_through() -> None:
    a = torch.tensor([0.3, 1.7], requires_grad=True)
    out = through(a, a.detach().round())
    assert out.tolist() == [0.0, 2.0]
    out.sum().backward()
    assert a.grad is not None
    assert a.grad.tolist() == [1.0, 1.0]
