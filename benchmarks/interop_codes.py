"""Rows of compressed-tensors, GPTQ and AWQ: their loaders are independent of llmc."""

from __future__ import annotations

import json
import subprocess
import sys
import tempfile
import warnings
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from interop_base import GPTQ, HALF_ULP, SAME, Found, NotRun, Subject, row
from torch import Tensor

from llmc.compiler.ir.interpret import run

# ** compressed-tensors **


def transformers_loads(subject: Subject, folder: Path, dense: bool = False) -> Any:
    """The model as transformers and compressed-tensors load it, in fp32."""
    from transformers import AutoModelForCausalLM, CompressedTensorsConfig

    more = {"quantization_config": CompressedTensorsConfig(dequantize=True)} if dense else {}
    with warnings.catch_warnings():
        # It warns that dequantize= overrides the folder's own setting, which is what it is for.
        warnings.simplefilter("ignore", UserWarning)
        model = AutoModelForCausalLM.from_pretrained(str(folder), dtype=torch.float32, **more)
    return model.eval()


def logits_of(model: Any, ids: Tensor) -> Tensor:
    """Logits of a model of transformers."""
    with torch.no_grad():
        out: Tensor = model(input_ids=ids).logits
    return out


def _packed(passes: str, dense: bool) -> Callable[[Subject], Found]:
    def measure(subject: Subject) -> Found:
        model, folder = subject.export(passes, "compressed-tensors", dtype=torch.float32)
        loaded = transformers_loads(subject, folder, dense)
        have = logits_of(loaded, subject.ids)
        theirs = {n: m.weight.detach() for n, m in loaded.named_modules() if hasattr(m, "weight")}
        return Found(
            subject.worst(subject.weights(model), theirs), subject.apart(have, model(subject.ids))
        )

    return measure


_CT = "transformers + compressed-tensors"
for _name, _passes in (
    ("pack-quantized W4 g32", "w4:group=32,solver=rtn"),
    ("pack-quantized W8 row", "w8:group=row,solver=rtn"),
    ("pack-quantized W4 g32 + 2:4 kept dense", "w4:group=32,solver=rtn,prune24"),
    ("float-quantized FP8, inputs per token", "fp8:solver=rtn"),
    ("float-quantized FP8, inputs per tensor", "fp8:solver=rtn,act=tensor"),
    ("float-quantized FP8, weights alone", "fp8w:solver=rtn"),
):
    row(f"compressed-tensors {_name}", _CT, weights=0.0, logits=SAME)(_packed(_passes, False))
row("compressed-tensors pack-quantized W4 g32", f"{_CT}, dequantize=True", weights=0.0,
    logits=SAME)(_packed("w4:group=32,solver=rtn", True))  # fmt: skip


@row("compressed-tensors pack-quantized W4 g32 asymmetric", f"{_CT}, dequantize=True", weights=0.0,
     logits=SAME)  # fmt: skip
def asymmetric(subject: Subject) -> Found:
    """Exact where it loads dense; whether the default path still raises is told."""
    found = _packed("w4:group=32,solver=rtn,symmetric=false", True)(subject)
    folder = subject.folder / f"compressed-tensors-{subject.count}"
    try:
        transformers_loads(subject, folder)
    except RuntimeError:
        found.note = "raises without dequantize=True"
    return found


def _bytes(passes: str) -> Callable[[Subject], Found]:
    def measure(subject: Subject) -> Found:
        from llmc.compiler.runtime.exporting.codes import without_grids

        model, folder = subject.export(passes, "compressed-tensors", dtype=torch.float32)
        plain, _ = without_grids(model.program)
        loaded = transformers_loads(subject, folder, dense=True)
        theirs = {n: m.weight.detach() for n, m in loaded.named_modules() if hasattr(m, "weight")}
        length = subject.ids.shape[1]
        inputs = {
            "input_ids": subject.ids, "position_ids": torch.arange(length).expand(2, -1),
            "attention_mask": torch.ones(2, length, dtype=torch.bool),
        }  # fmt: skip
        want = run(plain, {n.name: inputs[n.name] for n in plain.inputs})
        rounded = logits_of(transformers_loads(subject, folder), subject.ids)
        moved = subject.apart(rounded, model(subject.ids))
        return Found(
            subject.worst(subject.weights(model), theirs),
            subject.apart(logits_of(loaded, subject.ids), want),
            f"inputs unrounded; rounded, where theirs end at -128 and ours at -127: {moved:.1e}",
        )

    return measure


