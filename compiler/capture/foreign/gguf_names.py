"""What GGUF calls a model of transformers: its architecture, its tensors and its settings.

Only the architectures whose computation both sides define alike stand here. Of those that rotate
neighbouring channels, as GGUF's ``llama`` does, rows of queries and keys change their order.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from ...ir.errors import UsageError

if TYPE_CHECKING:
    from ..fit import Fitted


@dataclass(frozen=True)
class Arch:
    """One architecture: its name there, and whether it rotates neighbouring channels."""

    name: str
    neighbours: bool


# By model_type of the config.
ARCHS = {
    "llama": Arch("llama", True), "mistral": Arch("llama", True), "qwen2": Arch("qwen2", False),
    "qwen3": Arch("qwen3", False),
}  # fmt: skip
# What the settings below must be, for GGUF says it by the architecture alone.
_FIXED: dict[str, tuple[Any, ...]] = {
    "hidden_act": ("silu",), "mlp_bias": (False, None), "partial_rotary_factor": (1.0, 1, None),
    "sliding_window": (None,), "use_sliding_window": (False, None),
}  # fmt: skip


@dataclass(frozen=True)
class Names:
    """How one model is written.

    Attributes:
        arch: architecture. settings: (name of the writer's method, value) in order.
        rename: GGUF's name of a tensor by the model's; None where it has none.
        heads: rows' owners by the end of a tensor's name: how many heads its rows belong to.
    """

    arch: Arch
    settings: tuple[tuple[str, Any], ...]
    rename: Callable[[str], str | None]
    heads: dict[str, int]

    def ordered(self, name: str, value: Tensor) -> Tensor:
        """Rows of a tensor [N, …] in the order that the architecture wants."""
        count = next((n for end, n in self.heads.items() if f".{end}." in name), None)
        if count is None or not self.arch.neighbours:
            return value
        rows = value.reshape(count, 2, value.shape[0] // count // 2, *value.shape[1:])
        return rows.transpose(1, 2).reshape(value.shape)


def names_of(config: Any) -> Names:
    """How a model with that config is written.

    Args:
        config: of transformers, with every field written out.
    Raises:
        UsageError: a model type or a setting that GGUF says otherwise; the field is named.
    """
    import gguf

    arch = ARCHS.get(config.model_type)
    if arch is None:
        raise UsageError(
            f"model_type: expected one of {', '.join(ARCHS)}, found {config.model_type}",
            hint="--format hf, then llama.cpp's own converter",
        )
    rope = getattr(config, "rope_parameters", None) or {}
    found = {name: getattr(config, name, None) for name in _FIXED}
    found["attention_bias"] = bool(getattr(config, "attention_bias", False))
    for name, value in found.items():
        allowed = _FIXED.get(name, (False,))
        # A window that no layer uses says nothing.
        idle = name == "sliding_window" and found.get("use_sliding_window") is False
        if value not in allowed and not idle:
            raise UsageError(f"{name}: expected {allowed[0]}, found {value!r}",
                             hint="gguf has no place for it")  # fmt: skip
    if rope.get("rope_type", "default") != "default":
        raise UsageError(f"rope_type: expected default, found {rope['rope_type']!r}",
                         hint="gguf has no place for it here")  # fmt: skip
    heads, head = config.num_attention_heads, getattr(config, "head_dim", None)
    head = head or config.hidden_size // heads
    if config.model_type == "qwen3" and head != 128:
        # transformers reads no other from a file, so that nothing could be checked.
        raise UsageError(f"head_dim: expected 128, found {head}",
                         hint="--format hf, then llama.cpp's own converter")  # fmt: skip
    shared = config.num_key_value_heads
    settings = (
        ("add_context_length", config.max_position_embeddings),
        ("add_embedding_length", config.hidden_size),
        ("add_block_count", config.num_hidden_layers),
        ("add_feed_forward_length", config.intermediate_size),
        ("add_head_count", heads),
        ("add_head_count_kv", shared),
        ("add_key_length", head),
        ("add_value_length", head),
        ("add_layer_norm_rms_eps", config.rms_norm_eps),
        ("add_rope_freq_base", float(rope.get("rope_theta", 10000.0))),
        ("add_rope_dimension_count", head),
        ("add_vocab_size", config.vocab_size),
    )
    kinds = {name: key for key, name in gguf.MODEL_ARCH_NAMES.items()}
    table = gguf.get_tensor_name_map(kinds[arch.name], config.num_hidden_layers)

    def rename(name: str) -> str | None:
        made: str | None = table.get_name(name, try_suffixes=(".weight", ".bias"))
        return made

    return Names(arch, settings, rename, {"q_proj": heads, "k_proj": shared})


def runner_of(fitted: Fitted, folder: Path, file: str) -> Callable[[dict[str, Tensor]], Tensor]:
    """Logits of token ids, by the model as transformers reads it from a GGUF file."""
    from transformers import modeling_gguf_pytorch_utils as reader

    from ..configs import quiet

    bar = reader.tqdm
    # Its bar listens to nobody's settings.
    reader.tqdm = partial(bar, disable=True)
    try:
        with quiet():
            model = fitted.family.model.from_pretrained(
                str(folder), gguf_file=file, dtype=torch.float32
            )
    finally:
        reader.tqdm = bar

    def run(inputs: dict[str, Tensor]) -> Tensor:
        found: Tensor = model.eval()(input_ids=inputs["input_ids"]).logits
        return found

    return run
