"""Static scales by percentile and by squared error: the histogram's laws, and what clips buy."""

from __future__ import annotations

import itertools
import math

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from llmc.compiler.ir.errors import UsageError
from llmc.compiler.ir.interpret import run
from llmc.compiler.ir.ops.rounding import round_input, scale_of
from llmc.compiler.ir.scheme import InputGrid
from llmc.compiler.pipeline import recipe, zoo
from llmc.compiler.pipeline.clipping import SHRINKS, clipped
from llmc.compiler.pipeline.compile import compile_plan
from llmc.compiler.pipeline.inputs import static_scale
from llmc.compiler.pipeline.magnitudes import OCTAVES, PARTS, Magnitudes, edges, places
from llmc.compiler.pipeline.measure import model_inputs
from llmc.compiler.pipeline.plan import make_plan
from llmc.compiler.pipeline.statistics import Collection


def seen(x):
    stat = Magnitudes()
    stat.update(x)
    return stat


def values(seed, rows=200, channels=6, tail=3.0):
    g = torch.Generator().manual_seed(seed)
    x = torch.randn(rows, channels, generator=g)
    return x * torch.exp(tail * torch.randn(rows, channels, generator=g))


# ** the histogram **


@settings(max_examples=40, deadline=None)
@given(st.integers(0, 10**6), st.lists(st.integers(1, 199), min_size=0, max_size=4))
def test_counts_do_not_depend_on_how_the_values_come(seed, cuts):
    x = values(seed, tail=6.0)
    x[:, 0] = 0
    whole, stream, merged = seen(x), Magnitudes(), Magnitudes()
    bounds = [0, *sorted(cuts), len(x)]
    for a, b in itertools.pairwise(bounds):
        if a < b:
            stream.update(x[a:b])
            merged.merge(seen(x[a:b]))
    for other in (stream, merged):
        assert torch.equal(other.counts, whole.counts)
        assert torch.equal(other.top, whole.top)
        assert other.tokens == whole.tokens == len(x)
    assert bool((whole.counts.sum(1) == len(x)).all())


def test_each_value_lies_inside_its_bin():
    x = values(1, tail=4.0).abs()
    stat = seen(x)
    at = places(x, stat.top)
    low, high = stat.ends[:, :-1], stat.ends[:, 1:]
    for channel in range(x.shape[1]):
        bins = at[:, channel]
        assert bool((low[channel][bins] <= x[:, channel].double()).all())
        assert bool((x[:, channel].double() < high[channel][bins]).all())
    assert bool((x.amax(0).double() * 2 >= 2.0 ** stat.top.double()).all())
    ends = edges(torch.tensor([3]))
    assert ends.shape == (1, OCTAVES * PARTS + 2)
    assert float(ends[0, -1]) == 8.0
    assert bool((ends.diff() > 0).all())


def test_it_follows_folds_and_slices():
    x, index = values(2), torch.tensor([3, 0, 5])
    factor = torch.tensor([0.5, 2.0, -4.0, 0.25, 1.0, 8.0])
    base, folded = seen(x), seen(x * factor)
    torch.testing.assert_close(base.scaled(factor).ends, folded.ends)
    assert torch.equal(base.scaled(factor).counts, folded.counts)
    assert torch.equal(base.taken(index).counts, seen(x[:, index]).counts)
    grid = InputGrid(8, "static", clip="percentile", percentile=99.0)
    half = torch.full((6,), 1 / 3)
    size = (x * half).abs().amax().view(1)
    a = float(clipped(base.scaled(half), size, grid))
    b = float(clipped(seen(x * half), size, grid))
    assert a == pytest.approx(b, rel=1 / 16)


# ** where the grid ends **


@settings(max_examples=40, deadline=None)
@given(st.integers(0, 10**6), st.sampled_from([90.0, 99.0, 99.9, 100.0]), st.sampled_from([6, 2]))
def test_a_percentile_is_kept_and_no_bin_more(seed, percentile, group):
    x = values(seed)
    grid = InputGrid(8, "static", group=group, clip="percentile", percentile=percentile)
    parts = x.abs().unflatten(1, (-1, group)).movedim(1, 0).flatten(1)
    size = clipped(seen(x), parts.amax(1), grid)
    for part, found in zip(parts, size.tolist(), strict=True):
        share = percentile / 100
        exact = float(part.sort().values[max(0, math.ceil(share * len(part) - 1e-6) - 1)])
        assert int((part <= found).sum()) >= share * len(part) - 1e-6
        assert exact <= found <= exact * (1 + 1 / 16) * (1 + 1 / 32)
    whole = InputGrid(8, "static", clip="percentile", percentile=100.0)
    assert torch.equal(clipped(seen(x), x.abs().amax().view(1), whole), x.abs().amax().view(1))


def error(x, size, grid):
    scale = scale_of(torch.as_tensor([size]), grid.kind, grid.bits, grid.power)
    how = {"kind": grid.kind, "bits": grid.bits, "per": "static", "power": grid.power}
    return float((round_input(x, scale, **how) - x).double().square().sum())


