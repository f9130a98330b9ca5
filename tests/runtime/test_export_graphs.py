"""Whole graphs for other runtimes: ONNX by onnxruntime and the standard, pt2 by torch alone."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch

sys.path.insert(0, str(Path(__file__).parents[1]))

from tiny_models import make

from llmc.compiler import api
from llmc.compiler.ir.errors import GateError, UsageError
from llmc.compiler.model import Model
from llmc.compiler.runtime.exporting import onnx as exporting
from llmc.compiler.runtime.exporting.onnx_pack import _bytes, unpack

onnx = pytest.importorskip("onnx")
onnxruntime = pytest.importorskip("onnxruntime")

IDS = torch.randint(3, 90, (2, 12), generator=torch.Generator().manual_seed(0))
SIZES = {"hidden_size": 64, "intermediate_size": 96, "num_hidden_layers": 1}


def compiled(passes: str, name: str = "llama", **over: Any) -> Model:
    """A tiny model, rounded to the nearest."""
    return api.compile(make(name, **SIZES, **over), passes, calibration=IDS)


def logits(folder: Path, model: Any = None, **session: str) -> torch.Tensor:
    """What onnxruntime computes of the file, or of a model that was changed, on a CPU."""
    options = onnxruntime.SessionOptions()
    for key, value in session.items():
        options.add_session_config_entry(f"session.{key}", value)
    path = folder / "model.onnx"
    if model is not None:
        path = folder / "changed.onnx"
        onnx.save(model, str(path))
    run = onnxruntime.InferenceSession(str(path), options, providers=["CPUExecutionProvider"])
    positions = torch.arange(IDS.shape[1]).expand(2, -1).contiguous()
    whole = {"input_ids": IDS, "position_ids": positions,
             "attention_mask": torch.ones_like(IDS).bool()}  # fmt: skip
    given = {i.name: whole[i.name].numpy() for i in run.get_inputs()}
    return torch.from_numpy(run.run(None, given)[0])


def apart(have: torch.Tensor, want: torch.Tensor) -> float:
    """The largest difference, as a share of the largest value."""
    return float((have - want).abs().max() / want.abs().max())


@pytest.mark.parametrize("bits", [1, 2, 4, 8])
def test_bytes_hold_codes_low_bits_first(bits: int) -> None:
    """Packing and its inverse."""
    g = torch.Generator().manual_seed(bits)
    codes = torch.randint(0, 1 << bits, (3, 5, 16), generator=g).to(torch.uint8)
    data = _bytes(codes, bits)
    assert data.shape == (3, 5, 2 * bits)
    assert int(data[0, 0, 0]) & ((1 << bits) - 1) == int(codes[0, 0, 0])
    assert torch.equal(unpack(data, bits), codes)


@pytest.mark.parametrize(
    "passes",
    ["w4:group=32,solver=rtn", "w4:group=32,symmetric=false,solver=rtn", "w8:group=row,solver=rtn",
     "prune24:solver=magnitude,w2:group=16,solver=rtn"],
)  # fmt: skip
def test_onnxruntime_computes_the_same(passes: str, tmp_path: Path) -> None:
    """Packed products within 1e-5, whichever level a session may choose above 8-bit inputs."""
    model = compiled(passes)
    record = model.export(tmp_path / "out", format="onnx")
    assert record["quantised"] == 7
    assert record["difference"] <= 1e-5
    want = model(IDS)
    assert apart(logits(tmp_path / "out"), want) <= 1e-5
    proto = onnx.load(str(tmp_path / "out" / "model.onnx"))
    products = [n for n in proto.graph.node if n.op_type == "MatMulNBits"]
    assert len(products) == 7
    for node in products:
        level = next(a for a in node.attribute if a.name == "accuracy_level")
        assert level.i == record["accuracy_level"] == 1
        level.i = 0
    assert apart(logits(tmp_path / "out", proto), want) <= 1e-5


@pytest.mark.parametrize("passes", ["w4:group=32,solver=rtn", "w4:group=32,symmetric=false"])
def test_the_standard_form(passes: str, tmp_path: Path) -> None:
    """No op beyond the standard; equal where a session keeps inputs, and the note says which."""
    model = compiled(passes)
    record = model.export(tmp_path / "out", format="onnx-qdq")
    proto = onnx.load(str(tmp_path / "out" / "model.onnx"))
    assert {o.domain for o in proto.opset_import} == {""}
    assert next(o.version for o in proto.opset_import) == 21
    kinds = [n.op_type for n in proto.graph.node]
    assert kinds.count("DequantizeLinear") == 7
    key = {"qdq_matmulnbits_accuracy_level": "0"}
    assert apart(logits(tmp_path / "out", **key), model(IDS)) <= 1e-5
    assert any("qdq_matmulnbits_accuracy_level" in n for n in record["notes"])


@pytest.mark.parametrize(
    ("form", "passes", "words"),
    [
        ("onnx", "w3:solver=rtn", "bits: expected 2 or 4 or 8, found 3"),
        ("onnx-qdq", "w8:solver=rtn", "bits: expected 4, found 8"),
        (
            "onnx",
            "w8a8:solver=rtn",
            r"inputs: expected .*, found a8 token at model\.layers\.0\.\S*q_",
        ),
        ("onnx", "w4:group=8,solver=rtn", "group: expected one of 16, 32"),
        ("onnx", "nf4", "codes: expected integers"),
    ],
)
def test_what_onnx_cannot_hold_is_refused(
    form: str, passes: str, words: str, tmp_path: Path
) -> None:
    """One line that names the layer and the field; nothing is written."""
    model = compiled(passes)
    with pytest.raises(UsageError, match=words):
        model.export(tmp_path / "out", format=form)
    assert not (tmp_path / "out").exists()


def test_a_graph_that_computes_otherwise_never_appears(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Codes that are off by one are found by running the file."""
    real = exporting.pack

    def spoiled(weight: Any) -> Any:
        found = real(weight)
        found.codes[0, 0, 0] ^= 0x77
        return found

    monkeypatch.setattr(exporting, "pack", spoiled)
    with pytest.raises(GateError, match="expected logits within"):
        compiled("w4:group=32,solver=rtn").export(tmp_path / "out", format="onnx")
    assert not (tmp_path / "out").exists()


