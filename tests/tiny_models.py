"""Tiny random models of many architectures, by the names of transformers' model types."""

from __future__ import annotations

from typing import Any

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
    "hunyuan_v1_dense": {**GROUPED, "head_dim": 8},
    "arcee": {**GROUPED, "head_dim": 8, "bos_token_id": 0, "eos_token_id": 0},
    "olmoe": {**GROUPED, "num_experts": 4, "num_experts_per_tok": 2},
    "roberta": {**BASE, "pad_token_id": 0},
    "glm4": {**GROUPED, "head_dim": 8, "attention_bias": True, "pad_token_id": 0},
    "granite": {
        **GROUPED, "embedding_multiplier": 2.0, "residual_multiplier": 0.5,
        "attention_multiplier": 0.3, "logits_scaling": 2.0,
    },
}  # fmt: skip
# Neither language models nor maskers: their result is a hidden state.
PLAIN: dict[str, dict[str, Any]] = {
    "t5": {
        "vocab_size": 96, "d_model": 32, "d_kv": 8, "d_ff": 48, "num_layers": 2, "num_heads": 4,
    },
    "vit": {
        "hidden_size": 32, "num_hidden_layers": 2, "num_attention_heads": 4,
        "intermediate_size": 48, "image_size": 8, "patch_size": 4, "num_channels": 3,
    },
}  # fmt: skip
# On these dependency groups are tried, sliced against masked.
FAMILIES = (
    "llama", "qwen2", "qwen3", "qwen3_moe", "mixtral", "mistral", "gemma2", "gemma3_text", "phi3",
    "gpt2", "gpt_neox", "gptj", "opt", "bloom", "falcon", "stablelm", "olmo2", "starcoder2",
    "cohere", "glm4", "granite", "deepseek_v3", "bert", "t5", "vit",
)  # fmt: skip
ENCODERS = ("bert", "roberta")


def config_of(name: str, **over: Any) -> Any:
    """The tiny config of an architecture."""
    from transformers import AutoConfig

    return AutoConfig.for_model(name, **{**(ZOO | MORE | PLAIN)[name], **over})


def make(name: str, **over: Any) -> Any:
    """A tiny random model, in evaluation mode, with eager attention."""
    import transformers as hf

    torch.manual_seed(0)
    config = config_of(name, **over)
    if name in PLAIN:
        kind: Any = {"t5": hf.T5EncoderModel, "vit": hf.ViTModel}[name]
        model = kind(config, **({"add_pooling_layer": False} if name == "vit" else {})).eval()
    else:
        auto = hf.AutoModelForMaskedLM if name in ENCODERS else hf.AutoModelForCausalLM
        model = auto.from_config(config, attn_implementation="eager").eval()
    with torch.no_grad():
        for p in model.parameters():
            # Gains and biases off their trivial start, so that a lost one shows.
            if p.ndim == 1:
                p.add_(0.1 * torch.randn_like(p))
            elif p.ndim >= 2:
                p.mul_(4.0)
    return model


def random_tokens(batch: int, length: int, seed: int = 0) -> dict[str, torch.Tensor]:
    """Random ids with positions 0 … and all tokens valid."""
    g = torch.Generator().manual_seed(seed)
    return {
        "input_ids": torch.randint(3, 90, (batch, length), generator=g),
        "position_ids": torch.arange(length)[None].expand(batch, -1).contiguous(),
        "attention_mask": torch.ones(batch, length, dtype=torch.bool),
    }


def capture_tiny(name: str) -> Any:
    """The program of a tiny random model, with its segments."""
    from llmc.compiler.analysis.blocks import apply_segments
    from llmc.compiler.capture import capture

    if name == "vit":
        axes = {"pixel_values": ("B", None, None, None)}
        program = capture(make(name), inputs=random_inputs(name, 2), axes=axes)
    else:
        program = capture(make(name))
    apply_segments(program)
    return program


def random_inputs(name: str, batch: int, length: int = 12, seed: int = 0) -> dict[str, Any]:
    """Inputs that the architecture's program takes."""
    if name == "vit":
        g = torch.Generator().manual_seed(seed)
        return {"pixel_values": torch.randn(batch, 3, 8, 8, generator=g)}
    return random_tokens(batch, length, seed)
