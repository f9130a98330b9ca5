"""The fused op: a body that is read and never run, whose meaning is that of its rows."""

from __future__ import annotations

from typing import Any

import pytest
import torch

from llmc.compiler.ir.errors import ModelError
from llmc.compiler.ir.ops import ROWS, cost
from llmc.compiler.ir.ops.fused import MAX_STEPS, fused, read, recast, values_of, write
from llmc.compiler.ir.types import TensorType

BODY = (
    "v0 = llmc.rms_norm(a0, a1, eps=1e-05); v1 = aten.linear.default(v0, a2); "
    "v2 = aten.cat.default([v1, a3], -1)"
)


def given(*shape: int) -> list[torch.Tensor]:
    """x [..., 6], gain [6], weight [3, 6] and what is put beside it [..., 3]."""
    g = torch.Generator().manual_seed(0)
    return [torch.randn(*s, generator=g) for s in ((*shape, 6), (6,), (3, 6), (*shape, 3))]


def by_hand(x: torch.Tensor, gain: torch.Tensor, w: torch.Tensor, y: torch.Tensor) -> torch.Tensor:
    h = x * torch.rsqrt(x.pow(2).mean(-1, keepdim=True) + 1e-5) * gain
    return torch.cat([h @ w.T, y], -1)


def test_a_body_means_its_steps() -> None:
    tensors = given(2, 5)
    torch.testing.assert_close(fused(tensors, body=BODY), by_hand(*tensors))


def test_reading_and_writing_are_inverse() -> None:
    """With every kind of literal that a body can hold."""
    text = (
        "v0 = llmc.dequantize(a0, a1, None, bits=4, group=8, columns=8, dtype=torch.float64); "
        "v1 = aten.slice.Tensor(v0, -1, 0, 4); v2 = llmc.gated(v1, v1, act='silu'); "
        'v3 = aten.clamp.default(v2, float("-inf"), 2.5); v4 = aten.cat.default([v3, a2], -1)'
    )
    assert write(read(text)) == text
    assert "dtype=torch.bfloat16" in recast(text, torch.bfloat16)


def test_only_what_is_wanted_is_computed() -> None:
    """A value that hangs on parameters alone needs no x."""
    _, gain, w, _ = given(4)
    body = f"{BODY}; v3 = aten.t.default(a2); v4 = aten.linear.default(v2, v3)"
    found = values_of(body, [None, gain, w, None], ["v3", "a1"])
    assert torch.equal(found["v3"], w.T)
    assert found["a1"] is gain


@pytest.mark.parametrize(
    ("body", "words"),
    [
        ("", "1 to"),
        ("v0 = __import__('os').system('true')", "an op that a body may hold"),
        ("v0 = aten.nothing.default(a0)", "an op that a body may hold"),
        ("v0 = llmc.fused([a0], body='v0 = aten.t.default(a0)')", "an op that a body may hold"),
        ("v0 = llmc.cached_attention(a0, a0, a0, a0, state='kv0')", "an op that a body may hold"),
        ("v0 = aten.t.default(v1)", "an earlier value"),
        ("v0 = aten.t.default(lambda: 1)", "an earlier value"),
        ("v0 = aten.t.default(open)", "an earlier value"),
        ("v0 = aten.t.default(a0); v0 = aten.t.default(a0)", "twice"),
        ("a0 = aten.t.default(a0)", "twice"),
        ("aten.t.default(a0)", "expected one call"),
        ("v0 = aten.add.Tensor(a0, a0, **a0)", "keyword arguments"),
        ("v0 = aten.t.default(a0", "expected a body"),
        ("; ".join(f"v{i} = aten.t.default(a0)" for i in range(MAX_STEPS + 1)), "1 to"),
        ("v0 = aten.t.default(" + "(" * 500 + "a0" + ")" * 500 + ")", "expected a"),
        ("v0 = aten.t.default(a7)", "inputs of a body, found a7"),
    ],
)
def test_what_is_no_body_is_refused(body: str, words: str) -> None:
    """Nothing of it is run."""
    with pytest.raises(ModelError, match=words):
        fused([torch.zeros(2, 2)], body=body)


def test_a_type_that_a_row_refuses_is_refused() -> None:
    row = ROWS["llmc.fused"]
    types = [TensorType(t.shape, t.dtype) for t in given(2)]
    assert row.infer(types, body=BODY) == TensorType((2, 6), torch.float32)
    with pytest.raises(ModelError):
        row.infer([types[0], types[1], types[1], types[3]], body=BODY)


class Module(torch.nn.Module):
    """The op in a module, as a lowered graph calls it."""

    def __init__(self) -> None:
        super().__init__()
        _, self.gain, self.w, _ = given(1)

    def forward(self, x: torch.Tensor) -> Any:
        return torch.ops.llmc.fused([x, self.gain, self.w, x[..., :3]], body=BODY) * 2


def test_a_graph_that_holds_it_exports_with_a_dynamic_length() -> None:
    some = torch.export.Dim("S", min=2, max=64)
    exported = torch.export.export(Module(), (given(2, 5)[0],), dynamic_shapes={"x": {1: some}})
    assert any(n.target is torch.ops.llmc.fused.default for n in exported.graph.nodes)
    longer = given(2, 9)[0]
    torch.testing.assert_close(exported.module()(longer), Module()(longer), rtol=1e-6, atol=1e-6)


def test_the_op_keeps_torchs_rules() -> None:
    """Schema, fake kernel and dispatch, as torch.library checks them."""
    torch.library.opcheck(
        torch.ops.llmc.fused.default, (given(2, 3),), {"body": BODY},
        test_utils=("test_schema", "test_faketensor"),
    )  # fmt: skip


def test_its_cost_is_that_of_its_rows() -> None:
    from torch import fx

    from llmc.compiler.ir.graph import Info

    graph = fx.Graph()
    nodes = [graph.placeholder(f"x{i}") for i in range(4)]
    for node, tensor in zip(nodes, given(7), strict=True):
        node.meta["llmc"] = Info(TensorType(tensor.shape, tensor.dtype))
    call = graph.call_function(torch.ops.llmc.fused.default, (nodes,), {"body": BODY})
    call.meta["llmc"] = Info(TensorType((7, 6), torch.float32))
    flops, moved = cost(call)
    assert flops == 4 * 7 * 6 + 2 * 7 * 3 * 6
    assert moved == 4 * (7 * 6 + 6 + 3 * 6 + 7 * 3 + 7 * 6)
