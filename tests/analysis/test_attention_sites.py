"""Attention sites: rows and columns by head are those that make and read the values."""

from __future__ import annotations

import sys
from functools import cache
from pathlib import Path
from typing import Any

import pytest
import torch
from analysis_build import HEADS, KV, D, H, Stack

from llmc.compiler.analysis.heads import AttentionSite, attention_sites, found_sites, units_of
from llmc.compiler.analysis.labels import Untraced, reads, told_once, trace
from llmc.compiler.analysis.unweave import unweave
from llmc.compiler.ir.graph import info
from llmc.compiler.ir.interpret import run
from llmc.compiler.ir.refusal import Refusal
from llmc.compiler.ir.verifier import verify
from llmc.compiler.pipeline import zoo

sys.path.insert(0, str(Path(__file__).parents[1]))

from tiny_models import capture_tiny, random_inputs

FUSED = {"gpt2": False, "phi3": False, "gpt_neox": True, "bloom": True}
NAMES = ("llama", "qwen3", "cohere", "opt", *FUSED)


@cache
def captured(name: str) -> Any:
    return capture_tiny(name)


def values(program: Any, name: str) -> dict[str, torch.Tensor]:
    seen: dict[str, torch.Tensor] = {}
    inputs = random_inputs(name, 2)
    given = {n.name: inputs[n.name] for n in program.inputs}
    with torch.no_grad():
        run(program, given, observe=lambda node, value: seen.update({node.name: value}))
    return seen


def made(program: Any, rows: Any, seen: dict[str, torch.Tensor]) -> torch.Tensor:
    """[B, heads, S, D] from the rows of an index map."""
    out = torch.einsum("bsn,hdn->bhsd", seen[rows.reads], program.fetch(rows.param)[rows.index])
    if rows.bias is not None:
        out = out + program.fetch(rows.bias)[rows.index][:, None]
    return out


