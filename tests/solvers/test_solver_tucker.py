"""Tucker form in fp64: exact error, HOOI against HOSVD, bounds, planted tensors, ranks, stacks."""

from __future__ import annotations

from math import prod

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from llmc.compiler.ir.errors import ModelError, UsageError
from llmc.compiler.solvers import tucker as solver
from llmc.compiler.solvers.factor import diagonal, factor, identity, whitening
from llmc.compiler.solvers.tucker import Sizes, cheapest, even, kept, leading, stack, tucker

Shape = st.tuples(st.integers(2, 4), st.integers(2, 6), st.integers(2, 6))


def random(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def decaying(*shape: int, seed: int = 0) -> Tensor:
    """A tensor whose unfoldings fall off along every axis."""
    out = random(*shape, seed=seed)
    for axis, n in enumerate(shape):
        basis = torch.linalg.qr(random(n, n, seed=seed + axis + 1)).Q
        falls = basis * torch.arange(1, n + 1, dtype=torch.float64) ** -1.0
        out = torch.tensordot(falls, out, dims=([1], [axis])).movedim(0, axis)
    return out


def fitting(shape: tuple[int, ...], caps: tuple[int, ...]) -> tuple[int, ...]:
    """Ranks of which none is above the product of the others."""
    ranks = [min(n, c) for n, c in zip(shape, caps, strict=True)]
    for _ in ranks:
        ranks = [min(k, prod(ranks) // k) for k in ranks]
    return tuple(ranks)


# ** one tensor **


@settings(max_examples=40, deadline=None)
@given(shape=Shape, caps=Shape, seed=st.integers(0, 99))
def test_the_error_is_what_the_core_lacks_and_within_the_bounds(shape, caps, seed):
    a, ranks = random(*shape, seed=seed), fitting(shape, caps)
    made = tucker(a, ranks)
    assert tuple(made.core.shape) == ranks
    error = float((a - made.dense()).square().sum())
    assert error == pytest.approx(made.dropped, rel=1e-10, abs=1e-12)
    lacks = float(a.square().sum() - made.core.square().sum())
    assert error == pytest.approx(lacks, rel=1e-10, abs=1e-10 * made.whole)
    for u in (u for u in made.factors if u is not None):
        torch.testing.assert_close(u.t() @ u, torch.eye(u.shape[1], dtype=u.dtype))
    assert all(b <= a for a, b in zip(made.history, made.history[1:], strict=False))
    # No tensor of these ranks is nearer than one unfolding cut to its rank.
    tails = [
        float(torch.linalg.svdvals(a.movedim(i, 0).flatten(1))[k:].square().sum())
        for i, k in enumerate(ranks)
    ]
    cut = sum(k < n for k, n in zip(ranks, shape, strict=True))
    first = tucker(a, ranks, 0)
    assert first.dropped == pytest.approx(made.history[0])
    assert first.dropped <= sum(tails) * (1 + 1e-10) + 1e-12
    assert first.dropped**0.5 <= (cut * max(tails)) ** 0.5 * (1 + 1e-10) + 1e-9
    assert made.dropped >= max(tails) * (1 - 1e-10) - 1e-12
    assert (made.factors[0] is None) == (ranks[0] == shape[0])


@settings(max_examples=10, deadline=None)
@given(shape=Shape, seed=st.integers(0, 99))
def test_whole_ranks_are_lossless(shape, seed):
    a = random(*shape, seed=seed)
    ranks = fitting(shape, shape)
    if ranks == shape:
        made = tucker(a, ranks)
        assert made.factors == (None, None, None)
        assert torch.equal(made.core, a)
    else:  # directions that the others cannot tell apart
        made = tucker(a, ranks)
        torch.testing.assert_close(made.dense(), a, rtol=1e-10, atol=1e-10)


def test_a_planted_core_is_found():
    core = random(2, 3, 4)
    sides = [torch.linalg.qr(random(n, k, seed=n)).Q for n, k in ((5, 2), (8, 3), (9, 4))]
    a = torch.einsum("abc,ia,jb,kc->ijk", core, *sides)
    made = tucker(a, (2, 3, 4))
    assert made.dropped < 1e-20 * made.whole
    for u, side in zip(made.factors, sides, strict=True):
        torch.testing.assert_close(u @ u.t(), side @ side.t(), rtol=1e-10, atol=1e-10)
    assert tucker(a, (2, 2, 4)).dropped > 1e-3
    assert tucker(a, (5, 3, 4)).dropped < 1e-20 * made.whole


def test_sweeps_gain_on_hosvd():
    a = random(4, 12, 10)
    made = tucker(a, (4, 4, 3))
    assert len(made.history) > 2
    assert made.dropped < 0.99 * tucker(a, (4, 4, 3), 0).dropped


def test_a_matrix_is_its_svd():
    a = random(7, 5)
    made = tucker(a, (3, 3))
    want = torch.linalg.svdvals(a)[3:].square().sum()
    assert made.dropped == pytest.approx(float(want), rel=1e-12)


@pytest.mark.parametrize("shape", [(3, 9, 4), (3, 4, 30), (20, 2, 3)])
def test_large_unfoldings_go_by_their_gram(monkeypatch, shape):
    a = decaying(*shape)
    ranks = fitting(shape, (2, 3, 3))
    want = tucker(a, ranks, 0)
    directions = leading(a, 0)[:, :2]
    monkeypatch.setattr(solver, "EXACT", 1)
    made = tucker(a, ranks, 0)
    assert made.dropped == pytest.approx(want.dropped, rel=1e-8)
    again = leading(a, 0)[:, :2]
    torch.testing.assert_close(again @ again.t(), directions @ directions.t(), atol=1e-7, rtol=1e-7)


@pytest.mark.parametrize("ranks", [(0, 2, 2), (2, 6, 2), (1, 2, 3), (2, 2)])
def test_ranks_that_do_not_fit(ranks):
    with pytest.raises(UsageError, match=r"expected up to \[2, 5, 6\], and less than that up to"):
        tucker(random(2, 5, 6), ranks)


def test_numbers_that_are_not_finite():
    a = random(2, 3, 4)
    a[1, 2, 3] = float("inf")
    with pytest.raises(ModelError, match="found NaN or Inf"):
        tucker(a, (2, 2, 2))


# ** stacks in a metric **


def inputs(columns: int, rank: int | None = None) -> Tensor:
    x = random(60, columns, seed=7) * torch.arange(1, columns + 1, dtype=torch.float64) ** -1.0
    return x if rank is None else x[:, :rank] @ random(rank, columns, seed=8)


@pytest.mark.parametrize("ranks", [(4, 5, 3), (4, 9, 3), (4, 5, 7), (2, 5, 3), (2, 9, 7)])
@pytest.mark.parametrize("kind", ["none", "full", "deficient"])
def test_a_stack_is_its_whitened_tensor(ranks, kind):
    w = random(4, 9, 7)
    x = inputs(7, 4 if kind == "deficient" else None)
    root = identity() if kind == "none" else whitening(x.t() @ x)
    made = stack(w, root, ranks)
    sizes = Sizes((4, 9, 7), ranks)
    parts = (made.mix, made.left, made.right)
    assert tuple(p is not None for p in parts) == sizes.cut
    assert made.core.numel() + sum(p.numel() for p in parts if p is not None) == sizes.numbers
    rows = (w - made.dense()).flatten(0, 1)
    error = float((rows @ x.t()).square().sum()) if kind != "none" else float(rows.square().sum())
    assert made.dropped == pytest.approx(error, rel=1e-8, abs=1e-10)
    whole = float((w.flatten(0, 1) @ (x.t() if kind != "none" else torch.eye(7).double())).norm())
    assert made.whole == pytest.approx(whole**2, rel=1e-10)
    assert made.dropped <= made.history[-1] * (1 + 1e-9) + 1e-12
    if kind != "deficient":
        want = tucker(root.times(w.flatten(0, 1)).reshape(4, 9, -1), ranks)
        assert made.dropped <= want.dropped * (1 + 1e-9) + 1e-12


def test_whole_columns_or_a_single_matrix_are_known_solutions():
    w, x = random(4, 9, 7), inputs(7)
    root = whitening(x.t() @ x)
    rows = stack(w, root, (4, 9, 3))
    assert rows.dropped == pytest.approx(factor(w.flatten(0, 1), root, 3).dropped, rel=1e-9)
    one = stack(w[:1], root, (1, 3, 3))
    assert one.dropped == pytest.approx(factor(w[0], root, 3).dropped, rel=1e-9)
    same = stack(w, root, (4, 9, 7))
    assert torch.equal(same.dense(), w)


def test_an_input_that_never_varies_costs_no_error_and_is_still_kept_by_size():
    w, x = random(3, 6, 5), inputs(5)
    x[:, 2] = 0
    root = whitening(x.t() @ x)
    made = stack(w, root, (3, 6, 4))
    assert made.dropped < 1e-12 * made.whole
    dead = stack(w, diagonal(torch.tensor([1.0, 0, 0, 0, 0])), (3, 6, 4))
    assert dead.dropped < 1e-12 * dead.whole
    # Behind what the metric sees, the rest is cut by its size.
    rows = w.flatten(0, 1)
    first = rows[:, :1] / rows[:, 0].norm()
    plain = torch.linalg.svdvals(rows - first @ (first.t() @ rows))[3:].norm()
    assert float((w - dead.dense()).norm()) == pytest.approx(float(plain), rel=1e-6)


def test_the_metric_lowers_the_error_that_it_measures():
    w, x = random(4, 12, 10), inputs(10)
    root = whitening(x.t() @ x)
    aware, blind = (stack(w, r, (4, 6, 5)) for r in (root, identity()))
    assert aware.dropped < 0.7 * root.loss((w - blind.dense()).flatten(0, 1))


# ** ranks **


@pytest.mark.parametrize("q", [4, 2])
def test_the_table_holds_the_error_of_every_pair(q):
    w, x = decaying(4, 6, 5), inputs(5)
    root = whitening(x.t() @ x)
    there = root.times(w.flatten(0, 1)).reshape(4, 6, 5)
    table = kept(w, root, q)
    assert table.shape == (7, 6)
    assert float(table[0].sum()) == float(table[:, 0].sum()) == 0
    for r in range(1, 7):
        for s in range(1, 6):
            if q == 4 and (r <= q * s or r == 6) and (s <= q * r or s == 5):
                lost = tucker(there, (4, r, s), 0).dropped
                whole = float(there.square().sum())
                assert whole - float(table[r, s]) == pytest.approx(lost, rel=1e-8, abs=1e-9)
    assert bool((table.diff(dim=0) >= 0).all())
    assert bool((table.diff(dim=1) >= 0).all())


@settings(max_examples=30, deadline=None)
@given(share=st.floats(0.4, 0.9), seed=st.integers(0, 20), step=st.sampled_from([1, 2, 4]))
def test_ranks_by_error_lose_no_more_than_even_ones_in_their_numbers(share, seed, step):
    w, shape = decaying(4, 12, 8, seed=seed), (4, 12, 8)
    most = int(share * w.numel())
    plain = even(shape, 4, (step, step), most)
    assert plain.numbers <= most
    found = cheapest(shape, 4, (step, step), plain.numbers, kept(w, identity(), 4))
    assert found.numbers <= plain.numbers
    one, other = (tucker(w, s.ranks, 0).dropped for s in (found, plain))
    assert one <= other * (1 + 1e-9)
    for s in (plain, found):
        assert all(k % step == 0 for k in s.ranks[1:])


def test_no_other_even_pair_is_fuller():
    found = even((4, 12, 8), 4, (1, 1), 250)
    share = min(found.ranks[1] / 12, found.ranks[2] / 8)
    for r in range(1, 13):
        for s in range(1, 9):
            other = Sizes((4, 12, 8), (4, r, s))
            assert other.numbers > 250 or min(r / 12, s / 8) <= share


def test_too_few_numbers():
    with pytest.raises(UsageError, match="expected room for 24 of 384 numbers, found 23"):
        even((4, 12, 8), 4, (1, 1), 23)


def test_sweeps_over_large_unfoldings_step_towards_the_same(monkeypatch):
    a = decaying(5, 14, 12) + 0.05 * random(5, 14, 12)
    want = tucker(a, (5, 4, 3))
    monkeypatch.setattr(solver, "EXACT", 1)
    made = tucker(a, (5, 4, 3))
    assert all(b <= a for a, b in zip(made.history, made.history[1:], strict=False))
    assert len(made.history) > 1
    assert made.dropped == pytest.approx(want.dropped, rel=1e-3)
    for u in made.factors[1:]:
        torch.testing.assert_close(u.t() @ u, torch.eye(u.shape[1], dtype=u.dtype))
