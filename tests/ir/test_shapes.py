"""Shape rules on symbolic sizes: what they prove, and what they refuse."""

from __future__ import annotations

from typing import Any

import pytest
import sympy
import torch

from llmc.compiler.ir.dims import BATCH, SEQ, dim
from llmc.compiler.ir.errors import ModelError
from llmc.compiler.ir.ops import row
from llmc.compiler.ir.types import SymType, TensorType, show_type

B, S = BATCH, SEQ
F, I = torch.float32, torch.int64  # noqa: E741
b, s = SymType(B), SymType(S)


def f(*shape: Any) -> TensorType:
    return TensorType(tuple(map(dim, shape)), F)


def i(*shape: Any) -> TensorType:
    return TensorType(tuple(map(dim, shape)), I)


def m(*shape: Any) -> TensorType:
    return TensorType(tuple(map(dim, shape)), torch.bool)


GIVES: list[tuple[str, tuple[Any, ...], dict[str, Any], str]] = [
    ("aten.add.Tensor", (f(B, S, 8), f(8)), {}, "f32[B, S, 8]"),
    ("aten.add.Tensor", (f(B, 1, S), f(S, 1)), {}, "f32[B, S, S]"),
    ("aten.mul.Tensor", (i(S), 2.0), {}, "f32[S]"),
    ("aten.mul.Tensor", (i(S), f()), {}, "f32[S]"),
    ("aten.add.Tensor", (TensorType((S,), torch.bfloat16), f()), {}, "bf16[S]"),
    ("aten.le.Tensor", (i(1, 1, S), i(B, S, 1)), {}, "b8[B, S, S]"),
    ("aten.linear.default", (f(B, S, 8), f(3, 8), f(3)), {}, "f32[B, S, 3]"),
    ("aten.matmul.default", (f(B, 4, S, 8), f(B, 1, 8, S)), {}, "f32[B, 4, S, S]"),
    ("aten.bmm.default", (f(4 * B, S, 8), f(4 * B, 8, S)), {}, "f32[4*B, S, S]"),
    ("aten.addmm.default", (f(3), f(B * S, 8), f(8, 3)), {}, "f32[B*S, 3]"),
    ("aten.embedding.default", (f(50, 8), i(B, S)), {}, "f32[B, S, 8]"),
    ("aten.reshape.default", (f(B, S, 8), [b, s, 2, 4]), {}, "f32[B, S, 2, 4]"),
    ("aten.reshape.default", (f(B, S, 8), [-1, 8]), {}, "f32[B*S, 8]"),
    ("aten.reshape.default", (f(B * S, 8), [b, -1, 8]), {}, "f32[B, S, 8]"),
    ("aten.reshape.default", (f(B, S, 2, 4), [b, s, -1]), {}, "f32[B, S, 8]"),
    ("aten.view.default", (f(B, 2 * S), [b, 2, s]), {}, "f32[B, 2, S]"),
    ("aten.expand.default", (f(B, 1, S), [b, 4, -1]), {}, "f32[B, 4, S]"),
    ("aten.expand.default", (f(1, S), [b, -1, -1]), {}, "f32[B, 1, S]"),
    ("aten.repeat.default", (f(B, S), [2, 1, 3]), {}, "f32[2, B, 3*S]"),
    ("aten.repeat_interleave.self_int", (f(B, 2, S), 3, 1), {}, "f32[B, 6, S]"),
    ("aten.transpose.int", (f(B, S, 2), 1, -1), {}, "f32[B, 2, S]"),
    ("aten.permute.default", (f(B, S, 2), [2, 0, 1]), {}, "f32[2, B, S]"),
    ("aten.unsqueeze.default", (f(B, S), -1), {}, "f32[B, S, 1]"),
    ("aten.squeeze.dim", (f(B, 1, S), 1), {}, "f32[B, S]"),
    ("aten.squeeze.dim", (f(B, 1, S), 2), {}, "f32[B, 1, S]"),
    ("aten.slice.Tensor", (f(B, S), 1, 1), {}, "f32[B, S - 1]"),
    ("aten.slice.Tensor", (f(B, S), 1, -1), {}, "f32[B, 1]"),
    ("aten.slice.Tensor", (f(B, S), 1, 0, -1), {}, "f32[B, S - 1]"),
    ("aten.slice.Tensor", (f(64, 8), 0, 0, s), {}, "f32[S, 8]"),
    ("aten.slice.Tensor", (f(B, 8), 1, 2, 1 << 62), {}, "f32[B, 6]"),
    ("aten.select.int", (f(B, S, 8), 1, -1), {}, "f32[B, 8]"),
    ("aten.split.Tensor", (f(B, S, 9), 4, 2), {}, "(f32[B, S, 4], f32[B, S, 4], f32[B, S, 1])"),
    ("aten.chunk.default", (f(B, 8), 2, -1), {}, "(f32[B, 4], f32[B, 4])"),
    ("aten.cat.default", ([f(B, S), f(B, 1)], -1), {}, "f32[B, S + 1]"),
    ("aten.stack.default", ([f(B, S), f(B, S)], 1), {}, "f32[B, 2, S]"),
    ("aten.mean.dim", (f(B, S, 8), [-1], True), {}, "f32[B, S, 1]"),
    ("aten.sum.dim_IntList", (i(B, S), [1]), {}, "i64[B]"),
    ("aten.sum.default", (m(B, S),), {}, "i64[]"),
    ("aten.cumsum.default", (m(B, S), -1), {}, "i64[B, S]"),
    ("aten.topk.default", (f(B * S, 4), 2), {}, "(f32[B*S, 2], i64[B*S, 2])"),
    ("aten.argmax.default", (f(B, S, 8), -1), {}, "i64[B, S]"),
    ("aten.index.Tensor", (f(B, S, 8), [None, i(S)]), {}, "f32[B, S, 8]"),
    ("aten.index.Tensor", (f(64, 8), [i(B, S)]), {}, "f32[B, S, 8]"),
    ("aten.index.Tensor", (f(B, S, 8), [i(B), None, i(B)]), {}, "f32[B, S]"),
    ("aten.gather.default", (f(B, S), 1, i(B, 3)), {}, "f32[B, 3]"),
    ("aten.one_hot.default", (i(B, S), 4), {}, "i64[B, S, 4]"),
    ("aten.arange.default", (s,), {}, "i64[S]"),
    ("aten.arange.start", (1, SymType(dim(B * S + 1))), {}, "i64[B*S]"),
    ("aten.zeros.default", ([b, s, 4],), {"dtype": torch.bool}, "b8[B, S, 4]"),
    ("aten.full.default", ([b], 1.0), {}, "f32[B]"),
    ("aten.where.self", (m(B, 1, S), f(B, S, S), f()), {}, "f32[B, S, S]"),
    ("aten.layer_norm.default", (f(B, S, 8), [8], f(8), f(8), 1e-5), {}, "f32[B, S, 8]"),
    ("aten.scaled_dot_product_attention.default",
     (f(B, 4, S, 8), f(B, 1, S, 8), f(B, 1, S, 8), m(B, 1, S, S)), {}, "f32[B, 4, S, 8]"),
    ("llmc.attention", (f(B, 4, S, 8), f(B, 2, S, 8), f(B, 2, S, 6)), {"scale": 1.0},
     "f32[B, S, 4, 6]"),
    ("aten.sym_size.int", (f(B, 2 * S), 1), {}, "int(2*S)"),
    ("operator.mul", (b, SymType(dim(2 * S))), {}, "int(2*B*S)"),
    ("operator.floordiv", (s, 2), {}, "int(floor(S/2))"),
    ("operator.truediv", (SymType(dim(4 * S)), 4), {}, "int(S)"),
]  # fmt: skip


