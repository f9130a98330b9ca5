"""The formats that a program can be exported to: one row here and one module each.

A module has ``write(job) -> dict``: it writes the folder whole or not at all, checks it by reading
it back, and returns its record. Nothing heavy is imported before that.
"""

from __future__ import annotations

import importlib
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from .job import Job


@dataclass(frozen=True)
class Format:
    """One format: its name, the line that help shows, and the module that writes it."""

    name: str
    help: str
    module: str

    def write(self, job: Job) -> dict[str, Any]:
        """Write a job; see :func:`..export.export`."""
        out: dict[str, Any] = importlib.import_module(f".{self.module}", __name__).write(job)
        return out


_ROWS = (
    Format("hf", "a Hugging Face checkpoint that plain from_pretrained loads; weights are dense",
           "hugging_face"),
    Format("compressed-tensors", "packed w4 and w8, w8a8, fp8; transformers, vLLM and SGLang",
           "compressed_tensors"),
    Format("gptq", "w2, w3, w4, w8; version 1 where symmetric, gptq_v2 else; vLLM, GPTQModel",
           "gptq"),
    Format("awq", "w4 in groups, GEMM layout; vLLM, SGLang and others", "awq"),
    Format("gguf", "w4, w5 and w8 as Q4, Q5 and Q8 blocks; llama.cpp and what is built on it",
           "gguf"),
    Format("onnx", "MatMulNBits on w2, w4 and w8 codes; onnxruntime", "onnx"),
    Format("onnx-qdq", "the same by the standard's DequantizeLinear on w4 codes, opset 21",
           "onnx"),
    Format("pt2", "an AOTInductor package: the graph compiled for this processor, codes packed",
           "pt2"),
)  # fmt: skip
FORMATS = {f.name: f for f in _ROWS}
