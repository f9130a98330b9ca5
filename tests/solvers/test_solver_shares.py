"""Sharing sparsity out over layers: exact in sum, within the band, and never above uniform."""

from __future__ import annotations

import pytest
import torch
from hypothesis import example, given, settings
from hypothesis import strategies as st

from llmc.compiler.ir.errors import ModelError
from llmc.compiler.solvers.shares import BINS, histogram, share_out


def scores(sizes, seed=0, *, steps=None):
    """Random positive scores of layers of those sizes and of different scales."""
    g = torch.Generator().manual_seed(seed)
    made = [torch.rand(n, generator=g, dtype=torch.float64) for n in sizes]
    if steps is not None:  # few values, told apart exactly
        return [(s * steps).ceil() * 2.0 ** (i % 3) for i, s in enumerate(made)]
    return [s.pow(2) * 10.0 ** (i % 3) for i, s in enumerate(made)]


def lost(layers, counts):
    """What goes when each layer gives up its lowest scores."""
    return sum(float(s.sort().values[:n].sum()) for s, n in zip(layers, counts, strict=True))


def uniform(sizes, share):
    """Counts of one share everywhere, whose sum is the rounded overall one."""
    goal = round(share * sum(sizes))
    counts = [int(share * n) for n in sizes]
    open_ = [i for i, n in enumerate(sizes) if counts[i] < share * n]
    for i in open_[: goal - sum(counts)]:
        counts[i] += 1
    return counts


LAYERS = {
    "sizes": st.lists(st.integers(1, 60), min_size=1, max_size=5),
    "share": st.sampled_from([0.0, 0.1, 1 / 3, 0.5, 0.77, 0.99]),
    "spread": st.sampled_from([0.0, 0.05, 0.15, 1.0]),
    "seed": st.integers(0, 999),
}


@settings(max_examples=200, deadline=None)
@given(**LAYERS, steps=st.sampled_from([1, 3, 200]))
@example(sizes=[20, 15], share=0.1, spread=0.05, seed=0, steps=1)  # 3.0000000000000004 of 20
def test_sum_band_and_loss(sizes, share, spread, seed, steps):
    """Exact to one weight; with scores that can be told apart, no more is lost than uniformly."""
    layers = scores(sizes, seed, steps=steps)
    counts = share_out([histogram(s) for s in layers], share, spread)
    assert sum(counts) == round(share * sum(sizes))
    for n, c in zip(sizes, counts, strict=True):
        assert 0 <= c <= n
        assert (share - spread) * n - 1 < c < (share + spread) * n + 1
    assert lost(layers, counts) <= lost(layers, uniform(sizes, share))


@settings(max_examples=50, deadline=None)
@given(sizes=LAYERS["sizes"], share=LAYERS["share"], seed=LAYERS["seed"])
def test_without_a_band_the_lowest_scores_of_all_layers_go(sizes, share, seed):
    layers = scores(sizes, seed, steps=200)
    counts = share_out([histogram(s) for s in layers], share, 1.0)
    goal = round(share * sum(sizes))
    if share < 0.99:  # above, no layer may give up everything
        for s, c in zip(layers, counts, strict=True):
            if c >= len(s) * 0.99:
                return
        least = float(torch.cat(layers).sort().values[:goal].sum())
        assert lost(layers, counts) == pytest.approx(least, rel=1e-12)


def test_continuous_scores_lose_no_more_than_their_resolution():
    layers = scores([4000, 3000, 2000], 5)
    for share in (0.2, 0.3, 0.4):  # no layer is to give up nearly everything
        counts = share_out([histogram(s) for s in layers], share, 1.0)
        best = float(torch.cat(layers).sort().values[: round(share * 9000)].sum())
        assert best * (1 - 1e-12) <= lost(layers, counts) <= best * (1 + 2.0**-8)
        assert lost(layers, counts) < lost(layers, uniform([4000, 3000, 2000], share))


def test_equal_layers_get_equal_shares_and_sensitive_ones_lower():
    base = scores([1000])[0]
    same = share_out([histogram(base)] * 3, 0.5, 0.15)
    assert same == [500, 500, 500]
    falling = share_out([histogram(base * f) for f in (1.0, 4.0, 16.0)], 0.5, 1.0)
    assert falling[0] > falling[1] > falling[2]
    banded = share_out([histogram(base * f) for f in (1.0, 4.0, 16.0)], 0.5, 0.15)
    assert banded == [650, 500, 350]
    assert max(share_out([histogram(base)] * 3, 0.4, 0.0)) == 400


def test_a_common_factor_changes_nothing_but_resolution():
    layers = scores([500, 400, 300], 3)
    plain = share_out([histogram(s) for s in layers], 0.5, 0.2)
    assert share_out([histogram(s * 2.0**-60) for s in layers], 0.5, 0.2) == plain


def test_bins_ascend_and_bad_scores_are_refused():
    values = torch.tensor([0.0, 1e-45, 1e-30, 0.5, 1.0, 1.01, 3e38])
    bins = [int(histogram(v[None]).nonzero()) for v in values]
    assert bins == sorted(bins)
    assert bins[-1] < BINS
    assert int(histogram(torch.tensor([-0.0])).nonzero()) == 0
    for bad in (-1.0, float("nan"), float("inf")):
        with pytest.raises(ModelError):
            histogram(torch.tensor([1.0, bad]))
