"""Rounds on tiny programs: order, joint solve, waves, barriers, propagation, refusals."""

import pytest
import torch

from llmc.compiler.ir import packing
from llmc.compiler.ir.errors import GateError, ModelError, UsageError
from llmc.compiler.ir.interpret import run
from llmc.compiler.pipeline import recipe, rounds, zoo
from llmc.compiler.pipeline.compile import compile_plan
from llmc.compiler.pipeline.measure import Options, model_inputs
from llmc.compiler.pipeline.plan import make_plan
from llmc.compiler.pipeline.solving import Work
from llmc.compiler.runtime.lowering import recast


def tokens(samples: int = 8, length: int = 16) -> torch.Tensor:
    g = torch.Generator().manual_seed(1)
    return torch.randint(0, 20, (samples, length), generator=g)


def compiled(strings, program=None, options=None, **kwargs):
    program = program or zoo.decoder(hidden=16, inner=32)
    plan = make_plan(program, recipe.from_strings(strings), **kwargs)
    return compile_plan(plan, tokens(), options)


def tensors(done):
    return {n: done.program.weights.load(n) for n in done.program.params}


def same(a, b):
    a, b = tensors(a), tensors(b)
    return a.keys() == b.keys() and all(torch.equal(a[k], b[k]) for k in a)


W4 = "w4:group=8"


@pytest.mark.parametrize("text", [f"{W4},prune24,smooth", f"prune24,smooth,{W4}"])
def test_order_inside_a_string_changes_nothing(text):
    assert same(compiled([f"smooth,{W4},prune24"]), compiled([text]))


