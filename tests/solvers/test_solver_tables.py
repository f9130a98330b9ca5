"""Table grids, levels by k-means, signed factors and 8-bit scales against their laws, in fp64."""

from __future__ import annotations

import itertools

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from llmc.compiler.ir.errors import UsageError
from llmc.compiler.ir.levels import levels
from llmc.compiler.solvers import Grid, MaskRule, prepare, rtn, solve
from llmc.compiler.solvers.bcq import BinaryGrid, sums
from llmc.compiler.solvers.double import BLOCK, double_scales
from llmc.compiler.solvers.grid import rtn_t
from llmc.compiler.solvers.lut import LutGrid
from llmc.compiler.solvers.obs import Sweep
from llmc.compiler.solvers.schedule import make_schedule
from llmc.compiler.solvers.tables import QuantileGrid, TableGrid

F32 = torch.float32


def table(name: str, bits: int, group: int | None = 64, **options) -> TableGrid:
    return TableGrid(bits, group, values=tuple(levels(name, bits).tolist()), **options)


GRIDS = {
    "nf4": table("nf", 4, 16),
    "nf3 mse": table("nf", 3, None, clip="mse"),
    "nf4 double": table("nf", 4, 16, double=True, scale_dtype=F32),
    "w4 double": Grid(4, 16, double=True, scale_dtype=F32),
    "w3 asymmetric double": Grid(3, 16, symmetric=False, double=True, scale_dtype=F32),
    "fp4 power": table("e2m1", 4, 16, power=True),
    "e4m3": table("e4m3", 8, None),
    "e5m2": table("e5m2", 8, None),
    "ternary": table("ternary", 2, 16, clip="absmean"),
    "binary": table("binary", 1, 16, clip="absmean"),
    "quantile": QuantileGrid(4, 16),
    "lut": LutGrid(3, None),
    "shared": LutGrid(3, None, shared=True),
    "signs": BinaryGrid(2, 16),
    "signs row": BinaryGrid(3, None),
    "percentile": Grid(4, 16, clip="percentile", percentile=95.0),
}


def normal(*shape: int, seed: int = 0, dtype: torch.dtype = torch.float64) -> torch.Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=dtype)


def test_normal_floats_have_their_known_error():
    w = normal(512, 1024, dtype=F32)
    r = rtn(w, table("nf", 4, scale_dtype=F32))
    assert float((r.weight - w).square().mean()) == pytest.approx(8.46e-3, rel=0.01)
    uniform = rtn(w, Grid(4, 64, scale_dtype=F32))
    assert float((uniform.weight - w).square().mean()) > 1.15 * 8.46e-3


@pytest.mark.parametrize("name", [n for n in GRIDS if "double" not in n])
def test_rounding_what_is_rounded_changes_nothing(name):
    """Levels and scales that held stay; fitted tables find their own levels again."""
    grid, w = GRIDS[name], normal(9, 48, dtype=F32)
    once = rtn(w, grid)
    if grid.clip == "absmax" and grid.scaled and "quantile" not in name:
        assert torch.equal(rtn(once.weight, grid).weight, once.weight)
    wt = w.t().contiguous()
    value, centred, fit = rtn_t(wt, grid)
    again, same, _ = rtn_t(value, grid, fit=fit)
    assert torch.equal(again, value)
    assert torch.equal(same, centred)


def test_absmax_weight_and_zero_are_exact_on_normal_floats():
    w = normal(16, 128, dtype=F32).half().float()
    w[:, ::7] = 0
    r = rtn(w, table("nf", 4, 64))
    assert bool((r.weight[:, ::7] == 0).all())
    groups, found = w.view(16, 2, 64), r.weight.view(16, 2, 64)
    at = groups.abs().argmax(-1, keepdim=True)
    assert torch.equal(found.gather(-1, at), groups.gather(-1, at))


