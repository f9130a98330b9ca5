"""Input grids and outlier columns from recipe to graph: sharing, calibration, oracles, bounds."""

import json
import math
from dataclasses import replace

import pytest
import torch

from llmc.compiler.ir.errors import GateError, UsageError
from llmc.compiler.ir.graph import DictWeights
from llmc.compiler.ir.interpret import run
from llmc.compiler.ir.ops import row_of
from llmc.compiler.ir.scheme import Codes, InputGrid, Mask, Scheme, Sparse, View
from llmc.compiler.ir.verifier import verify, verify_tensors
from llmc.compiler.pipeline import recipe, zoo
from llmc.compiler.pipeline.compile import compile_plan
from llmc.compiler.pipeline.inputs import outlier_columns, static_scale
from llmc.compiler.pipeline.measure import Options, model_inputs
from llmc.compiler.pipeline.plan import make_plan
from llmc.compiler.pipeline.statistics import AbsMax

ROUND = "llmc.round_input"


def tokens(samples=6, length=12):
    g = torch.Generator().manual_seed(1)
    return torch.randint(0, 20, (samples, length), generator=g)


def model(gain=1.0, channel=3, **given):
    """A block whose first norm makes one channel ``gain`` times as large."""
    program = zoo.decoder(hidden=32, inner=32, heads=8, **given)
    name = str(next(program.calls("llmc.rms_norm")).args[1].target)
    program.weights.tensors[name][channel] = gain
    return program


def compiled(text, program=None, options=None):
    program = model() if program is None else program
    return compile_plan(make_plan(program, recipe.from_strings([text])), tokens(), options)


def logits(program, ids=None):
    return run(program, model_inputs(tokens() if ids is None else ids))


def error(text, program):
    exact = logits(program)
    return float((logits(compiled(text, program).program) - exact).norm() / exact.norm())


def calls(program):
    return list(program.calls(ROUND))


# ** the graph **


def test_one_rounding_per_value_that_linears_alone_read():
    done = compiled("w8a8").program
    reads = {n.args[0] for n in done.calls("aten.linear.default")} & set(calls(done))
    assert len(calls(done)) == 8  # q, k and v share one, gate and up another; two blocks
    assert reads == set(calls(done))
    for node in calls(done):
        assert all(row_of(u).name == "aten.linear.default" for u in node.users)
        assert all(u.args[0] is node for u in node.users)
    verify(done)


def test_a_site_that_is_skipped_reads_the_value_as_it_is():
    given = {"version": 1, "stages": [{"w8a8": {}}],
             "overrides": [{"where": {"role": ["q"]}, "skip": ["w8a8"]}]}  # fmt: skip
    plan = make_plan(model(), recipe.from_mapping(given))
    done = compile_plan(plan, tokens()).program
    verify(done)
    first = calls(done)[0]
    assert len(first.users) == 2
    other = {u.op and row_of(u).name for u in first.args[0].users}
    assert other == {ROUND, "aten.linear.default"}


def test_what_reads_one_value_is_rounded_alike():
    override = {"where": {"role": ["k"]}, "set": {"a8": {"act": "static"}}}
    given = {"version": 1, "stages": [{"a8": {}}], "overrides": [override]}
    with pytest.raises(UsageError, match="one input grid for all that read"):
        make_plan(model(), recipe.from_mapping(given))


@pytest.mark.parametrize("text", ["w8a8,a8", "w8a8,w4", "int8_split,w8a8", "a8,a4"])
def test_two_opinions_about_one_fact_are_refused(text):
    with pytest.raises(UsageError, match="expected one"):
        make_plan(model(), recipe.from_strings([text]))


def test_smooth_behind_an_input_grid_is_refused():
    with pytest.raises(UsageError, match="'smooth' before 'w8a8'"):
        recipe.from_strings(["w8a8", "smooth"])


def test_a_weight_grid_and_an_input_grid_are_the_pass_of_both():
    one, two = compiled("w4a8").program, compiled("w4,a8").program
    assert torch.equal(logits(one), logits(two))
    assert one.weight_bytes() == two.weight_bytes()


JOINT = ["w8a8", "w4a8:group=8", "fp8", "zeroquant:group=8", "zeroquant_fp:group=8"]