for _name, _passes in (("token", "w8a8:solver=rtn"), ("static", "w8a8:solver=rtn,act=static")):
    row(f"compressed-tensors int-quantized W8A8 {_name}", _CT, weights=0.0, logits=SAME)(
        _bytes(_passes)
    )


# ** GPTQ **


def gptqmodel_loads(folder: Path, ids: Tensor) -> tuple[dict[str, Tensor], Tensor]:
    """Weights [N, K] by module and logits, by GPTQModel in a process of its own (fp16, CPU)."""
    from safetensors.torch import load_file, save_file

    if not (GPTQ / "gptqmodel").is_dir():
        raise NotRun("GPTQModel is not installed; make interop installs it into .cache")
    with tempfile.TemporaryDirectory() as place:
        given, out = Path(place) / "ids.safetensors", Path(place) / "out.safetensors"
        save_file({"ids": ids}, given)
        command = [sys.executable, __file__, str(folder), str(given), str(out)]
        done = subprocess.run(command, capture_output=True, text=True, check=False, timeout=900)
        if done.returncode:
            raise NotRun(f"GPTQModel fails: {' '.join(done.stderr.split())[-200:]}")
        tensors = load_file(out)
    logits = tensors.pop("logits")
    return tensors, logits


def gptqmodel_process(folder: str, given: str, out: str) -> None:
    """What the process of :func:`gptqmodel_loads` does."""
    sys.path.insert(0, str(GPTQ))
    from gptqmodel import BACKEND, GPTQModel
    from safetensors.torch import load_file, save_file

    model = GPTQModel.load(folder, device="cpu", backend=BACKEND.TORCH, dtype=torch.float16).model
    tensors = {
        name: module.dequantize_weight().T.contiguous()
        for name, module in model.named_modules()
        if hasattr(module, "dequantize_weight")
    }
    tensors["logits"] = logits_of(model, load_file(given)["ids"]).float()
    save_file(tensors, out)


def _gptq(passes: str) -> Callable[[Subject], Found]:
    def measure(subject: Subject) -> Found:
        model, folder = subject.export(passes, "gptq")
        theirs, have = gptqmodel_loads(folder, subject.ids)
        logits = subject.apart(have, model(subject.ids))
        return Found(subject.worst(subject.weights(model), theirs), logits, "computes in fp16")

    return measure


for _name, _passes in (
    ("v1 W4 g32", "w4:group=32,solver=rtn"),
    ("v1 W4 g32 + 2:4 kept dense", "w4:group=32,solver=rtn,prune24"),
    ("v1 W8 row", "w8:group=row,solver=rtn"),
    ("v2 W4 g32 asymmetric", "w4:group=32,solver=rtn,symmetric=false"),
    ("v2 W3 g32 asymmetric", "w3:group=32,solver=rtn,symmetric=false"),
):
    row(f"gptq {_name}", "GPTQModel TorchLinear", weights=HALF_ULP, logits=2e-2)(_gptq(_passes))


# ** AWQ **


def _awq(passes: str) -> Callable[[Subject], Found]:
    def measure(subject: Subject) -> Found:
        from compressed_tensors.compressors import BaseCompressor
        from compressed_tensors.entrypoints.convert.converters.autoawq import AutoAWQConverter
        from compressed_tensors.quantization import QuantizationScheme
        from safetensors.torch import load_file

        model, folder = subject.export(passes, "awq")
        told = json.loads((folder / "config.json").read_text())["quantization_config"]
        tensors = load_file(folder / "model.safetensors")
        tensors = AutoAWQConverter.from_autoawq_config(told).process(tensors)
        scheme = QuantizationScheme(targets=["Linear"], weights={
            "num_bits": 4, "symmetric": False, "strategy": "group", "group_size": 32,
        })  # fmt: skip
        tool = BaseCompressor.get_value_from_registry("pack-quantized")
        parts = ("weight_packed", "weight_shape", "weight_scale", "weight_zero_point")
        theirs = {}
        for path in (n.removesuffix(".weight_packed") for n in tensors if "weight_packed" in n):
            given = {p: tensors[f"{path}.{p}"] for p in parts}
            given["weight_scale"] = given["weight_scale"].float()
            theirs[path] = tool.decompress(given, scheme)["weight"]
        return Found(subject.worst(subject.weights(model), theirs))

    return measure


for _name, _passes in (
    ("W4 g32", "w4:group=32,solver=rtn"),
    ("W4 g32 asymmetric", "w4:group=32,solver=rtn,symmetric=false"),
):
    row(f"awq GEMM {_name}", "compressed-tensors AutoAWQConverter", weights=0.0)(_awq(_passes))


if __name__ == "__main__":
    gptqmodel_process(*sys.argv[1:])
