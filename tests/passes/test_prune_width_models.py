"""prune_width on captured architectures: every method, masked Hugging Face models, written back."""

from __future__ import annotations

import sys
from pathlib import Path

import pytest
import torch

from llmc.compiler.capture import capture
from llmc.compiler.ir.interpret import run
from llmc.compiler.pipeline import recipe
from llmc.compiler.pipeline.compile import compile_plan
from llmc.compiler.pipeline.measure import gives_logits
from llmc.compiler.pipeline.plan import make_plan
from llmc.compiler.runtime.export import export

sys.path.insert(0, str(Path(__file__).parents[1]))

from tiny_models import capture_tiny, config_of, make, random_tokens


def pruned(program, knobs):
    ids = random_tokens(4, 12, seed=0)["input_ids"]
    return compile_plan(make_plan(program, recipe.from_strings([f"prune_width:{knobs}"])), ids)


def kept(done):
    return done.structure[0]["choice"]["keep"]


def test_a_masked_llama_of_transformers_gives_the_sliced_logits():
    """The oracle is the eager model with the columns of the cut units set to zero."""
    model = make("llama")
    done = pruned(capture(model), "neurons=40,heads=1,units=neuron+head,method=wanda")
    keep = kept(done)
    size, width = model.config.head_dim, model.config.intermediate_size
    shared = model.config.num_attention_heads // model.config.num_key_value_heads
    with torch.no_grad():
        for i, layer in enumerate(model.model.layers):
            gone = [j for j in range(width) if j not in keep[f"block{i}/neuron0"]]
            layer.mlp.down_proj.weight[:, gone] = 0
            for h in range(model.config.num_key_value_heads):
                if h not in keep[f"block{i}/kv_group0"]:
                    columns = slice(h * shared * size, (h + 1) * shared * size)
                    layer.self_attn.o_proj.weight[:, columns] = 0
        inputs = random_tokens(2, 9, seed=7)
        want = model(input_ids=inputs["input_ids"]).logits
        found = run(done.program, inputs)
    assert float((found - want).abs().max()) <= 1e-5 * float(want.abs().max())


@pytest.mark.parametrize(
    ("name", "knobs"),
    [
        ("llama", "remove=0.2,method=flap"),
        ("phi3", "remove=0.15,method=obs"),
        ("qwen2", "remove=0.2,method=taylor,ranking=global,uniform=true"),
        ("mixtral", "experts=3,heads=1,method=flap,compensate=none"),
    ],
)
def test_uniform_results_load_into_transformers(name, knobs, tmp_path):
    """New biases of FLAP too, where the architecture's config has a place for them."""
    from transformers import AutoModelForCausalLM

    done = pruned(capture_tiny(name), knobs)
    export(done.program, tmp_path / "hf")
    model = AutoModelForCausalLM.from_pretrained(str(tmp_path / "hf")).eval()
    inputs = random_tokens(2, 9, seed=7)
    with torch.no_grad():
        found = run(done.program, inputs)
        want = model(input_ids=inputs["input_ids"]).logits
    assert float((found - want).abs().max()) <= 1e-5 * float(want.abs().max())


@pytest.mark.parametrize("name", ["gpt2", "deepseek_v3"])
@pytest.mark.parametrize("method", ["flap", "taylor", "michel"])
def test_other_shapes_of_blocks_prune_too(name, method):
    """Fused projections stored turned; a dense block beside blocks of routed and shared experts."""
    done = pruned(capture_tiny(name), f"remove=0.15,method={method}")
    with torch.no_grad():
        assert torch.isfinite(run(done.program, random_tokens(2, 9, seed=7))).all()
    before, after = (done.structure[0][k]["parameters"] for k in ("before", "after"))
    assert after < before


def classifier():
    """Its pooler is a group of neurons outside the blocks."""
    from transformers import BertForSequenceClassification

    torch.manual_seed(0)
    return capture(BertForSequenceClassification(config_of("bert")).eval())


@pytest.mark.parametrize(
    "how", ["ranking=local", "uniform=false", "ranking=global,uniform=true", "uniform=true"]
)
def test_a_share_of_the_blocks_leaves_the_classifier_alone(how):
    """The pooler's width costs the blocks nothing, so no ranking may take it instead of them."""
    program = classifier()
    knobs = f"remove=0.25,method=magnitude,{how}"
    plan = make_plan(program, recipe.from_strings([f"prune_width:{knobs}"]))
    told = [r for r in plan.refusals if r.predicate == "outside_blocks"]
    assert len(told) == 1
    assert "epilogue/neuron0" in told[0].reason
    done = compile_plan(plan, None)
    assert {name.split("/")[0] for name in kept(done)} == {"block0", "block1"}


def test_a_number_of_parameters_reaches_the_classifier():
    program = classifier()
    total = sum(torch.Size(p.shape).numel() for p in program.params.values() if p.trained)
    for how in ("local", "global"):
        knobs = f"params={total * 4 // 5},method=magnitude,uniform=true,ranking={how}"
        plan = make_plan(program, recipe.from_strings([f"prune_width:{knobs}"]))
        assert "epilogue/neuron0" in kept(compile_plan(plan, None))


def test_a_model_without_logits_prunes_and_tells_no_loss():
    """The encoder of T5 gives hidden states, which are no scores of tokens however wide."""
    program = capture_tiny("t5")
    done = pruned(program, "remove=0.2,method=wanda")
    found = done.structure[0]["records"]
    assert found
    assert all("kind" in row for row in found)
    assert not gives_logits(program, 5)
    assert gives_logits(capture_tiny("llama"), 95)
    assert not gives_logits(capture_tiny("llama"), 96)
