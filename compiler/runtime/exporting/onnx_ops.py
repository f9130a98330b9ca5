"""The one op that ONNX's standard lacks: a product of packed codes, as torch's exporter sees it."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

OPSET = 21
# 1: products in fp32. 0 lets onnxruntime choose, 4 would round inputs to 8 bits.
ACCURACY = 1


def product(
    x: Tensor, codes: Tensor, scale: Tensor, zero: Tensor | None, rows: int, columns: int,
    bits: int, block: int,
) -> Tensor:  # fmt: skip
    """com.microsoft.MatMulNBits: x [..., K] times codes uint8 [N, K / block, block · bits / 8].

    It stands for the op while a graph is exported; it computes nothing.
    """
    given = [x, codes, scale] + ([] if zero is None else [zero])
    attrs: Any = {"K": columns, "N": rows, "bits": bits, "block_size": block,
             "accuracy_level": ACCURACY}  # fmt: skip
    found: Tensor = torch.onnx.ops.symbolic(
        "com.microsoft::MatMulNBits", given, attrs, dtype=x.dtype, shape=(*x.shape[:-1], rows),
        version=1,
    )  # fmt: skip
    return found
