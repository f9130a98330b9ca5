"""Bad model folders are refused, each in one line that names what and where."""

from __future__ import annotations

import json
import struct
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file

from llmc.compiler.capture import capture
from llmc.compiler.capture.checkpoint import Checkpoint
from llmc.compiler.ir.errors import LlmcError, ModelError

Spoil = Callable[[Path], None]


@pytest.fixture
def folder(tmp_path: Path, build: Callable[..., Any]) -> Path:
    build("llama").save_pretrained(tmp_path / "model")
    return tmp_path / "model"


def refused(source: object, **kwargs: Any) -> str:
    """The one line with which a source is refused."""
    with pytest.raises(ModelError) as caught:
        capture(source, **kwargs)  # type: ignore[arg-type]
    text = str(caught.value)
    assert "\n" not in text
    assert caught.value.exit_code == 3
    return text


def rewrite(folder: Path, change: Callable[[dict[str, torch.Tensor]], None]) -> None:
    file = folder / "model.safetensors"
    tensors = {k: v.clone() for k, v in load_file(file).items()}
    change(tensors)
    save_file(tensors, file, metadata={"format": "pt"})


def header(folder: Path, change: Callable[[dict[str, Any]], str | None]) -> None:
    """Rewrite the header in place; ``change`` may return its raw text."""
    file = folder / "model.safetensors"
    raw = file.read_bytes()
    (n,) = struct.unpack("<Q", raw[:8])
    fields = json.loads(raw[8 : 8 + n])
    text = change(fields) or json.dumps(fields)
    file.write_bytes(struct.pack("<Q", len(text)) + text.encode() + raw[8 + n :])


def config(folder: Path, **fields: Any) -> None:
    file = folder / "config.json"
    file.write_text(json.dumps({**json.loads(file.read_text()), **fields}))


def test_nothing_there(tmp_path: Path) -> None:
    assert "expected a model folder" in refused(tmp_path / "none")


def test_a_file(tmp_path: Path) -> None:
    (tmp_path / "x").write_text("")
    assert "found a file" in refused(tmp_path / "x")


