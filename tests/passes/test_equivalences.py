"""The passes that move factors between layers: exactness, theorems, conflicts, what they refuse."""

import itertools

import pytest
import torch

from llmc.compiler.ir.errors import UsageError
from llmc.compiler.ir.interpret import run
from llmc.compiler.pipeline import learning, recipe, zoo
from llmc.compiler.pipeline.compile import compile_plan
from llmc.compiler.pipeline.measure import model_inputs
from llmc.compiler.pipeline.plan import make_plan

RTN = "w3:group=8,solver=rtn"


def tokens(samples: int = 8, length: int = 16) -> torch.Tensor:
    g = torch.Generator().manual_seed(1)
    return torch.randint(0, 20, (samples, length), generator=g)


def compiled(*strings, program=None):
    given = strings[0] if isinstance(strings[0], recipe.Recipe) else recipe.from_strings(strings)
    return compile_plan(make_plan(program or zoo.decoder(), given), tokens())


def tensors(done):
    return {n: done.program.weights.load(n) for n in done.program.params}


def same(a, b):
    a, b = tensors(a), tensors(b)
    return a.keys() == b.keys() and all(torch.equal(a[k], b[k]) for k in a)


def logits(program):
    return run(program, model_inputs(tokens(2)))


def apart(done, program):
    want = logits(program)
    return float((logits(done.program) - want).abs().max() / want.abs().max())


def loud(**attrs):
    """A decoder whose norms make one channel fifty times as loud, and one that is always 0."""
    program = zoo.decoder(**attrs)
    for node in program.calls():
        if node.target.__name__.startswith(("rms_norm", "layer_norm")):
            name = str(node.args[1].target)
            gain = program.weights.load(name).clone()
            gain[3], gain[5] = 50.0, 0.0
            program.set_tensor(name, gain)
            if len(node.args) > 2:
                bias = str(node.args[2].target)
                program.set_tensor(
                    bias, program.weights.load(bias).index_fill(0, torch.tensor([5]), 0.7)
                )
    return program


@pytest.mark.parametrize("solver", ["rtn", "gptq"])
@pytest.mark.parametrize("clip", ["absmax", "mse", "output"])
def test_awq_never_loses_to_its_grid_without_scales(solver, clip):
    done = compiled(f"awq,w3:group=8,solver={solver},clip={clip}", program=loud())
    assert all(f["loss"] <= f["loss_unscaled"] for f in done.folds)
    assert any(f["alpha"] > 0 and f["loss"] < 0.8 * f["loss_unscaled"] for f in done.folds)
    assert all((f["alpha"] == 0) == (f["moved"] == 0) for f in done.folds)


def test_awq_leaves_dead_channels_and_the_function():
    quiet = zoo.decoder()
    assert apart(compiled("awq", program=quiet), quiet) < 1e-5
    program = loud()
    plain = compiled("awq:round=pow2", program=program)
    assert apart(plain, program) < 1e-6
    site = plain.plan.stages[0].migrations[0].site
    gain = next(a.param for a in site.absorbers)
    old, new = program.weights.load(gain), plain.program.weights.load(gain)
    assert old[5] == new[5] == 0
    q = site.consumers[0][1]
    assert torch.equal(program.weights.load(q)[:, 5], plain.program.weights.load(q)[:, 5])


def test_awq_assumes_a_grid_only_where_none_is_stated():
    """Without codes in the recipe the knobs say what the weights are to be rounded to."""
    fine, coarse = (compiled(f"awq:bits={b},group=8", program=loud()) for b in (8, 2))
    assert sum(f["loss_unscaled"] for f in coarse.folds) > sum(
        f["loss_unscaled"] for f in fine.folds
    )
    later = compiled("awq:bits=8", RTN, program=loud())
    stated = compiled(f"awq:bits=2,{RTN}", program=loud())
    # The first block's inputs are the same; further on, one of the two has been rounded.
    first, second = (
        [f["alpha"] for f in done.folds if f["site"].startswith("block0")]
        for done in (later, stated)
    )
    assert first == second


