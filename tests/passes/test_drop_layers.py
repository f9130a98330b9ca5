"""drop_layers: a dropped block is one that is gone, and the blocks are those that the laws name."""

import math

import pytest
import torch

from llmc.compiler.analysis.blocks import apply_segments
from llmc.compiler.analysis.depth import spans
from llmc.compiler.ir.errors import GateError, UsageError
from llmc.compiler.ir.interpret import run, run_nodes
from llmc.compiler.ir.verifier import verify
from llmc.compiler.pipeline import recipe, zoo
from llmc.compiler.pipeline.compile import compile_plan
from llmc.compiler.pipeline.measure import Options, loss, model_inputs, stream
from llmc.compiler.pipeline.plan import make_plan
from llmc.compiler.pipeline.skipping import Skipping, cosines, course
from llmc.compiler.runtime.cache import add_cache
from llmc.compiler.runtime.executor import Runner

OPTIONS = Options(batch=3)


def tokens(samples: int = 7, length: int = 12, seed: int = 1) -> torch.Tensor:
    g = torch.Generator().manual_seed(seed)
    return torch.randint(0, 20, (samples, length), generator=g)


def compiled(text, program=None, ids=None):
    program = program or zoo.decoder(blocks=5)
    plan = make_plan(program, recipe.from_strings([text]))
    return compile_plan(plan, tokens() if ids is None else ids, OPTIONS)


def segmented(program):
    apply_segments(program)
    return program


def bypassed(program, indices, ids):
    """Logits of a run in which the stream behind each block is overwritten by what came before.

    The blocks run; only their values are thrown away, so nothing of the rewrite is used.
    """
    program = segmented(program.clone())
    around = {s.leaves: s.enters for s in spans(program) if s.index in indices}
    env = dict(zip(program.inputs, model_inputs(ids).values(), strict=True))
    for node in program.graph.nodes:
        if node.op in ("call_function", "get_attr"):
            run_nodes([node], env, program.fetch)
        if node.name in around:
            env[node] = env[program.node(around[node.name])]
    return env[program.output.args[0]]


def drops(done):
    """The blocks in the order in which they went, and the loss behind each."""
    rows = [r for r in done.structure[0]["records"] if "change" in r]
    return [r["block"] for r in rows], [r["loss"] for r in rows]


@pytest.mark.parametrize("listed", ["0", "2", "-1", "1+2", "3+0+-1", "1+3"])
def test_to_skip_is_to_delete(listed):
    program = zoo.decoder(blocks=5, bias=True)
    done = compiled(f"drop_layers:method=list,blocks={listed}", program)
    indices = {int(i) % 5 for i in listed.split("+")}
    ids = tokens(3, seed=2)
    want = bypassed(program, indices, ids)
    assert torch.equal(run(done.program, model_inputs(ids)), want)
    names = [s.name for s in done.program.segments]
    assert names == ["prologue", *(f"block{i}" for i in range(5 - len(indices))), "epilogue"]
    gone = len(program.params) - len(done.program.params)
    assert 5 * gone == len(indices) * (len(program.params) - 3)  # but table, last norm and head


def test_the_loss_after_every_drop_is_that_of_the_smaller_model():
    program = segmented(zoo.decoder(blocks=5))
    done = compiled("drop_layers:method=list,blocks=3+1+-1", program)
    order, losses = drops(done)
    assert order == [None, 3, 1, 4]
    assert losses[0] == pytest.approx(loss(program, tokens(), OPTIONS), rel=1e-6)
    for i in range(1, 4):
        listed = "+".join(map(str, order[1 : i + 1]))
        part = compiled(f"drop_layers:method=list,blocks={listed}", program)
        assert losses[i] == pytest.approx(loss(part.program, tokens(), OPTIONS), rel=1e-6)


def test_fewer_windows_give_the_losses_of_those():
    program = segmented(zoo.decoder(blocks=4))
    _, losses = drops(compiled("drop_layers:samples=3", program))
    assert losses[0] == pytest.approx(loss(program, tokens()[:3], OPTIONS), rel=1e-6)


def silenced(block: int, blocks: int = 5):
    """A model in which the projections back to the stream of one block are zero."""
    program = segmented(zoo.decoder(blocks=blocks))
    span = spans(program)[block]
    segment = next(s for s in program.segments if s.name == span.block)
    adds = [program.node(n) for n in segment.nodes if n.startswith("add")]
    assert len(adds) == 2
    for add in adds:
        weight = str(add.args[1].args[1].target)
        program.set_tensor(weight, torch.zeros(program.params[weight].shape))
    return program


