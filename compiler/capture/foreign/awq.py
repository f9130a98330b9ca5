"""AWQ checkpoints of the GEMM layout: codes and zero points packed along outputs, interleaved.

Stored are ``qweight`` int32 [K, N/8], ``qzeros`` int32 [G, N/8] and ``scales`` fp16 [G, N];
w = (q - z)·s. Nibble k of a word holds output ``ORDER[k]`` of its eight. Source: AutoAWQ.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor

from ...ir.errors import ModelError
from ...ir.ops.compressed import groups_of
from ...ir.packing import pack, unpack
from ...ir.scheme import Codes
from ...ir.types import short
from ..checkpoint import Checkpoint
from .base import FLOATS, Layer, Piece, check_shape, choice, codes_piece, entry, group_of

MARKS = (".qweight", ".qzeros", ".scales")
ORDER = (0, 2, 4, 6, 1, 3, 5, 7)


def interleave(q: Tensor) -> Tensor:
    """Codes [R, N] to int32 [R, N/8], eight outputs in each word in the order of ORDER."""
    return pack(q.unflatten(-1, (-1, 8))[..., list(ORDER)].flatten(-2), 4)


def straighten(words: Tensor) -> Tensor:
    """Inverse of :func:`interleave`: int32 [R, N/8] to uint8 [R, N]."""
    q = unpack(words, 4, words.shape[-1] * 8).unflatten(-1, (-1, 8))
    back = torch.tensor(ORDER).argsort()
    return q[..., back].flatten(-2)


def read(
    settings: Mapping[str, Any], checkpoint: Checkpoint, names: Mapping[str, str],
    linears: Mapping[str, str],
) -> list[Layer]:  # fmt: skip
    """The coded linears of a checkpoint; only headers are read.

    Args:
        settings: its quantization_config. names: module of the model by path in the checkpoint.
    Raises:
        ModelError: a field that is not supported, or tensors that do not fit it.
    """
    given = dict(settings)
    for key, old in (("bits", "w_bit"), ("group_size", "q_group_size")):
        given.setdefault(key, given.get(old))
    if isinstance(given.get("version"), str):
        given["version"] = given["version"].lower()
    choice(given, "bits", (4,))
    choice(given, "version", ("gemm",), "gemm")
    choice(given, "zero_point", (True,), True)
    group = group_of(given)
    return [_layer(checkpoint, path, group) for path in names]


def _layer(checkpoint: Checkpoint, path: str, group: int | None) -> Layer:
    packed = entry(checkpoint, f"{path}.qweight", (torch.int32,))
    zeros = entry(checkpoint, f"{path}.qzeros", (torch.int32,))
    scales = entry(checkpoint, f"{path}.scales", FLOATS)
    if len(packed.shape) != 2:
        raise ModelError(f"expected a matrix for {path}.qweight", where=packed.file.name)
    columns, rows = packed.shape[0], packed.shape[1] * 8
    width = group if group is not None and group < columns else columns
    groups = groups_of(columns, width)
    why = f"{rows} outputs, {columns} inputs in groups of {width}"
    check_shape(zeros, f"{path}.qzeros", (groups, rows // 8), why)
    check_shape(scales, f"{path}.scales", (groups, rows), why)
    codes = Codes(4, None if width == columns else width, False, scale_dtype=short(scales.dtype))

    def load(part: str) -> Tensor:
        return checkpoint.load(f"{path}.{part}")

    pieces = {
        "codes": codes_piece((rows, columns), 4,
                             lambda: pack(straighten(load("qweight")).t().contiguous(), 4)),
        "scale": Piece((rows, groups), scales.dtype, lambda: load("scales").t().contiguous()),
        "zero": Piece((rows, groups), torch.uint8,
                      lambda: straighten(load("qzeros")).t().contiguous()),
    }  # fmt: skip
    keys = tuple(f"{path}.{part}" for part in ("qweight", "qzeros", "scales"))
    return Layer(path, (rows, columns), codes, None, pieces, keys)
