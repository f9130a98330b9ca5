"""Factors of a weight: Eckart and Young at the output, in fp64, for any metric and covariance."""

from __future__ import annotations

import math

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from llmc.compiler.ir.errors import ModelError, UsageError
from llmc.compiler.solvers import factor as module
from llmc.compiler.solvers.factor import (
    Root,
    diagonal,
    factor,
    identity,
    output_loss,
    refit,
    spectrum,
    tail,
    whitening,
)

SHAPES = [(24, 40), (40, 24), (16, 16)]


def random(*shape: int, seed: int = 0) -> Tensor:
    g = torch.Generator().manual_seed(seed + 1000 * sum(shape))
    return torch.randn(*shape, generator=g, dtype=torch.float64)


def inputs(columns: int, tokens: int = 400, seed: int = 0) -> Tensor:
    """Correlated inputs with one loud channel; fewer tokens than columns leave XᵀX singular."""
    x = random(tokens, columns, seed=seed) @ random(columns, columns, seed=seed + 1)
    x[:, 5] *= 50
    return x


def measured(w: Tensor, made: Tensor, x: Tensor) -> float:
    return float((x @ (w - made).t()).norm())


def metrics(w: Tensor, x: Tensor) -> dict[str, Root]:
    fisher = random(*w.shape, seed=3).square().sum(0)
    return {
        "svd": identity(),
        "fwsvd": diagonal(fisher.sqrt()),
        "asvd": diagonal(x.abs().mean(0).sqrt()),
        "svdllm": whitening(x.t() @ x),
    }


@pytest.mark.parametrize("solver", ["svd", "gram"])
@pytest.mark.parametrize("shape", SHAPES)
def test_the_loss_at_the_output_is_the_root_of_the_dropped_squares(shape, solver):
    w, x = random(*shape), inputs(shape[1])
    root = whitening(x.t() @ x)
    assert root.kind == "cholesky"
    assert not root.notes
    true = torch.linalg.svdvals(x @ w.t())
    for k in (1, 5, min(shape) - 1):
        made = factor(w, root, k, solver=solver)
        assert made.solver == solver
        want = math.sqrt(float(true[k:].square().sum()))
        assert measured(w, made.factors.product, x) == pytest.approx(want, rel=1e-10)
        assert made.error == pytest.approx(want, rel=1e-10)
        assert made.factors.left.shape == (shape[0], k)
        assert made.factors.right.shape == (k, shape[1])


@pytest.mark.parametrize("name", ["svd", "fwsvd", "asvd", "svdllm"])
@pytest.mark.parametrize("shape", SHAPES)
def test_each_metric_drops_its_own_tail_and_full_rank_is_lossless(shape, name):
    w, x = random(*shape), inputs(shape[1])
    root = metrics(w, x)[name]
    whole = factor(w, root, min(shape))
    torch.testing.assert_close(whole.factors.product, w, rtol=1e-10, atol=1e-10)
    assert whole.dropped == 0
    falling = []
    for k in range(1, min(shape) + 1):
        made = factor(w, root, k)
        left = root.loss(w - made.factors.product)
        assert left == pytest.approx(made.dropped, rel=1e-10, abs=1e-18 * made.whole)
        torch.testing.assert_close(whole.to(k).factors.product, made.factors.product)
        assert whole.to(k).dropped == pytest.approx(made.dropped, rel=1e-10)
        falling.append(made.dropped)
    assert falling == sorted(falling, reverse=True)


@given(st.integers(1, 15), st.integers(0, 50), st.sampled_from([8, 16, 200]))
@settings(max_examples=40, deadline=None)
def test_whitening_is_never_above_the_others_at_the_output(k, seed, tokens):
    w, x = random(20, 16, seed=seed), inputs(16, tokens, seed)
    gram = x.t() @ x
    found = metrics(w, x)
    loss = {n: output_loss(w, factor(w, r, k).factors.product, gram) for n, r in found.items()}
    energy = output_loss(w, torch.zeros_like(w), gram)
    assert all(loss["svdllm"] <= other + 1e-12 * energy for other in loss.values())


@pytest.mark.parametrize("shape", SHAPES)
def test_alike_inputs_give_plain_svd_and_independent_ones_their_rms(shape):
    w, n = random(*shape), shape[1]
    plain = factor(w, identity(), 7).factors.product
    same = factor(w, whitening(3.7 * torch.eye(n, dtype=torch.float64)), 7).factors.product
    torch.testing.assert_close(same, plain, rtol=1e-9, atol=1e-9)
    rms = random(n).abs() + 0.1
    apart = factor(w, whitening(torch.diag(rms.square())), 7).factors.product
    scaled = factor(w, diagonal(rms), 7).factors.product
    torch.testing.assert_close(apart, scaled, rtol=1e-9, atol=1e-9)


@pytest.mark.parametrize("shape", SHAPES)
def test_few_tokens_fall_back_to_eigenvectors_and_stay_exact(shape):
    w, x = random(*shape), inputs(shape[1], tokens=9)
    root = whitening(x.t() @ x)
    assert root.kind == "eigen"
    assert root.notes == (f"XᵀX has rank 9 of {shape[1]}, its eigenvectors used",)
    true = torch.linalg.svdvals(x @ w.t())
    for k in (1, 4, 8):
        want = math.sqrt(float(true[k:].square().sum()))
        assert measured(w, factor(w, root, k).factors.product, x) == pytest.approx(want, rel=1e-9)
    # Beyond the tokens' rank nothing is lost on them, and the rest is the best for any input.
    scale = float((x @ w.t()).norm())
    before = float("inf")
    for k in (9, 12, min(shape)):
        made = factor(w, root, k).factors.product
        assert measured(w, made, x) <= 1e-6 * scale
        assert float((w - made).norm()) < before
        before = float((w - made).norm())
    assert before <= 1e-9 * float(w.norm())