def spoken(program, length: int = 12):
    """What the model itself says after each of seven tokens: text that it predicts well."""
    ids = tokens(7, 1)
    for _ in range(length - 1):
        ids = torch.cat([ids, run(program, model_inputs(ids))[:, -1:].argmax(-1)], 1)
    return ids


@pytest.mark.parametrize("block", [1, 3])
def test_a_block_that_adds_nothing_goes_first(block):
    program = silenced(block)
    text = spoken(program)
    seen = course(program, text, OPTIONS, lambda event: None)
    assert seen.influence[block] == 0.0
    assert min(v for i, v in enumerate(seen.influence) if i != block) > 1e-3
    for method in ("sleb", "influence"):
        order, losses = drops(compiled(f"drop_layers:n=2,method={method}", program, text))
        assert order[1] == block
        assert losses[1] - losses[0] == 0.0
        assert losses[2] > losses[1]
    angular = compiled("drop_layers:n=1,method=angular", program, text)
    assert drops(angular)[0] == [None, block]
    ids = tokens(3, seed=4)
    one = compiled("drop_layers", program, text).program
    assert torch.equal(run(one, model_inputs(ids)), run(program, model_inputs(ids)))


def test_sleb_is_the_greedy_argmin():
    """Against a search that deletes and measures whole models."""
    program = segmented(zoo.decoder(blocks=6, seed=3))
    order, losses = drops(compiled("drop_layers:n=3,protect_first=0,protect_last=2", program))
    gone: list[int] = []
    for found, at in zip(order[1:], losses[1:], strict=True):
        tried = {}
        for i in range(4):
            if i not in gone:
                listed = "+".join(map(str, [*gone, i]))
                part = make_plan(program, recipe.from_strings(
                    [f"drop_layers:method=list,losses=false,blocks={listed}"]))  # fmt: skip
                tried[i] = loss(compile_plan(part, None).program, tokens(), OPTIONS)
        assert found == min(tried, key=tried.__getitem__)
        assert at == pytest.approx(tried[found], rel=1e-6)
        gone.append(found)


def test_sleb_costs_the_blocks_behind_each_candidate():
    """Segments that run: the prefix once, then for each candidate what lies behind it."""
    program = segmented(zoo.decoder(blocks=6))
    ran = []
    names = [f"block{i}" for i in range(2, 5)]
    skipping = Skipping(program, names, tokens(), OPTIONS, lambda e: ran.append(e.data["where"]))
    skipping.without_one_more((), names)
    behind = {"block2": 4, "block3": 3, "block4": 2}
    assert len(ran) == sum(behind.values()) + 2  # and the stream from block2 to block4
    assert ran.count("epilogue") == 3
    assert "prologue" not in ran
    assert "block0" not in ran


@pytest.mark.parametrize("scale", [1e-3, 0.5, 64.0])
def test_influence_does_not_see_the_size_of_the_stream(scale):
    g = torch.Generator().manual_seed(0)
    before, after = torch.randn(2, 40, 16, generator=g, dtype=torch.float64)
    assert torch.allclose(cosines(before * scale, after * scale), cosines(before, after))
    assert torch.equal(cosines(before, before * scale).round(decimals=12), torch.ones(40).double())
    nothing = torch.zeros(3, 16)
    assert torch.equal(cosines(nothing, nothing), torch.ones(3).double())
    assert torch.equal(cosines(nothing, before[:3]), torch.zeros(3).double())


def test_influence_and_angle_are_their_formulas():
    program = segmented(zoo.decoder(blocks=4))
    seen = course(program, tokens(), OPTIONS, lambda event: None)
    values: dict[str, list[tuple[torch.Tensor, torch.Tensor]]] = {}
    for one in stream(program, tokens(), Options(batch=7)):
        values.setdefault(one.block, []).append((one.enters, one.leaves))
    (first, _), (_, last) = values["block1"][0], values["block2"][0]
    cos = torch.nn.functional.cosine_similarity(*values["block1"][0], dim=-1)
    assert seen.influence[1] == pytest.approx(1 - float(cos.mean()), abs=1e-6)
    cos = torch.nn.functional.cosine_similarity(first[:, -1], last[:, -1], dim=-1)
    angle = float(torch.arccos(cos.clamp(-1, 1)).mean()) / math.pi
    assert seen.angle(1, 2) == pytest.approx(angle, abs=1e-6)


