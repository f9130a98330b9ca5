"""Tiny random models of many architectures, saved to folders and captured once each."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

BASE = {
    "vocab_size": 96,
    "hidden_size": 32,
    "num_hidden_layers": 2,
    "intermediate_size": 48,
    "num_attention_heads": 4,
    "max_position_embeddings": 64,
}
GROUPED = {**BASE, "num_key_value_heads": 2}
ZOO: dict[str, dict[str, Any]] = {
    "llama": {**GROUPED, "tie_word_embeddings": True},
    "qwen2": GROUPED,
    "qwen3": {**GROUPED, "head_dim": 8},
    "qwen3_moe": {
        **GROUPED, "head_dim": 8, "num_experts": 4, "num_experts_per_tok": 2,
        "moe_intermediate_size": 24, "decoder_sparse_step": 1,
    },
    "mistral": {**GROUPED, "sliding_window": 5},
    "mixtral": {
        **GROUPED, "num_local_experts": 4, "num_experts_per_tok": 2, "sliding_window": None,
    },
    "gemma2": {**GROUPED, "head_dim": 8, "sliding_window": 5, "query_pre_attn_scalar": 8},
    "gemma3_text": {
        **GROUPED, "head_dim": 8, "sliding_window": 5, "query_pre_attn_scalar": 8,
        "layer_types": ["sliding_attention", "full_attention"],
    },
    "phi3": {**GROUPED, "pad_token_id": 0},
    "gpt2": {"vocab_size": 96, "n_embd": 32, "n_layer": 2, "n_head": 4, "n_positions": 64},
    "gpt_neox": BASE,
    "olmo2": GROUPED,
    "opt": {
        "vocab_size": 96, "hidden_size": 32, "num_hidden_layers": 2, "ffn_dim": 48,
        "num_attention_heads": 4, "max_position_embeddings": 64, "word_embed_proj_dim": 32,
    },
    "falcon": {
        "vocab_size": 96, "hidden_size": 32, "num_hidden_layers": 2, "num_attention_heads": 4,
        "new_decoder_architecture": False, "multi_query": True, "alibi": False,
        "parallel_attn": True, "max_position_embeddings": 64,
    },
    "bert": BASE,
}  # fmt: skip
# Captured and equal to eager too, though some keep their attention or rope written out.
MORE: dict[str, dict[str, Any]] = {
    "bloom": {"vocab_size": 96, "hidden_size": 32, "n_layer": 2, "n_head": 4},
    "deepseek_v3": {
        **BASE, "num_key_value_heads": 4, "q_lora_rank": 16, "kv_lora_rank": 16,
        "qk_rope_head_dim": 8, "qk_nope_head_dim": 8, "v_head_dim": 8, "n_routed_experts": 4,
        "num_experts_per_tok": 2, "moe_intermediate_size": 16, "n_group": 1, "topk_group": 1,
        "first_k_dense_replace": 1, "n_shared_experts": 1,
    },
    "cohere": GROUPED,
    "starcoder2": GROUPED,
    "stablelm": GROUPED,
    "gemma": {**GROUPED, "head_dim": 8},
    "gptj": {
        "vocab_size": 96, "n_embd": 32, "n_layer": 2, "n_head": 4, "n_positions": 64,
        "rotary_dim": 8,
    },
    "gpt_neo": {
        "vocab_size": 96, "hidden_size": 32, "num_layers": 2, "num_heads": 4, "window_size": 5,
        "max_position_embeddings": 64, "attention_types": [[["global", "local"], 1]],
    },
    "qwen2_moe": {
        **GROUPED, "num_experts": 4, "num_experts_per_tok": 2, "moe_intermediate_size": 16,
        "shared_expert_intermediate_size": 16,
    },
    "olmoe": {**GROUPED, "num_experts": 4, "num_experts_per_tok": 2},
    "roberta": {**BASE, "pad_token_id": 0},
}  # fmt: skip
ENCODERS = ("bert", "roberta")


def pytest_generate_tests(metafunc: pytest.Metafunc) -> None:
    """``arch`` runs over the supported architectures, ``more`` over further ones."""
    if "arch" in metafunc.fixturenames:
        metafunc.parametrize("arch", list(ZOO))
    if "more" in metafunc.fixturenames:
        metafunc.parametrize("more", list(MORE))


def config_of(name: str, **over: Any) -> Any:
    """The tiny config of an architecture."""
    from transformers import AutoConfig

    return AutoConfig.for_model(name, **{**(ZOO | MORE)[name], **over})


def make(name: str, **over: Any) -> Any:
    """A tiny random model, in evaluation mode, with eager attention."""
    from transformers import AutoModelForCausalLM, AutoModelForMaskedLM

    torch.manual_seed(0)
    auto = AutoModelForMaskedLM if name in ENCODERS else AutoModelForCausalLM
    model = auto.from_config(config_of(name, **over), attn_implementation="eager").eval()
    with torch.no_grad():
        for p in model.parameters():
            # Gains and biases off their trivial start, so that a lost one shows.
            if p.ndim == 1:
                p.add_(0.1 * torch.randn_like(p))
            elif p.ndim >= 2:
                p.mul_(4.0)
    return model


class Case:
    """One architecture: the eager model, its folder and its program."""

    def __init__(self, name: str, folder: Path) -> None:
        from llmc.compiler.capture import capture

        self.name = name
        self.model = make(name)
        self.folder = folder
        self.model.save_pretrained(folder)
        self.program = capture(folder)
        self.loads_to_capture = self.program.weights.loads

    def eager(self, **inputs: torch.Tensor) -> torch.Tensor:
        import inspect

        known = inspect.signature(self.model.forward).parameters
        given = {k: v for k, v in inputs.items() if k in known}
        with torch.no_grad():
            out: torch.Tensor = self.model(**given).logits
        return out

    def run(self, **inputs: torch.Tensor) -> torch.Tensor:
        from llmc.compiler.ir.interpret import run

        with torch.no_grad():
            out: torch.Tensor = run(self.program, inputs)
        return out


@pytest.fixture(scope="session")
def case(tmp_path_factory: pytest.TempPathFactory) -> Callable[[str], Case]:
    """``case(name)``: captured once per session."""
    made: dict[str, Case] = {}

    def get(name: str) -> Case:
        if name not in made:
            made[name] = Case(name, tmp_path_factory.mktemp(name))
        return made[name]

    return get


@pytest.fixture(scope="session")
def build() -> Callable[..., Any]:
    """``build(name, **config)``: a tiny random model."""
    return make


@pytest.fixture(scope="session")
def tokens() -> Callable[..., dict[str, torch.Tensor]]:
    """``tokens(batch, length, seed)``: inputs of a whole batch."""
    return random_tokens


def random_tokens(batch: int, length: int, seed: int = 0) -> dict[str, torch.Tensor]:
    """Random ids with positions 0 … and all tokens valid."""
    g = torch.Generator().manual_seed(seed)
    return {
        "input_ids": torch.randint(3, 90, (batch, length), generator=g),
        "position_ids": torch.arange(length)[None].expand(batch, -1).contiguous(),
        "attention_mask": torch.ones(batch, length, dtype=torch.bool),
    }
