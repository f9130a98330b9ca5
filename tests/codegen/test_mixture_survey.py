"""Launches of a decode step of real mixtures of experts, captured from random models."""

from __future__ import annotations

from typing import Any

import pytest
import torch

import llmc
from llmc.codegen.survey import survey
from llmc.codegen.targets import BANDWIDTH
from llmc.compiler.ir.graph import Program
from llmc.compiler.pipeline import recipe
from llmc.compiler.pipeline.plan import make_plan
from llmc.compiler.runtime.cache import add_cache
from llmc.compiler.runtime.lowering import runner_for

COMMON: dict[str, Any] = {
    "hidden_size": 256, "intermediate_size": 128, "num_attention_heads": 4,
    "num_key_value_heads": 2, "num_hidden_layers": 2, "vocab_size": 512,
    "max_position_embeddings": 64,
}  # fmt: skip
TOKENS: dict[str, Any] = {"pad_token_id": 0, "bos_token_id": 0, "eos_token_id": 0}
CHOSEN: dict[str, Any] = {
    "n_routed_experts": 8, "num_experts_per_tok": 2, "moe_intermediate_size": 128,
    "first_k_dense_replace": 0,
}  # fmt: skip
SIZES: dict[str, dict[str, Any]] = {
    "mixtral": {**COMMON, "num_local_experts": 8, "num_experts_per_tok": 2},
    "qwen3_moe": {
        **COMMON, "head_dim": 64, "num_experts": 8, "num_experts_per_tok": 2,
        "moe_intermediate_size": 128, "norm_topk_prob": True,
    },
    "olmoe": {**COMMON, **TOKENS, "num_experts": 8, "num_experts_per_tok": 2},
    "granitemoe": {**COMMON, "num_local_experts": 8, "num_experts_per_tok": 2},
    "qwen2_moe": {
        **COMMON, "num_experts": 8, "num_experts_per_tok": 2, "moe_intermediate_size": 128,
        "shared_expert_intermediate_size": 512,
    },
    "granitemoeshared": {
        **COMMON, "num_local_experts": 8, "num_experts_per_tok": 2, "shared_intermediate_size": 256,
    },
    "hunyuan_v1_moe": {
        **COMMON, "head_dim": 64, "num_experts": 8, "moe_topk": 2, "num_shared_expert": 1,
    },
    "glm4_moe": {**COMMON, **CHOSEN, "head_dim": 64, "n_group": 1, "topk_group": 1},
    "dots1": {
        **COMMON, **CHOSEN, "head_dim": 64, "n_group": 1, "topk_group": 1, "n_shared_experts": 1,
        "routed_scaling_factor": 2.5,
    },
    "ernie4_5_moe": {
        **COMMON, "head_dim": 64, "moe_num_experts": 8, "moe_k": 2, "moe_intermediate_size": 128,
        "moe_num_shared_experts": 1, "moe_layer_start_index": 0,
    },
    "deepseek_v3": {
        **COMMON, **CHOSEN, "num_key_value_heads": 4, "n_group": 2, "topk_group": 1,
        "q_lora_rank": 64, "kv_lora_rank": 64, "qk_rope_head_dim": 32, "qk_nope_head_dim": 32,
        "v_head_dim": 64,
    },
}  # fmt: skip


def model(name: str) -> Any:
    """A random model; what a new one has at zero, or too small to choose by, is not."""
    from transformers import AutoConfig, AutoModelForCausalLM

    torch.manual_seed(0)
    made = AutoModelForCausalLM.from_config(AutoConfig.for_model(name, **SIZES[name])).eval()
    for at, tensor in [*made.named_buffers(), *made.named_parameters()]:
        if "correction" in at:
            tensor.data.uniform_(-0.5, 0.5)
        if at.endswith("mlp.gate.weight"):
            tensor.data.normal_()
    return made


def captured(name: str) -> Program:
    return llmc.capture(model(name))


def surveyed(name: str, target: str = "triton", tokens: int = 1) -> dict[str, Any]:
    plan = make_plan(captured(name), recipe.from_strings(["w4:group=128"]))
    return survey(add_cache(plan.program), target, tokens, "fp16", BANDWIDTH)