@settings(max_examples=25, deadline=None)
@given(
    st.integers(0, 10**6),
    st.sampled_from([("int", 4), ("int", 6), ("int", 8), ("e4m3", 8), ("e2m1", 4)]),
    st.sampled_from([0.5, 1.5, 3.0]),
)
def test_the_least_error_is_found(seed, kind, tail):
    """Against rounding all values with every size that the search tries.

    The search sees counts in bins a thirty-second wide; one value may be most of the error.
    """
    x = values(seed, rows=400, tail=tail)
    grid = InputGrid(kind[1], "static", kind[0], clip="mse")
    top = x.abs().amax().view(1)
    found = error(x, float(clipped(seen(x), top, grid)), grid)
    best = min(error(x, float(top) * s, grid) for s in SHRINKS)
    assert found <= 1.5 * best


def test_one_planted_outlier_widens_neither():
    """99.9 % of 1..2 and one value of 1000: absmax gives it the grid, the other two do not."""
    g = torch.Generator().manual_seed(0)
    x = 1 + torch.rand(4000, 1, generator=g)
    x[17, 0] = 1000.0
    top = x.abs().amax().view(1)
    kept = InputGrid(8, "static", clip="percentile", percentile=99.9)
    assert 1.9 < float(clipped(seen(x), top, kept)) <= 2 * (1 + 1 / 32)
    cheap = InputGrid(4, "static", clip="mse")
    x[17, 0] = 8.0
    top = x.abs().amax().view(1)
    size = float(clipped(seen(x), top, cheap))
    assert size < 8.0
    assert error(x, size, cheap) < error(x, 8.0, cheap)


def test_values_that_the_grid_holds_exactly_are_not_clipped():
    x = torch.tensor([1.0, -2.0, 3.0, 7.0]).repeat(50)[:, None]
    grid = InputGrid(4, "static", clip="mse")
    assert float(clipped(seen(x), torch.tensor([7.0]), grid)) >= 6.4


def test_outlier_columns_do_not_count_and_a_dead_value_has_scale_one():
    x = values(5, tail=0.0)
    x[:, 2] *= 1000
    grid = InputGrid(8, "static", clip="percentile", percentile=99.0)
    columns = torch.tensor([2])
    rest = x.index_fill(1, columns, 0.0)
    size = x[:, [0, 1, 3, 4, 5]].abs().amax().view(1)
    found = static_scale(x.abs().amax(0), grid, columns, seen=seen(x))
    want = clipped(seen(rest), size, grid, columns) / 127
    assert torch.equal(found, want)
    zero = torch.zeros(4, 3)
    for clip in ("percentile", "mse"):
        grid = InputGrid(8, "static", clip=clip, percentile=99.0)
        assert float(static_scale(zero.amax(0), grid, seen=seen(zero))) == 1.0


# ** from recipe to graph **


def tokens():
    return torch.randint(0, 20, (6, 12), generator=torch.Generator().manual_seed(1))


def compiled(text):
    program = zoo.decoder(hidden=32, inner=32, heads=8)
    plan = make_plan(program, recipe.from_strings([text]))
    return plan, compile_plan(plan, tokens())


@pytest.mark.parametrize(
    "text",
    ["w8a8:act=static,act_clip=mse", "smooth,w4a8:act=static,act_clip=percentile,group=8",
     "a4:act=static,act_clip=mse,act_group=8", "fp8:act=static,act_clip=mse",
     "int8_split:threshold=2,act=static,act_clip=percentile,act_percentile=99",
     "prune24,w4,a8:act=static,act_clip=mse"],
)  # fmt: skip
def test_scales_of_the_graph_are_those_of_the_values(text):
    """Each stored scale is that of what its linear read in calibration, no wider than absmax."""
    plan, done = compiled(text)
    wide = compiled(text.replace("mse", "absmax").replace("percentile", "absmax")
                    .replace(",act_absmax=99", ""))[1]  # fmt: skip
    assert plan.program.weight_bytes() >= done.program.weight_bytes()
    names = [n for n in done.program.params if n.endswith("in_scale")]
    assert names
    found, most = (torch.cat([d.program.weights.load(n) for n in names]) for d in (done, wide))
    first = names[0]
    assert bool(
        (done.program.weights.load(first) <= wide.program.weights.load(first) * (1 + 1e-6)).all()
    )
    if text.startswith("a4"):
        assert bool((found < most).any())
    assert torch.isfinite(run(done.program, model_inputs(tokens()))).all()
    short = {d.scheme.short for d in plan.stages[0].decisions.values()}
    assert all(("static mse" in s) or ("static p99" in s) for s in short)


def test_the_knobs_ask_for_each_other():
    for text, why in (
        ("w8a8:act_clip=mse", "w8a8:act_clip: expected act=static"),
        ("a8:act=tensor,act_clip=percentile", "a8:act_clip: expected act=static"),
        ("a8:act=static,act_percentile=99", "a8:act_percentile: expected act_clip=percentile"),
        ("olive:act=static,act_clip=mse", "pairs clip nothing"),
        ("a8:act=static,act_clip=no", "expected one of absmax, percentile, mse"),
    ):
        with pytest.raises(UsageError, match=why):
            compiled(text)


def test_a_collection_feeds_it():
    stats, x = Collection(), values(3)
    stats.want("v", "magnitudes")
    stats.update("v", x.view(10, 20, 6))
    assert torch.equal(stats.get("v", "magnitudes").value, seen(x).counts)
