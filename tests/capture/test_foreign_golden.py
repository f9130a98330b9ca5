"""What GPTQModel 7.7.0 decoded of random checkpoints, to the bit.

``golden/capture/gptqmodel.safetensors`` holds for each case tensors of one linear [32, 64] as
``random_gptq`` made them (group 32), and the fp16 weight that its TorchLinear gave on a CPU.
"""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file

from llmc.compiler.capture.checkpoint import Checkpoint
from llmc.compiler.capture.foreign import gptq

CASES = ("w4-v1-sym-plain", "w4-v2-asym-order", "w3-v2-asym-plain", "w8-v1-sym-order",
         "w2-v2-asym-plain")  # fmt: skip


@pytest.mark.parametrize("case", CASES)
def test_gptq_as_gptqmodel_decodes_it(repo: Path, tmp_path: Path, case: str) -> None:
    """Our importer's weight rounds to the same fp16 numbers."""
    golden = load_file(repo / "tests" / "golden" / "capture" / "gptqmodel.safetensors")
    parts = {k.partition("/")[2]: t for k, t in golden.items() if k.startswith(f"{case}/")}
    weight = parts.pop("weight")
    save_file({f"a.b.{k}": t for k, t in parts.items()}, tmp_path / "model.safetensors")
    (tmp_path / "config.json").write_text(json.dumps({}))
    bits, version, symmetric, order = case.split("-")
    settings = {
        "bits": int(bits[1:]), "group_size": 32, "sym": symmetric == "sym",
        "desc_act": order == "order", "checkpoint_format": "gptq" if version == "v1" else "gptq_v2",
    }  # fmt: skip
    (layer,) = gptq.read(settings, Checkpoint(tmp_path), {"a.b": "a.b"}, {})
    assert layer.shape == (32, 64)
    assert ("order" in layer.pieces) == (order == "order")
    assert torch.equal(layer.dense().half(), weight)
