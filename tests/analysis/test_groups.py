"""Dependency groups: what moves together, what a unit is and costs, and what blocks it."""

from __future__ import annotations

import networkx as nx
import pytest
import torch
from analysis_build import HEADS, INNER, KV, D, H, Stack, scrambled, stack

from llmc.compiler.analysis.blocks import apply_segments
from llmc.compiler.analysis.dimensions import Dimensions
from llmc.compiler.analysis.groups import Group, dependency_groups, group_graph, scoped_group
from llmc.compiler.analysis.linears import LinearSite, linear_sites
from llmc.compiler.ir.graph import Program


def groups_of(program: Program) -> dict[str, Group]:
    apply_segments(program)
    return {g.id: g for g in dependency_groups(program)}


def roles(program: Program, block: str = "block0") -> dict[str, str]:
    sites = linear_sites(program)
    return {s.role: s.param for s in sites if isinstance(s, LinearSite) and s.segment == block}


def axes(group: Group) -> set[tuple[str, int]]:
    return {(m.param, m.axis) for m in group.members}


def test_a_kv_group_takes_its_query_heads() -> None:
    program = stack(["silu"] * 2)
    group = groups_of(program)["block0/kv_group0"]
    w = roles(program)
    assert (group.kind, group.units, group.segment) == ("kv_group", KV, "block0")
    assert axes(group) == {(w["q"], 0), (w["k"], 0), (w["v"], 0), (w["o"], 1)}
    maps = {m.param: m.unit_of for m in group.members}
    rows = torch.arange(HEADS * D)
    assert torch.equal(maps[w["q"]], rows // (HEADS // KV * D))
    assert torch.equal(maps[w["k"]], torch.arange(KV * D) // D)
    assert torch.equal(maps[w["o"]], maps[w["q"]])
    assert {m.param: m.role for m in group.members}[w["o"]] == "reads"


def test_kinds_and_counts_of_a_decoder() -> None:
    program = stack(["silu", "relu", "moe"], bias=True)
    found = groups_of(program)
    kinds = sorted((g.segment, g.kind, g.units) for g in found.values() if not g.blocked)
    per_block = [("kv_group", KV), ("value_channel", D), ("channel", D), ("neuron", INNER)]
    want = [(f"block{i}", kind, n) for i in range(3) for kind, n in per_block]
    assert kinds == sorted([*want, ("block2", "expert", 3), ("model", "hidden", H)])
    blocked = [g for g in found.values() if g.blocked]
    assert {g.kind for g in blocked} == {"channel"}
    assert all(b.node and b.reason for g in blocked for b in g.blocked)


def test_cost_of_a_unit_is_what_it_stores_and_multiplies() -> None:
    program = stack(["silu", "moe"])
    found = groups_of(program)
    neuron = found["block0/neuron0"]
    assert neuron.bytes_per_unit == 4 * 3 * H
    assert neuron.flops_per_unit == 2 * 3 * H
    total = sum(
        p.bytes for n, p in program.params.items() if n in {m.param for m in neuron.members}
    )
    assert neuron.bytes_per_unit * neuron.units == total
    # A token meets two of three experts; an expert is its weights and a router row.
    expert = found["block1/expert0"]
    assert expert.bytes_per_unit == 4 * (3 * INNER * H + H)
    assert expert.least == 2


def test_a_fused_projection_is_cut_in_both_halves() -> None:
    s = Stack()
    both = s.linear(s.norm(s.x), 2 * INNER, H)
    gate, up = (s.call("aten.slice.Tensor", both, 2, i * INNER, (i + 1) * INNER) for i in (0, 1))
    s.x = s.add(s.x, s.linear(s.call("llmc.gated", gate, up, act="silu"), H, INNER))
    program = s.done()
    w = roles(program, "main")
    group = next(g for g in dependency_groups(program) if (w["gate_up"], 0) in axes(g))
    assert group.units == INNER
    assert axes(group) == {(w["gate_up"], 0), (w["down"], 1)}
    maps = {m.param: m.unit_of for m in group.members}
    assert torch.equal(maps[w["gate_up"]], torch.arange(2 * INNER) % INNER)


def test_experts_neurons_are_rows_of_both_halves() -> None:
    program = stack(["moe"])
    group = groups_of(program)["block0/neuron0"]
    maps = {tuple(program.params[m.param].shape): (m.axis, m.unit_of) for m in group.members}
    assert group.units == INNER
    assert maps[3, 2 * INNER, H][0] == 1
    assert torch.equal(maps[3, 2 * INNER, H][1], torch.arange(2 * INNER) % INNER)
    assert torch.equal(maps[3, H, INNER][1], torch.arange(INNER))


def test_rotary_pairs_move_together() -> None:
    s = Stack()
    n = s.norm(s.x)
    half = s.call("aten.embedding.default", s.param(9, D // 2), s.pos)
    angle = s.call("aten.unsqueeze.default", s.call("aten.cat.default", [half, half], -1), 1)
    q = s.heads(s.linear(n, HEADS * D, H), HEADS)
    k, v = (s.heads(s.linear(n, KV * D, H), KV) for _ in range(2))
    q, k = (s.call("llmc.rope", x, angle, angle) for x in (q, k))
    s.x = s.add(s.x, s.linear(s.attend(q, k, v), H, HEADS * D))
    program = s.done()
    pairs = next(g for g in dependency_groups(program) if g.kind == "rotary_pair")
    assert pairs.units == D // 2
    keys = next(m for m in pairs.members if len(m.unit_of) == KV * D)
    assert torch.equal(keys.unit_of, torch.arange(KV * D) % (D // 2))


def test_scope_can_stop_at_shared_heads() -> None:
    program = stack(["silu"], kv=HEADS)
    dims = Dimensions(program)
    attention = next(program.calls("llmc.attention"))
    root = dims.of(attention.args[1], 1)
    whole = next(g for g in dependency_groups(program) if g.kind == "head")
    part = scoped_group(program, dims, root, ("repeat",), "keys")
    w = roles(program)
    assert axes(part) == {(w["k"], 0)}
    assert axes(part) < axes(whole)
    assert part.units == HEADS


@pytest.mark.parametrize("kind", ["aten.sort.default", "aten.cumsum.default", "aten.flip.default"])
def test_what_mixes_channels_blocks_the_group_and_is_named(kind: str) -> None:
    s = Stack()
    y = s.linear(s.norm(s.x), INNER, H)
    y = s.call(kind, y, [-1] if "flip" in kind else -1)
    y = s.call("operator.getitem", y, 0) if "sort" in kind else y
    s.x = s.add(s.x, s.linear(y, H, INNER))
    program = s.done()
    found = [g for g in dependency_groups(program) if g.units == INNER]
    assert found
    assert all(kind.split(".")[1] in g.blocked[0].node for g in found)


def test_channels_that_compete_are_not_cut() -> None:
    s = Stack()
    y = s.call("aten.softmax.int", s.linear(s.norm(s.x), INNER, H), -1)
    s.x = s.add(s.x, s.linear(y, H, INNER))
    program = s.done()
    group = next(g for g in dependency_groups(program) if g.units == INNER)
    assert group.chosen
    assert "compete" in group.blocked[-1].reason


def test_the_graph_joins_groups_and_parameter_axes() -> None:
    program = stack(["silu"] * 2)
    found = dependency_groups(program)
    g = group_graph(found)
    assert nx.is_bipartite(g)
    groups = {n for n, d in g.nodes(data=True) if d["bipartite"] == 0}
    assert groups == {x.id for x in found}
    for x in found:
        assert set(g.neighbors(x.id)) == axes(x)
        for m in x.members:
            assert g.edges[x.id, (m.param, m.axis)]["role"] == m.role


def test_names_do_not_matter() -> None:
    program = stack(["silu", "moe"])
    other, back = scrambled(program)
    a, b = groups_of(program), groups_of(other)
    assert list(a) == list(b)
    for x, y in zip(a.values(), b.values(), strict=True):
        assert [(m.param, m.axis, m.role) for m in x.members] == [
            (back[m.param], m.axis, m.role) for m in y.members
        ]
        assert all(
            torch.equal(m.unit_of, n.unit_of) for m, n in zip(x.members, y.members, strict=True)
        )


def test_groups_are_data() -> None:
    row = groups_of(stack(["silu"]))
    shown = next(g for g in row.values() if g.kind == "neuron").to_json()
    assert shown["units"] == INNER
    assert [m["indices_per_unit"] for m in shown["members"]] == [1, 1, 1]
