"""Launches of a decode step of real architectures, captured from random models."""

from __future__ import annotations

from typing import Any

import pytest
import torch

import llmc
from llmc.codegen.survey import ATTENTION, survey
from llmc.codegen.targets import BANDWIDTH
from llmc.compiler.pipeline import recipe
from llmc.compiler.pipeline.plan import make_plan
from llmc.compiler.runtime.cache import add_cache

GROUPED: dict[str, Any] = {
    "hidden_size": 256, "intermediate_size": 512, "num_attention_heads": 4,
    "num_key_value_heads": 2, "num_hidden_layers": 2, "vocab_size": 512,
    "max_position_embeddings": 64,
}  # fmt: skip
SIZES: dict[str, dict[str, Any]] = {
    "qwen3": {**GROUPED, "head_dim": 64},
    "olmo2": {**GROUPED, "pad_token_id": 0, "bos_token_id": 0, "eos_token_id": 0},
    "opt": {
        "hidden_size": 256, "ffn_dim": 512, "num_attention_heads": 4, "num_hidden_layers": 2,
        "vocab_size": 512, "max_position_embeddings": 64, "word_embed_proj_dim": 256,
    },
    "gptj": {
        "n_embd": 256, "n_layer": 2, "n_head": 4, "vocab_size": 512, "n_positions": 64,
        "rotary_dim": 32, "bos_token_id": 0, "eos_token_id": 0,
    },
    "gemma3_text": {**GROUPED, "head_dim": 64},
    "gemma2": {**GROUPED, "head_dim": 64},
    "glm4": {**GROUPED, "head_dim": 64, "pad_token_id": 0},
    "bloom": {"hidden_size": 256, "n_layer": 2, "n_head": 4, "vocab_size": 512},
    "hunyuan_v1_dense": {**GROUPED, "head_dim": 64, "pad_token_id": 0},
    "arcee": {**GROUPED, "head_dim": 64, "bos_token_id": 0, "eos_token_id": 0},
    "nemotron": {**GROUPED, "bos_token_id": 0, "eos_token_id": 0},
}  # fmt: skip
# What a norm of queries and keys goes over.
NORMS = {
    "qwen3": "head", "olmo2": "row", "gemma3_text": "head", "hunyuan_v1_dense": "behind",
}  # fmt: skip
# Whose blocks norm what attention and MLP give, before it is added.
BEHIND = ("olmo2", "gemma2", "gemma3_text", "glm4")


def surveyed(name: str, sizes: dict[str, Any] | None = None) -> dict[str, Any]:
    from transformers import AutoConfig, AutoModelForCausalLM

    torch.manual_seed(0)
    config = AutoConfig.for_model(name, **(sizes or SIZES[name]))
    model = AutoModelForCausalLM.from_config(config).eval()
    plan = make_plan(llmc.capture(model), recipe.from_strings(["w4:group=128"]))
    return survey(add_cache(plan.program), "triton", 1, "fp16", BANDWIDTH)


@pytest.mark.parametrize(
    "name",
    [*("qwen3", "olmo2", "gemma2", "arcee"), *(pytest.param(n, marks=pytest.mark.slow)
                                      for n in ("opt", "gptj", "gemma3_text", "glm4",
                                                "hunyuan_v1_dense", "bloom", "nemotron"))],
)  # fmt: skip
def test_a_block_starts_six_kernels(name: str) -> None:
    """Norms, scales and rotations of queries and keys are in the two launches of attention; norms
    of what attention and MLP give are in the kernels of their last linears."""
    page = surveyed(name)
    assert ATTENTION == 2
    for block in ("block0", "block1"):
        calls = page["blocks"][block]["calls"]
        at = next(i for i, c in enumerate(calls) if "cached_attention" in c)
        assert len([c for c in calls[:at] if "fused" in c]) == 1
        assert not [c for c in calls[:at] if "norm" in c and block != "block0"]
    problems = [a["problem"] for a in page["attention"]]
    assert [p["norm"] for p in problems] == [NORMS.get(name, "")] * 2
    assert page["not_fused"] == []
    ends = [p for p in (f["problem"] for f in page["fused"]) if p["residual"]]
    assert [p["out_norm"] for p in ends] == [name in BEHIND] * 4
    assert page["launches_per_block"] == 6


@pytest.mark.slow
def test_latent_attention_starts_six_kernels() -> None:
    """Four products whose norms are their own, and two launches that rotate, keep and attend."""
    sizes = {
        **GROUPED, "num_key_value_heads": 4, "q_lora_rank": 64, "kv_lora_rank": 64,
        "qk_nope_head_dim": 32, "qk_rope_head_dim": 32, "v_head_dim": 64,
        "first_k_dense_replace": 2, "n_routed_experts": 4, "num_experts_per_tok": 2,
    }  # fmt: skip
    page = surveyed("deepseek_v3", sizes)
    calls = page["blocks"]["block1"]["calls"]
    assert [c.split("_")[0] for c in calls] == [*["fused"] * 3, "cached", *["fused"] * 3]
    assert page["not_fused"] == []
    assert all(a["problem"]["last"] for a in page["attention"])
    assert page["launches_per_block"] == 8
