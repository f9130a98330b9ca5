"""Codes as ONNX stores them: MatMulNBits' bytes, and 4-bit integers of the standard.

MatMulNBits: codes uint8 [N, K / block, block · bits / 8], low bits first, scale [N, blocks], zero
points uint8 [N, ceil(blocks · bits / 8)]. Source: the contrib operators of onnxruntime.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from .codes import Coded

BITS = (2, 4, 8)
BLOCKS = (16, 32, 64, 128, 256)
# A row with one scale is cut into blocks of so many columns, which share it.
_ROW = 128


@dataclass(frozen=True)
class Packed:
    """One weight [rows, columns] in MatMulNBits' layout; scales are fp32."""

    codes: Tensor
    scale: Tensor
    zero: Tensor | None
    rows: int
    columns: int
    bits: int
    block: int


def check_weight(weight: Coded, standard: bool) -> None:
    """Raises UsageError where ONNX has no place for the codes; the layer and the field."""
    codes = weight.codes
    hint = "--format hf writes the weight dense"
    if codes.grid != "uniform":
        raise weight.refuse("grid", "integers", codes.grid, hint)
    bits = (4,) if standard else BITS
    if codes.bits not in bits:
        told = " or ".join(map(str, bits))
        raise weight.refuse("bits", told, codes.bits, f"compile with w{bits[-1]}")
    if codes.group is not None and codes.group not in BLOCKS:
        told = ", ".join(map(str, BLOCKS))
        raise weight.refuse("group", f"one of {told}, or a row", codes.group,
                            "compile with group=128")  # fmt: skip


def pack(weight: Coded) -> Packed:
    """The weight's codes as they are; nothing is quantised again."""
    found, bits = weight.load(), weight.codes.bits
    rows, columns = weight.shape
    block = weight.codes.group or _ROW
    count = -(-columns // block)
    scale = found.scale.float()
    zero = found.zero
    if scale.shape[1] != count:
        scale = scale.expand(rows, count)
        zero = None if zero is None else zero.expand(rows, count)
    middle = 1 << (bits - 1)
    q = torch.nn.functional.pad(found.codes, (0, count * block - columns), value=middle)
    data = _bytes(q, bits).reshape(rows, count, -1)
    packed_zero = None
    if zero is not None:
        each = 8 // bits
        padded = torch.nn.functional.pad(zero, (0, -count % each))
        packed_zero = _bytes(padded.contiguous(), bits)
    return Packed(data, scale.contiguous(), packed_zero, rows, columns, bits, block)


def _bytes(values: Tensor, bits: int) -> Tensor:
    """uint8 [..., n] of ``bits`` each -> uint8 [..., n · bits / 8], low bits first."""
    each = 8 // bits
    parts = values.unflatten(-1, (-1, each)).to(torch.int32)
    return (parts << (torch.arange(each) * bits)).sum(-1).to(torch.uint8)


def unpack(data: Tensor, bits: int) -> Tensor:
    """Inverse of the packing: uint8 [..., n] -> uint8 [..., n · 8 / bits]."""
    shifts = torch.arange(0, 8, bits)
    return ((data.unsqueeze(-1) >> shifts) & ((1 << bits) - 1)).flatten(-2)


def to_standard(model: Any) -> None:
    """Every MatMulNBits of a model becomes DequantizeLinear and MatMul, in place.

    Codes are UINT4 [N, blocks · block] along whose second axis a scale holds for a block.
    """
    from onnx import TensorProto, helper, numpy_helper

    graph = model.graph
    stored = {t.name: t for t in graph.initializer}
    nodes = []
    for node in graph.node:
        if node.op_type != "MatMulNBits":
            nodes.append(node)
            continue
        attrs = {a.name: helper.get_attribute_value(a) for a in node.attribute}
        rows, columns, block = attrs["N"], attrs["K"], attrs["block_size"]
        name = node.output[0]
        scale = numpy_helper.to_array(stored[node.input[2]])
        width = scale.shape[-1] if scale.ndim == 2 else scale.size // rows
        codes = _nibbles(stored[node.input[1]].raw_data, f"{name}.codes", (rows, width * block))
        if len(node.input) > 3 and node.input[3]:
            packed = torch.from_numpy(numpy_helper.to_array(stored[node.input[3]]).copy())
            values = unpack(packed.reshape(rows, -1), 4)[:, :width]
        else:
            values = torch.full((rows, width), 8, dtype=torch.uint8)
        flat = torch.nn.functional.pad(values.reshape(-1), (0, values.numel() % 2))
        zero = _nibbles(_bytes(flat, 4).numpy().tobytes(), f"{name}.zero", (rows, width))
        wide = numpy_helper.from_array(scale.reshape(rows, width).copy(), f"{name}.scale")
        graph.initializer.extend([codes, zero, wide])
        nodes.append(helper.make_node(
            "DequantizeLinear", [codes.name, wide.name, zero.name], [f"{name}.w"], axis=1,
            block_size=block))  # fmt: skip
        weight = f"{name}.w"
        if width * block != columns:
            ends = [(f"{name}.{k}", v) for k, v in (("from", 0), ("to", columns), ("axis", 1))]
            for key, value in ends:
                graph.initializer.append(helper.make_tensor(key, TensorProto.INT64, [1], [value]))
            nodes.append(helper.make_node("Slice", [weight, *(k for k, _ in ends)],
                                          [f"{name}.k"]))  # fmt: skip
            weight = f"{name}.k"
        nodes.append(helper.make_node("Transpose", [weight], [f"{name}.t"], perm=[1, 0]))
        nodes.append(helper.make_node("MatMul", [node.input[0], f"{name}.t"], [name]))
    del graph.node[:]
    graph.node.extend(nodes)
    read = {i for n in graph.node for i in n.input}
    for tensor in [t for t in graph.initializer if t.name not in read]:
        graph.initializer.remove(tensor)
    for domain in [o for o in model.opset_import if o.domain == "com.microsoft"]:
        model.opset_import.remove(domain)


def _nibbles(raw: bytes, name: str, shape: tuple[int, int]) -> Any:
    """A UINT4 initializer; two values to a byte, low first."""
    from onnx import TensorProto, helper

    return helper.make_tensor(name, TensorProto.UINT4, shape, raw, raw=True)