@pytest.mark.parametrize(
    ("name", "route"),
    [
        ("mixtral", "softmax sum"),
        pytest.param("qwen3_moe", "softmax sum", marks=pytest.mark.slow),
        pytest.param("olmoe", "softmax", marks=pytest.mark.slow),
    ],
)
def test_a_block_starts_six_kernels(name: str, route: str) -> None:
    """q, k and v behind the norm; turn and write; attend; out and sum; router, gate and up behind
    the norm; down, weighed, and sum."""
    page = surveyed(name)
    assert page["launches_per_block"] == 6
    for block in ("block0", "block1"):
        kinds = [c.split("_default")[0] for c in page["blocks"][block]["calls"]]
        assert kinds == ["fused", "cached_attention", "fused", "fused"]
    assert page["not_fused"] == []
    layers = [r for r in page["fused"] if r["problem"]["routed"]]
    assert [r["launches"] for r in layers] == [2, 2]
    assert all(r["path"].endswith("mlp.experts") for r in layers)
    for r in layers:
        up, down = r["problem"], r["down"]
        assert (up["route"], up["norm"], up["experts"], up["chosen"]) == (route, True, 8, 2)
        assert (down["routed"], down["residual"], down["N"]) == ("down", True, 8 * 256)
        # Of the codes a quarter: two of eight experts are read.
        codes = 3 * 8 * 128 * 256 // 2
        assert codes // 4 < r["bytes"] < codes // 2 < r["stored_bytes"]


@pytest.mark.parametrize(
    ("name", "route"),
    [
        ("glm4_moe", "sigmoid added sum+1e-20"),
        ("ernie4_5_moe", "softmax added sum>1e-12"),
        pytest.param("dots1", "sigmoid added times=2.5", marks=pytest.mark.slow),
        pytest.param(
            "deepseek_v3", "sigmoid added groups=2:1:two sum+1e-20 times=2.5",
            marks=pytest.mark.slow,
        ),
    ],
)  # fmt: skip
def test_other_routers_are_part_of_the_first_launch(name: str, route: str) -> None:
    """Sigmoids, corrections and groups of experts: the kernel chooses, behind its norm; nothing of
    the choice is left in the graph."""
    page = surveyed(name)
    layers = [r for r in page["fused"] if r["problem"]["routed"]]
    assert {(r["problem"]["route"], r["problem"]["norm"]) for r in layers} == {(route, True)}
    assert {r["launches"] for r in layers} == {2}
    assert [r for r in page["not_fused"] if r["predicate"] == "route"] == []
    calls = {c.split("_")[0] for b in page["blocks"].values() for c in b["calls"]}
    assert not calls & {"linear", "topk", "gather", "sigmoid", "softmax", "div", "scatter"}


@pytest.mark.parametrize(
    ("name", "always", "gated"),
    [
        ("qwen2_moe", 4, True),
        ("granitemoeshared", 2, False),
        ("ernie4_5_moe", 1, False),
        pytest.param("hunyuan_v1_moe", 1, False, marks=pytest.mark.slow),
        pytest.param("dots1", 1, False, marks=pytest.mark.slow),
    ],
)
def test_an_expert_of_all_tokens_starts_no_kernels(name: str, always: int, gated: bool) -> None:
    """It is more experts of the same two launches, so a block starts six; its weight, where it has
    one, is one more product with the router."""
    page = surveyed(name)
    assert page["launches_per_block"] == 6
    assert page["not_fused"] == []
    layers = [r for r in page["fused"] if r["problem"]["routed"]]
    assert {r["launches"] for r in layers} == {2}
    for r in layers:
        up, down = r["problem"], r["down"]
        found = (up["always"], down["always"], up["experts"], up["chosen"])
        assert found == (always, always, 8 + always, 2 + always)
        assert up["route"].endswith(" gated") == gated


@pytest.mark.parametrize(
    "name", ["glm4_moe", "ernie4_5_moe", pytest.param("deepseek_v3", marks=pytest.mark.slow)]
)
def test_a_prompt_and_cached_steps_equal_the_model(name: str) -> None:
    """What such a router is in the graph, before any of it is fused, against the model itself."""
    whole = model(name)
    tokens = torch.randint(0, 512, (2, 8), generator=torch.Generator().manual_seed(0))
    with torch.no_grad():
        want = whole(tokens).logits
    runner = runner_for(llmc.capture(whole), cached=True)
    cache = runner.start(2, 16)
    steps = [tokens[:, :5], *(tokens[:, i : i + 1] for i in range(5, 8))]
    got = torch.cat([runner.forward(s, cache=cache) for s in steps], 1)
    torch.testing.assert_close(got, want, rtol=0, atol=4e-6 * float(want.abs().max()))