@pytest.mark.parametrize("text", JOINT)
@pytest.mark.parametrize("act", ["token", "static"])
def test_mask_grid_scales_and_inputs_in_one_string(text, act):
    joint = f"prune24,smooth,{text}{',' if ':' in text else ':'}act={act}"
    plan = make_plan(model(), recipe.from_strings([joint]))
    predicted = plan.predictions(0, 1)
    done = compile_plan(plan, tokens())
    assert predicted["exact"]
    assert done.program.weight_bytes() == predicted["bytes_after"]
    verify_tensors(done.program)
    assert all(abs(r["zeros"] - 0.5) < 1e-6 for r in done.records)
    assert all(act in row["scheme"] for row in plan.rows())
    assert torch.isfinite(logits(done.program)).all()


# ** oracles **


def test_smoothing_helps_bytes_on_an_outlier_channel():
    """algorithms.md 2.5 e: clearly below without; scales per tensor need it most."""
    program = model(gain=60.0)
    assert error("smooth,w8a8", program) < 0.7 * error("w8a8", program)
    plain, moved = (error(f"{s}w8a8:act=tensor", program) for s in ("", "smooth,"))
    assert moved < 0.5 * plain


def layer(text, program):
    """Relative error of what the first linear gives, in fp64 from its stored parts."""
    done = compiled(text, program).program
    name = next(program.calls("aten.linear.default")).name
    seen = {}
    for key, p in (("exact", program), ("found", done)):
        run(p, model_inputs(tokens()), observe=lambda n, v, k=key: seen.setdefault((k, n.name), v))
    node = done.node(name)
    last = next((u for u in node.users if row_of(u).name == "aten.add.Tensor"), node)
    exact, found = seen["exact", name].double(), seen["found", last.name].double()
    return float((found - exact).norm() / exact.norm())


SPLIT = "int8_split:threshold=6,solver=rtn"


def test_splitting_off_a_planted_column_is_ten_times_better():
    program = model(gain=100.0)
    assert layer(SPLIT, program) * 10 <= layer("w8a8:solver=rtn", program)


def test_a_threshold_that_nothing_reaches_is_plain_int8():
    program = model(gain=10.0)
    plain = logits(compiled("w8a8:solver=rtn", program).program)
    for threshold in ("none", "1e30"):
        done = compiled(f"int8_split:threshold={threshold},solver=rtn", program).program
        assert torch.equal(logits(done), plain)


@pytest.mark.parametrize("threshold", ["0", "1e-30"])
def test_a_threshold_of_nothing_is_exact(threshold):
    program = model(gain=10.0)
    done = compiled(f"int8_split:threshold={threshold},most=1", program).program
    exact = logits(program)
    assert (logits(done) - exact).abs().max() <= 1e-5 * exact.abs().max()


def test_outlier_columns_are_found_behind_smoothing():
    """algorithms.md 2.5 g: the threshold speaks about smoothed values."""

    def columns(text):
        done = compiled(text, model(gain=100.0)).program
        return done.params[str(calls(done)[0].args[2].target)].shape

    assert columns(SPLIT) == (1,)
    assert columns(f"smooth:alpha=1,{SPLIT}") == (0,)


def test_columns_are_stored_exactly_and_their_codes_are_zero():
    program = model(gain=100.0)
    done = compiled(SPLIT, program).program
    name = str(next(program.calls("aten.linear.default")).args[1].target)
    assert torch.equal(done.weights.load(f"{name}.columns"), torch.tensor([3], dtype=torch.int32))
    dense = program.weights.load(name)
    assert torch.equal(done.weights.load(f"{name}.beside"), dense[:, [3]])
    rest = dense.index_fill(1, torch.tensor([3]), 0.0)
    scale = (rest.abs().amax(1) / 127.5).half()
    assert torch.equal(done.weights.load(f"{name}.scale")[:, 0], scale)


def test_the_guard_keeps_what_calibration_never_saw():
    """A value beyond the threshold in another column: its token is read as it is."""
    done = compiled(SPLIT, model(gain=100.0)).program
    node = calls(done)[0]
    seen = {}
    broken = done.clone()
    gain = str(next(broken.calls("llmc.rms_norm")).args[1].target)
    broken.weights = DictWeights({gain: broken.weights.load(gain).clone()}, broken.weights)
    broken.weights.tensors[gain][9] = 1e3
    run(broken, model_inputs(tokens()), observe=lambda n, v: seen.setdefault(n.name, v))
    x, y = seen[node.args[0].name], seen[node.name]
    kept = x.index_fill(-1, torch.tensor([3]), 0.0)
    beyond = kept.abs().amax(-1) > 6
    assert bool(beyond.any())
    assert torch.equal(y[beyond], kept[beyond])