def close(a: torch.Tensor, b: torch.Tensor) -> None:
    torch.testing.assert_close(a, b, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("name", NAMES)
def test_index_maps_make_what_attention_reads(name: str) -> None:
    program = captured(name)
    sites = found_sites(program)
    assert list(sites) == ["block0/attention0", "block1/attention0"]
    seen = values(program, name)
    for site in sites.values():
        q, k, v = (program.node(site.node).args[i].name for i in range(3))
        assert site.interleaved == FUSED.get(name, False)
        assert site.q is not None
        assert site.o is not None
        close(made(program, site.v, seen), seen[v])
        for rows, value in ((site.q, q), (site.k, k)):
            mine = made(program, rows, seen)
            if any(side is (rows is site.q) for side, _ in site.norms):
                # A norm divides all channels of a head by one number, rotation keeps each pair.
                gain = next(n for side, n in site.norms if side is (rows is site.q))
                mine = mine * program.fetch(gain.gain)[gain.index][:, None]
                ratio = mine.pow(2).sum(-1) / seen[value].pow(2).sum(-1)
                i, j = site.pairs[0]
                pair = mine[..., [i, j]].pow(2).sum(-1) / seen[value][..., [i, j]].pow(2).sum(-1)
                close(pair / ratio, torch.ones_like(pair))
                continue
            for i, j in site.pairs.tolist():
                close(mine[..., [i, j]].pow(2).sum(-1), seen[value][..., [i, j]].pow(2).sum(-1))
            if name == "opt" and rows is site.q:
                mine = mine * site.k.index.shape[1] ** -0.5
            close(mine[..., site.free], seen[value][..., site.free])
        columns = program.fetch(site.o.param)[:, site.o.index]
        want = torch.einsum("bshd,nhd->bsn", seen[site.node], columns)
        bias = program.node(site.o.node).args[2:]
        close(want + (seen[bias[0].name] if bias else 0), seen[site.o.node])


@pytest.mark.parametrize("name", NAMES)
def test_pairs_and_free_channels_are_all_channels(name: str) -> None:
    for site in found_sites(captured(name)).values():
        assert site.fixed_keys == site.fixed_values == ""
        every = torch.cat([site.pairs.flatten(), site.free]).sort().values
        assert torch.equal(every, torch.arange(site.k.index.shape[1]))
    first = next(iter(found_sites(captured(name)).values()))
    rotary = {"gpt2": 0, "opt": 0, "bloom": 0, "gpt_neox": 1}.get(name, 4)
    assert len(first.pairs) == rotary
    if name == "cohere":  # neighbours rotate together
        assert first.pairs.tolist() == [[0, 1], [2, 3], [4, 5], [6, 7]]
    elif rotary == 4:
        assert first.pairs.tolist() == [[0, 4], [1, 5], [2, 6], [3, 7]]


@pytest.mark.parametrize("name", ["gpt_neox", "bloom"])
def test_unweaving_is_exact_and_parts_the_heads(name: str) -> None:
    program = captured(name).clone()
    before = found_sites(program)
    unweave(program, list(before.values()))
    verify(program)
    inputs = random_inputs(name, 2)
    given = {n.name: inputs[n.name] for n in program.inputs}
    close(run(program, given), run(captured(name), given))
    for site in found_sites(program).values():
        assert not site.interleaved
        rows = [units_of(m, site.kv) for m in site.keys.members]
        assert all(torch.equal(r.sort(1).values, r) for r in rows)
        assert {m.param for m in site.keys.members} == {site.k.param, site.k.bias}
        assert site.q is not None
        shares = [r.index.flatten() for r in (site.q, site.k, site.v)]
        assert len(torch.cat(shares).unique()) == sum(len(s) for s in shares)


def test_groups_hold_what_follows_a_head() -> None:
    site = next(iter(found_sites(captured("gpt2")).values()))
    assert {m.param for m in site.keys.members} == {site.k.param, site.k.bias}
    assert site.o is not None
    assert {m.param for m in site.queries.members} == {site.k.param, site.k.bias, site.o.param}
    alibi = found_sites(captured("bloom"))
    assert all(s.interleaved for s in alibi.values())


def refused(program: Any) -> list[Refusal]:
    return [s for s in attention_sites(program) if isinstance(s, Refusal)]


@pytest.mark.parametrize(
    ("name", "predicate"), [("shared_keys", "heads_read_once"), ("gives_keys", "heads_kept")]
)
def test_keys_that_others_read_are_refused(name: str, predicate: str) -> None:
    program = zoo.build(name)
    found = refused(program)
    assert predicate in {r.predicate for r in found}
    assert {r.node for r in found} <= {n.name for n in program.graph.nodes}


@pytest.mark.slow
def test_keys_of_two_linears_are_refused() -> None:
    found = refused(captured("deepseek_v3"))
    assert len(found) == 2
    assert {r.predicate for r in found} == {"layout_known"}


# ** what may not turn, on graphs built by hand **


def rotary(b: Stack, *, twice: bool = True) -> tuple[Any, Any]:
    """cos and sin [B, 1, S, D], of D/2 angles laid out twice or of angles that all differ."""
    where = b.call("aten.unsqueeze.default", b.pos, 2)
    where = b.call("aten.to.dtype", where, torch.float32)
    angles = [b.call("aten.mul.Tensor", where, b.param(D // 2)) for _ in range(2)]
    table = b.call("aten.cat.default", [angles[0], angles[0 if twice else 1]], 2)
    made = (b.call(f"aten.{f}.default", table) for f in ("cos", "sin"))
    return tuple(b.call("aten.unsqueeze.default", t, 1) for t in made)  # type: ignore[return-value]


def attention(
    *, twice: bool = True, spy: str = "", key: str = "", tail: str = ""
) -> tuple[Any, AttentionSite]:
    """One attention over rotated heads; something else may read a value or stand on its way."""
    b = Stack()
    n = b.norm(b.x)
    cos, sin = rotary(b, twice=twice)
    q, k, v = (b.linear(n, c * D, H) for c in (HEADS, KV, KV))
    extra = {"q": q, "k": k, "v": v}.get(spy)
    if key == "norm":
        k = b.norm(k, width=KV * D)
    q, k, v = b.heads(q, HEADS), b.heads(k, KV), b.heads(v, KV)
    if key == "layer":
        k = b.norm(k, "layer", width=D)
    if key == "clamp":
        k = b.call("aten.clamp.default", k, -1.0, 1.0)
    if key == "part":
        rest = [b.call("aten.slice.Tensor", k, 3, *at) for at in ((0, 2), (2, 4))]
        k = b.call("aten.cat.default", [b.call("aten.mul.Tensor", rest[0], 2.0), rest[1]], 3)
    q, k = (b.call("llmc.rope", x, cos, sin) for x in (q, k))
    a = b.attend(q, k, v)
    if tail:
        a = b.call(tail, a)
    x = b.add(b.x, b.linear(a, H, HEADS * D))
    if extra is not None:
        x = b.add(x, b.linear(extra, H, (HEADS if spy == "q" else KV) * D))
    program = b.finish(b.linear(b.norm(x), 20, H))
    (site,) = attention_sites(program)
    return program, site


@pytest.mark.parametrize(
    ("how", "keys", "values_"),
    [
        ({}, "", ""),
        ({"twice": False}, "not proved to turn both", ""),
        ({"key": "norm"}, "", ""),
        ({"key": "layer"}, "takes the mean", ""),
        ({"key": "clamp"}, "mixes them", ""),
        ({"key": "part"}, "scales a part", ""),
        ({"tail": "aten.tanh.default"}, "", "reads it"),
    ],
)
def test_what_may_not_turn_is_said(how: dict[str, Any], keys: str, values_: str) -> None:
    _, site = attention(**how)
    assert isinstance(site, AttentionSite)
    for said, why in ((keys, site.fixed_keys), (values_, site.fixed_values)):
        assert (said in why) if said else why == ""
    assert len(site.norms) == (how.get("key") == "norm")


@pytest.mark.parametrize("spy", ["k", "v"])
def test_heads_that_a_linear_reads_too_may_not_be_shared(spy: str) -> None:
    """It would read fewer channels, and other ones."""
    _, site = attention(spy=spy)
    assert isinstance(site, Refusal)
    assert site.predicate == "heads_alike"


def test_queries_that_a_linear_reads_too_may_move_but_not_turn() -> None:
    _, site = attention(spy="q")
    assert "reads them too" in site.fixed_keys
    assert site.fixed_order == site.fixed_values == ""
    assert sum(m.role == "reads" for m in site.queries.members) == 2


def test_heads_that_are_added_to_the_result_may_not_be_shared() -> None:
    """A residual of values ties them to query heads; no layout parts those."""
    b = Stack()
    n = b.norm(b.x)
    q, k, v = (b.heads(b.linear(n, HEADS * D, H), HEADS) for _ in range(3))
    a = b.call("llmc.attention", q, k, v, b.pos, b.pos, b.valid, scale=0.5)
    a = b.add(a, b.call("aten.transpose.int", v, 1, 2))
    x = b.add(b.x, b.linear(b.reshape(a, HEADS * D), H, HEADS * D))
    program = b.finish(b.linear(b.norm(x), 20, H))
    (site,) = attention_sites(program)
    assert isinstance(site, Refusal)
    assert site.predicate == "heads_read_once"
    assert "reads heads that attention" in site.reason


def test_labels_follow_moves_and_stop_at_mixing() -> None:
    program, site = attention()
    found = trace(program.node(site.node).args[1])
    assert found.source.name == site.k.node
    assert torch.equal(found.end, torch.arange(KV * D).reshape(KV, D))
    assert len(found.pairs) == 1
    linear, labels = reads(program.node(site.node))
    assert site.o is not None
    assert linear.name == site.o.node
    assert torch.equal(labels, torch.arange(HEADS * D))
    with pytest.raises(Untraced, match="made by no linear"):
        trace(program.node("embedding_default"))
    rope = next(program.calls("llmc.rope"))
    assert told_once(rope.args[1], False)
    assert not told_once(rope.args[1], True)
    assert not told_once(rope.args[0], False)
    assert info(rope).type is not None