@pytest.mark.parametrize(("op", "args", "kwargs", "want"), GIVES)
def test_symbolic_result(op: str, args: Any, kwargs: Any, want: str) -> None:
    assert show_type(row(op).infer(*args, **kwargs)) == want


REFUSED: list[tuple[str, tuple[Any, ...], dict[str, Any]]] = [
    ("aten.add.Tensor", (f(B, S), f(S, B)), {}),
    ("aten.add.Tensor", (f(S), f(16)), {}),
    ("aten.bitwise_and.Tensor", (f(S), f(S)), {}),
    ("aten.linear.default", (f(B, 8), f(3, 9)), {}),
    ("aten.linear.default", (f(B, 8), f(3, 8), f(4)), {}),
    ("aten.linear.default", (f(B, 8), TensorType((3, 8), torch.bfloat16)), {}),
    ("aten.matmul.default", (f(B, S), f(B, S)), {}),
    ("aten.bmm.default", (f(B, 2, 3), f(S, 3, 4)), {}),
    ("aten.mm.default", (f(B, 2, 3), f(B, 3, 4)), {}),
    ("aten.addmm.default", (f(5), f(B, 8), f(8, 3)), {}),
    ("aten.embedding.default", (f(50, 8), f(B, S)), {}),
    ("aten.reshape.default", (f(B, S, 8), [b, s, 9]), {}),
    ("aten.reshape.default", (f(B, S, 8), [-1, -1]), {}),
    ("aten.reshape.default", (f(B, S), [16, -1]), {}),
    ("aten.expand.default", (f(B, 3), [-1, 4]), {}),
    ("aten.expand.default", (f(B, 3), [4]), {}),
    ("aten.permute.default", (f(B, S), [0, 0]), {}),
    ("aten.transpose.int", (f(B, S), 0, 2), {}),
    ("aten.t.default", (f(B, S, 2),), {}),
    ("aten.select.int", (f(B, 3), 1, 3), {}),
    ("aten.split.Tensor", (f(B, S), 4, 1), {}),
    ("aten.split_with_sizes.default", (f(B, 8), [3, 4], 1), {}),
    ("aten.cat.default", ([f(B, S), f(S, S)], -1), {}),
    ("aten.stack.default", ([f(B, S), f(S, B)],), {}),
    ("aten.mean.dim", (i(B, S), [1]), {}),
    ("aten.topk.default", (f(B, 4), 5), {}),
    ("aten.index.Tensor", (f(B, S), [m(B)]), {}),
    ("aten.index.Tensor", (f(B), [i(S), i(S)]), {}),
    ("aten.gather.default", (f(B, S), 1, i(S)), {}),
    ("aten.scatter.src", (f(B, S), 1, i(B, 2), i(B, 2)), {}),
    ("aten.index_put.default", (f(8), [i(S)], f(B)), {}),
    ("aten.one_hot.default", (i(B), -1), {}),
    ("aten.dropout.default", (f(B), 0.1, True), {}),
    ("aten.layer_norm.default", (f(B, 8), [9]), {}),
    ("aten.where.self", (f(B), f(B), f(B)), {}),
    ("aten.masked_fill.Scalar", (f(B), i(B), 0.0), {}),
    ("aten.zeros.default", ([1 << 20, 1 << 20],), {}),
    ("aten.expand.default", (f(1), [1 << 40]), {}),
    ("aten.zeros.default", ([-1],), {}),
    ("aten.arange.default", (1 << 40,), {}),
    ("aten.scaled_dot_product_attention.default",
     (f(B, 4, S, 8), f(B, 4, S, 8), f(B, 4, S, 8), None, 0.1), {}),
    ("llmc.attention", (f(B, 3, S, 8), f(B, 2, S, 8), f(B, 2, S, 8)), {"scale": 1.0}),
    ("operator.truediv", (s, 2), {}),
    ("operator.add", (f(B), 1), {}),
    ("operator.getitem", ((f(B),), 1), {}),
]  # fmt: skip


