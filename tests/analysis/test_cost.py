"""The cost model: exact where it can be counted by hand, linear where it must be."""

from __future__ import annotations

import json

import pytest
import torch
from analysis_build import HEADS, INNER, KV, D, H, Stack, stack

from llmc.compiler.analysis.blocks import apply_segments
from llmc.compiler.analysis.cost import CostModel
from llmc.compiler.ir.dims import BATCH, SEQ
from llmc.compiler.ir.errors import UsageError
from llmc.compiler.pipeline.zoo import Builder


def test_a_linear_by_hand() -> None:
    b = Builder()
    x = b.input("x", torch.float32, BATCH, SEQ, H)
    y = b.linear(x, INNER, H, bias=True)
    model = CostModel(b.finish(y), 2, 5)
    row = model.node(y)
    assert row.flops == 2 * 2 * 5 * H * INNER
    assert row.moved == 4 * (2 * 5 * H + H * INNER + INNER + 2 * 5 * INNER)
    assert model.table()["total"]["weights"] == 4 * (H * INNER + INNER)


def test_block_flops_by_hand() -> None:
    program = stack(["silu"] * 2)
    apply_segments(program)
    tokens, length = 3 * 7, 7
    rows = {r["name"]: r for r in CostModel(program, 3, 7).table()["segments"]}
    linears = 2 * tokens * (2 * H * HEADS * D + 2 * H * KV * D + 3 * H * INNER)
    attention = 4 * tokens * length * HEADS * D
    block = rows["block0"]
    assert block == {**rows["block1"], "name": "block0"}
    pointwise = block["flops"] - linears - attention
    assert 0 < pointwise < 20 * tokens * (H + INNER)


def test_peak_by_hand() -> None:
    """x is needed again at the end, so the widest moment holds x, gate, up and the product."""
    b = Builder()
    x = b.input("x", torch.float32, BATCH, SEQ, H)
    gate, up = b.linear(x, INNER, H), b.linear(x, INNER, H)
    y = b.linear(b.call("llmc.gated", gate, up, act="silu"), H, INNER)
    program = b.finish(b.call("aten.add.Tensor", x, y))
    model = CostModel(program, 2, 5)
    (segment,) = apply_segments(program)
    assert model.peak(segment) == 4 * 2 * 5 * (H + 3 * INNER)


def test_views_cost_nothing() -> None:
    b = Builder()
    x = b.input("x", torch.float32, BATCH, SEQ, H)
    y = b.call("aten.transpose.int", x, 1, 2)
    z = b.call("llmc.activation", b.call("aten.unsqueeze.default", y, 1), act="relu")
    program = b.finish(z)
    model = CostModel(program, 1, 4)
    assert model.node(y).moved == 0
    (segment,) = apply_segments(program)
    # The view keeps x alive; x and the result are all there is.
    assert model.peak(segment) == 2 * 4 * 4 * H


def test_inputs_of_a_segment_live_throughout() -> None:
    program = stack(["silu"] * 2)
    segments = apply_segments(program)
    model = CostModel(program, 2, 8)
    by_name = {n.name: n for n in program.graph.nodes}
    for s in segments[1:]:
        live = [by_name[n] for n in s.live_in if by_name[n].op != "get_attr"]
        assert model.peak(s) >= sum(model.bytes_of(n) for n in live)


def test_totals_and_scaling() -> None:
    program = stack(["silu", "moe"])
    apply_segments(program)
    one, two = (CostModel(program, b, 16).table() for b in (1, 2))
    for table in (one, two):
        for key in ("flops", "moved", "weights"):
            assert table["total"][key] == sum(r[key] for r in table["segments"])
    assert two["total"]["flops"] == pytest.approx(2 * one["total"]["flops"], rel=1e-6)
    assert two["total"]["weights"] == one["total"]["weights"] == program.weight_bytes()
    blocks = [r for r in one["segments"] if r["name"].startswith("block")]
    assert all(r["peak"] > 0 for r in blocks)
    nodes = CostModel(program, 1, 16).nodes()
    assert sum(r["flops"] for r in nodes) == one["total"]["flops"]
    assert json.loads(json.dumps(one)) == one


def test_stored_bytes_count_not_computed_ones() -> None:
    s = Stack()
    s.block()
    program = s.done()
    before = CostModel(program, 1, 4).table()["total"]
    for name in program.params:
        program.set_tensor(name, program.weights.load(name).to(torch.bfloat16))
    after = CostModel(program, 1, 4).table()["total"]
    assert after["weights"] * 2 == before["weights"]
    assert after["moved"] < before["moved"]
    assert after["peak"] == before["peak"]


def test_bad_sizes() -> None:
    with pytest.raises(UsageError, match="at least 1"):
        CostModel(stack(["silu"]), 0, 4)