@pytest.mark.parametrize("share", ["mean", "max"])
def test_awq_equates_heads_that_share_a_value_head(share):
    done = compiled(f"awq:share={share},{RTN}", program=zoo.decoder(heads=4, kv=2))
    value = next(m.site for m in done.plan.stages[0].migrations if m.site.kind == "value")
    assert value.n_scales * 2 == value.channels


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@pytest.mark.parametrize("name", ["awq", "os_plus", "omniquant"])
def test_sixteen_bit_weights_get_powers_of_two(name, dtype):
    program = loud(norm="layer", bias=True, mlp="relu")
    for param in list(program.params):
        program.set_tensor(param, program.weights.load(param).to(dtype))
    alone = compiled(name, program=program)
    assert apart(alone, program) < 1e-5
    for f in alone.folds:
        ends = torch.tensor([f["smallest"], f["largest"]])
        assert ends.frexp().mantissa.tolist() == [0.5, 0.5]


def test_what_becomes_codes_is_never_stored_in_sixteen_bits():
    """Its scales need no rounding; those of an edge with a dense reader do."""
    program = loud()
    for param in list(program.params):
        program.set_tensor(param, program.weights.load(param).bfloat16())
    coded = compiled(f"awq,{RTN}", program=program)
    powers = {
        f["site"]
        for f in coded.folds
        if torch.tensor([f["smallest"], f["largest"]]).frexp().mantissa.tolist() == [0.5, 0.5]
        and f["moved"]
    }
    assert not {p for p in powers if p.startswith("block")}


@pytest.mark.parametrize("name", ["smooth", "awq", "os_plus", "omniquant", "rptq"])
def test_order_in_a_string_changes_nothing(name):
    assert same(compiled(f"{name},{RTN}"), compiled(f"{RTN},{name}"))


@pytest.mark.parametrize(("a", "b"), list(itertools.permutations(["smooth", "awq", "os_plus"], 2)))
def test_one_edge_takes_one_pass(a, b):
    with pytest.raises(UsageError, match="measured on the same activations") as e:
        compiled(f"{a},{b},{RTN}")
    assert "--passes" in e.value.hint
    assert "block0/norm0" in str(e.value)


def test_scales_measured_after_a_barrier_multiply():
    program = loud()
    assert apart(compiled("smooth", "awq", program=program), program) < 1e-5


def test_passes_on_different_edges_share_a_string():
    given = recipe.from_mapping(
        {
            "version": 1,
            "stages": [{"smooth": None, "awq": None, "w3": {"group": 8, "solver": "rtn"}}],
            "overrides": [
                {"where": {"role": ["norm"]}, "skip": ["awq"]},
                {"where": {"role": ["value", "product"]}, "skip": ["smooth"]},
            ],
        }
    )
    done = compiled(given)
    assert {(f["pass"], f["kind"]) for f in done.folds} == {
        ("smooth", "norm"), ("awq", "value"), ("awq", "product"),
    }  # fmt: skip


@pytest.mark.parametrize("attrs", [{}, {"bias": True}])
def test_os_plus_makes_a_constant_channel_zero(attrs):
    program = loud(norm="layer", mlp="relu", **attrs)
    done = compiled("os_plus", program=program)
    assert apart(done, program) < 1e-5
    shifted = [m.site for m in done.plan.stages[0].migrations if m.site.kind == "norm"]
    seen = {}
    run(
        done.program, model_inputs(tokens()),
        observe=lambda n, v: seen.__setitem__(n.name, v),
    )  # fmt: skip
    for site in shifted:
        x = seen[site.value].flatten(0, 1)
        assert (x[:, 5] == 0).all()
        assert (x.amax(0) + x.amin(0)).abs().max() < 1e-5 * x.abs().max()
    assert [f["shifted"] for f in done.folds if f["kind"] == "norm"] == [16] * len(shifted)
    assert all(f["smallest"] >= 1 and f["loss"] <= f["loss_unscaled"] for f in done.folds)


def test_os_plus_scales_only_where_no_bias_takes_a_shift():
    done = compiled("os_plus", program=loud())
    assert all("shifted" not in f for f in done.folds)
    assert len(done.program.params) == len(zoo.decoder().params)
    fixed = compiled("os_plus:shift=false", program=loud(norm="layer", mlp="relu"))
    assert all("shifted" not in f for f in fixed.folds)


def test_os_plus_helps_inputs_that_are_rounded():
    program = loud(norm="layer", bias=True, mlp="relu")
    want = logits(program)
    lost = {
        text: float((logits(compiled(text, program=program).program) - want).square().mean())
        for text in ("w8a8", "os_plus,w8a8")
    }
    assert lost["os_plus,w8a8"] < lost["w8a8"]


