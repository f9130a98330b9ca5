"""Layers of experts on the triton target: alone, and in decoders that keep a cache.

Triton reads TRITON_INTERPRET at import, so one child process runs them all (this file as a script)
and the tests judge its answers.
"""

from __future__ import annotations

import json
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from interpreter import interpreted

# Of a layer alone: how it is stored, routed and computed.
LAYERS: dict[str, tuple[str, str, dict[str, Any]]] = {
    "int4": ("float32", "softmax sum", {}),
    "int8": ("float16", "chosen", {"bits": 8, "group": 0}),
    "groups": ("float32", "sigmoid added groups=2:1:two sum+1e-20 times=2.5", {}),
    "told": ("float16", "tanh", {"dense": True}),
}
# Of a whole decoder: passes and dtype.
DECODERS = {
    "zoo": ("w4:group=32", "float16"),
    "mixtral": ("w4:group=32", "float32"),
    "qwen2_moe": ("w4:group=32", "float16"),
    "qwen3_moe": ("w8:group=row", "float16"),
    "glm4_moe": ("w4:group=32", "float32"),
    "ernie4_5_moe": ("w4:group=32", "float32"),
    "granitemoeshared": ("w4:group=32", "float32"),
    "hunyuan_v1_moe": ("w4:group=32", "float32"),
    "deepseek_v3": ("w4:group=32", "float16"),
}
# Experts that all tokens go to, where there are some.
ALWAYS = {"qwen2_moe": 2, "glm4_moe": 1, "ernie4_5_moe": 1, "deepseek_v3": 1,
          "granitemoeshared": 2, "hunyuan_v1_moe": 1}  # fmt: skip
FAST = ("qwen2_moe", "glm4_moe")


