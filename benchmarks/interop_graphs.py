"""Rows of GGUF, ONNX and AOTInductor packages: their loaders are independent of llmc."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from interop_base import SAME, Found, NotRun, Subject, row
from interop_codes import logits_of
from torch import Tensor

# m of an asymmetric block is rounded to fp16: half a last place of what is below 1.
_ROUNDED = 2.0**-12


def _blocks(passes: str) -> Callable[[Subject], Found]:
    def measure(subject: Subject) -> Found:
        from transformers import AutoModelForCausalLM

        model, folder = subject.export(passes, "gguf", dtype=torch.float32)
        loaded = AutoModelForCausalLM.from_pretrained(
            str(folder), gguf_file="model.gguf", dtype=torch.float32
        ).eval()
        theirs = {n: m.weight.detach() for n, m in loaded.named_modules() if hasattr(m, "weight")}
        have = logits_of(loaded, subject.ids)
        return Found(
            subject.worst(subject.weights(model), theirs), subject.apart(have, model(subject.ids))
        )

    return measure


for _name, _passes, _weights, _logits in (
    ("Q4_0, rotary rows in order", "w4:group=32,solver=rtn", 0.0, SAME),
    ("Q4_0 + 2:4 kept dense", "w4:group=64,solver=rtn,prune24", 0.0, SAME),
    ("Q4_1 (zero points as fp16 m)", "w4:group=32,solver=rtn,symmetric=false", _ROUNDED, 1e-2),
    ("Q5_0", "w5:group=32,solver=rtn", 0.0, SAME),
    ("Q8_0", "w8:group=row,solver=rtn", 0.0, SAME),
):
    row(f"gguf {_name}", "transformers gguf_file= (gguf)", weights=_weights, logits=_logits)(
        _blocks(_passes)
    )


def _session(folder: Path, subject: Subject, **entries: str) -> Tensor:
    """Logits by onnxruntime, with entries of the session's configuration."""
    try:
        import onnxruntime
    except ImportError as error:
        raise NotRun("pip install onnxruntime") from error
    options = onnxruntime.SessionOptions()
    options.intra_op_num_threads, options.log_severity_level = 1, 3
    for key, value in entries.items():
        options.add_session_config_entry(f"session.{key}", value)
    session = onnxruntime.InferenceSession(
        str(folder / "model.onnx"), options, providers=["CPUExecutionProvider"]
    )
    whole = _inputs(subject)
    given = {i.name: whole[i.name].numpy() for i in session.get_inputs()}
    return torch.from_numpy(session.run(None, given)[0])


def _inputs(subject: Subject) -> dict[str, Tensor]:
    rows, length = subject.ids.shape
    return {
        "input_ids": subject.ids,
        "position_ids": torch.arange(length).expand(rows, -1).contiguous(),
        "attention_mask": torch.ones(rows, length, dtype=torch.bool),
    }


def _level(folder: Path, level: int) -> None:
    """Let every packed product of a file say another accuracy level."""
    import onnx

    path = str(folder / "model.onnx")
    model = onnx.load(path, load_external_data=False)
    for node in model.graph.node:
        for attribute in node.attribute:
            if attribute.name == "accuracy_level":
                attribute.i = level
    onnx.save(model, path)


def _products(passes: str, level: int) -> Callable[[Subject], Found]:
    def measure(subject: Subject) -> Found:
        model, folder = subject.export(passes, "onnx")
        _level(folder, level)
        return Found(None, subject.apart(_session(folder, subject), model(subject.ids)))

    return measure


for _name, _passes in (
    ("W4 g32", "w4:group=32,solver=rtn"),
    ("W4 g64 asymmetric", "w4:group=64,solver=rtn,symmetric=false"),
    ("W8 row", "w8:group=row,solver=rtn"),
):
    for _at in (0, 1):
        row(f"onnx MatMulNBits {_name}, accuracy_level {_at}", "onnxruntime", logits=SAME)(
            _products(_passes, _at)
        )
row("onnx MatMulNBits W4 g32, accuracy_level 4", "onnxruntime")(
    _products("w4:group=32,solver=rtn", 4)
)


def _standard(**entries: str) -> Callable[[Subject], Found]:
    def measure(subject: Subject) -> Found:
        model, folder = subject.export("w4:group=32,solver=rtn", "onnx-qdq")
        return Found(None, subject.apart(_session(folder, subject, **entries), model(subject.ids)))

    return measure


row("onnx-qdq W4 g32, opset 21, level 0 in the session", "onnxruntime", logits=SAME)(
    _standard(qdq_matmulnbits_accuracy_level="0")
)
row("onnx-qdq W4 g32, opset 21, as a session comes", "onnxruntime")(_standard())


@row("pt2 W4 g128 (AOTInductor)", "torch alone", logits=SAME)
def package(subject: Subject) -> Found:
    """The package is loaded by torch; in the tests by a process that cannot import llmc."""
    from llmc.compiler.ir.errors import ResourceError

    try:
        model, folder = subject.export("w4:solver=rtn", "pt2")
    except ResourceError as error:
        raise NotRun(str(error)) from error
    loaded: Any = torch._inductor.aoti_load_package(str(folder / "model.pt2"))
    return Found(None, subject.apart(loaded(*_inputs(subject).values()), model(subject.ids)))
