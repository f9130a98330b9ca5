"""Outlier-victim pairs as a weight grid: codes, errors against plain grids, what cannot use it."""

from functools import partial

import pytest
import torch

from llmc.compiler.ir import packing
from llmc.compiler.ir.errors import UsageError
from llmc.compiler.ir.ops.pairs import USUAL, decode_pairs, pair_codes, round_pairs
from llmc.compiler.solvers import Grid, solve
from llmc.compiler.solvers.pairs import PairGrid


def grid(bits=4, group=None, clip="mse"):
    how = {"rounded": partial(round_pairs, bits=bits), "encoded": partial(pair_codes, bits=bits)}
    return PairGrid(bits, group, clip=clip, usual=USUAL, **how)


def weight(seed=0, outliers=6):
    g = torch.Generator().manual_seed(seed)
    w = torch.randn(24, 96, generator=g)
    at = torch.randperm(w.numel(), generator=g)[:outliers]
    w.view(-1)[at] *= 40
    return w


@pytest.mark.parametrize("bits", [4, 8])
@pytest.mark.parametrize("group", [None, 32, 64])
def test_codes_decode_to_the_solved_weight(bits, group):
    found = solve(weight(), grid=grid(bits, group), grid_solver="rtn")
    packed = packing.pack(found.codes, bits)
    back = decode_pairs(packed, found.scale, bits=bits, group=group or 96, columns=96)
    assert torch.equal(back, found.weight)


@pytest.mark.parametrize("group", [None, 32])
def test_an_outlier_costs_a_victim_and_not_the_row(group):
    w = weight()
    plain = solve(w, grid=Grid(4, group, clip="mse"), grid_solver="rtn")
    found = solve(w, grid=grid(4, group), grid_solver="rtn")
    assert found.loss < 0.7 * plain.loss
    assert solve(w, grid=grid(4, group, "absmax"), grid_solver="rtn").loss >= found.loss
    rest = w.abs() < 10
    assert ((found.weight == 0) & rest).sum() > 0


def test_masked_weights_stay_zero_and_are_the_best_victims():
    w = weight()
    keep = torch.ones_like(w, dtype=torch.bool)
    keep[:, 1::2] = False
    found = solve(w, grid=grid(), grid_solver="rtn", keep=keep, mask_solver="magnitude")
    assert bool((found.weight[~keep] == 0).all())


def test_what_takes_one_input_at_a_time_is_refused():
    with pytest.raises(UsageError, match="solver=rtn"):
        solve(weight(), torch.eye(96) + 0.1, grid=grid(), grid_solver="gptq")
    with pytest.raises(UsageError, match="even number"):
        solve(weight()[:, :95], grid=grid(), grid_solver="rtn")
    with pytest.raises(UsageError, match="even group"):
        grid(group=33)
