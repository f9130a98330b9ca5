"""Captured tiny models, each once a session; ``analysis_build`` becomes importable."""

from __future__ import annotations

import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

sys.path.insert(0, str(Path(__file__).parent))

BASE = {
    "vocab_size": 96, "hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 3,
    "num_attention_heads": 4, "num_key_value_heads": 2, "max_position_embeddings": 64,
    "pad_token_id": 0, "bos_token_id": 1, "eos_token_id": 2,
}  # fmt: skip
PLAIN = {k: v for k, v in BASE.items() if k != "num_key_value_heads"}
MODELS: dict[str, tuple[str, dict[str, Any]]] = {
    "llama": ("llama", BASE),
    "mqa_tied": (
        "llama",
        BASE | {"num_key_value_heads": 1, "num_hidden_layers": 1, "tie_word_embeddings": True},
    ),
    "qwen2": ("qwen2", BASE),
    "qwen3": ("qwen3", BASE | {"head_dim": 8}),
    "gemma2": ("gemma2", BASE | {"head_dim": 8, "sliding_window": 3}),
    "gpt2": (
        "gpt2",
        {"vocab_size": 96, "n_embd": 32, "n_layer": 2, "n_head": 4, "n_positions": 64,
         "bos_token_id": 1, "eos_token_id": 2},
    ),
    "opt": ("opt", PLAIN | {"ffn_dim": 48, "word_embed_proj_dim": 32}),
    "mixtral": ("mixtral", BASE | {"num_local_experts": 4, "num_experts_per_tok": 2}),
    "phi3": ("phi3", BASE),
    "bert": ("bert", PLAIN),
}  # fmt: skip


@pytest.fixture(scope="session")
def captured(tmp_path_factory: pytest.TempPathFactory) -> Callable[[str], Any]:
    """``captured(name)``: a fresh copy of the program of a tiny random model of that kind."""
    known: dict[str, Any] = {}

    def get(name: str) -> Any:
        if name not in known:
            known[name] = _capture(name, tmp_path_factory.mktemp(name))
        return known[name].clone()

    return get


def _capture(name: str, folder: Path) -> Any:
    import torch
    from transformers import AutoConfig, AutoModelForCausalLM, AutoModelForMaskedLM

    from llmc.compiler.capture import capture

    kind, sizes = MODELS[name]
    auto = AutoModelForMaskedLM if kind == "bert" else AutoModelForCausalLM
    torch.manual_seed(0)
    model = auto.from_config(AutoConfig.for_model(kind, **sizes)).eval()
    with torch.no_grad():
        # Gains of exactly one and biases of exactly zero would hide mistakes.
        for p in model.parameters():
            p.add_(torch.randn_like(p) * 0.1)
    model.save_pretrained(folder)
    return capture(folder)
