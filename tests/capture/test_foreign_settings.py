"""Every field of a quantization_config, replaced by what does not belong there."""

from __future__ import annotations

import copy
import json
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch

sys.path.insert(0, str(Path(__file__).parents[1]))

from foreign_folders import random_gptq, rewrite
from tiny_models import make

from llmc.compiler.capture import foreign
from llmc.compiler.capture.checkpoint import Checkpoint
from llmc.compiler.capture.huggingface import build, model_class, read_config
from llmc.compiler.ir.errors import ModelError

WRONG: list[Any] = [
    None, {}, "x", -1, 1e300, True, [1], {"a": 1}, ["re:("], "é" * 500, {"x": {"y": "z"}},
    10**30, "re:(a+)+$",
]  # fmt: skip
WEIGHTS = {"num_bits": 4, "type": "int", "symmetric": True, "strategy": "group", "group_size": 32,
           "dynamic": False, "actorder": None}  # fmt: skip
GROUP = {"targets": ["Linear"], "format": None, "weights": WEIGHTS, "input_activations": None,
         "output_activations": None}  # fmt: skip
SETTINGS: dict[str, dict[str, Any]] = {
    "gptq": {"quant_method": "gptq", "bits": 4, "group_size": 32, "sym": True, "desc_act": False,
             "checkpoint_format": "gptq", "pack_dtype": "int32", "dynamic": {"+:x": {"bits": 4}}},
    "awq": {"quant_method": "awq", "bits": 4, "group_size": 32, "zero_point": True,
            "version": "gemm"},
    "compressed-tensors": {
        "quant_method": "compressed-tensors", "format": "pack-quantized",
        "quantization_status": "compressed", "ignore": ["lm_head"], "kv_cache_scheme": None,
        "sparsity_config": {"format": "dense"}, "config_groups": {"group_0": GROUP},
    },
}  # fmt: skip


def places(value: Any, base: tuple[str, ...] = ()) -> Iterator[tuple[str, ...]]:
    """Paths to every field."""
    yield base
    if isinstance(value, dict):
        for key in value:
            yield from places(value[key], (*base, key))


def changed(value: Any, place: tuple[str, ...], new: Any) -> Any:
    """A copy with one field replaced."""
    if not place:
        return new
    out = copy.deepcopy(value)
    at = out
    for key in place[:-1]:
        at = at[key]
    at[place[-1]] = new
    return out


def tensors(method: str) -> dict[str, torch.Tensor]:
    """Of a linear [64, 64], in a method's names and shapes."""
    if method == "gptq":
        made, _ = random_gptq(64, 64, 4, 32, 1, True, None, torch.Generator().manual_seed(0))
        return made
    words = torch.zeros(64, 8, dtype=torch.int32)
    if method == "awq":
        return {"qweight": words, "qzeros": words[:2].clone(), "scales": torch.ones(2, 64).half()}
    return {"weight_packed": words, "weight_scale": torch.ones(64, 2),
            "weight_shape": torch.tensor([64, 64])}  # fmt: skip


@pytest.mark.parametrize("method", list(SETTINGS))
def test_wrong_fields_are_refused_in_one_line(tmp_path: Path, method: str) -> None:
    """Nothing but a ModelError leaves, it names a key or a tensor, and nothing hangs."""
    sizes = {"hidden_size": 64, "intermediate_size": 96, "num_hidden_layers": 1}
    make("llama", **sizes, tie_word_embeddings=False, num_key_value_heads=4).save_pretrained(
        tmp_path / "made"
    )
    folder = tmp_path / "made"

    def quantise(have: dict[str, torch.Tensor]) -> None:
        for path in [n.removesuffix(".weight") for n in have if n.endswith("proj.weight")]:
            if have[f"{path}.weight"].shape == (64, 64):
                del have[f"{path}.weight"]
                have.update({f"{path}.{k}": t.clone() for k, t in tensors(method).items()})

    rewrite(folder, quantise)
    config = read_config(folder)
    model, _ = build(config, model_class(config))
    raw = json.loads((folder / "config.json").read_text())
    told = SETTINGS[method]
    if method == "compressed-tensors":
        told = changed(told, ("ignore",), ["lm_head", "re:.*mlp"])

    def read(settings: Any) -> Any:
        text = json.dumps(raw | {"quantization_config": settings})
        (folder / "config.json").write_text(text)
        return foreign.read(Checkpoint(folder), model)

    sound = read(told)
    assert sound is not None
    assert len(sound.layers) == 4
    said = []
    for place in places(told):
        for value in WRONG:
            try:
                read(changed(told, place, value))
            except ModelError as e:
                said.append(str(e))
    assert all("\n" not in text and len(text) < 500 for text in said)
    assert len(said) > 7 * len(list(places(told)))
