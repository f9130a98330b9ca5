"""Factored weights of captured architectures: fused, biased, transposed, routed; run and cached."""

from __future__ import annotations

import sys
from pathlib import Path

import pytest
import torch

from llmc.compiler.analysis.linears import LinearSite
from llmc.compiler.capture import capture
from llmc.compiler.ir.interpret import run
from llmc.compiler.pipeline import recipe
from llmc.compiler.pipeline.analysis import Analysis
from llmc.compiler.pipeline.compile import compile_plan
from llmc.compiler.pipeline.plan import make_plan
from llmc.compiler.runtime.cache import add_cache
from llmc.compiler.runtime.executor import Runner

sys.path.insert(0, str(Path(__file__).parents[1]))

from tiny_models import make, random_tokens


def compiled(program, passes):
    ids = random_tokens(6, 12, seed=0)["input_ids"]
    return compile_plan(make_plan(program, recipe.from_strings([passes])), ids)


@pytest.mark.parametrize(
    ("name", "knobs", "latents"),
    [
        ("llama", "share=true", 4),
        ("gpt2", "update=closed", 4),
        ("phi3", "alloc=global,samples=2", 4),
        ("opt", "sequential=true,update=closed", 6),
        pytest.param("gpt_neox", "share=true", 4, marks=pytest.mark.slow),
        pytest.param("falcon", "share=true", 3, marks=pytest.mark.slow),
        ("mixtral", "", 4),
        pytest.param("gemma2", "multiple=4", 7, marks=pytest.mark.slow),
    ],
)
def test_the_eager_model_with_the_products_gives_the_factored_logits(name, knobs, latents):
    """Weights of the dense program replaced by A·B are the oracle; eager equals that program."""
    program = capture(make(name))
    done = compiled(program, f"svdllm:{knobs}" if knobs else "svdllm")
    whole, ranks = done.plan.captured.clone(), done.structure[0]["choice"]["ranks"]
    found = set()
    for site in (s for s in Analysis(whole).linears if isinstance(s, LinearSite)):
        if site.id in ranks:
            node = done.program.node(site.node)
            latent = node.args[0]
            left, right = (done.program.fetch(n.target) for n in (node.args[1], latent.args[1]))
            assert left.shape[1] == right.shape[0] == ranks[site.id]
            whole.set_tensor(site.param, left @ right)
            found.add(latent.name)
    if "global" not in knobs:
        assert len(found) == 2 * latents
    inputs = random_tokens(2, 9, seed=7)
    want, made = run(whole, inputs), run(done.program, inputs)
    torch.testing.assert_close(made, want, rtol=1e-4, atol=1e-5)
    assert done.program.weight_bytes() <= done.plan.captured.weight_bytes() * 0.99
    predicates = {r.predicate for r in done.plan.refusals}
    assert ("not_experts" in predicates) == (name == "mixtral")
    assert ("not_router" in predicates) == (name == "mixtral")


@pytest.mark.parametrize(
    ("name", "passes"),
    [("llama", "svdllm:share=true,smooth,w4"), ("gpt2", "asvd,prune24:solver=wanda")],
)
def test_factors_are_smoothed_pruned_coded_and_decoded_step_by_step(name, passes):
    done = compiled(capture(make(name)), passes)
    ids = random_tokens(2, 8, seed=7)
    want = run(done.program, ids)
    runner = Runner(add_cache(done.program))
    cache = runner.start(2, 8)
    steps = [
        runner.forward(ids["input_ids"][:, i : i + 1], cache=cache)[:, -1] for i in range(8)
    ]  # fmt: skip
    torch.testing.assert_close(torch.stack(steps, 1), want, rtol=1e-3, atol=1e-4)


def test_ranks_and_rows_do_not_depend_on_names():
    """The same weights in a folder of other names: nothing is decided by a path."""
    program = capture(make("llama"))
    renamed = program.clone()
    for key, param in list(renamed.params.items()):
        renamed.params[key] = type(param)(
            param.name, param.shape, param.dtype, (f"x.{key}",), param.trained, param.keep
        )  # fmt: skip
    one, other = (compiled(p, "svdllm:alloc=global,samples=2") for p in (program, renamed))
    assert one.structure[0]["choice"] == other.structure[0]["choice"]
