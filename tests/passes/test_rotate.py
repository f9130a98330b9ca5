"""rotate: the model stays the same, in fp64 and on many architectures, or the pass says why not."""

import sys
from pathlib import Path

import pytest
import torch

from llmc.compiler.analysis.turning import TurnSite, turn_sites
from llmc.compiler.ir.errors import GateError, UsageError
from llmc.compiler.ir.interpret import run
from llmc.compiler.ir.turned import TurnedWeights
from llmc.compiler.pipeline import recipe, zoo
from llmc.compiler.pipeline.compile import compile_plan
from llmc.compiler.pipeline.encode import refresh_types
from llmc.compiler.pipeline.measure import model_inputs
from llmc.compiler.pipeline.plan import make_plan
from llmc.compiler.pipeline.rotating import FACT
from llmc.compiler.runtime.artefact import Contents, load, save

sys.path.insert(0, str(Path(__file__).parents[1]))

from tiny_models import capture_tiny, random_inputs

# Tied heads, layer_norms that fold into biases that are new, experts.
QUICK = ("gpt2", "stablelm", "mixtral")
SLOW = (
    "llama", "phi3", "qwen2", "mistral", "qwen3", "qwen3_moe", "qwen2_moe", "olmoe", "gemma",
    "granite", "cohere",
    "gpt_neox", "gptj", "gpt_neo", "opt", "falcon", "starcoder2", "deepseek_v3",
)  # fmt: skip
EVERY = [*QUICK, *(pytest.param(n, marks=pytest.mark.slow) for n in SLOW)]


def tokens(samples=8, length=16):
    return torch.randint(0, 20, (samples, length), generator=torch.Generator().manual_seed(1))


def compiled(text, program=None):
    plan = make_plan(program or zoo.decoder(), recipe.from_strings([text]))
    return compile_plan(plan, tokens())


def logits(program):
    return run(program, model_inputs(tokens(2)))


def apart(done, program):
    want = logits(program)
    return float((logits(done.program) - want).abs().max() / want.abs().max())


def doubled(program):
    """The program with floating parameters stored and computed in fp64."""
    program = program.clone()
    program.dtype = torch.float64
    for name, p in list(program.params.items()):
        if p.dtype.is_floating_point:
            program.set_tensor(name, program.weights.load(name).double())
    refresh_types(program)
    return program


def turned(program, text="rotate"):
    """The program behind the pass, in the precision in which it came, and its sites."""
    plan = make_plan(program, recipe.from_strings([text]))
    return plan.source, plan.steps[0].choice.records


@pytest.mark.parametrize("name", EVERY)
def test_architectures_stay_the_same(name):
    program = doubled(capture_tiny(name))
    new, sites = turned(program)
    assert "stream" in {s["kind"] for s in sites}
    inputs = random_inputs(name, 2)
    want, found = run(program, inputs), run(new, inputs)
    assert float((found - want).abs().max()) <= 1e-12 * float(want.abs().max())
    assert not [n for n in new.calls("llmc.layer_norm") if n.name not in _kept(program)]


def _kept(program):
    found = [s for s in turn_sites(program) if isinstance(s, TurnSite)]
    return {name for s in found for name in s.back}


@pytest.mark.parametrize(
    ("name", "reason"),
    [
        ("gemma2", "rms_norm_1 has a gain, and add"),
        pytest.param("bert", "layer_norm has a gain, and add", marks=pytest.mark.slow),
        pytest.param("t5", "is the result of the program", marks=pytest.mark.slow),
    ],
)
def test_a_stream_that_cannot_turn_names_the_node(name, reason):
    found = turn_sites(capture_tiny(name))
    (refused,) = [s for s in found if not isinstance(s, TurnSite)]
    assert reason in refused.reason
    assert {s.kind for s in found if isinstance(s, TurnSite)} == {"values"}


@pytest.mark.parametrize("bias", [False, True])
@pytest.mark.parametrize("norm", ["rms", "layer"])
@pytest.mark.parametrize("tied", [False, True])
@pytest.mark.parametrize("mlp", ["gated", "relu"])
def test_every_kind_of_decoder_stays_the_same(norm, tied, bias, mlp):
    program = doubled(zoo.decoder(norm=norm, tied=tied, bias=bias, mlp=mlp, rope=1.0))
    new, _ = turned(program)
    want = logits(program)
    torch.testing.assert_close(logits(new), want, rtol=1e-11, atol=1e-11)
    # The stream itself is another one.
    before, after = ({}, {})
    for p, seen in ((program, before), (new, after)):
        run(p, model_inputs(tokens(2)), observe=lambda n, v, seen=seen: seen.update({n.name: v}))
    name = next(program.calls("llmc.attention")).name
    assert not torch.allclose(before[name], after[name])
    add = next(n.name for n in program.calls("aten.add.Tensor") if before[n.name].shape[-1] == 16)
    assert not torch.allclose(before[add], after[add])