def test_the_joint_mask_is_exact_and_codes_give_the_weight():
    done = compiled([f"smooth,{W4},prune24"])
    program = done.program
    weights = [n for n in program.graph.nodes if n.name.startswith("expand_nm")]
    assert len(weights) == 14
    seen = {}
    run(program, model_inputs(tokens(1)), observe=lambda n, v: seen.setdefault(n.name, v))
    for node in weights:
        w = seen[node.name]
        assert ((w.view(w.shape[0], -1, 4) != 0).sum(-1) <= 2).all()
        meta = program.params[str(node.args[1].target)]
        places = packing.unpack(program.fetch(meta.name), 2, w.shape[1] // 2).view(-1, 2)
        assert (places[:, 0] < places[:, 1]).all()


def test_bits_per_weight_count_codes_places_and_scales():
    done = compiled(["w4:group=16,prune24"], zoo.decoder(hidden=32, inner=64, heads=8))
    assert done.plan.bits_per_weight() == pytest.approx(2 + 1 + 16 / 16)
    assert done.program.weight_bytes() == done.plan.predictions(0, 1)["bytes_after"]


@pytest.mark.parametrize("grid", ["gptq", "rtn"])
@pytest.mark.parametrize("mask", ["sparsegpt", "wanda", "magnitude"])
def test_every_solver_pair_runs(grid, mask):
    done = compiled([f"w4:group=8,solver={grid},prune24:solver={mask}"])
    assert all(abs(r["zeros"] - 0.5) < 1e-6 for r in done.records)


FORMS = ["w3", "w2:group=row", "w8:symmetric=false"]
MASKS = ["prune48", "prune:n=1,m=4", "prune:sparsity=0.6", "prune:sparsity=0.6,solver=wanda"]


@pytest.mark.parametrize("text", [*FORMS, *MASKS, *(f"{f},{m}" for f in FORMS for m in MASKS)])
def test_single_and_joint_forms(text):
    done = compiled([text])
    assert torch.isfinite(run(done.program, model_inputs(tokens(1)))).all()


def test_a_mask_behind_a_barrier_is_frozen():
    first = compiled(["prune24"])
    both = compiled(["prune24", W4])
    a, b = tensors(first), tensors(both)
    metas = [k for k in a if k.endswith(".meta")]
    assert metas
    assert all(torch.equal(a[k], b[k]) for k in metas)
    assert any(k.endswith(".codes") for k in b)


def test_a_later_round_starts_from_the_weights_of_the_one_before():
    """8 bits round to nearest: what is decoded lies half a step from what the first round made."""
    first = compiled(["prune24"])
    both = compiled(["prune24", "w8:group=8,solver=rtn"])
    seen = []
    for done in (first, both):
        values = []
        run(done.program, model_inputs(tokens(1)), observe=lambda *at, to=values: to.append(at))
        seen.append([v for n, v in values if n.name.startswith("expand_nm")])
    assert len(seen[0]) == len(seen[1]) == 14
    for a, b in zip(*seen, strict=True):
        assert float((a - b).abs().max()) <= float(a.abs().max()) / 127 * 0.51


def test_sixteen_bit_programs_are_calibrated_in_their_own_dtype():
    """As torch.compile hands them over: activations in 16 bits, solves in fp32."""
    plain = compiled([f"smooth,{W4},prune24"])
    for dtype in (torch.bfloat16, torch.float16):
        program = recast(zoo.decoder(hidden=16, inner=32), dtype)
        done = compiled([f"smooth,{W4},prune24"], program)
        for a, b in zip(plain.records, done.records, strict=True):
            assert b["loss"] == pytest.approx(a["loss"], rel=0.25)
        assert run(done.program, model_inputs(tokens(1))).dtype == dtype


def test_folds_need_no_solve_beside_them():
    want = [f["site"] for f in compiled(["smooth"]).folds]
    got = compiled(["smooth"], options=Options(true_sequential=True)).folds
    assert want
    assert [f["site"] for f in got] == want


@pytest.mark.parametrize("strings", [["smooth"], ["smooth,prune24"], ["prune24", W4]])
def test_only_what_is_stored_is_held_at_the_end(monkeypatch, strings):
    """Whatever the passes: no working copy and no mask of a finished block stays behind."""
    works = []

    class Seen(Work):
        def __init__(self, *given):
            super().__init__(*given)
            works.append(self)

    monkeypatch.setattr(rounds, "Work", Seen)
    done = compiled(strings)
    (work,) = works
    assert not work.masks
    assert not set(work.dense) & set(work.packed)
    assert all(t.dtype == done.program.params[n].dtype for n, t in work.dense.items())
    assert {p for p in work.dense if p in done.program.params} == set(work.dense)


def test_hessian_budget_and_batch_do_not_change_the_answer():
    a = compiled([f"{W4},prune24"], options=Options(batch=8))
    b = compiled([f"{W4},prune24"], options=Options(batch=3, budget=4 * 16 * 16))
    x, y = tensors(a), tensors(b)
    for k in x:
        if k.endswith(".codes"):
            p, q = (
                packing.unpack(x[k], 4, x[k].shape[1] * 8),
                packing.unpack(y[k], 4, y[k].shape[1] * 8),
            )
            assert (p == q).float().mean() > 0.9


def test_true_sequential_sees_compressed_predecessors():
    a = compiled([W4], options=Options(true_sequential=True))
    b = compiled([W4])
    first = "p2.codes"
    assert torch.equal(tensors(a)[first], tensors(b)[first])
    assert not same(a, b)


def test_dense_propagation_leaves_the_first_block_alone():
    a = compiled(["prune24"], options=Options(propagate="dense"))
    b = compiled(["prune24"])
    assert torch.equal(tensors(a)["p2.values"], tensors(b)["p2.values"])
    assert not same(a, b)


def test_the_source_is_not_touched():
    program = zoo.decoder()
    before = {n: program.weights.load(n).clone() for n in program.params}
    text = str(program.graph)
    compiled([f"smooth,{W4},prune24"], program)
    assert str(program.graph) == text
    assert all(torch.equal(before[n], program.weights.load(n)) for n in before)


def test_same_input_same_bytes():
    assert same(compiled([f"smooth,{W4},prune24"]), compiled([f"smooth,{W4},prune24"]))


def test_plan_says_where_a_group_is_short_and_refuses_an_explicit_one():
    program = zoo.decoder(hidden=16, inner=200)
    plan = make_plan(program, recipe.from_strings(["w4"]))
    notes = [r.get("note") for r in plan.rows() if r["role"] == "down"]
    assert notes == ["last group of 72 of 200 inputs"] * 2
    with pytest.raises(UsageError, match="nearest is group=100"):
        make_plan(program, recipe.from_strings(["w4:group=128"]))


def test_group_must_fit_the_mask():
    with pytest.raises(UsageError, match="multiple of 8"):
        compiled(["w4:group=12,prune48"], zoo.decoder(hidden=24, inner=24, heads=6))


def test_calibration_is_needed_and_rtn_needs_none():
    program = zoo.decoder()
    with pytest.raises(UsageError, match="calibration data for w4"):
        compile_plan(make_plan(program, recipe.from_strings(["w4"])), None)
    plan = make_plan(program, recipe.from_strings(["w4:solver=rtn,prune24:solver=magnitude"]))
    done = compile_plan(plan, None)
    assert done.records
    assert not done.fallbacks


def test_nan_weights_and_activations_are_named():
    program = zoo.decoder()
    bad = program.weights.load("p2").clone()
    bad[0, 0] = float("nan")
    program.set_tensor("p2", bad)
    with pytest.raises(ModelError, match="finite"):
        compile_plan(make_plan(program, recipe.from_strings(["w4"])), tokens())


def test_nothing_to_do_is_said():
    with pytest.raises(GateError, match="found none"):
        make_plan(
            zoo.decoder(inner=26, hidden=18, size=3, heads=6, kv=3),
            recipe.from_strings(["prune:n=1,m=7"]),
        )


def test_overrides_skip_and_change_sites():
    r = recipe.from_mapping(
        {
            "version": 1,
            "stages": [{"w4": {"group": 8}}],
            "overrides": [
                {"where": {"role": ["down"]}, "set": {"w4": {"group": 16}}},
                {"where": {"role": ["q"]}, "skip": ["w4"]},
            ],
        }
    )
    plan = make_plan(zoo.decoder(hidden=16, inner=32), r)
    rows = {row["site"]: row for row in plan.rows()}
    assert "block0/linear0" not in rows
    assert rows["block0/linear6"]["scheme"] == "w4 g16"
    assert rows["block0/linear1"]["scheme"] == "w4 g8"
    assert any(x.predicate == "override" for x in plan.refusals)


def test_an_override_that_names_nothing_is_refused():
    r = recipe.from_mapping(
        {
            "version": 1,
            "stages": [{"w4": {}}],
            "overrides": [{"where": {"role": ["dwn"]}, "skip": ["w4"]}],
        }
    )
    with pytest.raises(UsageError, match=r"overrides\.0"):
        make_plan(zoo.decoder(), r)


def test_more_sweeps_lower_the_loss():
    once = compiled([f"{W4},prune24"])
    more = compiled([f"{W4},prune24,sweeps=3,mask_search=true"])
    first = {r["site"]: r["loss"] for r in once.records}["block0/linear0"]
    assert {r["site"]: r["loss"] for r in more.records}["block0/linear0"] < first


def test_two_passes_cannot_set_one_option_differently():
    with pytest.raises(UsageError, match="one value of sweeps"):
        compiled(["w4:group=8,sweeps=2,prune24:sweeps=3"])