def test_more_outliers_than_may_stay_are_told_and_strict_refuses_them():
    from llmc.compiler import api

    done = compiled("int8_split:threshold=0.5,most=0.1", model())
    assert done.fallbacks
    assert "reach 0.5" in done.fallbacks[0]["reasons"][0]
    text = "int8_split:threshold=0.5,most=0.1"
    with pytest.raises(GateError, match="fell back"):
        api.compile(model(), text, calibration=tokens(), strict=True)


def test_planned_bytes_of_columns_are_a_bound():
    plan = make_plan(model(gain=100.0), recipe.from_strings([SPLIT]))
    bound = plan.predictions(0, 1)
    assert not bound["exact"]
    done = compile_plan(plan, tokens())
    assert done.program.weight_bytes() < bound["bytes_after"]
    verify_tensors(done.program)


# ** calibration **


@pytest.mark.parametrize("text", ["w8a8:act=static", "fp8:act=static", "a8:act=static,act_group=8"])
def test_static_scales_clip_nothing_that_calibration_saw(text):
    program = model(gain=20.0)
    done = compiled(text, program).program
    seen = {}
    run(program, model_inputs(tokens()), observe=lambda n, v: seen.setdefault(n.name, v))
    node = calls(done)[0]
    scale = done.weights.load(str(node.args[1].target))
    top = {"int": 127, "e4m3": 448}[node.kwargs["kind"]]
    x = seen[node.args[0].name].flatten(0, 1).abs().amax(0)
    reach = (scale * top).repeat_interleave(node.kwargs["group"] or len(x))
    assert bool((x <= reach * (1 + 1e-6)).all())
    assert bool((x.unflatten(0, (len(scale), -1)).amax(1) >= 0.999 * scale * top).all())


def test_static_scales_follow_the_fold_as_if_recollected():
    program = model(gain=30.0)
    once = compiled("smooth,w8a8:act=static", program).program
    folded = compiled("smooth", program).program
    for a in calls(once)[:1]:
        again = compiled("w8a8:act=static", folded).program
        b = calls(again)[0]
        left, right = (p.weights.load(str(n.args[1].target)) for p, n in ((once, a), (again, b)))
        torch.testing.assert_close(left, right, rtol=1e-5, atol=0)


def test_the_statistic_of_a_fold_is_that_of_folded_values_exactly():
    x = torch.randn(50, 8, dtype=torch.float64)
    factor = torch.exp2(torch.randint(-3, 4, (8,)).double())
    before, after = AbsMax(), AbsMax()
    before.update(x)
    after.update(x * factor)
    grid = InputGrid(8, "static")
    moved = static_scale(before.scaled(factor).value, grid)
    assert torch.equal(moved, static_scale(after.value, grid))


@pytest.mark.parametrize("propagate", ["compressed", "dense"])
def test_blocks_behind_are_calibrated_on_rounded_inputs(propagate):
    """What enters the second block in calibration is what enters it when the result runs."""
    done = compiled("a4:act=static", model(gain=50.0), Options(propagate=propagate)).program
    node = calls(done)[4]
    seen = {}
    run(done, model_inputs(tokens()), observe=lambda n, v: seen.setdefault(n.name, v))
    reach = 7 * float(done.weights.load(str(node.args[1].target)))
    top = float(seen[node.args[0].name].abs().max())
    assert (top == pytest.approx(reach, rel=1e-5)) == (propagate == "compressed")


def test_a_dead_channel_and_a_dead_value_have_scale_one():
    grid = InputGrid(8, "static", group=4)
    scale = static_scale(torch.tensor([0.0, 0, 0, 0, 127, 0, 0, 0]), grid)
    assert scale.tolist() == [1.0, 1.0]
    program = model(gain=0.0)
    for text in ("w8a8:act=static", "w8a8", "int8_split", "olive"):
        assert torch.isfinite(logits(compiled(text, program).program)).all()


def test_the_largest_columns_stay_where_not_all_may():
    absmax = torch.tensor([7.0, 1, 9, 6, 8, 0, 0, 0, 0, 0])
    found, notes = outlier_columns(absmax, Sparse("columns", 0.2, 6.0))
    assert found.tolist() == [2, 4]
    assert notes
    found, notes = outlier_columns(absmax, Sparse("columns", 0.4, 6.0))
    assert found.tolist() == [0, 2, 3, 4]
    assert not notes
    assert outlier_columns(absmax, Sparse("columns", 1.0, math.inf))[0].numel() == 0


