"""kv8, kvfp8, kivi, kvquant: from recipe to artefact and back, and what they refuse."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch

from llmc.compiler.analysis.blocks import apply_segments
from llmc.compiler.analysis.rotation import Rotation, cache_sites, rotation_of
from llmc.compiler.ir.errors import GateError, ModelError, UsageError
from llmc.compiler.ir.graph import Program
from llmc.compiler.ir.interpret import run, run_nodes
from llmc.compiler.ir.ops import row_of
from llmc.compiler.ir.verifier import verify
from llmc.compiler.pipeline.caches import fisher, look, watched
from llmc.compiler.pipeline.compile import compile_plan
from llmc.compiler.pipeline.data import Stream
from llmc.compiler.pipeline.measure import Options, model_inputs, next_token_loss
from llmc.compiler.pipeline.plan import make_plan
from llmc.compiler.pipeline.recipe import from_mapping, from_strings
from llmc.compiler.pipeline.zoo import build, decoder
from llmc.compiler.runtime.artefact import Contents, load, save
from llmc.compiler.runtime.cache import add_cache
from llmc.compiler.runtime.evaluate import evaluate
from llmc.compiler.runtime.lowering import runner_for
from llmc.compiler.runtime.stepwise import Stepwise

NAMES = ["kv8", "kv8:keys=channel", "kvfp8", "kivi:bits=4,group=4,residual=8", "kvquant:bits=4"]


def tokens(rows: int = 6, length: int = 24, seed: int = 3) -> torch.Tensor:
    return torch.randint(0, 20, (rows, length), generator=torch.Generator().manual_seed(seed))


def compiled(passes: str, program: Program | None = None) -> Any:
    plan = make_plan(program or build("with_rope"), from_strings([passes]))
    return compile_plan(plan, tokens())


def decoded(program: Program, ids: torch.Tensor, target: str = "reference", **more: Any) -> Any:
    runner = runner_for(program, target, cached=True, **more)
    cache = runner.start(*ids.shape)
    steps = [runner.forward(ids[:, t : t + 1], cache=cache) for t in range(ids.shape[1])]
    return torch.cat(steps, 1)


@pytest.mark.parametrize("passes", NAMES)
def test_the_artefact_decodes_as_what_was_compiled(passes: str, tmp_path: Path) -> None:
    done = compiled(passes)
    plain = save(tmp_path / "plain", Contents(build("with_rope")))
    sealed = save(tmp_path / "out", Contents(done.program))
    assert sealed.content_hash != plain.content_hash
    program = load(tmp_path / "out").program
    assert program.caches == done.program.caches
    ids = tokens(2, 20, seed=5)
    assert torch.equal(decoded(program, ids), decoded(done.program, ids))
    whole = runner_for(build("with_rope")).forward(ids)
    assert torch.equal(runner_for(program).forward(ids), whole)
    off = (decoded(program, ids) - whole).abs().max()
    assert 1e-6 < off < 0.5
    torch.testing.assert_close(decoded(program, ids, "cpu"), decoded(program, ids))


def test_a_rotation_behind_the_cache_changes_nothing() -> None:
    ids = tokens(2, 20, seed=5)
    done = compiled("kvquant:first=64,weigh=plain")
    cached = add_cache(done.program)
    verify(cached)
    assert len(list(cached.calls("llmc.rope"))) == 2  # the queries' alone
    for node in cached.calls("llmc.cached_attention"):
        assert len(node.args) == 9
    whole = runner_for(done.program).forward(ids)
    for target in ("reference", "cpu"):
        torch.testing.assert_close(decoded(done.program, ids, target), whole, rtol=0, atol=1e-5)


def test_left_padding_and_a_prompt() -> None:
    done = compiled("kvquant:first=64,weigh=plain")
    ids = tokens(2, 16, seed=8)
    valid = torch.ones_like(ids, dtype=torch.bool)
    valid[0, :5] = False
    runner = runner_for(done.program, cached=True)
    cache = runner.start(2, 4)
    got = [runner.forward(ids[:, :10], valid[:, :10], cache=cache)]
    got += [runner.forward(ids[:, t : t + 1], cache=cache) for t in range(10, 16)]
    want = runner_for(done.program).forward(ids[:1, 5:])[0]
    torch.testing.assert_close(torch.cat(got, 1)[0, 5:], want, rtol=0, atol=1e-5)


@pytest.mark.parametrize("passes", NAMES)
def test_half_precision_and_batch_rows(passes: str) -> None:
    done = compiled(passes)
    ids = tokens(3, 18, seed=4)
    both = decoded(done.program, ids)
    for row in range(3):
        off = (decoded(done.program, ids[row : row + 1])[0] - both[row]).abs()
        assert off.max() < slack(passes)
    half = decoded(done.program, ids, dtype=torch.bfloat16)
    assert (half.float() - both).abs().mean() < 0.1


def slack(passes: str) -> float:
    """How far a batch may be from its rows: rounding decides numbers that lie between two codes.

    With 20 tokens the ends of a key's range are numbers that come again and again, and a last bit
    says whether they are kept apart.
    """
    return 0.2 if "kvquant" in passes else 1e-4


def test_more_bits_lose_less() -> None:
    ids = tokens(4, 48, seed=6)
    whole = runner_for(build("with_rope")).forward(ids)

    def off(passes: str) -> float:
        return float((decoded(compiled(passes).program, ids) - whole).square().mean())

    kivi = [off(f"kivi:bits={b},group=4,residual=4") for b in (2, 4, 8)]
    assert kivi[0] > 4 * kivi[1] > 16 * kivi[2]
    quant = [off(f"kvquant:bits={b}") for b in (2, 3, 4)]
    assert quant[0] > quant[1] > quant[2]


@pytest.mark.parametrize(
    ("passes", "error", "message"),
    [
        ("kivi:bits=3", UsageError, "kivi:bits: expected 2, 4 or 8, found 3"),
        ("kivi:residual=100", UsageError, "whole groups of 32 tokens, found 100; residual=96"),
        ("kivi:group=3,residual=6", UsageError, r"divides 4 channels.*found 3 at block0/kv0; gr"),
        ("kvquant:bits=5", UsageError, "kvquant:bits"),
        ("kivi,kv8", UsageError, "expected one pass that writes caches"),
        ("kv8:codes=fp8", UsageError, "expected a knob of keys, found 'codes'"),
    ],
)
def test_knobs_that_make_no_sense(passes: str, error: type[Exception], message: str) -> None:
    with pytest.raises(error, match=message):
        make_plan(build("with_rope"), from_strings([passes]))


def test_places_that_are_refused_name_their_node() -> None:
    with pytest.raises(GateError, match=r"not causal.*node attention"):
        make_plan(build("sees_all"), from_strings(["kivi"]))
    with pytest.raises(GateError, match=r"brings positions into the keys.*node attention"):
        make_plan(build("scaled_after_rope"), from_strings(["kvquant"]))
    with pytest.raises(UsageError, match="'w4' before 'kivi'"):
        from_strings(["kivi", "w4"])


def test_rotations_that_may_not_move() -> None:
    program = build("with_rope")
    node = next(program.calls("llmc.attention"))
    found = rotation_of(node)
    assert isinstance(found, Rotation)
    assert found.keys is node.args[1].args[0]
    assert rotation_of(next(build("llama_gqa").calls("llmc.attention"))) is None
    # Angles that depend on what is masked are no function of the position alone.
    mask = next(n for n in program.inputs if n.name == "attention_mask")
    cos = node.args[1].args[1]
    length = program.emit("aten.sum.dim_IntList", mask, [1], before=cos, made_by="test")
    shaped = program.emit("aten.view.default", length, [-1, 1, 1, 1], before=cos, made_by="test")
    scaled = program.emit("aten.mul.Tensor", cos.args[0], shaped, before=cos, made_by="test")
    cos.args = (scaled,)
    assert "positions alone, found attention_mask" in str(rotation_of(node))


@pytest.mark.parametrize("passes", ["kvquant:bits=4", "kivi:bits=8,group=4,residual=4"])
def test_caches_come_behind_weights_and_before_exits(passes: str) -> None:
    ids = tokens(2, 24, seed=5)
    program = decoder(rope=1.0, blocks=3)
    done = compiled(f"early_exit:threshold=0.2,{passes},w4:group=8", program)
    applied = [c.name for _, c in done.plan.applied]
    assert applied == ["w4", passes.partition(":")[0], "early_exit"]
    runner = runner_for(done.program, cached=True)
    cache = runner.start(2, 8)
    used = set()
    for t in range(24):
        logits = runner.forward(ids[:, t : t + 1], cache=cache)
        assert torch.isfinite(logits).all()
        used |= {*runner.used}
    assert len(used) > 1
    alone = runner.start(1, 8)
    steps = [runner.forward(ids[:1, t : t + 1], cache=alone) for t in range(24)]
    assert (steps[-1][0] - logits[0]).abs().max() < 10 * slack(passes)


def test_a_recipe_may_leave_some_attentions_alone() -> None:
    recipe = from_mapping({
        "version": 1, "stages": [{"kivi": {"group": 4, "residual": 8}}],
        "overrides": [{"where": {"block": [0]}, "skip": ["kivi"]}],
    })  # fmt: skip
    done = compile_plan(make_plan(build("with_rope"), recipe), None)
    assert len(done.program.caches) == 1
    kinds = [s.kind for s in add_cache(done.program).states.values()]
    assert kinds == ["kv", "kivi"]
    assert torch.isfinite(decoded(done.program, tokens(2, 20))).all()


@pytest.mark.parametrize("passes", ["kivi:group=4,residual=8", "kvquant:bits=4"])
def test_evaluation_goes_through_the_cache(passes: str) -> None:
    done = compiled(passes)
    runner = runner_for(done.program, cached=True)
    step = Stepwise(runner, runner_for(done.program))
    stream = Stream(tokens(1, 96)[0], "made", "0" * 64)
    found = evaluate(step, stream, 32, batch=2)
    told = step.to_json(found)["cache"]
    assert told["bytes"] == step.cache.bytes
    # Two layers of two heads of four channels, keys and values in f32, with position and validity.
    rows = 1 if step.cache.batch == 1 else 2
    assert told["plain_bytes"] == rows * 32 * 2 * (2 * 2 * 4 * 4 + 8 + 1)
    whole = evaluate(runner_for(done.program), stream, 32)
    assert told["full_perplexity"] == pytest.approx(whole.perplexity, rel=1e-5)
    assert found.perplexity != whole.perplexity
    assert 0.5 < told["agreement"] <= 1
    assert "exits" not in step.to_json(found)


# ** what is measured **


def test_what_is_looked_at_is_what_the_attention_reads() -> None:
    program = build("with_rope")
    apply_segments(program)
    sites = cache_sites(program)
    ids = tokens(4, 8)
    given = model_inputs(ids)
    nodes = [n for n in program.graph.nodes if n.op != "output"]
    env = run_nodes(nodes, {n: given[n.name] for n in program.inputs}, program.fetch)
    env = {n.name: v for n, v in env.items()}
    for turned in (False, True):
        seen = list(look(program, sites, ids, Options(batch=3), turned=turned))
        assert [s.site for s in seen] == sites
        for one in seen:
            names = watched(program, one.site, turned)
            for got, name in zip((one.keys, one.values), names, strict=True):
                torch.testing.assert_close(got, env[name].transpose(1, 2).flatten(0, 1))


def test_fisher_weights_are_squared_gradients() -> None:
    program = build("with_rope")
    apply_segments(program)
    sites, ids = cache_sites(program), tokens(2, 6)
    found = fisher(program, sites, ids, Options(batch=2), turned=True)
    name = watched(program, sites[0], True)[0]
    node = program.node(name)
    delta = torch.zeros(2, 2, 6, 4, requires_grad=True)
    out = run(program, model_inputs(ids),
              implementations={name: lambda *a: row_of(node).reference(*a) + delta})  # fmt: skip
    next_token_loss(out, ids).backward()
    want = delta.grad.square().transpose(1, 2).flatten(0, 1)
    torch.testing.assert_close(found[name], want, rtol=1e-4, atol=1e-12)


def test_a_state_without_its_record_is_refused() -> None:
    cached = add_cache(compiled("kv8").program)
    cached.caches.clear()
    with pytest.raises(ModelError, match="expected state of kind 'kv', found 'int8'"):
        runner_for(cached).start(1)
