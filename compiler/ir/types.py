"""What a value of a graph is: a tensor of symbolic shape, a symbolic integer, or a tuple."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TypeAlias

import torch

from .dims import Dim, Shape, dim, numel, same, same_shape, show, show_shape

_SHORT = {
    torch.float64: "f64", torch.float32: "f32", torch.float16: "f16", torch.bfloat16: "bf16",
    torch.int64: "i64", torch.int32: "i32", torch.int16: "i16", torch.int8: "i8",
    torch.uint8: "u8", torch.bool: "b8",
}  # fmt: skip
DTYPES = {short: dtype for dtype, short in _SHORT.items()}


def short(dtype: torch.dtype) -> str:
    """Two to four letters for a dtype, e.g. ``bf16``."""
    return _SHORT.get(dtype, str(dtype).removeprefix("torch."))


@dataclass(frozen=True)
class TensorType:
    """Shape (ints or sympy dims) and dtype of a tensor."""

    shape: Shape
    dtype: torch.dtype

    @property
    def rank(self) -> int:
        return len(self.shape)

    @property
    def bytes(self) -> Dim:
        """Bytes that the tensor occupies, an expression of the symbols."""
        return dim(numel(self.shape) * self.dtype.itemsize)

    def with_shape(self, *shape: Dim) -> TensorType:
        return TensorType(tuple(dim(d) for d in shape), self.dtype)

    def with_dtype(self, dtype: torch.dtype) -> TensorType:
        return TensorType(self.shape, dtype)

    def __str__(self) -> str:
        return short(self.dtype) + show_shape(self.shape)


@dataclass(frozen=True)
class SymType:
    """An integer that depends on the input's shape, e.g. the sequence length."""

    expr: Dim

    def __str__(self) -> str:
        return f"int({show(self.expr)})"


ValueType: TypeAlias = "TensorType | SymType | tuple[ValueType, ...] | None"


def same_type(a: ValueType, b: ValueType) -> bool:
    """Whether two value types are provably equal."""
    if isinstance(a, TensorType) and isinstance(b, TensorType):
        return a.dtype == b.dtype and same_shape(a.shape, b.shape)
    if isinstance(a, SymType) and isinstance(b, SymType):
        return same(a.expr, b.expr)
    if isinstance(a, tuple) and isinstance(b, tuple):
        return len(a) == len(b) and all(same_type(x, y) for x, y in zip(a, b, strict=True))
    return a is None and b is None


def show_type(value: ValueType) -> str:
    """Text of a value type, e.g. ``f32[B, S, 256]``."""
    if isinstance(value, tuple):
        return "(" + ", ".join(show_type(v) for v in value) + ")"
    return str(value)


def total_bytes(value: ValueType) -> Dim:
    """Bytes of all tensors of a value."""
    if isinstance(value, TensorType):
        return value.bytes
    if isinstance(value, tuple):
        out: Dim = 0
        for v in value:
            out = out + total_bytes(v)
        return dim(out)
    return 0