def test_jitter_is_relative_and_makes_a_singular_covariance_whole():
    x = inputs(16, tokens=9)
    gram = x.t() @ x
    for scale in (1e-12, 1.0, 1e12):
        root = whitening(gram * scale, jitter=1e-6)
        assert root.kind == "cholesky"
        torch.testing.assert_close(root.value, whitening(gram, 1e-6).value * math.sqrt(scale))


def test_a_covariance_that_says_nothing_is_noted_and_left_out():
    w = random(8, 6)
    plain = factor(w, identity(), 3).factors.product
    for bad, word in ((torch.zeros(6, 6), "all zero"), (torch.full((6, 6), torch.nan), "NaN")):
        made = factor(w, whitening(bad), 3)
        assert word in made.notes[0]
        torch.testing.assert_close(made.factors.product, plain)
    half = torch.eye(6)
    half[0, 5] = torch.inf
    assert whitening(half).kind == "identity"
    assert diagonal(torch.zeros(6)).notes


def test_a_dead_input_costs_nothing_and_keeps_what_it_can():
    w, x = random(12, 10), inputs(10)
    x[:, 2] = 0
    root = whitening(x.t() @ x)
    assert root.value.shape[1] == 9
    made = factor(w, root, 10).factors.product
    torch.testing.assert_close(made, w, rtol=1e-9, atol=1e-9)


def test_bad_arguments_are_one_line():
    w = random(8, 6)
    for call in (
        lambda: factor(w, identity(), 7),
        lambda: factor(w, identity(), 0),
        lambda: factor(w, identity(), 2, solver="fast"),
        lambda: whitening(torch.zeros(3, 4)),
        lambda: whitening(torch.eye(3), jitter=-1.0),
    ):
        with pytest.raises(UsageError, match="expected"):
            call()
    with pytest.raises(ModelError, match="finite weight"):
        factor(torch.full((4, 4), torch.nan), identity(), 2)
    with pytest.raises(ModelError, match="finite scales"):
        diagonal(torch.tensor([1.0, -1.0]))


@pytest.mark.parametrize("shape", [(60, 90), (90, 60)])
def test_the_randomised_error_is_the_one_that_is_stated(shape):
    w, x = random(*shape), inputs(shape[1])
    root = whitening(x.t() @ x)
    best, made = factor(w, root, 20), factor(w, root, 20, solver="randomised")
    assert made.solver == "randomised"
    assert made.error == pytest.approx(measured(w, made.factors.product, x), rel=1e-8)
    assert best.error <= made.error <= 1.02 * best.error
    again = factor(w, root, 20, solver="randomised")
    assert torch.equal(again.factors.left, made.factors.left)
    assert factor(w, root, 50, solver="randomised").solver == "svd"
    assert made.to(10).error == pytest.approx(measured(w, made.to(10).factors.product, x), rel=1e-8)


def test_a_gram_that_cannot_tell_directions_gives_way(monkeypatch):
    monkeypatch.setattr(module, "EXACT", 4)
    u, v = (torch.linalg.qr(random(16, 16, seed=s)).Q for s in (1, 2))
    w = u @ torch.diag(10.0 ** -torch.arange(16, dtype=torch.float64)) @ v
    assert factor(w, identity(), 4).solver == "gram"
    made = factor(w, identity(), 12)
    assert made.solver == "svd"
    assert "cannot tell direction 12" in made.notes[0]
    assert made.error == pytest.approx(float((w - made.factors.product).norm()), rel=1e-3)
    torch.testing.assert_close(spectrum(w, identity())[:6], torch.linalg.svdvals(w)[:6])


def test_refitting_is_the_least_squares_of_the_dense_outputs():
    w, x, read = random(12, 10), inputs(10), inputs(10) + 0.3 * random(400, 10, seed=9)
    made = factor(w, whitening(x.t() @ x), 4).factors
    now = refit(w, made, read.t() @ read, x.t() @ read)
    want = torch.linalg.lstsq(read @ made.right.t(), x @ w.t()).solution.t()
    torch.testing.assert_close(now.left, want, rtol=1e-8, atol=1e-8)
    assert torch.equal(now.right, made.right)
    grams = (x.t() @ x, read.t() @ read, x.t() @ read)
    before, after = (output_loss(w, f.product, *grams) for f in (made, now))
    direct = float((x @ w.t() - read @ now.product.t()).square().sum())
    assert after == pytest.approx(direct, rel=1e-9)
    assert after < before
    # Where both read the same, whitening has nothing left to gain.
    same = refit(w, made, x.t() @ x)
    torch.testing.assert_close(same.product, made.product, rtol=1e-8, atol=1e-8)


def test_refitting_on_few_tokens_moves_the_factor_least():
    w, x, read = random(12, 10), inputs(10), inputs(10, tokens=3, seed=4)
    made = factor(w, whitening(x.t() @ x), 6).factors
    now = refit(w, made, read.t() @ read)
    torch.testing.assert_close(read @ now.product.t(), read @ w.t(), rtol=1e-7, atol=1e-6)
    still = torch.linalg.svd(read @ made.right.t()).Vh[3:]
    torch.testing.assert_close(now.left @ still.t(), made.left @ still.t(), rtol=1e-6, atol=1e-6)


def test_the_tail_starts_with_all_and_ends_with_nothing():
    assert tail(torch.tensor([3.0, 2.0, 1.0])).tolist() == [14.0, 5.0, 1.0, 0.0]
