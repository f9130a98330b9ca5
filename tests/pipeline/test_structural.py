"""Structural passes in the pipeline: order, prediction and decision, artefacts, refusals."""

import dataclasses
import itertools
import json

import pytest
import torch
from torch import Tensor

import llmc
from llmc.compiler.analysis.blocks import apply_segments
from llmc.compiler.ir.errors import LlmcError, ModelError, UsageError
from llmc.compiler.ir.interpret import run
from llmc.compiler.ir.serial import to_json
from llmc.compiler.pipeline import order, recipe, zoo
from llmc.compiler.pipeline.base import Lossy
from llmc.compiler.pipeline.compile import compile_plan
from llmc.compiler.pipeline.measure import (
    Options,
    collect,
    loss,
    model_inputs,
    next_token_loss,
    stream,
)
from llmc.compiler.pipeline.plan import make_plan
from llmc.compiler.pipeline.structure import Choice, Context, Structural

OPTIONS = Options(batch=3)


def tokens(samples: int = 8, length: int = 16) -> Tensor:
    g = torch.Generator().manual_seed(1)
    return torch.randint(0, 20, (samples, length), generator=g)


def model():
    return zoo.decoder(blocks=4, inner=32)


def planned(*strings, program=None):
    return make_plan(program or model(), recipe.from_strings(list(strings)))


# ** order **


def test_stages_stand_where_the_algebra_puts_them():
    ranks = [order.RANK[s] for s in ("depth", "heads", "width", "equivalence", "mask", "grid")]
    assert ranks == sorted(ranks)
    assert order.RANK["exit"] == max(order.RANK.values())


@pytest.mark.parametrize(
    ("early", "late", "why"),
    [
        ("w4", "drop_layers", "makes the scales, zeros and codes that are there stale"),
        ("smooth", "drop_layers", "makes the scales, zeros and codes that are there stale"),
        ("prune24", "prune_width", "makes the scales, zeros and codes that are there stale"),
        ("prune_width", "drop_layers", "a new shape makes scales, zeros and codes stale"),
    ],
)
def test_a_structural_pass_behind_a_barrier_is_refused(early, late, why):
    stages = {"w4": "grid", "smooth": "equivalence", "prune24": "mask", "prune_width": "width",
              "drop_layers": "depth"}  # fmt: skip
    names = [[order.Named(n, stages[n])] for n in (early, late)]
    with pytest.raises(UsageError) as error:
        order.check_barriers(names)
    assert f"expected {late!r} before {early!r}" in str(error.value)
    assert why in str(error.value)
    assert f"nearest legal order: --passes {late},{early}" in str(error.value)


def test_two_passes_of_one_stage_are_refused():
    with pytest.raises(UsageError, match="expected one pass that writes widths"):
        order.resolve([order.Named("prune_width", "width"), order.Named("other", "width")])
    with pytest.raises(UsageError, match="expected one pass that writes blocks"):
        recipe.from_strings(["drop_layers,drop_layers"])


@pytest.mark.parametrize("strings", [["drop_layers", "w4"], ["drop_layers", "smooth", "w4"]])
def test_barriers_in_order_give_what_one_string_gives(strings):
    apart = compile_plan(planned(*strings), tokens(), OPTIONS)
    assert [row["pass"] for row in apart.structure] == ["drop_layers"]
    assert [i for i, _ in apart.plan.applied] == list(range(len(strings)))
    together = compile_plan(planned(strings[0]), tokens(), OPTIONS)
    rest = planned(*strings[1:], program=together.program)
    one = compile_plan(rest, tokens(), OPTIONS)
    assert {r["round"] for r in apart.records} == {len(strings) - 1}
    for name in one.program.params:
        assert torch.equal(one.program.weights.load(name), apart.program.weights.load(name))


# ** planning **


def test_a_plan_holds_three_programs():
    program = model()
    before = to_json(program)
    plan = planned("drop_layers,smooth,w4:group=8", program=program)
    assert to_json(program) == before
    apply_segments(program)
    assert to_json(plan.captured) == to_json(program)
    blocks = [s.name for s in plan.source.segments]
    assert blocks == ["prologue", "block0", "block1", "block2", "epilogue"]
    assert len(plan.captured.segments) == 6
    assert plan.source.params.keys() < plan.captured.params.keys()
    assert [s.name for s in plan.snapshots] == ["captured", "drop_layers", "smooth", "w4"]
    assert plan.needing == ["drop_layers", "smooth", "w4"]
    assert planned("drop_layers:method=list,losses=false,blocks=1,w4:solver=rtn").needing == []