def test_angular_drops_a_run():
    done = compiled("drop_layers:n=2,method=angular", zoo.decoder(blocks=6))
    rows = [r for r in done.structure[0]["records"] if "angle" in r]
    assert [r["first"] for r in rows] == [1, 2, 3]
    best = min(rows, key=lambda r: r["angle"])["first"]
    assert done.structure[0]["choice"]["blocks"] == [best, best + 1]


def test_the_cache_gives_what_no_cache_gives():
    done = compiled("drop_layers:n=2", zoo.decoder(blocks=5))
    cached = add_cache(done.program)
    assert list(cached.states) == ["kv0", "kv1", "kv2"]
    verify(cached)
    ids = tokens(2, 9, seed=5)
    want = run(done.program, model_inputs(ids))
    runner = Runner(cached)
    cache = runner.start(2)
    rows = [runner.forward(ids[:, i : i + 1], cache=cache) for i in range(ids.shape[1])]
    assert torch.allclose(torch.cat(rows, 1), want, atol=1e-5)


def test_order_in_one_string_changes_nothing():
    made = [
        compiled(text, zoo.decoder(blocks=4, inner=32))
        for text in ("drop_layers,smooth,w4:group=8", "w4:group=8,drop_layers,smooth")
    ]
    first, second = (d.program for d in made)
    assert first.params == second.params
    assert all(torch.equal(first.weights.load(n), second.weights.load(n)) for n in first.params)
    assert len(made[0].records) == 3 * 7


@pytest.mark.parametrize(
    ("text", "says"),
    [
        ("drop_layers:n=4", "expected 1..2 of 4 blocks, found 4"),
        ("drop_layers:n=3", "expected 1..2 of 4 blocks, found 3"),
        ("drop_layers:n=4,protect_first=0,protect_last=0", "expected 1..3 of 4"),
        ("drop_layers:remove=1.0", "expected 1..2 of 4 blocks, found 4"),
        ("drop_layers:remove=0.01", "expected 1..2 of 4 blocks, found 0"),
        ("drop_layers:protect_first=2,protect_last=2", "expected 1..0 of 4"),
        ("drop_layers:method=list,blocks=4", "expected blocks -4..3, found 4"),
        ("drop_layers:method=list,blocks=1+1", "expected each once"),
        ("drop_layers:method=list,blocks=1+-3", "expected each once"),
        ("drop_layers:method=list,blocks=0+1+2+3", "expected a block to stay"),
        ("drop_layers:method=list,blocks=one", "expected numbers as in 3+5"),
        ("drop_layers:method=list", "expected blocks= with method=list"),
        ("drop_layers:blocks=1", "expected blocks= with method=list"),
        ("drop_layers:n=1,remove=0.5", "found n and remove"),
        ("drop_layers:n=1,method=list,blocks=1", "found n and blocks"),
    ],
)
def test_refused(text, says):
    with pytest.raises(UsageError) as error:
        make_plan(zoo.decoder(blocks=4), recipe.from_strings([text]))
    assert says in str(error.value)
    assert "\n" not in error.value.args[0]
    assert error.value.exit_code == 2


def test_a_block_that_others_read_stays():
    program = zoo.build("gives_keys")
    plan = make_plan(program, recipe.from_strings(["drop_layers"]))
    refused = [r for r in plan.refusals if r.predicate == "one_way_out"]
    assert [r.by for r in refused] == ["drop_layers"]
    assert "which block0 makes beside the stream" in refused[0].reason
    assert program.node(refused[0].node).op == "call_function"
    assert plan.steps[0].sites == 3
    with pytest.raises(UsageError, match="may be left out, found 0"):
        make_plan(program, recipe.from_strings(["drop_layers:method=list,blocks=0"]))
    done = compile_plan(make_plan(program, recipe.from_strings(
        ["drop_layers:method=list,losses=false,blocks=1+3"])), None)  # fmt: skip
    ids = tokens(2)
    logits, keys = run(done.program, model_inputs(ids))
    assert torch.equal(keys, run(program, model_inputs(ids))[1])
    assert logits.shape == (2, 12, 20)


def test_without_blocks_there_is_nothing_to_drop():
    b = zoo.Builder()
    ids = b.input("input_ids", torch.int64, 2, 3)
    program = b.finish(b.call("aten.embedding.default", b.param(20, 16), ids))
    with pytest.raises(GateError, match="no repeated blocks"):
        make_plan(program, recipe.from_strings(["drop_layers"]))
