"""SpQR's two parts: scales that are codes, and weights that the sweep keeps off the grid."""

import math
from dataclasses import replace

import pytest
import torch

from llmc.compiler.ir.errors import UsageError
from llmc.compiler.ir.ops.bilevel import decode_bilevel
from llmc.compiler.ir.packing import pack
from llmc.compiler.solvers import Grid, prepare, solve
from llmc.compiler.solvers.bilevel import BilevelGrid, bilevel_scales

GRID = BilevelGrid(3, 8, False, scale_dtype=torch.float32)


def problem(rows=40, columns=48, seed=0):
    """Weights with a few large ones, and correlated inputs."""
    g = torch.Generator().manual_seed(seed)
    w = torch.randn(rows, columns, generator=g, dtype=torch.float64)
    w[torch.rand(w.shape, generator=g) < 0.01] *= 8
    x = torch.randn(400, columns, generator=g, dtype=torch.float64)
    x = x @ torch.randn(columns, columns, generator=g, dtype=torch.float64)
    return w, prepare(x.t() @ x, 0.01)


def split(threshold, most=1.0, grid=GRID, **given):
    w, factor = problem()
    return solve(w, factor=factor, grid=grid, threshold=threshold, most=most, **given)


# ** scales **


@pytest.mark.parametrize("rows", [16, 40, 5])
@pytest.mark.parametrize("bits", [1, 3, 8])
def test_scales_lie_within_half_a_step(rows, bits):
    g = torch.Generator().manual_seed(bits)
    scale = torch.rand(6, rows, generator=g, dtype=torch.float64) + 0.1
    empty = torch.rand(6, rows, generator=g) < 0.1
    made = bilevel_scales(scale, empty, bits)
    back = made.decoded()
    assert (back > 0).all()
    assert made.step.shape == made.low.shape == (6, math.ceil(rows / 16))
    step = made.step.double().repeat_interleave(16, 1)[:, :rows]
    off = (back.double() - scale).abs()[~empty]
    assert (off <= (step / 2 + 2.0**-9).expand_as(scale)[~empty]).all()
    given = (pack(made.codes, bits), made.step, made.low)
    assert torch.equal(decode_bilevel(*given, bits=bits, block=16, columns=rows), back.t())


def test_blocks_do_not_see_each_other():
    scale = torch.ones(2, 32, dtype=torch.float64)
    scale[:, 16:] = torch.linspace(50, 100, 16)
    made = bilevel_scales(scale, torch.zeros(2, 32, dtype=torch.bool), 3)
    assert torch.equal(made.decoded()[:, :16], torch.ones(2, 16))
    assert not made.step[:, 0].any()


def test_a_grid_of_one_scale_everywhere_is_the_uniform_grid():
    w, factor = problem()
    grid = replace(GRID, symmetric=True)
    one = torch.sign(w) * 3.5
    plain = Grid(3, 8, scale_dtype=torch.float32)
    a, b = (solve(one, factor=factor, grid=x, grid_solver="rtn") for x in (grid, plain))
    assert torch.equal(a.weight, b.weight)


def test_zero_stays_on_the_grid():
    w, factor = problem()
    w[:, ::3] = 0
    done = solve(w, factor=factor, grid=GRID, grid_solver="rtn")
    assert not done.weight[:, ::3].any()


def test_options_that_scales_of_codes_do_not_have():
    for given in ({"double": True}, {"power": True}, {"scale_dtype": torch.float16}):
        with pytest.raises(UsageError, match="bilevel"):
            BilevelGrid(3, 8, **{"scale_dtype": torch.float32, **given})
    with pytest.raises(UsageError, match="scale bits"):
        BilevelGrid(3, 8, scale_dtype=torch.float32, scale_bits=9)


# ** what stays **


@pytest.mark.parametrize("act_order", [False, True])
@pytest.mark.parametrize("grid", [GRID, Grid(3, 16), Grid(4, None)], ids=["two", "group", "row"])
def test_nothing_beyond_an_infinite_threshold_is_gptq_bit_for_bit(grid, act_order):
    w, factor = problem()
    plain = solve(w, factor=factor, grid=grid, act_order=act_order)
    for threshold in (math.inf, 1e30):
        done = split(threshold, grid=grid, act_order=act_order)
        assert torch.equal(done.weight, plain.weight)
        assert torch.equal(done.codes, plain.codes)
        assert done.loss == plain.loss
        assert not done.extra.any()


def test_at_threshold_zero_nothing_is_lost():
    done = split(0.0)
    w, _ = problem()
    assert done.loss < 1e-12
    torch.testing.assert_close(done.weight.double(), w, rtol=1e-6, atol=1e-7)


def test_fewer_stay_as_the_threshold_rises():
    counts, losses = [], []
    for threshold in (0.0, 0.02, 0.1, 0.5, 2.0, math.inf):
        done = split(threshold)
        counts.append(int(done.extra.sum()))
        losses.append(done.loss)
    assert counts == sorted(counts, reverse=True)
    assert counts[0] > counts[2] > 0 == counts[-1]
    assert losses == sorted(losses)


def test_no_more_than_the_share_stays_and_it_is_said():
    done = split(0.0, most=0.05)
    assert int(done.extra.sum()) == round(0.05 * 40 * 48)
    assert any("96 are kept" in note for note in done.fallbacks)
    assert done.loss < split(math.inf).loss


def test_what_stays_is_off_the_grid_and_the_rest_on_it():
    done = split(0.1)
    zero, scale = (t.float().repeat_interleave(8, 1) for t in (done.zero, done.scale))
    on = (done.codes.float() - zero) * scale
    assert torch.equal(on[~done.extra], done.weight[~done.extra])
    assert not on[done.extra].any()


def test_it_needs_a_sweep_that_rounds():
    w, factor = problem()
    for given in ({"grid_solver": "rtn"}, {"grid": None}, {"extra": torch.zeros_like(w) > 0}):
        with pytest.raises(UsageError, match="threshold: expected a grid"):
            solve(w, factor=factor, **{"grid": GRID, "threshold": 0.1, **given})