def test_a_plan_tells_sizes_before_and_after():
    plan = planned("drop_layers:n=2,w4:group=8")
    data = plan.to_json(64, 16)
    json.dumps(data)
    (row,) = data["structure"]
    assert (row["before"]["blocks"], row["after"]["blocks"]) == (4, 2)
    assert row["exact"] is True
    assert row["before"]["bytes"] == data["predicted"]["bytes_before"]
    assert row["after"]["bytes"] == plan.source.weight_bytes()
    assert data["predicted"]["bytes_after"] == plan.program.weight_bytes()
    assert [o["pass"] for o in data["order"]] == ["drop_layers", "w4"]
    assert len(data["sites"]) == 2 * 7
    without = planned("w4:group=8").to_json(64, 16)
    assert without["structure"] == []
    more = (
        data["predicted"]["calibration_flops"]
        - planned("drop_layers:method=list,losses=false,blocks=1+2,w4:group=8").to_json(64, 16)[
            "predicted"
        ]["calibration_flops"]
    )
    assert more > 0


def test_planning_loads_no_tensor(monkeypatch):
    program = model()
    program.weights.tensors.clear()
    plan = planned("drop_layers,w4:group=8", program=program)
    assert plan.steps[0].after["blocks"] == 3


def test_listed_blocks_are_planned_as_they_are_compiled():
    plan = planned("drop_layers:method=list,blocks=0+3")
    ids = tokens(2)
    done = compile_plan(plan, tokens(), OPTIONS)
    want = run(done.program, model_inputs(ids))
    assert torch.equal(run(plan.program, model_inputs(ids)), want)


# ** compiling **


def test_the_plan_of_the_result_is_the_decided_one():
    plan = planned("drop_layers:protect_first=0,protect_last=0,w4:group=8")
    done = compile_plan(plan, tokens(), OPTIONS)
    assert done.plan is not plan
    assert done.plan.program is done.program
    (row,) = done.structure
    (decided,) = row["choice"]["blocks"]
    gone = done.plan.captured.params.keys() - done.plan.source.params.keys()
    listed = planned(f"drop_layers:method=list,losses=false,blocks={decided}")
    assert gone == listed.captured.params.keys() - listed.source.params.keys()
    assert row["records"]
    assert len(done.records) == 3 * 7


def test_a_recipe_of_structural_passes_alone_works():
    done = compile_plan(planned("drop_layers"), tokens(), OPTIONS)
    assert done.records == []
    assert done.plan.stages == []
    assert done.program.weight_bytes() < done.plan.captured.weight_bytes()


def test_calibration_data_is_asked_for():
    with pytest.raises(UsageError, match="expected calibration data for drop_layers, found none"):
        compile_plan(planned("drop_layers"), None)


def test_events_tell_what_happens():
    seen = []
    compile_plan(planned("drop_layers,w4:group=8"), tokens(), OPTIONS, seen.append)
    kinds = [e.kind for e in seen]
    assert kinds[0] == "start"
    assert kinds[-1] == "end"
    assert kinds.count("structure") + kinds.count("block") == seen[0].data["steps"]
    where = [e.data["where"] for e in seen if e.kind == "tick" and "where" in e.data]
    assert set(where) <= {s.name for s in planned("drop_layers").captured.segments}


@dataclasses.dataclass(frozen=True)
class Told(Structural):
    """Keeps the graph and notes what it was given."""

    variants = {"told": {}}
    stage = "width"
    effect = Lossy("perplexity")
    seen: list = dataclasses.field(default_factory=list, compare=False)

    def sites(self, analysis):
        return list(analysis.linears), []

    def predict(self, analysis, sites):
        return Choice({"sites": [s.id for s in sites]}, exact=False)

    def decide(self, context, sites):
        assert isinstance(context, Context)
        self.seen.append((context, [s.id for s in sites]))
        return Choice({"sites": [s.id for s in sites]}, records=[{"sites": len(sites)}])

    def apply(self, program, choice):
        return []


def test_each_decision_sees_what_the_one_before_left():
    told = Told(called="told")
    calls = (*recipe.from_strings(["drop_layers:n=2"]).calls, recipe.Call("told", told))
    plan = make_plan(model(), recipe.Recipe((calls,)))
    assert [s.call.name for s in plan.steps] == ["drop_layers", "told"]
    assert plan.steps[1].choice.exact is False
    done = compile_plan(plan, tokens(), OPTIONS)
    ((context, sites),) = told.seen
    assert len(context.analysis.blocks) == 2
    assert context.options is OPTIONS
    assert torch.equal(context.data, tokens())
    assert len(sites) == 15
    assert done.structure[1]["records"] == [{"sites": 15}]


def test_a_pass_that_needs_data_must_say_so():
    context = Context(model(), None, None, OPTIONS, lambda event: None)
    with pytest.raises(LlmcError, match="to say so"):
        _ = context.data


# ** overrides **


def with_overrides(*overrides):
    return recipe.from_mapping({
        "version": 1, "stages": [{"drop_layers": {"protect_first": 0}, "w4": {"solver": "rtn"}}],
        "overrides": list(overrides),
    })  # fmt: skip


