"""Checkpoint keys find their parameters: per-expert tensors, missing prefixes, shards."""

from __future__ import annotations

import json
import resource
import struct
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file

from llmc.compiler.capture import capture
from llmc.compiler.ir.errors import ModelError
from llmc.compiler.ir.interpret import run

Build = Callable[..., Any]
Tokens = Callable[..., dict[str, torch.Tensor]]


def rekey(folder: Path, change: Callable[[str], str]) -> dict[str, torch.Tensor]:
    file = folder / "model.safetensors"
    tensors = {change(k): v.clone() for k, v in load_file(file).items()}
    save_file(tensors, file, metadata={"format": "pt"})
    return tensors


@pytest.mark.parametrize("name", ["qwen3_moe", "mixtral"])
def test_per_expert_tensors_are_stacked_when_read(build: Build, tmp_path: Path, name: str) -> None:
    """The checkpoint holds one tensor per expert; the program one per layer, of the same bytes."""
    model = build(name)
    model.save_pretrained(tmp_path)
    stored = load_file(tmp_path / "model.safetensors")
    assert any(".experts.3." in k for k in stored)
    program = capture(tmp_path)
    fused = {p.names[0]: k for k, p in program.params.items() if len(p.shape) == 3}
    assert len(fused) == 4
    live = dict(model.named_parameters())
    for own, key in fused.items():
        assert torch.equal(program.weights.load(key), live[own])
    size = sum(p.bytes for p in program.params.values() if p.trained)
    assert size == sum(t.numel() * t.element_size() for t in stored.values())


def test_missing_expert(build: Build, tmp_path: Path) -> None:
    build("qwen3_moe").save_pretrained(tmp_path)
    rekey(tmp_path, lambda k: k.replace("layers.0.mlp.experts.3.up_proj", "layers.0.mlp.lost"))
    with pytest.raises(ModelError, match="equally many tensors per expert"):
        capture(tmp_path)


@pytest.mark.parametrize(
    ("name", "prefix"), [("gpt2", "transformer."), ("llama", "model."), ("bert", "bert.")]
)
def test_keys_of_the_bare_model(
    build: Build, tokens: Tokens, tmp_path: Path, name: str, prefix: str
) -> None:
    """Checkpoints of the model without its head, as gpt2's own, lack the prefix."""
    model = build(name, tie_word_embeddings=True)
    model.save_pretrained(tmp_path)
    keys = rekey(tmp_path, lambda k: k.removeprefix(prefix))
    assert not all(k.startswith(prefix) for k in keys)
    program = capture(tmp_path)
    inputs = tokens(2, 7)
    with torch.no_grad():
        want = model(input_ids=inputs["input_ids"]).logits
        torch.testing.assert_close(run(program, inputs), want, rtol=1e-5, atol=1e-5)


def test_turned_weights_keep_their_bytes(build: Build, tmp_path: Path) -> None:
    """gpt2 stores its products as [in, out]; reading them as [out, in] copies nothing."""
    model = build("gpt2")
    program = capture(model)
    live = dict(model.named_parameters())
    turned = 0
    for key, param in program.params.items():
        own = live.get(param.names[0])
        if own is not None and own.ndim == 2:
            loaded = program.weights.load(key)
            assert loaded.data_ptr() == own.data_ptr()
            turned += int(torch.equal(loaded, own.t()))
    assert turned == 8


def test_a_big_checkpoint_is_not_read(tmp_path: Path) -> None:
    """Two layers of a 7B Llama, 1.4 GB in a sparse file: capture grows by headers only."""
    from transformers import LlamaConfig

    wide, deep, words = 4096, 11008, 32000
    config = LlamaConfig(
        vocab_size=words, hidden_size=wide, intermediate_size=deep, num_hidden_layers=2,
        num_attention_heads=32, architectures=["LlamaForCausalLM"],
    )  # fmt: skip
    config.save_pretrained(tmp_path)
    shapes = {
        "model.embed_tokens": [words, wide], "lm_head": [words, wide], "model.norm": [wide],
    }  # fmt: skip
    square = {f"self_attn.{n}_proj": [wide, wide] for n in "qkvo"}
    mlp = {
        "mlp.gate_proj": [deep, wide],
        "mlp.up_proj": [deep, wide],
        "mlp.down_proj": [wide, deep],
    }
    norms = {"input_layernorm": [wide], "post_attention_layernorm": [wide]}
    for i in range(2):
        shapes |= {f"model.layers.{i}.{n}": s for n, s in (square | mlp | norms).items()}
    header, end = {}, 0
    for name, shape in shapes.items():
        start, end = end, end + 2 * torch.Size(shape).numel()
        header[name + ".weight"] = {"dtype": "BF16", "shape": shape, "data_offsets": [start, end]}
    text = json.dumps(header).encode()
    with (tmp_path / "model.safetensors").open("wb") as f:
        f.write(struct.pack("<Q", len(text)) + text)
        f.truncate(8 + len(text) + end)
    before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    program = capture(tmp_path)
    grown = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before
    assert program.weight_bytes() > 1.3e9
    assert grown * 1024 < 300e6
    assert program.weights.loads == 0


def test_tensors_without_a_place_are_named(build: Build, tmp_path: Path) -> None:
    """Layers beyond the config are not an error, and not silent either."""
    build("llama").save_pretrained(tmp_path)
    assert capture(tmp_path).facts["unread"] == []
    config = json.loads((tmp_path / "config.json").read_text())
    config["num_hidden_layers"] -= 1
    config.pop("layer_types", None)
    (tmp_path / "config.json").write_text(json.dumps(config))
    unread = capture(tmp_path).facts["unread"]
    assert len(unread) == 9
    assert all(".layers.1." in k for k in unread)
