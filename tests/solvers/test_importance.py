"""Scores of units against exact oracles in fp64 (algorithms.md §2.12, §2.15, §2.16)."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from llmc.compiler.ir.errors import UsageError
from llmc.compiler.solvers import importance as imp

F64 = torch.float64


def data(m: int = 6, n: int = 12, tokens: int = 64, seed: int = 0):
    """Weight [m, n] and correlated inputs [tokens, n] with a non-zero mean."""
    g = torch.Generator().manual_seed(seed)
    mix = torch.randn(n, n, generator=g, dtype=F64)
    x = torch.randn(tokens, n, generator=g, dtype=F64) @ mix + torch.randn(n, generator=g)
    return torch.randn(m, n, generator=g, dtype=F64), x


def least_loss(weight, x, gone, ridge: float = 0.0):
    """Exact least squares: the best change of the weight that zeroes ``gone``, and its loss."""
    h = x.T @ x + ridge * torch.eye(x.shape[1], dtype=F64)
    kept = [j for j in range(x.shape[1]) if j not in gone]
    best = torch.zeros_like(weight)
    best[:, kept] = torch.linalg.solve(h[kept][:, kept], h[kept] @ weight.T).T
    d = weight - best
    return float((d @ h * d).sum()), best


UNITS = torch.tensor([0, 0, 1, 1, 2, 2, -1, 3, 3, 0, 1, 2])


def test_obs_score_is_the_least_loss_of_removing_the_unit():
    weight, x = data()
    score = imp.obs(weight, x.T @ x, UNITS, 4, damp=0.0)
    for unit in range(4):
        gone = (unit == UNITS).nonzero().view(-1).tolist()
        assert float(score[unit]) == pytest.approx(least_loss(weight, x, gone)[0], rel=1e-9)


def test_obs_of_single_columns_is_the_textbook_formula():
    weight, x = data()
    h = x.T @ x
    ridge = 0.01 * h.diagonal().mean()
    want = weight.square().sum(0) / torch.linalg.inv(h + ridge * torch.eye(12)).diagonal()
    found = imp.obs(weight, h, torch.arange(12), 12, damp=0.01)
    torch.testing.assert_close(found, want, rtol=1e-7, atol=0)


@pytest.mark.parametrize("scale", [1e-14, 1.0, 1e14])
def test_obs_keeps_its_unit(scale):
    """Extreme statistics are rescaled inside; the score stays in units of what was given."""
    weight, x = data()
    h = x.T @ x
    want = imp.obs(weight, h, UNITS, 4) * scale
    torch.testing.assert_close(imp.obs(weight, h * scale, UNITS, 4), want, rtol=1e-7, atol=0)


def test_refit_reaches_the_obs_score_and_the_least_squares_weight():
    weight, x = data()
    gone = [0, 1, 9]
    kept = torch.tensor([j for j in range(12) if j not in gone])
    loss, best = least_loss(weight, x, gone)
    found = imp.refit(weight, x.T @ x, kept, damp=0.0)
    torch.testing.assert_close(found, best[:, kept], rtol=1e-8, atol=1e-10)
    full = torch.zeros_like(weight)
    full[:, kept] = found
    got = float((x @ (weight - full).T).square().sum())
    assert got == pytest.approx(loss, rel=1e-9)
    assert float(imp.obs(weight, x.T @ x, UNITS, 4, damp=0.0)[0]) == pytest.approx(got, rel=1e-8)


def test_a_dead_input_costs_nothing_and_breaks_nothing():
    weight, x = data()
    x[:, 3] = 0
    score = imp.obs(weight, x.T @ x, torch.arange(12), 12)
    assert torch.isfinite(score).all()
    ridge = 0.01 * float(x.square().sum(0).mean())
    assert float(score[3]) == pytest.approx(ridge * float(weight[:, 3].square().sum()), rel=0.1)
    assert float(score[3]) < float(score[torch.arange(12) != 3].min())
    kept = torch.tensor([j for j in range(12) if j != 3])
    torch.testing.assert_close(imp.refit(weight, x.T @ x, kept), weight[:, kept])


def test_a_duplicate_input_can_be_taken_over_by_its_twin():
    weight, x = data()
    x[:, 5] = x[:, 4]
    kept = torch.tensor([j for j in range(12) if j != 5])
    found = imp.refit(weight, x.T @ x, kept, damp=1e-12)
    want = weight[:, kept].clone()
    want[:, 4] += weight[:, 5]
    torch.testing.assert_close(found, want, rtol=1e-5, atol=1e-5)
    unit = torch.full((12,), -1)
    unit[5] = 0
    alone = float(weight[:, 5].square().sum() * x[:, 5].square().sum())
    assert float(imp.obs(weight, x.T @ x, unit, 1, damp=1e-10)) < 1e-6 * alone


def test_flap_keeps_the_mean_output_and_leaves_exactly_the_covariance():
    weight, x = data()
    gone = torch.tensor([2, 5, 7])
    kept = torch.tensor([j for j in range(12) if j not in gone.tolist()])
    mean = x.mean(0)
    delta = imp.shift(weight, weight[:, kept], mean, kept)
    torch.testing.assert_close(delta, weight[:, gone] @ mean[gone], rtol=1e-10, atol=1e-12)
    before, after = x @ weight.T, x[:, kept] @ weight[:, kept].T + delta
    torch.testing.assert_close(after.mean(0), before.mean(0), rtol=1e-10, atol=1e-12)
    covariance = torch.cov(x.T, correction=0)[gone][:, gone]
    want = torch.trace(weight[:, gone] @ covariance @ weight[:, gone].T)
    assert float((after - before).square().sum(1).mean()) == pytest.approx(float(want), rel=1e-10)
    diagonal = imp.fluctuation(weight, x.var(0, correction=0))[gone].sum()
    by_hand = (weight[:, gone].square() * covariance.diagonal()).sum()
    assert float(diagonal) == pytest.approx(float(by_hand), rel=1e-12)


def test_a_constant_input_is_lossless_to_remove():
    weight, x = data()
    x[:, 4] = 3.5
    assert float(imp.fluctuation(weight, x.var(0, correction=0))[4]) < 1e-25
    kept = torch.tensor([j for j in range(12) if j != 4])
    delta = imp.shift(weight, weight[:, kept], x.mean(0), kept)
    torch.testing.assert_close(x[:, kept] @ weight[:, kept].T + delta, x @ weight.T)


def test_refit_on_the_covariance_with_the_shift_is_regression_with_an_intercept():
    weight, x = data()
    kept = torch.tensor([0, 2, 3, 6, 8, 10, 11])
    covariance = torch.cov(x.T, correction=0)
    found = imp.refit(weight, covariance, kept, damp=0.0)
    delta = imp.shift(weight, found, x.mean(0), kept)
    ones = torch.cat((x[:, kept], torch.ones(len(x), 1, dtype=F64)), 1)
    want = torch.linalg.lstsq(ones, x @ weight.T).solution
    torch.testing.assert_close(torch.cat((found.T, delta[None])), want, rtol=1e-7, atol=1e-9)


def samples(seed: int = 0):
    """A loss of one matrix over four samples, with its mean gradient and mean squared gradient."""
    weight, x = data(seed=seed)
    w = weight.clone().requires_grad_()
    losses = [torch.tanh(part @ w.T).square().sum() for part in x.split(16)]
    grads = [torch.autograd.grad(loss, w, retain_graph=True)[0] for loss in losses]
    stacked = torch.stack(grads)
    return weight, x, grads, stacked.mean(0), stacked.square().mean(0)


def test_taylor_vector_is_the_directional_derivative_along_the_unit():
    weight, x, _, mean, square = samples()

    def loss(w):
        return sum(torch.tanh(part @ w.T).square().sum() for part in x.split(16)) / 4

    for axis in (0, 1):
        score = imp.taylor(weight, mean, square, "vector", axis)
        for j in range(weight.shape[axis]):
            step = torch.zeros_like(weight)
            step.select(axis, j).copy_(weight.select(axis, j))
            h = 1e-5
            slope = (loss(weight + h * step) - loss(weight - h * step)) / (2 * h)
            assert float(score[j]) == pytest.approx(abs(float(slope)), rel=1e-5, abs=1e-7)


def test_taylor_orders_are_their_formulas():
    weight, _, _, g, f = samples()
    want = {
        "first": (g * weight).abs(),
        "second": weight**2 * f,
        "mixed": (g * weight - 0.5 * weight**2 * f).abs(),
    }
    for order, element in want.items():
        for axis in (0, 1):
            found = imp.taylor(weight, g, f, order, axis)
            torch.testing.assert_close(found, element.sum(1 - axis), rtol=1e-12, atol=0)
    with pytest.raises(UsageError, match="taylor"):
        imp.taylor(weight, g, f, "third", 0)


def test_michel_equals_autograd_through_an_explicit_mask():
    weight, x, grads, _, _ = samples()
    for part, grad in zip(x.split(16), grads, strict=True):
        mask = torch.ones(12, dtype=F64, requires_grad=True)
        loss = torch.tanh((part * mask) @ weight.T).square().sum()
        (want,) = torch.autograd.grad(loss, mask)
        torch.testing.assert_close(imp.masked_slope(weight, grad, 1), want, rtol=1e-10, atol=1e-12)


@pytest.mark.parametrize("order", imp.ORDERS)
def test_a_zero_unit_scores_zero(order):
    weight, x = data()
    _, _, _, g, f = samples()
    weight[:, UNITS == 1] = 0
    scores = [
        imp.per_unit(imp.taylor(weight, g, f, order, 1), UNITS, 4),
        imp.per_unit(imp.along(imp.magnitude(weight), 1), UNITS, 4),
        imp.per_unit(imp.along(imp.wanda(weight, x.norm(dim=0)), 1), UNITS, 4),
        imp.per_unit(imp.fluctuation(weight, x.var(0)), UNITS, 4, mean=True),
        imp.obs(weight, x.T @ x, UNITS, 4),
    ]
    for score in scores:
        assert float(score[1]) == 0
        assert (score[[0, 2, 3]] > 0).all()


@pytest.mark.parametrize("axis", [0, 1, 2])
def test_along_sums_every_other_axis(axis):
    t = torch.arange(24.0).view(2, 3, 4)
    rest = tuple(a for a in range(3) if a != axis)
    torch.testing.assert_close(imp.along(t, axis), t.double().sum(rest))
    assert imp.along(t[0, 0], 0).tolist() == [0, 1, 2, 3]


@settings(max_examples=40, deadline=None)
@given(
    st.integers(1, 6).flatmap(
        lambda u: st.tuples(st.just(u), st.lists(st.integers(-1, u - 1), min_size=1, max_size=20))
    )
)
def test_per_unit_is_the_loop(case):
    units, members = case
    unit_of = torch.tensor(members)
    values = torch.arange(1.0, len(members) + 1)
    total, mean = (imp.per_unit(values, unit_of, units, mean=m) for m in (False, True))
    for u in range(units):
        mine = [float(v) for v, at in zip(values, members, strict=True) if at == u]
        assert float(total[u]) == sum(mine)
        assert float(mean[u]) == pytest.approx(sum(mine) / len(mine) if mine else 0)


def test_reductions():
    parts = [torch.tensor([1.0, 5.0]), torch.tensor([3.0, 1.0])]
    assert imp.combine(parts, "sum").tolist() == [4, 6]
    assert imp.combine(parts, "max").tolist() == [3, 5]
    assert imp.combine(parts, "mean").tolist() == [2, 3]
    with pytest.raises(UsageError):
        imp.combine(parts, "min")


def test_standardise():
    s = imp.standardise(torch.tensor([1.0, 2.0, 3.0, 4.0]), 0.5)
    assert s.tolist() == [-3, -1, 1, 3]
    assert imp.standardise(torch.full((4,), 7.0), 0.0).tolist() == [0, 0, 0, 0]


def test_random_follows_its_seed():
    assert torch.equal(imp.random(5, 3), imp.random(5, 3))
    assert not torch.equal(imp.random(5, 3), imp.random(5, 4))