@pytest.fixture(scope="module")
def cache(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("kernel_cache")


@pytest.fixture(scope="module")
def answers(cache: Path) -> dict[str, Any]:
    """What a child process found of the layers and of two decoders."""
    found: dict[str, Any] = interpreted(__file__, cache, *LAYERS, *FAST)
    return found


@pytest.mark.parametrize("name", LAYERS)
def test_a_layer_computes_what_its_reference_does(name: str, answers: dict[str, Any]) -> None:
    """No further from the reference in fp32 than the reference in its own dtype is, or twice; the
    same for tokens by themselves and together, and as a registered op."""
    found = answers[name]
    assert found["mixtures"] == 1
    assert found["refused"] == (["route", "around"] if name == "told" else [])
    for error in found["errors"]:
        assert error < 2 * found["noise"] + 2e-6 < 0.01
    assert found["same as op"]
    assert found["op is one call"]


@pytest.mark.parametrize("name", FAST)
def test_a_decoder_computes_what_its_reference_does(name: str, answers: dict[str, Any]) -> None:
    """A prompt, then token by token through a cache. glm4_moe adds to its scores for the choice,
    multiplies weights by a factor and has an expert for all tokens; qwen2_moe weighs one that is
    twice as wide as the others by a sigmoid."""
    check(name, answers[name])


@pytest.mark.slow
@pytest.mark.parametrize("name", sorted(set(DECODERS) - set(FAST)))
def test_other_decoders_compute_what_their_references_do(name: str, cache: Path) -> None:
    check(name, interpreted(__file__, cache, name)[name])


def check(name: str, found: dict[str, Any]) -> None:
    assert found["mixtures"] == 2
    assert all(len(names) == 2 for names in found["kernels"])
    assert found["route"] == [True, True]
    assert found["always"] == [ALWAYS.get(name, 0)] * 2
    assert found["error"] < 2 * found["noise"] + 2e-6 < 0.02
    assert found["left"] == [], "canonical codes that nothing reads"
    assert found["after"] == found["held"]


# ** the child process **


def _layer(name: str) -> dict[str, Any]:
    from lowering_programs import hidden
    from mixture_programs import HIDDEN, layer

    from llmc.codegen.modules import as_module
    from llmc.codegen.targets import lower
    from llmc.compiler.ir.interpret import run

    word, kind, scheme = LAYERS[name]
    dtype = getattr(torch, word)
    wide, program = (layer(d, kind=kind, **scheme) for d in (torch.float32, dtype))
    made = lower(program, "triton")
    module = as_module(made)
    x = hidden(dtype, HIDDEN)
    want = run(wide, {"h": x.float()})
    scale = (want - x.float()).norm()
    errors, same = [], True
    for given, wanted in ((x, want), (x[:1, 1:2], want[:1, 1:2])):
        got = run(made.program, {"h": given}, implementations=made.implementations)
        errors.append(float((got.float() - wanted).norm() / scale))
        same = same and torch.equal(module(given), got)
    noise = float((run(program, {"h": x}).float() - want).norm() / scale)
    ops = [n for n in module.graph.nodes if n.target is torch.ops.llmc.placed_mixture.default]
    return {
        "mixtures": len(made.mixtures), "refused": [r.predicate for r in made.refused],
        "errors": errors, "noise": noise, "same as op": same, "op is one call": len(ops) == 1,
    }  # fmt: skip


def _program(name: str) -> Any:
    import llmc
    from llmc.compiler.pipeline import zoo

    if name == "zoo":
        return zoo.decoder(hidden=64, inner=64, heads=4, kv=2, size=16, rope=1.0, mlp="moe")
    from transformers import AutoConfig, AutoModelForCausalLM

    sizes = {
        "hidden_size": 64, "intermediate_size": 64, "num_attention_heads": 4,
        "num_key_value_heads": 2, "num_hidden_layers": 2, "vocab_size": 64,
        "max_position_embeddings": 64, "head_dim": 16, "num_experts_per_tok": 2,
    }  # fmt: skip
    glm = {
        "n_routed_experts": 8, "n_shared_experts": 1, "moe_intermediate_size": 64,
        "first_k_dense_replace": 0, "routed_scaling_factor": 1.5,
    }  # fmt: skip
    more = {
        "mixtral": {"num_local_experts": 4},
        "granitemoeshared": {"num_local_experts": 4, "shared_intermediate_size": 128},
        "hunyuan_v1_moe": {"num_experts": 4, "moe_topk": 2, "num_shared_expert": 1},
        "qwen3_moe": {"num_experts": 4, "moe_intermediate_size": 64, "norm_topk_prob": True},
        "glm4_moe": glm | {"n_group": 1, "topk_group": 1},
        "deepseek_v3": glm | {
            "n_group": 4, "topk_group": 2, "q_lora_rank": 32, "kv_lora_rank": 32,
            "qk_nope_head_dim": 16, "qk_rope_head_dim": 16, "v_head_dim": 16,
            "num_key_value_heads": 4,
        },
        "qwen2_moe": {
            "num_experts": 4, "moe_intermediate_size": 64, "norm_topk_prob": False,
            "shared_expert_intermediate_size": 128,
        },
        "ernie4_5_moe": {
            "moe_num_experts": 4, "moe_k": 2, "moe_intermediate_size": 64,
            "moe_num_shared_experts": 1, "moe_layer_start_index": 0,
        },
    }  # fmt: skip
    torch.manual_seed(0)
    config = AutoConfig.for_model(name, **sizes | more[name])
    model = AutoModelForCausalLM.from_config(config).eval()
    for at, tensor in [*model.named_buffers(), *model.named_parameters()]:
        if "correction" in at:  # which a new model has at zero
            tensor.data.uniform_(-0.5, 0.5)
        if at.endswith("mlp.gate.weight"):
            tensor.data.normal_()
    return llmc.capture(model)


def _decoder(name: str) -> dict[str, Any]:
    from llmc.codegen.targets import lower
    from llmc.compiler.pipeline import recipe
    from llmc.compiler.pipeline.compile import compile_plan
    from llmc.compiler.pipeline.plan import make_plan
    from llmc.compiler.runtime.cache import add_cache
    from llmc.compiler.runtime.lowering import recast, runner_for, runner_of

    text, word = DECODERS[name]
    tokens = torch.randint(0, 20, (4, 8), generator=torch.Generator().manual_seed(0))
    wide = compile_plan(make_plan(_program(name), recipe.from_strings([text])), tokens).program
    dtype = getattr(torch, word)
    program = recast(wide, dtype) if dtype != wide.dtype else wide
    made = lower(add_cache(program), "triton")
    outs = []
    runners = [runner_for(p, cached=True) for p in (wide, program)]
    for runner in (*runners, runner_of(made, device="cpu")):
        cache = runner.start(1, 16)
        steps = [tokens[:1, :3], *(tokens[:1, i : i + 1] for i in range(3, 5))]
        outs.append(torch.cat([runner.forward(s, cache=cache) for s in steps], 1).double())
    noise, error = (float((o - outs[0]).norm() / outs[0].norm()) for o in outs[1:])
    return {
        "error": error, "noise": noise, "mixtures": len(made.mixtures),
        "kernels": [m.kernels for m in made.mixtures],
        "always": [m.fused.up.always for m in made.mixtures],
        "route": [bool(m.fused.up.route) for m in made.mixtures],
        "after": made.program.weight_bytes(),
        "held": sum(p.bytes for p in made.program.params.values()),
        "left": [n for n in made.program.params if n.endswith(".codes") and "packed" not in n],
    }  # fmt: skip


if __name__ == "__main__":
    for at in (Path(__file__).parent, Path(__file__).parents[1]):
        sys.path.insert(0, str(at))
    names = sys.argv[1:]
    print(json.dumps({n: _layer(n) if n in LAYERS else _decoder(n) for n in names}))