_ALONE = """
import json, sys, torch
sys.modules["llmc"] = None
model = torch._inductor.aoti_load_package(sys.argv[1])
ids = torch.tensor(json.loads(sys.argv[2]))
shape = ids.shape
given = (ids, torch.arange(shape[1]).expand(shape).contiguous(), torch.ones(shape).bool())
print(json.dumps(model(*given).tolist()))
"""


@pytest.mark.slow
def test_pt2_runs_without_llmc(tmp_path: Path) -> None:
    """A process that cannot import llmc loads the package and computes the same."""
    model = compiled("w4:group=32,solver=rtn")
    record = model.export(tmp_path / "out", format="pt2")
    assert record["difference"] <= 1e-5
    assert record["inputs"] == ["input_ids", "position_ids", "attention_mask"]
    told = json.dumps(IDS.tolist())
    done = subprocess.run(
        [sys.executable, "-c", _ALONE, str(tmp_path / "out" / "model.pt2"), told],
        capture_output=True, text=True, check=False, timeout=300,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr[-2000:]
    assert apart(torch.tensor(json.loads(done.stdout)), model(IDS)) <= 1e-5


def test_pt2_without_a_compiler_is_refused(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Exit 5 and what to install, before anything is exported."""
    from llmc.compiler.ir.errors import ResourceError

    monkeypatch.setenv("CXX", "no-such-compiler")
    with pytest.raises(ResourceError, match=r"expected a C\+\+ compiler, found no no-such"):
        compiled("w4:group=32,solver=rtn").export(tmp_path / "out", format="pt2")