def test_unreachable_hub_id(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    assert "reachable hub id" in refused("nobody/nothing-of-that-name")


def test_not_a_model(tmp_path: Path) -> None:
    assert "expected config.json" in refused(tmp_path)


def test_no_weights(folder: Path) -> None:
    (folder / "model.safetensors").unlink()
    assert "expected *.safetensors weights, found none" in refused(folder)


@pytest.mark.parametrize("name", ["pytorch_model.bin", "model.pt"])
def test_pickles_only(folder: Path, name: str) -> None:
    (folder / "model.safetensors").rename(folder / name)
    text = refused(folder)
    assert name in text
    assert "save_pretrained" in text


def test_config_not_json(folder: Path) -> None:
    (folder / "config.json").write_text("{")
    assert "at config.json" in refused(folder)


def test_unknown_model_type(folder: Path) -> None:
    config(folder, model_type="no-such-model", architectures=[])
    assert "config of a known model" in refused(folder)


def test_own_code_needs_trust(folder: Path) -> None:
    config(folder, auto_map={"AutoModelForCausalLM": "modeling.Evil"})
    (folder / "modeling.py").write_text("raise SystemExit('ran')")
    assert "trust_remote_code" in refused(folder)


def test_trusted_code_runs(folder: Path, monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    """With the flag, the repository's own classes are used."""
    monkeypatch.setenv("HF_MODULES_CACHE", str(tmp_path / "modules"))
    monkeypatch.setattr("transformers.dynamic_module_utils.HF_MODULES_CACHE", str(tmp_path / "m"))
    (folder / "own_model.py").write_text(
        "from transformers import LlamaConfig, LlamaForCausalLM\n"
        "class OwnConfig(LlamaConfig):\n"
        "    model_type = 'own-llama'\n"
        "class OwnModel(LlamaForCausalLM):\n"
        "    config_class = OwnConfig\n"
        "    def forward(self, *args, **kwargs):\n"
        "        out = super().forward(*args, **kwargs)\n"
        "        out.logits = out.logits * 0.5\n"
        "        return out\n"
    )
    auto = {"AutoConfig": "own_model.OwnConfig", "AutoModelForCausalLM": "own_model.OwnModel"}
    config(folder, model_type="own-llama", architectures=["OwnModel"], auto_map=auto)
    program = capture(folder, trust_remote_code=True)
    assert program.facts["architecture"] == "OwnModel"
    assert program.output.args[0].args[1] == 0.5


def test_quantised_checkpoint(folder: Path) -> None:
    config(folder, quantization_config={"quant_method": "bitsandbytes"})
    assert "quant_method: expected one of compressed-tensors, gptq, awq" in refused(folder)


def test_config_and_weights_disagree(folder: Path) -> None:
    config(folder, intermediate_size=64)
    assert "expected 'model.layers.0.mlp" in refused(folder)


def test_missing_tensor(folder: Path) -> None:
    rewrite(folder, lambda t: t.pop("model.layers.1.mlp.up_proj.weight"))  # type: ignore[arg-type, return-value]
    assert "'model.layers.1.mlp.up_proj.weight' in the checkpoint, found none" in refused(folder)


@pytest.mark.parametrize("cut", [4, 200, -64])
def test_truncated_file(folder: Path, cut: int) -> None:
    file = folder / "model.safetensors"
    file.write_bytes(file.read_bytes()[:cut])
    assert "at model.safetensors" in refused(folder)


def test_tail_after_the_tensors(folder: Path) -> None:
    with (folder / "model.safetensors").open("ab") as f:
        f.write(b"extra")
    assert "truncated or has a tail" in refused(folder)


def first(fields: dict[str, Any]) -> dict[str, Any]:
    name = min((k for k in fields if k != "__metadata__"), key=lambda k: fields[k]["data_offsets"])
    found: dict[str, Any] = fields[name]
    return found


@pytest.mark.parametrize(
    ("change", "says"),
    [
        (lambda f: first(f).update(shape=[3, 3]), "expected 36 bytes for [3, 3]"),
        (lambda f: first(f).update(dtype="Q4"), "expected a dtype of"),
        (lambda f: first(f).update(shape=[-1]), "whole numbers"),
        (lambda f: first(f).update(data_offsets=[0]), "whole numbers"),
        (lambda f: first(f).pop("shape") and None, "dtype, shape and data_offsets"),
        (lambda f: "[]", "an object of tensors"),
        (lambda f: "not json", "JSON header"),
        (lambda f: '{"a": {}, "a": {}}', "found 'a' twice"),
    ],
)
def test_bad_header(folder: Path, change: Any, says: str) -> None:
    header(folder, change)
    assert says in refused(folder)


def test_overlapping_tensors(folder: Path) -> None:
    def overlap(fields: dict[str, Any]) -> None:
        same = [v for k, v in fields.items() if k != "__metadata__"]
        a, b = [v for v in same if v["shape"] == same[1]["shape"]][:2]
        b["data_offsets"] = a["data_offsets"]

    header(folder, overlap)
    text = refused(folder)
    assert "an overlap with" in text or "a hole after" in text


@pytest.mark.parametrize("value", [float("nan"), float("inf")])
def test_weights_that_are_not_finite(folder: Path, value: float) -> None:
    """Found when the tensor is loaded; capture itself reads none."""

    def spoil(tensors: dict[str, torch.Tensor]) -> None:
        tensors["model.norm.weight"][3] = value

    rewrite(folder, spoil)
    program = capture(folder)
    name = next(n for n, p in program.params.items() if "model.norm.weight" in p.names)
    with pytest.raises(ModelError, match=r"1 NaN or infinite in 'model.norm.weight' at model.safe"):
        program.weights.load(name)


def sharded(folder: Path) -> dict[str, str]:
    """Split the folder's file in two, with an index."""
    tensors = load_file(folder / "model.safetensors")
    (folder / "model.safetensors").unlink()
    names = sorted(tensors)
    files = ["model-00001-of-00002.safetensors", "model-00002-of-00002.safetensors"]
    table = {n: files[i % 2] for i, n in enumerate(names)}
    for file in files:
        save_file({n: tensors[n] for n in names if table[n] == file}, folder / file)
    index(folder, table)
    return table


def index(folder: Path, table: dict[str, str]) -> None:
    text = json.dumps({"metadata": {}, "weight_map": table})
    (folder / "model.safetensors.index.json").write_text(text)


def test_shards_load(folder: Path) -> None:
    whole = Checkpoint(folder)
    want = {name: whole.load(name).clone() for name in whole}
    sharded(folder)
    parts = Checkpoint(folder)
    assert parts.loads == 0
    assert all(torch.equal(parts.load(n), t) for n, t in want.items())
    assert parts.loads == len(want)


def test_missing_shard(folder: Path) -> None:
    sharded(folder)
    (folder / "model-00002-of-00002.safetensors").unlink()
    assert "the download is not complete" in refused(folder)


@pytest.mark.parametrize("name", ["../model.safetensors", "/etc/hosts", "sub/x.safetensors", ".."])
def test_index_that_leads_outside(folder: Path, name: str) -> None:
    table = sharded(folder)
    index(folder, {**table, "extra": name})
    assert "expected a file of this folder" in refused(folder)


def test_index_that_lies(folder: Path) -> None:
    table = sharded(folder)
    index(folder, dict.fromkeys(table, "model-00001-of-00002.safetensors"))
    assert "as the index says" in refused(folder)


def test_link_that_leads_outside(folder: Path, tmp_path: Path) -> None:
    table = sharded(folder)
    file = folder / table[min(table)]
    file.rename(tmp_path / "elsewhere.safetensors")
    file.symlink_to(tmp_path / "elsewhere.safetensors")
    assert "the link" in refused(folder)


def test_hub_cache_links_are_fine(folder: Path, tmp_path: Path) -> None:
    """The hub's cache keeps files in blobs/ and links to them from snapshots/<revision>/."""
    blobs, snapshot = tmp_path / "repo" / "blobs", tmp_path / "repo" / "snapshots" / "abc"
    blobs.mkdir(parents=True)
    snapshot.mkdir(parents=True)
    for file in list(folder.iterdir()):
        file.rename(blobs / file.name)
        (snapshot / file.name).symlink_to(blobs / file.name)
    assert len(Checkpoint(snapshot).entries) > 0


def test_unknown_name(folder: Path) -> None:
    with pytest.raises(LlmcError, match=r"did you mean 'model.norm.weight'"):
        Checkpoint(folder).load("model.norm.weigh")
