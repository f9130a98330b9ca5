"""Linear sites: roles by data flow, waves, groups, heads, routers, refusals."""

from __future__ import annotations

import torch
from analysis_build import HEADS, INNER, KV, D, H, Stack, scrambled, stack

from llmc.compiler.analysis.blocks import apply_segments
from llmc.compiler.analysis.linears import ExpertSite, LinearSite, linear_sites
from llmc.compiler.ir.dims import BATCH, SEQ
from llmc.compiler.ir.graph import Param, Program
from llmc.compiler.ir.refusal import Refusal
from llmc.compiler.pipeline.zoo import Builder


def found(program: Program) -> list[LinearSite | ExpertSite | Refusal]:
    apply_segments(program)
    return linear_sites(program)


def test_roles_waves_and_groups_of_a_gated_block() -> None:
    sites = found(stack(["silu"] * 2, bias=False))
    block = [s for s in sites if isinstance(s, LinearSite) and s.segment == "block1"]
    assert [s.id for s in block] == [f"block1/linear{i}" for i in range(7)]
    assert [s.role for s in block] == ["q", "k", "v", "o", "gate", "up", "down"]
    assert [s.wave for s in block] == [0, 0, 0, 1, 2, 2, 3]
    groups = [s.group for s in block]
    assert len(set(groups)) == 4
    assert groups[0] == groups[1] == groups[2] != groups[3]
    assert groups[4] == groups[5]
    assert [s.in_features for s in block] == [H, H, H, HEADS * D, H, H, INNER]
    assert [s.out_features for s in block] == [HEADS * D, KV * D, KV * D, H, INNER, INNER, H]
    assert not any(s.head or s.router for s in block)
    (head,) = [s for s in sites if isinstance(s, LinearSite) and s.segment == "epilogue"]
    assert head.head
    assert head.role == "head"


def test_site_names_point_at_the_graph() -> None:
    program = stack(["gelu"], norm="layer", bias=True)
    for s in found(program):
        assert isinstance(s, LinearSite)
        node = program.node(s.node)
        assert node.args[0].name == s.reads
        assert node.args[1].target == s.param
        assert program.params[s.param].shape == (s.out_features, s.in_features)
        assert s.bias == (node.args[2].target if len(node.args) > 2 else None)
    roles = [s.role for s in found(program)]
    assert roles == ["q", "k", "v", "o", "fc1", "fc2", "head"]


def test_parallel_branches_share_a_wave() -> None:
    s = Stack()
    n = s.norm(s.x)
    s.x = s.add(s.add(s.x, s.attention(n)), s.mlp(n))
    block = [x for x in found(s.done()) if x.segment == "block0"]
    assert [x.wave for x in block] == [0, 0, 0, 1, 0, 0, 1]


def test_router_and_experts() -> None:
    sites = found(stack(["moe"]))
    (router,) = [s for s in sites if isinstance(s, LinearSite) and s.router]
    (experts,) = [s for s in sites if isinstance(s, ExpertSite)]
    assert router.role == "router"
    assert experts.id == "block0/experts0"
    assert (experts.experts, experts.into, experts.back) == (3, (2 * INNER, H), (H, INNER))
    assert experts.reads == router.reads
    assert experts.wave == router.wave + 1


def test_a_tied_head_is_refused_and_names_the_embedding() -> None:
    program = stack(["silu"], tied=True)
    (refusal,) = [s for s in found(program) if isinstance(s, Refusal)]
    assert refusal.predicate == "param_read_once"
    assert "tied with embedding" in refusal.reason
    assert program.node(refusal.node).target is torch.ops.aten.embedding.default


def test_a_shared_weight_is_refused_at_both_places() -> None:
    b = Builder()
    x = b.input("x", torch.float32, BATCH, SEQ, H)
    w = b.param(H, H)
    y = b.call("aten.linear.default", x, w)
    program = b.finish(b.call("aten.linear.default", y, w))
    sites = found(program)
    assert [s.predicate for s in sites if isinstance(s, Refusal)] == ["param_read_once"] * 2
    assert {s.node for s in sites if isinstance(s, Refusal)} == {
        "linear_default",
        "linear_default_1",
    }


def test_a_weight_that_is_not_stored_is_refused() -> None:
    b = Builder()
    x = b.input("x", torch.float32, BATCH, SEQ, H)
    codes = b.program.add_param(
        Param("codes", (4, 2), torch.int32, keep=True),
        torch.zeros(4, 2, dtype=torch.int32),
        before=b.end,
    )
    w = b.call("llmc.dequantize", codes, b.param(4, 1), bits=4, group=16, columns=H)
    program = b.finish(b.call("aten.linear.default", x, w))
    (refusal,) = found(program)
    assert isinstance(refusal, Refusal)
    assert refusal.predicate == "weight_is_parameter"
    assert refusal.node == "linear_default"


def test_a_last_projection_into_the_stream_is_no_head() -> None:
    s = Stack()
    s.block("gelu")
    sites = found(s.finish(s.norm(s.x)))
    assert not any(x.head for x in sites)
    assert sites[-1].role == "fc2"


def test_a_gate_by_query_keeps_the_output_role() -> None:
    """attention · sigmoid(gate): o still reads it, and the gate is no router."""
    s = Stack()
    n = s.norm(s.x)
    q = s.heads(s.linear(n, HEADS * D, H), HEADS)
    k, v = (s.heads(s.linear(n, KV * D, H), KV) for _ in range(2))
    gate = s.call("llmc.activation", s.linear(n, HEADS * D, H), act="sigmoid")
    a = s.call("aten.mul.Tensor", s.attend(q, k, v), gate)
    s.x = s.add(s.x, s.linear(a, H, HEADS * D))
    block = [x for x in found(s.done()) if x.segment == "block0"]
    assert [x.role for x in block] == ["q", "k", "v", "fc1", "o"]
    assert [x.wave for x in block] == [0, 0, 0, 0, 1]


def test_names_do_not_matter() -> None:
    program = stack(["silu", "moe"], tied=True)
    other, back = scrambled(program)
    ours, theirs = found(program), found(other)
    assert len(ours) == len(theirs)
    for a, b in zip(ours, theirs, strict=True):
        if isinstance(a, LinearSite) and isinstance(b, LinearSite):
            assert back[b.param] == a.param
            assert {**vars(a), "param": ""} == {**vars(b), "param": ""}
        elif isinstance(a, Refusal) and isinstance(b, Refusal):
            assert (a.node, a.predicate) == (b.node, b.predicate)