@pytest.mark.parametrize(("op", "args", "kwargs"), REFUSED)
def test_misfit_is_refused(op: str, args: Any, kwargs: Any) -> None:
    with pytest.raises(ModelError, match="expected"):
        row(op).infer(*args, **kwargs)


def test_unknown_op_names_the_nearest() -> None:
    with pytest.raises(ModelError, match=r"did you mean 'aten\.linear\.default'"):
        row("aten.liner.default")


@pytest.mark.parametrize(
    ("before", "after", "want"),
    [
        ((S, 8), (S, 2, 4), [("same", (0,), (0,)), ("split", (1,), (1, 2))]),
        ((S, 2, 4), (S, 8), [("same", (0,), (0,)), ("merge", (1, 2), (1,))]),
        ((B, S, 8), (B * S, 8), [("merge", (0, 1), (0,)), ("same", (2,), (1,))]),
        ((B * S, 8), (B, S, 8), [("split", (0,), (0, 1)), ("same", (1,), (2,))]),
        ((1, 6), (2, 1, 3), [("split", (1,), (0, 2))]),
        ((4, 6), (6, 4), [("mix", (0, 1), (0, 1))]),
        ((2, 3, 4), (6, 2, 2), [("merge", (0, 1), (0,)), ("split", (2,), (1, 2))]),
    ],
)  # fmt: skip
def test_reshape_ties_are_the_shortest_runs(before: Any, after: Any, want: Any) -> None:
    x, out = f(*before), f(*after)
    ties = row("aten.reshape.default").ties
    assert ties is not None
    found = [(t.kind, tuple(a for _, a in t.ins), t.outs) for t in ties(out, x, list(after))]
    assert found == want


def test_cost_counts_multiplications_and_bytes() -> None:
    r = row("aten.linear.default")
    assert r.flops is not None
    x, w = f(B, S, 8), f(3, 8)
    assert sympy.expand(r.flops(f(B, S, 3), x, w) - 48 * B * S) == 0
