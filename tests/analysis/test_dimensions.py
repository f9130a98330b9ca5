"""Dimension classes, index maps and dependency groups."""

from __future__ import annotations

import torch
from analysis_build import HEADS, INNER, KV, VOCAB, D, H, Stack, scrambled, stack

from llmc.compiler.analysis.dimensions import DimClass, Dimensions
from llmc.compiler.analysis.linears import LinearSite, linear_sites
from llmc.compiler.ir.dims import BATCH, SEQ
from llmc.compiler.ir.graph import Program
from llmc.compiler.ir.interpret import run
from llmc.compiler.pipeline.zoo import Builder


def weights(program: Program, block: str = "block0") -> dict[str, str]:
    """Parameter name by role."""
    sites = linear_sites(program)
    return {s.role: s.param for s in sites if isinstance(s, LinearSite) and s.segment == block}


def axis_class(program: Program, d: Dimensions, name: str, axis: int) -> DimClass:
    return d.of(program.param_node(name), axis)


def test_the_stream_is_one_class() -> None:
    program = stack(["silu"] * 2)
    d = Dimensions(program)
    w = weights(program)
    stream = axis_class(program, d, w["q"], 1)
    assert stream.size == H
    same = {("q", 1), ("k", 1), ("v", 1), ("o", 0), ("gate", 1), ("up", 1), ("down", 0)}
    for block in ("block0", "block1"):
        for role, axis in same:
            assert (weights(program, block)[role], axis) in stream.params
    assert len(stream.norms) == 5
    assert not stream.blocked
    inner = axis_class(program, d, w["gate"], 0)
    assert set(inner.params) == {(w["gate"], 0), (w["up"], 0), (w["down"], 1)}
    assert inner.size == INNER
    assert not inner.blocked


def test_tokens_and_batch_are_told_from_channels() -> None:
    program = stack(["silu"])
    d = Dimensions(program)
    ids = program.inputs[0]
    assert d.of(ids, 0).kind == "batch"
    assert d.of(ids, 1).kind == "sequence"
    assert d.of(ids, 1).size == SEQ
    assert d.of(ids, 0).size == BATCH
    assert all(c.kind != "channel" or isinstance(c.size, int) for c in d.classes)


def test_what_mixes_an_axis_blocks_it() -> None:
    program = stack(["moe"])
    d = Dimensions(program)
    table = next(n for n in program.graph.nodes if n.op == "get_attr")
    vocabulary = d.of(table, 0)
    assert vocabulary.size == VOCAB
    assert "embedding" in vocabulary.blocked[0].reason
    result = axis_class(program, d, str(program.output.args[0].args[1].target), 0)
    assert "result of the program" in result.blocked[0].reason


def test_experts_compete_and_are_picked_where_they_were_chosen() -> None:
    program = stack(["moe"])
    d = Dimensions(program)
    router = axis_class(program, d, weights(program)["router"], 0)
    assert set(router.chosen) == {"softmax_int", "topk_default", "experts_default"}
    assert not router.blocked


def test_rope_pairs_the_head_size() -> None:
    s = Stack()
    n = s.norm(s.x)
    q = s.heads(s.linear(n, HEADS * D, H), HEADS)
    k, v = (s.heads(s.linear(n, KV * D, H), KV) for _ in range(2))
    angle = s.call(
        "aten.unsqueeze.default", s.call("aten.embedding.default", s.param(9, D), s.pos), 1
    )
    q, k = (s.call("llmc.rope", x, angle, angle) for x in (q, k))
    s.x = s.add(s.x, s.linear(s.attend(q, k, v), H, HEADS * D))
    program = s.done()
    d = Dimensions(program)
    assert not d.of(q, 3).blocked
    assert not d.of(v, 3).blocked
    assert {r.ins for r in d.relations if r.kind == "pair"} == {(d.of(q, 3).id,)}
    assert d.of(q, 3).id == d.of(k, 3).id


def test_index_maps_agree_with_running_the_op() -> None:
    b = Builder()
    x = b.input("x", torch.int64, BATCH, SEQ, 12)
    length = [b.call("aten.sym_size.int", x, i) for i in (0, 1)]
    split = b.call("aten.reshape.default", x, [*length, 3, 4])
    repeated = b.call("aten.repeat_interleave.self_int", split, 2, 2)
    merged = b.call("aten.reshape.default", repeated, [*length, 24])
    cut = b.call("aten.slice.Tensor", merged, 2, 5, 11)
    joined = b.call("aten.cat.default", [cut, x], -1)
    program = b.finish(joined)
    d = Dimensions(program)
    by_kind = {r.kind: r for r in d.relations}
    assert set(by_kind) == {"split", "repeat", "merge", "slice", "concat"}
    heads = torch.arange(3)[by_kind["repeat"].index_map(6)]
    channels = torch.arange(12).reshape(3, 4)[heads].flatten()
    want = channels[by_kind["merge"].index_map(24)][by_kind["slice"].index_map(6)]
    out = run(program, {"x": torch.arange(12).reshape(1, 1, 12)})[0, 0]
    assert torch.equal(out[:6], want)
    places = [r.index_map(n) for r, n in zip(
        [r for r in d.relations if r.kind == "concat"], (6, 12), strict=True)]  # fmt: skip
    assert torch.equal(out[places[1]], torch.arange(12))
    assert torch.equal(out[places[0]], want)


def test_names_do_not_matter() -> None:
    program = stack(["silu"])
    other, back = scrambled(program)
    a, b = Dimensions(program), Dimensions(other)
    assert a.relations == b.relations
    assert [c.params for c in a.classes] == [
        tuple((back[p], axis) for p, axis in c.params) for c in b.classes
    ]
