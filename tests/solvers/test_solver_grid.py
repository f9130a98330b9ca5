"""Grids and round-to-nearest: error bounds, stored scales, extremes."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from llmc.compiler.ir.errors import UsageError
from llmc.compiler.solvers import Grid, rtn


def spread(per_group, group, n):
    return per_group.double().repeat_interleave(group or n, 1)[:, :n]


@settings(max_examples=60, deadline=None)
@given(
    bits=st.integers(2, 8),
    group=st.sampled_from([None, 8, 12, 32]),
    symmetric=st.booleans(),
    clip=st.sampled_from(["absmax", "mse"]),
    n=st.integers(1, 40),
    seed=st.integers(0, 99),
    size=st.sampled_from([0.05, 1.0, 100.0]),
)
def test_rounding_laws(bits, group, symmetric, clip, n, seed, size):
    g = torch.Generator().manual_seed(seed)
    w = torch.randn(5, n, generator=g) * size
    grid = Grid(bits, group, symmetric=symmetric, clip=clip)
    r = rtn(w, grid)
    count = 1 if group is None else -(-n // group)
    assert r.scale.shape == (5, count)
    scale = spread(r.scale, group, n)
    zero = float(2 ** (bits - 1)) if r.zero is None else spread(r.zero, group, n)
    assert (r.zero is None) == symmetric
    assert r.codes.dtype == torch.uint8
    assert int(r.codes.max()) < 2**bits
    assert torch.equal(((r.codes.double() - zero) * scale).float(), r.weight)
    assert torch.equal(r.scale, r.scale.half().float())  # codes are rounded with what is stored
    error = (r.weight.double() - w.double()).abs()
    if clip == "absmax":  # half a step, plus what rounding the scale itself can move the ends
        assert bool((error <= scale * (0.5 + 2.0**bits * 2**-10)).all())
    again = (r.weight.double() / scale).round() + zero  # a second rounding changes nothing
    assert torch.equal(again.to(torch.uint8), r.codes)


def test_every_bit_width_has_its_known_error():
    """Relative error on N(0,1) in groups of 128; asymmetric figures from the reference digest."""
    w = torch.randn(256, 1024, generator=torch.Generator().manual_seed(0))
    expected = {2: 2.53e-1, 3: 4.65e-2, 4: 1.01e-2, 8: 3.50e-5}
    for bits, figure in expected.items():
        r = rtn(w, Grid(bits, 128, symmetric=False))
        assert float((r.weight - w).square().mean()) == pytest.approx(figure, rel=0.03)


@pytest.mark.parametrize("bits", [2, 3, 4])
@pytest.mark.parametrize("symmetric", [True, False])
def test_searched_clip_never_costs_more(bits, symmetric):
    w = torch.randn(64, 256, generator=torch.Generator().manual_seed(1))
    weights = torch.rand(256, generator=torch.Generator().manual_seed(2)) + 0.1
    costs = []
    for clip in ("absmax", "mse"):
        r = rtn(w, Grid(bits, 64, symmetric=symmetric, clip=clip), importance=weights)
        costs.append((r.weight - w).square().mul(weights).view(64, -1, 64).sum(-1))
    assert bool((costs[1] <= costs[0]).all())
    assert float(costs[1].sum()) < 0.95 * float(costs[0].sum())


def test_range_always_contains_zero():
    r = rtn(torch.rand(8, 64) + 1, Grid(4, 64, symmetric=False))
    assert bool((r.zero == 0).all())
    assert float((r.weight - r.weight.clamp(1, 2)).abs().max()) < 0.07


@pytest.mark.parametrize("symmetric", [True, False])
def test_zero_groups_and_masked_weights_are_exact(symmetric):
    w = torch.randn(4, 64)
    w[1] = 0
    w[2, 16:32] = 0
    keep = torch.rand(4, 64) > 0.5
    r = rtn(w, Grid(4, 16, symmetric=symmetric), keep=keep)
    assert bool((r.weight[~keep] == 0).all())
    assert bool((r.weight[1] == 0).all())
    assert bool((r.scale > 0).all())


@pytest.mark.parametrize("size", [1e30, 1e-30, 3e38, 1e-38])
def test_extreme_weights_stay_finite(size):
    r = rtn(torch.full((2, 16), size), Grid(4, 16))
    assert bool(torch.isfinite(r.weight).all())
    assert bool(torch.isfinite(r.scale).all())
    assert bool((r.scale > 0).all())


@pytest.mark.parametrize(
    "options",
    [{"bits": 1}, {"bits": 9}, {"group": 0}, {"clip": "best"}, {"scale_dtype": torch.int8}],
)
def test_impossible_grids_are_refused(options):
    with pytest.raises(UsageError, match="expected"):
        Grid(**{"bits": 4, **options})