@pytest.mark.parametrize("name", list(GRIDS))
def test_no_level_is_nearer_than_the_chosen_one(name):
    grid, wt = GRIDS[name], normal(48, 9).contiguous()
    value, _, fit = rtn_t(wt, grid)
    if type(grid) is Grid:
        codes = torch.arange(2**grid.bits, dtype=torch.float64)[:, None]
        zero = fit.zero if fit.zero is not None else torch.full_like(fit.scale, grid.implied_zero)
        every = (codes[None] - zero[:, None]) * fit.scale[:, None]
    elif isinstance(grid, TableGrid):
        _, known, _ = grid.ordered(wt)
        every = known[None, :, None] * fit.scale[:, None]
    elif isinstance(grid, BinaryGrid):
        every = sums(fit.table)
    else:
        every = fit.table.expand(1, -1, wt.shape[1]) * fit.scale[:, None]
    n = len(wt)
    g = grid.group or n
    for i in range(n):
        best = (wt[i] - every[i // g]).abs().amin(0)
        assert ((wt[i] - value[i]).abs() <= best + 1e-12).all()


@pytest.mark.parametrize("name", list(GRIDS))
def test_codes_decode_to_the_weight_and_gptq_beats_rounding(name, problem):
    grid = GRIDS[name]
    plain = solve(problem.weight, problem.hessian, grid=grid, grid_solver="rtn")
    swept = solve(problem.weight, problem.hessian, grid=grid)
    assert problem.loss(swept.weight) < problem.loss(plain.weight)
    better = solve(problem.weight, problem.hessian, grid=grid, sweeps=2)
    assert problem.loss(better.weight) <= problem.loss(swept.weight) * (1 + 1e-9)
    for s in (plain, swept, better):
        assert int(s.codes.max()) < 2**grid.bits
        if grid.scaled:
            scale = s.scale.float().repeat_interleave(grid.group or 64, 1)[:, :64]
        if isinstance(grid, TableGrid):
            got = torch.tensor(grid.values)[s.codes.long()] * scale
        elif isinstance(grid, QuantileGrid):
            got = s.table[0].float()[s.codes.long()] * scale
        elif isinstance(grid, LutGrid):
            got = s.table.float().expand(len(s.codes), -1).gather(1, s.codes.long())
        elif isinstance(grid, BinaryGrid):
            got = grid.decoded(s.codes.t(), s.table, 64).t()
        else:
            zero = float(grid.implied_zero) if s.zero is None else s.zero.float()
            if s.zero is not None:
                zero = zero.repeat_interleave(grid.group, 1)
            got = (s.codes.float() - zero) * scale
        assert torch.equal(got, s.weight)


@pytest.mark.parametrize("name", ["nf4 double", "lut", "signs", "e4m3", "quantile"])
def test_sweep_accounts_for_its_loss_on_any_grid(name, problem):
    """The sum of squared errors of the sweep is the damped loss of what it gives (GPTQ)."""
    grid, wt = GRIDS[name], problem.weight.t().contiguous()
    factor = prepare(problem.hessian, 0.01)
    fit = grid.fit_whole(wt)[0] if grid.whole else None
    schedule = make_schedule(grid.spans(64), unit=1, block=32)
    out = Sweep(wt, factor.root(None), schedule, grid=grid, scales=fit).run()
    d = wt - out.value
    h = factor.hessian + factor.ridge * torch.eye(64, dtype=torch.float64)
    torch.testing.assert_close(out.rows, (d * (h @ d)).sum(0), rtol=1e-11, atol=0)


@pytest.mark.parametrize("name", ["nf4", "lut", "signs row", "w4 double"])
def test_without_correlation_gptq_is_rounding(name):
    grid, w = GRIDS[name], normal(8, 48)
    diagonal = torch.diag(torch.rand(48, dtype=torch.float64) + 0.5)
    swept = solve(w, diagonal, grid=grid)
    assert torch.equal(swept.weight, solve(w, diagonal, grid=grid, grid_solver="rtn").weight)


def obq(w: torch.Tensor, h: torch.Tensor, snap) -> tuple[list[int], torch.Tensor]:
    """Optimal Brain Quantiser on one row: the cheapest weight first; order and values."""
    inverse, w, free = torch.linalg.inv(h), w.clone(), list(range(len(w)))
    order = []
    while free:
        cost = [(snap(w[j]) - w[j]) ** 2 / inverse[j, j] for j in free]
        j = free.pop(int(torch.stack(cost).argmin()))
        order.append(j)
        move = (w[j] - snap(w[j])) / inverse[j, j] * inverse[:, j]
        value = snap(w[j])
        w[free] -= move[free]
        w[j] = value
        inverse = inverse - inverse[:, j : j + 1] * inverse[j] / inverse[j, j]
    return order, w


@pytest.mark.parametrize("name", ["w3", "nf3", "ternary"])
def test_greedy_obq_is_gptq_in_its_order(name):
    grids = {
        "w3": Grid(3, None, scale_dtype=F32),
        "nf3": table("nf", 3, None, scale_dtype=F32),
        "ternary": table("ternary", 2, None, clip="absmean", scale_dtype=F32),
    }
    grid, n = grids[name], 14
    x, weights = normal(40, n, seed=3), normal(5, n, seed=4)
    factor = prepare(x.T @ x, 0.01)
    h = factor.hessian + factor.ridge * torch.eye(n, dtype=torch.float64)
    for row in weights:
        wt = row[:, None].contiguous()
        fit = rtn_t(wt, grid)[2]

        def snap(value, fit=fit):
            units = (value / fit.scale[0, 0])[None]
            snapped = grid.snap(units, grid.bounds(None), units.clone())
            return snapped[0] * fit.scale[0, 0]

        order, found = obq(row, h, snap)
        at = torch.tensor(order)
        schedule = make_schedule([(0, n)], unit=1, block=8)
        swept = Sweep(wt[at], factor.root(at), schedule, grid=grid, scales=fit).run()
        torch.testing.assert_close(swept.value[:, 0], found[at], rtol=1e-9, atol=1e-12)
        assert order != sorted(order)


def test_masked_weights_have_the_code_of_zero_where_there_is_one(problem):
    half = MaskRule("unstructured", sparsity=0.5)
    s = solve(problem.weight, problem.hessian, grid=GRIDS["nf4"], mask=half)
    assert bool((s.weight[~s.mask] == 0).all())
    assert bool((s.codes[~s.mask] == 7).all())
    for name in ("binary", "lut", "signs"):
        with pytest.raises(UsageError, match="holds 0"):
            solve(problem.weight, problem.hessian, grid=GRIDS[name], mask=half)
        two = solve(problem.weight, problem.hessian, grid=GRIDS[name], mask=MaskRule("nm", 2, 4))
        assert torch.equal(two.weight != 0, two.mask)
        assert int(two.mask.sum()) * 2 == two.mask.numel()


@pytest.mark.parametrize(
    ("make", "word"),
    [
        (lambda: TableGrid(4, 64, values=(0.0, 1.0)), "2\\*\\*bits"),
        (lambda: LutGrid(4, 64), "no group"),
        (lambda: LutGrid(9, None), "1 to 8"),
        (lambda: BinaryGrid(6, 64), "1 to 5"),
        (lambda: BinaryGrid(2, 64, symmetric=False), "zero point"),
        (lambda: table("nf", 4, symmetric=False), "zero point"),
        (lambda: Grid(4, 64, double=True), "float32"),
        (lambda: Grid(4, 64, clip="absmean"), "clip"),
        (lambda: Grid(4, 64, clip="percentile", percentile=20.0), "percentile"),
    ],
)
def test_grids_without_meaning_are_refused(make, word):
    with pytest.raises(UsageError, match=word):
        make()


# ** scales **


@settings(max_examples=30, deadline=None)
@given(
    groups=st.integers(1, 40), rows=st.integers(1, 20), spread=st.sampled_from([0.0, 0.3, 3.0]),
    seed=st.integers(0, 99), unit=st.sampled_from([1.0, 2.0**-20]),
)  # fmt: skip
def test_double_scales_decode_near_what_they_stand_for(groups, rows, spread, seed, unit):
    scale = torch.exp(spread * normal(groups, rows, seed=seed))
    empty = torch.zeros(groups, rows, dtype=torch.bool)
    found = double_scales(scale, empty, unit)
    assert found.codes.shape == (groups * rows,)
    assert len(found.step) == -(-groups * rows // BLOCK)
    back = found.decoded(groups, rows).double() / unit
    assert bool((back > 0).all())
    step = found.step.double().repeat_interleave(BLOCK)[: groups * rows].view(rows, groups).t()
    # One code up is taken where half a step off would be no positive scale any more.
    near = torch.where(scale * unit > step, 0.51, 1.01) * step / unit
    assert bool(((back - scale).abs() <= near + 1e-6 * scale).all())


def test_double_scales_ignore_groups_without_weights():
    scale = torch.full((4, 3), 0.01, dtype=torch.float64)
    empty = torch.zeros_like(scale, dtype=torch.bool)
    scale[1], empty[1] = 1.0, True
    found = double_scales(scale, empty)
    assert float(found.mean) == pytest.approx(0.01)
    torch.testing.assert_close(found.decoded(4, 3)[0].double(), scale[0], rtol=1e-6, atol=0)


def test_normal_floats_with_double_scales_take_their_known_bits():
    """4 + 8/64 + 32/(64·256) bits, and the mean; 4.5 with 32-bit scales."""
    w = normal(256, 1024, dtype=F32)
    grid = table("nf", 4, 64, double=True, scale_dtype=F32)
    s = solve(w, grid=grid, grid_solver="rtn")
    parts = (s.double.codes, s.double.step, s.double.mean)
    bits = 4 + 8 * sum(p.nbytes for p in parts) / w.numel()
    assert bits == pytest.approx(4.127, abs=2e-4)
    assert 4 + 8 * 4 * (w.numel() // 64) / w.numel() == 4.5
    assert float((s.weight - w).square().mean()) < 8.6e-3


def test_powers_of_two_are_rounded_up_and_never_clip():
    w = normal(16, 64, dtype=F32) * 0.037
    s = rtn(w, table("e2m1", 4, 16, power=True))
    mantissa, _ = torch.frexp(s.scale.float())
    assert bool((mantissa == 0.5).all())
    plain = rtn(w, table("e2m1", 4, 16, scale_dtype=F32)).scale
    assert bool((s.scale.float() >= plain * 0.999).all())
    assert bool((s.scale.float() <= plain * 2).all())
    exact = torch.full((1, 16), 6 * 2.0**-5)
    assert float(rtn(exact, table("e2m1", 4, 16, power=True)).scale) == 2.0**-5


def test_percentile_is_absmax_at_a_hundred_and_shrinks_below():
    w = normal(32, 128, dtype=F32)
    for symmetric in (True, False):
        full = rtn(w, Grid(4, 64, symmetric)).scale
        scales = [
            rtn(w, Grid(4, 64, symmetric, clip="percentile", percentile=p)).scale
            for p in (100.0, 99.0, 90.0, 75.0)
        ]
        torch.testing.assert_close(scales[0], full)
        for wide, narrow in itertools.pairwise(scales):
            assert bool((narrow <= wide).all())
        assert float(scales[1].float().mean()) < float(full.float().mean())


def test_mean_magnitude_is_the_best_scale_of_two_levels():
    w = normal(8, 64)
    fit = rtn_t(w.t().contiguous(), table("binary", 1, None, clip="absmean", scale_dtype=F32))[2]
    torch.testing.assert_close(fit.scale[0], w.abs().mean(1), rtol=1e-6, atol=0)


def test_quantile_levels_hold_zero_and_follow_the_data():
    skewed = normal(16, 256, dtype=F32).exp() - 0.5
    grid = QuantileGrid(4, 64)
    s = solve(skewed, grid=grid, grid_solver="rtn")
    assert s.table.shape == (1, 16)
    assert int((s.table == 0).sum()) == 1
    normal_float = solve(skewed, grid=table("nf", 4, 64), grid_solver="rtn")
    assert (s.weight - skewed).square().sum() < (normal_float.weight - skewed).square().sum()
