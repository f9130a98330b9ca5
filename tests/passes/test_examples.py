"""Generic over every pass: hits apply, misses refuse by name, exact ones keep the function."""

import json

import pytest
import torch

from llmc.compiler.ir.interpret import run
from llmc.compiler.ir.verifier import verify
from llmc.compiler.pipeline import recipe, zoo
from llmc.compiler.pipeline.analysis import Analysis
from llmc.compiler.pipeline.base import Exact, Lossy, Pass
from llmc.compiler.pipeline.compile import compile_plan
from llmc.compiler.pipeline.measure import model_inputs
from llmc.compiler.pipeline.order import LATE
from llmc.compiler.pipeline.plan import make_plan
from llmc.compiler.pipeline.registry import all_passes
from llmc.compiler.pipeline.structure import Structural

PASSES = all_passes()
HITS = [(n, e) for n, p in PASSES.items() for e in p.hits if n != "prune48"]
# A few random tokens prove no agreement that anybody would ask for.
KNOBS = {
    "early_exit": ":agreement=0.05,error=0.5",
    "lorc": ":rank=2,w3",
    "lowrank_residual": ":rank=2,w3",
    "window": ":size=4",
}
MISSES = [
    (next(iter(p.variants)), e) for p in sorted(set(PASSES.values()), key=str) for e in p.misses
]


def tokens(samples: int = 6, length: int = 16) -> torch.Tensor:
    g = torch.Generator().manual_seed(1)
    return torch.randint(0, 20, (samples, length), generator=g)


def logits(program, ids):
    return run(program, model_inputs(ids))


def build(name: str) -> Pass:
    return PASSES[name].build(name, {})


@pytest.mark.parametrize(("name", "example"), HITS, ids=lambda v: getattr(v, "model", v))
def test_hit(name, example):
    program = zoo.build(example.model)
    plan = make_plan(program, recipe.from_strings([name + KNOBS.get(name, "")]))
    before = logits(program, tokens(2))
    done = compile_plan(plan, tokens())
    after = logits(done.program, tokens(2))
    assert torch.isfinite(after).all()
    effect = PASSES[name].effect
    if issubclass(PASSES[name], Structural):
        check_structure(plan, done)
        assert not torch.equal(after, before) or PASSES[name].stage in LATE
    elif isinstance(effect, Exact):
        assert (after - before).abs().max() <= effect.rtol * before.abs().max()
        assert done.folds
    else:
        assert isinstance(effect, Lossy)
        assert not torch.equal(after, before)
        assert done.records or done.structure
        assert all(0 <= r["loss"] < 1 for r in done.records)


def check_structure(plan, done):
    """What was predicted holds: the same sizes, or at most the bound; and the result is whole."""
    verify(done.program)
    for planned, step, row in zip(plan.steps, done.plan.steps, done.structure, strict=True):
        if planned.choice.exact:
            assert planned.after == step.after
        assert all(step.after[k] <= planned.after[k] for k in step.after)
        assert row["records"]
        assert json.loads(json.dumps(row)) == row
    assert {s.name for s in done.program.segments} >= {"prologue", "block0", "epilogue"}


@pytest.mark.parametrize(("name", "example"), MISSES, ids=lambda v: getattr(v, "model", v))
def test_miss(name, example):
    _, refused = build(name).sites(Analysis(zoo.build(example.model)))
    assert example.predicate in {r.predicate for r in refused}
    assert all(r.reason and r.node for r in refused)
    culprits = {n.name for n in zoo.build(example.model).graph.nodes}
    assert {r.node for r in refused} <= culprits


@pytest.mark.parametrize("made", sorted(set(PASSES.values()), key=lambda p: p.__name__))
def test_declaration(made):
    assert len(made.law()) > 20
    assert made.source
    for knob in made.knobs().values():
        assert knob.help
        assert knob.help[0].islower()


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_smooth_is_exact_in_sixteen_bits(dtype):
    """Power-of-two scales: the stored model changes by nothing but exponents."""
    program = zoo.decoder(seed=3)
    for name in list(program.params):
        program.set_tensor(name, program.weights.load(name).to(dtype))
    before = logits(program, tokens(2))
    done = compile_plan(make_plan(program, recipe.from_strings(["smooth"])), tokens())
    after = logits(done.program, tokens(2))
    assert (after - before).abs().max() <= 1e-5 * before.abs().max()
    two_dim = [p for p in done.program.params.values() if len(p.shape) == 2]
    assert {p.dtype for p in two_dim} == {dtype}


def test_smooth_balances_at_half():
    """alpha 1/2 without rounding: max|x_j / s_j| equals max|W_:j s_j|."""
    program = zoo.decoder(seed=4)
    plan = make_plan(program, recipe.from_strings(["smooth:round=none"]))
    done = compile_plan(plan, tokens())
    site = next(m.site for m in plan.stages[0].migrations if m.site.kind == "product")
    seen = {}

    def observe(node, value):
        if node.name == site.value:
            seen["x"] = value.abs().flatten(0, 1).amax(0)

    run(done.program, model_inputs(tokens()), observe=observe)
    weights = [done.program.fetch(p).abs().amax(0) for _, p, _ in site.consumers]
    torch.testing.assert_close(seen["x"], torch.stack(weights).amax(0), rtol=1e-3, atol=1e-4)


def test_smooth_alpha_zero_gives_unit_columns():
    program = zoo.decoder(seed=5)
    plan = make_plan(program, recipe.from_strings(["smooth:alpha=0,round=none"]))
    done = compile_plan(plan, tokens())
    site = next(m.site for m in plan.stages[0].migrations if m.site.kind == "product")
    top = done.program.fetch(site.consumers[0][1]).abs().amax(0)
    torch.testing.assert_close(top, torch.ones_like(top), rtol=1e-4, atol=1e-4)