# ** records and artefacts **


def test_schemes_round_trip_and_show_both_grids():
    grid = InputGrid(8, "static", "e4m3", 64, power=True)
    scheme = Scheme(View("p1"), Codes(8, None), sparse=Sparse("columns", 0.1, 6.0), input_grid=grid)
    assert Scheme.from_json(json.loads(json.dumps(scheme.to_json()))) == scheme
    assert scheme.short == "+columns 6 w8 row a-e4m3 static g64 power"
    scheme.require_built()
    with pytest.raises(UsageError, match="input grid beside outlier columns"):
        Scheme(View("p"), Codes(8, None), sparse=Sparse("columns", 0.1)).require_built()
    kept = replace(scheme, mask=Mask(2, 4))
    kept.require_built()
    assert kept.short == "2:4 +columns 6 w8 row a-e4m3 static g64 power"
    with pytest.raises(UsageError, match="pairs of neighbours"):
        Scheme(View("p"), Codes(4, None, grid="pairs"), Mask(2, 4)).require_built()


@pytest.mark.parametrize("text", ["int8_split:threshold=2", "w8a8:act=static", "olive:act=static"])
def test_an_artefact_gives_the_same_logits(text, tmp_path):
    from llmc.compiler.runtime.artefact import Contents, load, save

    done = compiled(text, model(gain=40.0)).program
    save(tmp_path / "out", Contents(done))
    back = load(tmp_path / "out").program
    assert torch.equal(logits(back), logits(done))


@pytest.mark.parametrize(
    "text",
    ["a8:bits=4", "a8:kind=e2m1", "a4:kind=e4m3", "olive:bits=5", "olive:act_group=3",
     "olive:sweeps=1", "w8a8:act=row", "int8_split:most=2", "w4a8:act_bits=1"],
)  # fmt: skip
def test_knobs_without_meaning_are_refused(text):
    with pytest.raises(UsageError):
        recipe.from_strings([text])


# ** running **


@pytest.mark.parametrize("text", ["w8a8", "w8a8:act=static", "fp8", "olive", SPLIT])
def test_tokens_stay_apart_so_that_a_cache_may_be_added(text):
    from llmc.compiler.analysis.tokenwise import prove_tokenwise
    from llmc.compiler.runtime.cache import add_cache

    done = compiled(text, model(gain=100.0)).program
    assert prove_tokenwise(done) == []
    assert add_cache(done).states


def test_one_scale_for_all_tokens_admits_no_cache_and_says_why():
    from llmc.compiler.analysis.tokenwise import prove_tokenwise

    refused = prove_tokenwise(compiled("w8a8:act=tensor").program)
    assert refused[0].predicate == "point_wise"
    assert ROUND in refused[0].reason


@pytest.mark.parametrize("text", ["w8a8:act=static", SPLIT])
def test_the_memory_budget_changes_no_answer(text):
    program = model(gain=60.0)
    wide, narrow = (compiled(text, program, Options(budget=b)).program for b in (4 << 30, 1))
    assert wide.params.keys() == narrow.params.keys()
    for name in wide.params:
        assert torch.equal(wide.weights.load(name), narrow.weights.load(name))


def test_true_sequential_waves_see_rounded_inputs_before_them():
    done = compiled("w8a8:act=static", model(50.0), Options(true_sequential=True)).program
    node = calls(done)[1]  # what the output projection reads, behind rounded q, k and v
    seen = {}
    run(done, model_inputs(tokens()), observe=lambda n, v: seen.setdefault(n.name, v))
    reach = 127 * float(done.weights.load(str(node.args[1].target)))
    assert float(seen[node.args[0].name].abs().max()) == pytest.approx(reach, rel=1e-5)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_sixteen_bits_compute_what_they_can_hold(dtype):
    from llmc.compiler.runtime.lowering import recast

    for text in ("w8a8", SPLIT, "olive", "fp8:act=static"):
        done = compiled(text, model(gain=20.0)).program
        small = recast(done, dtype)
        exact, found = logits(done), logits(small).float()
        assert float((found - exact).norm() / exact.norm()) < 0.1