def test_statistics_are_measured_again_behind_a_shift():
    """The solve sees XᵀX of what its weights will read: a stale one would not be the same."""
    program = loud(norm="layer", bias=True, mlp="relu")
    one = compiled("os_plus,w3:group=8", program=program)
    two = compiled("os_plus", "w3:group=8", program=program)
    first = [r for r in one.records if r["site"].startswith("block0")]
    second = [r for r in two.records if r["site"].startswith("block0")]
    for a, b in zip(first, second, strict=True):
        assert a["loss"] == pytest.approx(b["loss"], rel=1e-2)


@pytest.mark.parametrize("symmetric", ["true", "false"])
def test_no_epochs_is_round_to_nearest(symmetric):
    text = f"w3:group=8,solver=rtn,symmetric={symmetric}"
    plain = compiled(f"{text},clip=absmax")
    assert same(compiled(f"{text},clip=learned,epochs=0"), plain)
    assert same(compiled(f"omniquant:epochs=0,{text},clip=learned,epochs=0"), plain)


def test_learning_never_ends_above_its_start_and_gains():
    text = "omniquant:epochs=8,windows=6,w3:group=8,solver=rtn,clip=learned"
    done = compiled(text, program=loud())
    rows = [r for r in done.records if r["site"].startswith("block0")]
    assert all(r["loss_learned"] < 0.9 * r["loss_start"] for r in rows)
    assert all(r["loss_learned"] <= r["loss_start"] for r in done.records)
    assert all(r["skipped"] == 0 for r in done.records)
    assert same(compiled(text, program=loud()), done)


def test_steps_that_are_not_finite_are_skipped_and_counted(monkeypatch):
    true = learning._Block._loss

    def broken(self, state, i, target):
        loss = true(self, state, i, target)
        return loss * float("nan") if loss.requires_grad and i % 2 else loss

    monkeypatch.setattr(learning._Block, "_loss", broken)
    done = compiled("w3:group=8,solver=rtn,clip=learned,epochs=2,windows=4")
    assert {r["skipped"] for r in done.records} == {4}
    assert all(r["loss_learned"] <= r["loss_start"] for r in done.records)
    assert torch.isfinite(logits(done.program)).all()


def test_key_scales_are_learned_on_request():
    program = zoo.decoder()
    done = compiled("omniquant:keys=true,epochs=2", program=program)
    assert {f["kind"] for f in done.folds} >= {"norm", "keys"}
    assert apart(done, program) < 1e-5
    text = f"omniquant:keys=true,epochs=4,{RTN},clip=learned"
    moved = [f for f in compiled(text).folds if f["kind"] == "keys"]
    assert any(f["moved"] for f in moved)


@pytest.mark.parametrize(
    ("text", "match"),
    [
        ("w3:epochs=3", "clip=learned beside it"),
        ("w3:clip=learned,sweeps=2", "no double and no sweeps"),
        ("w3:clip=learned,double=true", "no double and no sweeps"),
        ("rptq:units=head", "expected some of neuron, hidden"),
        ("awq:bits=9", "expected 2..8"),
        ("rptq,rptq", "one pass that writes orders of channels"),
    ],
)
def test_knobs_that_make_no_sense(text, match):
    with pytest.raises(UsageError, match=match):
        compiled(text)


def test_rptq_sorts_ranges():
    program = loud(inner=48)
    done = compiled("rptq", program=program)
    neurons = [g for g in done.plan.steps[0].choice.data["order"] if "neuron" in g]
    assert neurons == ["block0/neuron0", "block1/neuron0"]
    seen = {}
    run(
        done.program, model_inputs(tokens()),
        observe=lambda n, v: seen.__setitem__(n.name, v),
    )  # fmt: skip
    for node in done.program.calls("llmc.gated"):
        top = seen[node.name].flatten(0, 1).abs().amax(0)
        assert (top.diff() >= -1e-5 * top.max()).all()


def test_rptq_serves_scales_per_group_of_channels():
    program = zoo.decoder(hidden=32, inner=48, heads=8)
    mixed = torch.randperm(32, generator=torch.Generator().manual_seed(3))
    for node in program.calls("llmc.rms_norm"):
        program.set_tensor(str(node.args[1].target), torch.logspace(0, -3, 32)[mixed])
    want = logits(program)
    lost = {
        text: float((logits(compiled(text, program=program).program) - want).square().mean())
        for text in ("w8a8:act_group=8", "rptq,w8a8:act_group=8")
    }
    assert lost["rptq,w8a8:act_group=8"] < lost["w8a8:act_group=8"]
