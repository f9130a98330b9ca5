"""Masks: exact counts, ties, energy removed, invariances."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from llmc.compiler.ir.errors import UsageError
from llmc.compiler.solvers.masks import (
    BlockPick,
    MaskRule,
    ScorePick,
    drop_smallest,
    drop_smallest_per_row,
    pick_nm,
    static_mask,
)


@settings(max_examples=60, deadline=None)
@given(
    m=st.integers(1, 8), data=st.data(), blocks=st.integers(1, 4), levels=st.sampled_from([2, 1000])
)
def test_nm_pick_keeps_the_best_and_exactly_n(m, data, blocks, levels):
    n = data.draw(st.integers(1, m))
    g = torch.Generator().manual_seed(data.draw(st.integers(0, 99)))
    score = torch.randint(levels, (blocks * m, 7), generator=g).float()
    keep = pick_nm(score, n, m).view(blocks, m, 7)
    assert bool((keep.sum(1) == n).all())
    s = score.view(blocks, m, 7)
    worst_kept = s.masked_fill(~keep, torch.inf).amin(1)
    best_dropped = s.masked_fill(keep, -torch.inf).amax(1)
    assert bool((worst_kept >= best_dropped).all())
    one = ScorePick(n, m, score)
    assert torch.equal(torch.stack([one.keep(part) for part in s]), keep)


@settings(max_examples=60, deadline=None)
@given(k=st.integers(1, 12), levels=st.sampled_from([1, 3, 1000]), data=st.data())
def test_unstructured_picks_drop_exactly_the_smallest(k, levels, data):
    g = torch.Generator().manual_seed(data.draw(st.integers(0, 99)))
    score = torch.randint(levels, (k, 5), generator=g).float()
    count = data.draw(st.integers(0, k * 5))
    keep = drop_smallest(score, count)
    assert int((~keep).sum()) == count
    assert sorted(score[~keep].tolist()) == sorted(score.flatten().tolist())[:count]
    per_row = data.draw(st.integers(0, k))
    keep = drop_smallest_per_row(score, per_row)
    assert bool(((~keep).sum(0) == per_row).all())
    for column in range(5):
        dropped = score[~keep[:, column], column].tolist()
        assert sorted(dropped) == sorted(score[:, column].tolist())[:per_row]


def test_energy_removed_from_gaussian_weights():
    w = torch.randn(1024, 1024, generator=torch.Generator().manual_seed(0))
    rules = [
        (MaskRule("unstructured", sparsity=0.5), 0.071),
        (MaskRule("nm", 4, 8), 0.103),
        (MaskRule("nm", 2, 4), 0.132),
        (MaskRule("nm", 1, 4), 0.383),
    ]
    for rule, expected in rules:
        keep = static_mask(rule, "magnitude", w, torch.ones(1024))
        removed = float((w * ~keep).square().sum() / w.square().sum())
        assert removed == pytest.approx(expected, abs=0.003)


@pytest.mark.parametrize("rule", [MaskRule("nm", 2, 4), MaskRule("unstructured", sparsity=0.4)])
def test_wanda_does_not_see_diagonal_scaling_of_inputs(rule):
    """Activations divided and weights multiplied by s (powers of two, so exact)."""
    g = torch.Generator().manual_seed(3)
    w, d = torch.randn(32, 16, generator=g), torch.rand(32, generator=g) + 0.1
    s = 2.0 ** torch.randint(-3, 4, (32,), generator=g)
    base = static_mask(rule, "wanda", w, d)
    assert torch.equal(base, static_mask(rule, "wanda", w * s[:, None], d / s.square()))


def test_wanda_drops_per_row_and_magnitude_per_matrix():
    w = torch.randn(32, 16, generator=torch.Generator().manual_seed(4)) * torch.arange(1, 17)
    rule = MaskRule("unstructured", sparsity=0.5)
    assert bool((static_mask(rule, "wanda", w, torch.ones(32)).sum(0) == 16).all())
    magnitude = static_mask(rule, "magnitude", w, torch.ones(32))
    assert int(magnitude.sum()) == 256
    assert bool((magnitude.sum(0) != 16).any())


def test_block_pick_minimises_the_exact_cost():
    g = torch.Generator().manual_seed(5)
    a = torch.randn(3, 6, 6, generator=g, dtype=torch.float64)
    corner = a @ a.mT + torch.eye(6)
    w = torch.randn(6, 9, generator=g, dtype=torch.float64)
    pick = BlockPick(corner, 3, 6)
    for b in range(3):
        keep = pick.keep(b, w)
        assert bool((keep.sum(0) == 3).all())

        def cost(drop, row, b=b):
            at = torch.tensor(drop)
            return float(w[at, row] @ torch.linalg.inv(corner[b][at][:, at]) @ w[at, row])

        for row in range(9):
            chosen = [i for i in range(6) if not keep[i, row]]
            others = [[0, 1, 2], [3, 4, 5], [0, 2, 4], [1, 3, 5], [0, 1, 5]]
            assert all(cost(chosen, row) <= cost(o, row) + 1e-12 for o in others)


@pytest.mark.parametrize(
    "options",
    [
        {"kind": "block"},
        {"kind": "nm", "n": 0},
        {"kind": "nm", "n": 5, "m": 4},
        {"kind": "unstructured", "sparsity": 1.2},
    ],
)
def test_impossible_rules_are_refused(options):
    with pytest.raises(UsageError, match="expected"):
        MaskRule(**options)