def test_channels_that_stand_out_are_spread():
    """One channel of the stream is written a hundred times as loud."""
    program = zoo.decoder(hidden=64, inner=64)
    for node in program.calls():
        weight = node.args[1] if node.target.__name__.startswith("linear") else None
        if weight is not None and program.params[str(weight.target)].shape[0] == 64:
            w = program.weights.load(str(weight.target)).clone()
            w[5] *= 100
            program.set_tensor(str(weight.target), w)

    def peak(p):
        seen = {}
        run(p, model_inputs(tokens(2)), observe=lambda n, v: seen.__setitem__(n.name, v))
        x = seen[[n.name for n in p.calls("aten.add.Tensor")][-1]]
        return float(x.abs().max() / x.square().mean().sqrt())

    done = compiled("rotate", program)
    assert apart(done, program) < 1e-4
    assert peak(program) > 20
    assert peak(done.program) < 6


@pytest.mark.parametrize("text", ["rotate,w4:group=row", "rotate,w8a8", "rotate,prune24"])
def test_what_comes_behind_meets_plain_weights(text):
    program = zoo.decoder()
    done = compiled(text, program)
    assert apart(done, program) < 1.0
    assert len(done.records) == 14
    assert done.plan.program.weight_bytes() == done.program.weight_bytes()


def test_quip_leaves_alone_what_is_turned():
    done = compiled("rotate,quip:bits=4")
    schemes = {r["role"]: r["scheme"] for r in done.records}
    assert schemes == {
        "q": "rotated out midrise4 row", "k": "rotated out midrise4 row", "v": "midrise4 row",
        "o": "midrise4 row", "gate": "rotated out midrise4 row", "up": "rotated out midrise4 row",
        "down": "rotated in midrise4 row",
    }  # fmt: skip
    # Gates, queries and keys turn back their outputs, down its inputs; nothing turns twice.
    assert len(list(done.program.calls("llmc.rotate"))) == 2 * 5
    assert apart(done, zoo.decoder()) < 0.3


@pytest.mark.parametrize("kind", ["stream", "values"])
def test_one_kind_alone(kind):
    program = zoo.decoder()
    done = compiled(f"rotate:units={kind}", program)
    assert {r["kind"] for r in done.structure[0]["records"]} == {kind}
    assert apart(done, program) < 1e-5
    sides = done.program.facts[FACT]
    assert any("in" in s for s in sides.values())
    assert ("p0" in sides) == (kind == "stream")


def test_scales_have_no_norm_left_to_go_into():
    program = zoo.decoder()
    done = compiled("rotate,smooth", program)
    refused = [r for r in done.plan.refusals if r.predicate == "norm_has_gain"]
    assert len(refused) == 5
    assert {f["kind"] for f in done.folds} == {"product", "value"}
    assert apart(done, program) < 1e-4


@pytest.mark.parametrize("store", ["f32", "same"])
def test_sixteen_bits(store):
    program = zoo.decoder()
    for name in list(program.params):
        program.set_tensor(name, program.weights.load(name).bfloat16())
    done = compiled(f"rotate:store={store}", program)
    kinds = {p.dtype for p in done.program.params.values() if len(p.shape) == 2}
    assert kinds == {torch.float32 if store == "f32" else torch.bfloat16}
    assert (apart(done, program) < 1e-5) == (store == "f32")
    assert apart(done, program) < 0.1
    assert done.program.weight_bytes() == done.plan.program.weight_bytes()


def test_nothing_is_read_before_it_is_needed():
    program = zoo.decoder()
    read = []

    class Watched:
        def load(self, name):
            read.append(name)
            return tensors.load(name)

    tensors, program.weights = program.weights, Watched()
    new, _ = turned(program)
    assert read == []
    found = new.weights
    while not isinstance(found, TurnedWeights):
        found = found.base
    found.load("p2")
    assert set(read) == {"p1", "p2"}


def test_an_artefact_runs_the_same(tmp_path):
    done = compiled("rotate", zoo.decoder(tied=True, norm="layer", bias=True))
    save(tmp_path / "out", Contents(done.program))
    assert torch.equal(logits(load(tmp_path / "out").program), logits(done.program))


@pytest.mark.parametrize(
    ("text", "error", "match"),
    [
        ("rotate:units=heads", UsageError, "expected some of stream, values"),
        ("rotate,rotate", UsageError, "one pass that writes rotations"),
        ("rotate:store=f16", UsageError, "expected one of f32, same"),
    ],
)
def test_what_makes_no_sense(text, error, match):
    with pytest.raises(error, match=match):
        compiled(text)


def test_scales_of_an_earlier_stage_are_refused():
    with pytest.raises(UsageError, match="expected 'rotate' before 'smooth'"):
        make_plan(zoo.decoder(), recipe.from_strings(["smooth", "rotate"]))


def test_a_stream_too_odd_to_mix_is_refused():
    with pytest.raises(GateError, match="odd factor"):
        compiled("rotate:units=stream", zoo.decoder(hidden=2051, inner=8, blocks=1))
