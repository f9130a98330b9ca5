"""Segments: dominance cuts, exact liveness, blocks of every shape, classes."""

from __future__ import annotations

import pytest
import torch
from analysis_build import HEADS, KV, D, H, Stack, inputs, reordered, scrambled, stack

from llmc.compiler.analysis.blocks import apply_segments, block_classes, segment
from llmc.compiler.analysis.tokenwise import prove_tokenwise
from llmc.compiler.ir.dims import BATCH, SEQ
from llmc.compiler.ir.graph import Param, Program
from llmc.compiler.ir.interpret import run, run_nodes
from llmc.compiler.pipeline.zoo import Builder


def names(program: Program) -> list[str]:
    return [s.name for s in segment(program)]


def check(program: Program) -> None:
    """Every node once, in a topological order, contiguous, with exact live values; same output."""
    values = inputs(program)
    before = run(program, values)
    segments = apply_segments(program)
    order = [n.name for n in program.graph.nodes]
    assert [n for s in segments for n in s.nodes] == order
    by_name = {n.name: n for n in program.graph.nodes}
    known: dict[object, object] = {by_name[k]: v for k, v in values.items()}
    for s in segments:
        mine = set(s.nodes)
        read = {i.name for n in s.nodes for i in by_name[n].all_input_nodes} - mine
        assert set(s.live_in) == read
        assert set(s.live_out) == {n for n in mine if {u.name for u in by_name[n].users} - mine}
        # Nothing but the live-ins is there when the segment runs.
        env = {by_name[n]: known[by_name[n]] for n in s.live_in}
        env |= {by_name[n]: v for n, v in values.items() if n in mine}
        nodes = [by_name[n] for n in s.nodes if by_name[n].op != "output"]
        run_nodes(nodes, env, program.fetch)
        known |= {by_name[n]: env[by_name[n]] for n in s.live_out}
        last = env
    assert torch.equal(last[program.output.args[0]], before)
    assert torch.equal(run(program, values), before)


@pytest.mark.parametrize(
    ("mlps", "attrs"),
    [
        (["silu"], {}),
        (["silu"] * 3, {}),
        (["silu"] * 3, {"tied": True}),
        (["gelu"] * 2, {"norm": "layer", "bias": True}),
        (["moe"] * 2, {}),
        (["silu", "moe", "moe"], {}),
        (["silu", "moe", "relu"], {}),
    ],
)
def test_blocks_of_a_decoder(mlps: list[str], attrs: dict[str, object]) -> None:
    program = stack(mlps, **attrs)
    assert names(program) == ["prologue", *(f"block{i}" for i in range(len(mlps))), "epilogue"]
    check(program)


def test_only_the_residual_stream_crosses_a_block() -> None:
    program = stack(["silu"] * 3, tied=True)
    segments = apply_segments(program)
    stream = [s.live_out for s in segments[1:-1]]
    assert all(len(out) == 1 for out in stream)
    shared = {"position_ids", "attention_mask", "sym_size_int", "sym_size_int_1"}
    for before, s in zip(stream, segments[2:-1], strict=False):
        assert set(s.live_in) == {*before, *shared}
    table = program.graph.find_nodes(op="call_function", target=torch.ops.aten.embedding.default)
    assert set(segments[-1].live_in) == {*stream[-1], table[0].args[0].name}


def test_parameters_lie_with_their_first_reader() -> None:
    program = stack(["silu"] * 2)
    place = {n: s.name for s in segment(program) for n in s.nodes}
    for node in program.graph.nodes:
        if node.op == "get_attr":
            assert place[node.name] == place[next(iter(node.users)).name]


def test_post_norm_blocks() -> None:
    s = Stack()
    s.x = s.norm(s.x, "layer")
    for _ in range(3):
        s.x = s.norm(s.add(s.x, s.attention(s.x)), "layer")
        s.x = s.norm(s.add(s.x, s.mlp(s.x, "gelu")), "layer")
    program = s.finish(s.linear(s.x, 20, H))
    assert names(program) == ["prologue", "block0", "block1", "block2", "epilogue"]
    assert list(block_classes(program).values()) == [0, 0, 0]
    check(program)


def test_parallel_attention_and_mlp() -> None:
    s = Stack()
    for _ in range(2):
        n = s.norm(s.x)
        s.x = s.add(s.add(s.x, s.attention(n)), s.mlp(n))
    program = s.done()
    assert names(program) == ["prologue", "block0", "block1", "epilogue"]
    check(program)


def test_a_chunk_in_front_of_attention_belongs_to_its_block() -> None:
    s = Stack()
    for _ in range(3):
        s.x = s.call("aten.mul.Tensor", s.x, s.param(H, near=1.0, width=0.1))
        s.block()
    program = s.done()
    apply_segments(program)
    assert list(block_classes(program).values()) == [0, 0, 0]
    check(program)


