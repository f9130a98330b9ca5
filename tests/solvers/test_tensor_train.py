"""Tensor trains: exact error, the bound against the best, what is lossless, shapes and orders."""

from __future__ import annotations

import math
from math import prod

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from llmc.compiler.ir.errors import ModelError, UsageError
from llmc.compiler.solvers import tensor_train
from llmc.compiler.solvers.tensor_train import (
    capped,
    cluster_order,
    factors,
    fitting,
    full_ranks,
    nearest_shape,
    numbers,
    padded,
    tt_svd,
)

Sizes = st.lists(st.integers(2, 5), min_size=2, max_size=4).map(tuple)


def random(*shape: int, seed: int = 0) -> torch.Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


@settings(max_examples=25, deadline=None)
@given(sizes=Sizes, cap=st.integers(1, 6), seed=st.integers(0, 99))
def test_the_error_is_what_was_dropped(sizes: tuple[int, ...], cap: int, seed: int) -> None:
    a = random(3, *sizes, seed=seed)
    train = tt_svd(a, capped(sizes, cap))
    error = (a - train.dense()).square().flatten(1).sum(1)
    torch.testing.assert_close(error, train.dropped, rtol=1e-10, atol=1e-12)
    # No train of these ranks is nearer than the worst unfolding cut to its rank.
    tails = [
        torch.linalg.svdvals(a.reshape(3, prod(sizes[: k + 1]), -1))[:, r:].square().sum(1)
        for k, r in enumerate(train.ranks)
    ]
    best = torch.stack(tails).amax(0)
    assert bool((error <= (len(sizes) - 1) * best * (1 + 1e-9) + 1e-12).all())
    assert sum(c[0].numel() for c in train.cores) == numbers(sizes, train.ranks)


@settings(max_examples=15, deadline=None)
@given(sizes=Sizes, seed=st.integers(0, 99))
def test_full_ranks_are_lossless(sizes: tuple[int, ...], seed: int) -> None:
    a = random(2, *sizes, seed=seed)
    train = tt_svd(a, full_ranks(sizes))
    torch.testing.assert_close(train.dense(), a, rtol=1e-12, atol=1e-12)
    stored = [c.float().double() for c in train.cores]
    made = type(train)(tuple(stored), train.dropped).dense()
    assert float((made - a).norm() / a.norm()) < 1e-6


def test_a_kronecker_vector_has_rank_one() -> None:
    parts = [random(5, d, seed=d) for d in (4, 3, 2)]
    a = torch.einsum("ba,bc,bd->bacd", *parts)
    train = tt_svd(a, (1, 1))
    torch.testing.assert_close(train.dense(), a, rtol=1e-12, atol=1e-12)
    assert float(train.dropped.max()) < 1e-20
    assert numbers((4, 3, 2), train.ranks) == 9


def test_a_planted_train_is_found() -> None:
    cores = random(1, 4, 2), random(2, 5, 3, seed=1), random(3, 6, 1, seed=2)
    a = torch.einsum("xay,ybz,zcw->abc", *cores)[None]
    assert float(tt_svd(a, (2, 3)).dropped) < 1e-20 * float(a.square().sum())
    assert float(tt_svd(a, (2, 2)).dropped) > 1e-3


def test_large_unfoldings_go_by_their_gram(monkeypatch: pytest.MonkeyPatch) -> None:
    a = random(2, 6, 7, 8)
    want = tt_svd(a, (5, 6))
    monkeypatch.setattr(tensor_train, "EXACT", 3)
    have = tt_svd(a, (5, 6))
    torch.testing.assert_close(have.dense(), want.dense(), rtol=1e-9, atol=1e-9)
    torch.testing.assert_close(have.dropped, want.dropped, rtol=1e-9, atol=1e-12)
    eye = have.cores[1].flatten(1, 2)
    torch.testing.assert_close(eye.mT @ eye, torch.eye(6).double().expand(2, 6, 6))


def test_refuses() -> None:
    a = random(1, 3, 4)
    for ranks in ((4,), (0,), (1, 1), ()):
        with pytest.raises(UsageError, match=r"expected up to \[3\]"):
            tt_svd(a, ranks)
    with pytest.raises(UsageError):
        tt_svd(random(1, 2, 4, 4), (1, 4, 1))
    with pytest.raises(ModelError, match="NaN or Inf"):
        tt_svd(a / 0 * 0, (2,))


@settings(max_examples=50, deadline=None)
@given(sizes=Sizes, share=st.floats(0.3, 1.5))
def test_fitting_ranks_fit_and_none_more_does(sizes: tuple[int, ...], share: float) -> None:
    most = int(share * prod(sizes))
    least = numbers(sizes, capped(sizes, 1))
    if least > most:
        with pytest.raises(UsageError, match=f"at least {least} numbers"):
            fitting(sizes, most)
        return
    ranks = fitting(sizes, most)
    assert numbers(sizes, ranks) <= most
    tt_svd(random(1, *sizes), ranks)
    if most >= numbers(sizes, full_ranks(sizes)):
        assert ranks == full_ranks(sizes)


def test_factors() -> None:
    assert factors(256, 3) == (4, 8, 8)
    assert factors(4096, 3) == (16, 16, 16)
    assert factors(257, 2) is None
    assert factors(30, 3) == (2, 3, 5)
    assert factors(7, 1) == (7,)
    for n in range(2, 200):
        found = factors(n, 2)
        wanted = [(a, n // a) for a in range(2, math.isqrt(n) + 1) if n % a == 0]
        assert found == (min(wanted, key=sum) if wanted else None)
    assert padded(2048, 3) == (8, 16, 16)
    assert padded(50257, 3) == (34, 37, 40)
    assert padded(20, 2)[0] * padded(20, 2)[1] >= 20
    assert nearest_shape(256, (4, 8, 9)) == (4, 8, 8)
    assert nearest_shape(256, (9, 30)) == (8, 32)
    assert nearest_shape(257, (16, 16)) is None


def test_like_rows_share_leading_digits() -> None:
    """Eight far clusters of six rows each: every leading digit is one of them."""
    centres = 100 * torch.arange(8.0).double()[:, None] * random(1, 5)
    rows = (centres[:, None] + random(8, 6, 5, seed=1)).flatten(0, 1)
    shuffled = torch.randperm(48, generator=torch.Generator().manual_seed(3))
    order = cluster_order(rows[shuffled], (8, 6))
    assert order.sort().values.tolist() == list(range(48))
    groups = (shuffled[order] // 6).reshape(8, 6)
    assert bool((groups == groups[:, :1]).all())
    assert cluster_order(rows[:1], (2, 2)).tolist() == [0]