def test_overrides_skip_sites():
    skip = {"where": {"block": [0, 2]}, "skip": ["drop_layers"]}
    plan = make_plan(model(), with_overrides(skip))
    assert plan.steps[0].sites == 2
    assert [r.predicate for r in plan.refusals if r.by == "drop_layers"] == ["override"] * 2
    done = compile_plan(plan, tokens(), OPTIONS)
    assert done.structure[0]["choice"]["blocks"] == [1]
    skip = {"where": {"role": ["block"]}, "skip": ["drop_layers"]}
    with pytest.raises(LlmcError, match="expected a place for drop_layers, found none: the recipe"):
        make_plan(model(), with_overrides(skip))


def test_knobs_of_one_site_are_refused():
    with pytest.raises(UsageError, match=r"overrides.0.set: expected a pass that is solved site"):
        with_overrides({"where": {"block": [0]}, "set": {"drop_layers": {"n": 2}}})


# ** artefacts **


def test_any_order_gives_one_artefact(tmp_path):
    hashes = {}
    for i, names in enumerate(itertools.permutations(["drop_layers", "smooth", "w4:solver=rtn"])):
        small = llmc.compile(model(), ",".join(names), calibration=tokens())
        hashes[",".join(names)] = small.save(tmp_path / str(i)).content_hash
    assert len(set(hashes.values())) == 1, hashes


def test_an_artefact_keeps_what_was_decided(tmp_path):
    small = llmc.compile(model(), "drop_layers:n=2,w4:group=8", calibration=tokens())
    small.save(tmp_path / "a")
    again = llmc.load(tmp_path / "a")
    ids = tokens(2)
    torch.testing.assert_close(again(ids), small(ids), rtol=0, atol=0)
    assert again.report["structure"] == small.report["structure"]
    assert again.report["totals"]["bytes_before"] == model().weight_bytes()
    rows = again.loaded.manifest.passes
    assert [(r["pass"], r["stage"], r["sites"]) for r in rows] == [("drop_layers", 0, 4),
                                                                  ("w4", 0, 14)]  # fmt: skip
    assert list(again.loaded.graphs) == ["00-captured", "01-drop_layers", "02-w4"]
    assert len(again.loaded.graph("01-drop_layers").segments) == 4
    assert again.generate(ids[:, :4], max_new_tokens=3) == small.generate(
        ids[:, :4], max_new_tokens=3
    )
    assert len(again.generator.program.states) == 2


# ** measuring **


def test_collect_is_what_a_run_sees():
    program = model()
    apply_segments(program)
    value = next(program.calls("llmc.gated"))
    last = list(program.calls("llmc.rms_norm"))[-1]
    wants = {value.name: ["moments", "gram"], last.name: ["absmax"]}
    found = collect(program, tokens(), wants, OPTIONS)
    seen = {}
    run(program, model_inputs(tokens()), observe=lambda n, v: seen.setdefault(n.name, v))
    x = seen[value.name].flatten(0, 1)
    torch.testing.assert_close(found.get(value.name, "gram").value, x.T @ x, rtol=1e-4, atol=1e-4)
    assert found.get(value.name, "moments").tokens == 8 * 16
    torch.testing.assert_close(
        found.get(last.name, "absmax").value, seen[last.name].abs().flatten(0, 1).amax(0)
    )
    with pytest.raises(ModelError, match="expected a node named 'nowhere'"):
        collect(program, tokens(), {"nowhere": ["gram"]}, OPTIONS)
    with pytest.raises(UsageError, match="expected a statistic"):
        collect(program, tokens(), {value.name: ["nothing"]}, OPTIONS)


def test_stream_goes_from_block_to_block():
    program = model()
    apply_segments(program)
    seen = list(stream(program, tokens(), OPTIONS))
    assert [(s.block, s.batch) for s in seen] == [
        (f"block{b}", i) for b in range(4) for i in range(3)
    ]
    for before, after in itertools.pairwise([s for s in seen if s.batch == 1]):
        assert torch.equal(before.leaves, after.enters)
    assert seen[0].enters.shape == (3, 16, 16)
    assert seen[2].enters.shape == (2, 16, 16)


@pytest.mark.parametrize("batch", [1, 3, 8])
def test_loss_is_the_mean_over_all_windows(batch):
    program = model()
    apply_segments(program)
    want = next_token_loss(run(program, model_inputs(tokens())), tokens())
    assert loss(program, tokens(), Options(batch=batch)) == pytest.approx(float(want), rel=1e-6)


def test_a_loss_needs_logits():
    program = model()
    apply_segments(program)
    with pytest.raises(ModelError, match="expected logits over more than 20 tokens"):
        loss(program, tokens() + 1, OPTIONS)


def test_a_walk_refuses_what_is_not_finite():
    program = model()
    apply_segments(program)
    name = next(n for n in program.params if len(program.params[n].shape) == 1)
    program.set_tensor(name, torch.full(program.params[name].shape, float("nan")))
    with pytest.raises(ModelError, match="expected finite activations"):
        loss(program, tokens(), OPTIONS)
    with pytest.raises(ModelError, match="expected finite activations"):
        list(stream(program, tokens(), OPTIONS))