def test_cross_attention_does_not_start_a_block() -> None:
    s = Stack()
    memory = s.call("aten.embedding.default", s.param(20, H), s.pos)
    for _ in range(2):
        s.x = s.add(s.x, s.attention(s.norm(s.x)))
        n = s.norm(s.x)
        q = s.heads(s.linear(n, HEADS * D, H), HEADS)
        k, v = (s.heads(s.linear(memory, KV * D, H), KV) for _ in range(2))
        s.x = s.add(s.x, s.linear(s.attend(q, k, v), H, HEADS * D))
        s.x = s.add(s.x, s.mlp(s.norm(s.x)))
    program = s.done()
    assert names(program) == ["prologue", "block0", "block1", "epilogue"]
    check(program)


def test_classes_tell_attributes_apart() -> None:
    s = Stack()
    for window in (3, None, 3, None):
        s.block(window=window)
    program = s.done()
    apply_segments(program)
    assert list(block_classes(program).values()) == [0, 1, 0, 1]
    assert list(block_classes(program, attributes=False).values()) == [0, 0, 0, 0]


def test_classes_tell_shapes_apart() -> None:
    s = Stack()
    for kv in (2, 1):
        s.block(kv=kv)
    assert list(block_classes(s.done()).values()) == [0, 1]


def test_without_attention_the_repeated_part_is_the_block() -> None:
    b = Builder()
    x = b.input("x", torch.float32, BATCH, SEQ, H)
    for _ in range(3):
        y = b.call("llmc.activation", b.linear(x, 24, H), act="relu")
        x = b.call("aten.add.Tensor", x, b.linear(y, H, 24))
    program = b.finish(b.call("llmc.rms_norm", x, b.param(H), eps=1e-5))
    assert names(program) == ["prologue", "block0", "block1", "block2", "epilogue"]


def test_without_repetition_there_is_one_segment() -> None:
    b = Builder()
    x = b.input("x", torch.float32, BATCH, SEQ, H)
    y = b.call("llmc.rms_norm", b.linear(x, 24, H), b.param(24), eps=1e-5)
    program = b.finish(b.linear(y, 3, 24))
    (only,) = apply_segments(program)
    assert only.name == "main"
    assert only.nodes == tuple(n.name for n in program.graph.nodes)
    assert only.live_in == only.live_out == ()


def test_a_stray_order_is_put_right() -> None:
    """Parameters all in front, as an exporter may leave them, still end up with their block."""
    program = stack(["silu"] * 2)
    first = next(n for n in program.graph.nodes if n.op != "placeholder")
    for node in list(program.graph.nodes):
        if node.op == "get_attr":
            first.prepend(node)
    check(program)
    sizes = [len(s.nodes) for s in program.segments[1:3]]
    assert sizes[0] == sizes[1]


def test_a_compressed_weight_changes_no_cut() -> None:
    """A block whose weight is decoded from codes is still a block of the same structure."""
    program = stack(["silu"] * 3)
    linear = list(program.calls("aten.linear.default"))[-2]
    rows, columns = program.param_of(linear.args[1]).shape
    codes = program.add_param(
        Param("codes", (rows, columns // 8), torch.int32, keep=True),
        torch.zeros(rows, columns // 8, dtype=torch.int32),
        before=linear,
    )
    scale = program.add_param(
        Param("scale", (rows, 1), torch.float32), torch.ones(rows, 1), before=linear
    )
    args = {"bits": 4, "group": columns, "columns": columns}
    decoded = program.emit("llmc.dequantize", codes, scale, before=linear, made_by="test", **args)
    linear.replace_input_with(linear.args[1], decoded)
    program.prune()
    assert names(program) == ["prologue", "block0", "block1", "block2", "epilogue"]
    place = {n: s.name for s in segment(program) for n in s.nodes}
    assert place["codes"] == place["scale"] == place[decoded.name] == "block2"
    assert list(block_classes(program).values()) == [0, 0, 1]
    assert list(block_classes(program, attributes=False).values()) == [0, 0, 0]
    check(program)


def test_cached_attention_starts_a_block_too() -> None:
    s = Stack()
    for i in range(2):
        n = s.norm(s.x)
        q = s.heads(s.linear(n, HEADS * D, H), HEADS)
        k, v = (s.heads(s.linear(n, KV * D, H), KV) for _ in range(2))
        a = s.call("llmc.cached_attention", q, k, v, s.pos, scale=0.5, state=f"kv{i}")
        s.x = s.add(s.x, s.linear(s.reshape(a, HEADS * D), H, HEADS * D))
        s.x = s.add(s.x, s.mlp(s.norm(s.x)))
    program = s.done()
    assert names(program) == ["prologue", "block0", "block1", "epilogue"]
    assert prove_tokenwise(program) == []
    assert list(block_classes(program).values()) == [0, 0]


@pytest.mark.parametrize("seed", range(5))
def test_the_order_of_the_graph_does_not_matter(seed: int) -> None:
    program = stack(["silu", "moe", "silu"], tied=True)
    other = reordered(program, seed)
    assert [set(s.nodes) for s in segment(other)] == [set(s.nodes) for s in segment(program)]
    assert block_classes(other) == block_classes(program) == {"block0": 0, "block1": 1, "block2": 0}
    check(other)


def test_names_do_not_matter() -> None:
    program = stack(["silu", "moe"], tied=True)
    other, _ = scrambled(program)
    assert segment(other) == segment(program)
    assert block_classes(other) == block_classes(program)
