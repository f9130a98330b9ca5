"""Scale migration on hand-built programs: exact where it says so, refused where it must."""

from __future__ import annotations

import itertools

import pytest
import torch
from analysis_build import HEADS, INNER, KV, D, H, Stack, inputs, logits, scrambled, stack
from torch import fx

from llmc.compiler.analysis.blocks import apply_segments
from llmc.compiler.analysis.migrate import MigrationSite, migrated, migration_sites
from llmc.compiler.ir.graph import Program
from llmc.compiler.ir.refusal import Refusal


def split(program: Program) -> tuple[list[MigrationSite], list[Refusal]]:
    apply_segments(program)
    found = migration_sites(program)
    return (
        [s for s in found if isinstance(s, MigrationSite)],
        [s for s in found if isinstance(s, Refusal)],
    )


def exact(program: Program) -> list[MigrationSite]:
    """Random scales at every site leave the logits as they are; one site alone, then all."""
    sites, _ = split(program)
    values = inputs(program)
    g = torch.Generator().manual_seed(3)
    want = {t: logits(program, values, t) for t in (torch.float64, torch.float32)}
    every = program.clone()
    for site in sites:
        s = torch.exp(torch.randn(site.n_scales, generator=g, dtype=torch.float64))
        alone = program.clone()
        for target in (alone, every):
            for name, tensor in migrated(target, site, s).items():
                target.set_tensor(name, tensor)
        close(logits(alone, values, torch.float64), want[torch.float64], 1e-10)
        # The scales reach the readers: dividing only them would change the result.
        half = program.clone()
        new = migrated(half, site, s)
        for _, name, _ in site.consumers:
            half.set_tensor(name, new[name])
        assert (logits(half, values, torch.float64) - want[torch.float64]).abs().max() > 1e-6
    close(logits(every, values, torch.float64), want[torch.float64], 1e-10)
    close(logits(every, values, torch.float32), want[torch.float32], 1e-5)
    return sites


def close(a: torch.Tensor, b: torch.Tensor, relative: float) -> None:
    assert (a - b).abs().max() <= relative * b.abs().max()


def kinds(sites: list[MigrationSite]) -> list[str]:
    return [s.kind for s in sites]


@pytest.mark.parametrize(("kv", "bias"), list(itertools.product([4, 2, 1], [False, True])))
def test_gated_block(kv: int, bias: bool) -> None:
    sites = exact(stack(["silu"], kv=kv, bias=bias))
    assert kinds(sites) == ["norm", "value", "norm", "product", "norm"]
    value = sites[1]
    assert value.channels == HEADS * D
    assert value.n_scales == kv * D
    # Query head h reads KV head h // (HEADS // kv): its channels share that head's scales.
    heads = value.expand.reshape(HEADS, D)
    for h in range(HEADS):
        assert torch.equal(heads[h], heads[h // (HEADS // kv) * (HEADS // kv)])
    assert len(value.absorbers) == 1 + bias
    assert sites[0].id == "block0/norm0"
    assert len(sites[0].consumers) == 3


def test_layer_norm_and_relu() -> None:
    sites = exact(stack(["relu"], norm="layer", bias=True))
    assert kinds(sites) == ["norm", "value", "norm", "linear", "norm"]
    assert len(sites[0].absorbers) == 2
    assert sites[3].id == "block0/rows0"
    assert len(sites[3].absorbers) == 2


def test_one_plus_gain() -> None:
    s = Stack()
    n = s.norm(s.x, offset=1.0)
    s.x = s.add(s.x, s.attention(n))
    sites = exact(s.done())
    assert sites[0].absorbers[0].offset == 1.0


def test_a_gain_that_is_shifted_in_the_graph() -> None:
    """layer_norm with 1 + g computed beside it, as some exports leave it."""
    s = Stack()
    gain = s.call("aten.add.Tensor", s.param(H, width=0.1), 1.0)
    n = s.call("llmc.layer_norm", s.x, gain, s.param(H), eps=1e-5)
    s.x = s.add(s.x, s.attention(n))
    sites = exact(s.done())
    assert [a.offset for a in sites[0].absorbers] == [1.0, 0.0]


def test_router_and_experts_move_together() -> None:
    program = stack(["moe"])
    sites = exact(program)
    _, refusals = split(program)
    assert [r.predicate for r in refusals] == ["product_is_value"]
    (moe,) = [s for s in sites if any(axis == 2 for _, _, axis in s.consumers)]
    assert [axis for _, _, axis in moe.consumers] == [1, 2]
    assert moe.kind == "norm"


def fused(s: Stack, n: fx.Node) -> fx.Node:
    """q, k, v as slices of one linear with a bias."""
    rows = (HEADS + 2 * KV) * D
    y = s.linear(n, rows, H, bias=True)
    ends = [0, HEADS * D, (HEADS + KV) * D, rows]
    q, k, v = (
        s.heads(s.call("aten.slice.Tensor", y, 2, a, b), (b - a) // D)
        for a, b in itertools.pairwise(ends)
    )
    return s.linear(s.attend(q, k, v), H, HEADS * D)


def test_slices_of_one_linear() -> None:
    """Only v's rows of a fused projection are divided, bias included."""
    s = Stack()
    s.x = s.add(s.x, fused(s, s.norm(s.x)))
    n = s.norm(s.x)
    both = s.linear(n, 2 * INNER, H)
    gate, up = (
        s.call("operator.getitem", s.call("aten.chunk.default", both, 2, -1), i) for i in (0, 1)
    )
    s.x = s.add(s.x, s.linear(s.call("llmc.gated", gate, up, act="silu"), H, INNER))
    sites = exact(s.done())
    assert kinds(sites) == ["norm", "value", "norm", "product", "norm"]
    for absorber in sites[1].absorbers:
        assert (absorber.index[: (HEADS + KV) * D] == -1).all()
        assert (absorber.index[(HEADS + KV) * D :] >= 0).all()


def test_a_learned_factor_absorbs() -> None:
    s = Stack()
    n = s.norm(s.x)
    y = s.call("aten.mul.Tensor", n, s.param(H, near=1.0, width=0.1))
    s.x = s.add(s.x, s.linear(y, H, H))
    sites = exact(s.done())
    assert sites[0].kind == "product"


def test_a_stored_bias_behind_a_linear_absorbs() -> None:
    s = Stack()
    y = s.add(s.linear(s.norm(s.x), INNER, H), s.param(INNER))
    s.x = s.add(s.x, s.linear(s.call("aten.relu.default", y), H, INNER))
    sites = exact(s.done())
    assert [len(x.absorbers) for x in sites] == [1, 2, 1]


@pytest.mark.parametrize("swap", [False, True])
def test_a_gate_on_the_attention(swap: bool) -> None:
    """The product of attention and a sigmoid takes the division on attention's side."""
    s = Stack()
    n = s.norm(s.x)
    q = s.heads(s.linear(n, HEADS * D, H), HEADS)
    k, v = (s.heads(s.linear(n, KV * D, H), KV) for _ in range(2))
    gate = s.call("llmc.activation", s.linear(n, HEADS * D, H), act="sigmoid")
    factors = [s.attend(q, k, v), gate]
    y = s.call("aten.mul.Tensor", *(factors[::-1] if swap else factors))
    s.x = s.add(s.x, s.linear(y, H, HEADS * D))
    sites = exact(s.done())
    assert [len(x.consumers) for x in sites] == [4, 1, 1]
    assert sites[1].n_scales == KV * D


def test_a_norm_over_the_heads_channels_shares_scales() -> None:
    """A norm of v along the head size has one gain for all heads, so all heads share its scales."""
    s = Stack()
    n = s.norm(s.x)
    q = s.heads(s.linear(n, HEADS * D, H), HEADS)
    k, v = (s.heads(s.linear(n, KV * D, H), KV) for _ in range(2))
    s.x = s.add(s.x, s.linear(s.attend(q, k, s.norm(v, width=D)), H, HEADS * D))
    sites = exact(s.done())
    assert sites[1].n_scales == D
    assert sites[1].channels == HEADS * D


# ** near misses **


def refused(program: Program, predicate: str) -> Refusal:
    exact(program)
    _, refusals = split(program)
    (one,) = [r for r in refusals if r.predicate == predicate]
    return one


def test_a_second_reader_of_the_norm() -> None:
    s = Stack()
    n = s.norm(s.x)
    s.x = s.add(s.add(s.x, s.attention(n)), n)
    program = s.done()
    r = refused(program, "all_users_rewritten")
    assert program.node(r.node).target is torch.ops.aten.add.Tensor


def test_the_norm_is_the_output_too() -> None:
    s = Stack()
    n = s.norm(s.x)
    y = s.linear(n, 20, H)
    s.end.args = ((y, n),)
    s.end.meta["llmc"] = n.meta["llmc"]
    r = refused(s.program, "all_users_rewritten")
    assert r.node == s.end.name


def test_a_tied_head_behind_the_norm() -> None:
    program = stack(["silu"], tied=True)
    r = refused(program, "param_read_once")
    assert program.node(r.node).target is torch.ops.aten.embedding.default


def test_gelu_between() -> None:
    program = stack(["gelu"])
    r = refused(program, "absorbable")
    assert "gelu" in r.reason
    assert r.node == "activation_default"


def test_a_shared_gain() -> None:
    s = Stack()
    gain = s.param(H, near=1.0)
    for _ in range(2):
        n = s.call("llmc.rms_norm", s.x, gain, eps=1e-5)
        s.x = s.add(s.x, s.linear(n, H, H))
    _, refusals = split(s.done())
    assert [r.predicate for r in refusals] == ["param_read_once"] * 2


def test_a_norm_without_gain() -> None:
    s = Stack()
    s.x = s.add(s.x, s.linear(s.call("llmc.rms_norm", s.x, eps=1e-5), H, H))
    refused(s.done(), "norm_has_gain")


def test_values_that_two_attentions_read() -> None:
    s = Stack()
    n = s.norm(s.x)
    k, v = (s.heads(s.linear(n, KV * D, H), KV) for _ in range(2))
    for _ in range(2):
        q = s.heads(s.linear(n, HEADS * D, H), HEADS)
        s.x = s.add(s.x, s.linear(s.attend(q, k, v), H, HEADS * D))
    _, refusals = split(s.done())
    assert [r.predicate for r in refusals] == ["all_users_rewritten"] * 2


def test_the_stream_itself() -> None:
    s = Stack()
    s.x = s.add(s.x, s.linear(s.x, H, H))
    refused(s.done(), "all_users_rewritten")


def test_a_sum_of_two_values() -> None:
    s = Stack()
    n = s.norm(s.x)
    y = s.add(s.linear(n, H, H), s.linear(n, H, H))
    s.x = s.add(s.x, s.linear(y, H, H))
    refused(s.done(), "absorbable")


def test_readers_in_two_layouts() -> None:
    s = Stack()
    n = s.norm(s.x)
    swapped = s.reshape(s.call("aten.transpose.int", s.reshape(n, HEADS, H // HEADS), 2, 3), H)
    s.x = s.add(s.x, s.add(s.linear(n, H, H), s.linear(swapped, H, H)))
    refused(s.done(), "consumers_agree")


def test_an_overlapping_slice() -> None:
    """A slice that reads some of v's rows too is another reader of them."""
    s = Stack()
    n = s.norm(s.x)
    y = s.linear(n, 2 * KV * D, H)
    q = s.heads(s.linear(n, HEADS * D, H), HEADS)
    k = s.heads(s.call("aten.slice.Tensor", y, 2, 2, 2 + KV * D), KV)
    v = s.heads(s.call("aten.slice.Tensor", y, 2, KV * D, 2 * KV * D), KV)
    s.x = s.add(s.x, s.linear(s.attend(q, k, v), H, HEADS * D))
    refused(s.done(), "all_users_rewritten")


def test_a_squared_factor() -> None:
    s = Stack()
    n = s.linear(s.norm(s.x), INNER, H)
    s.x = s.add(s.x, s.linear(s.call("aten.mul.Tensor", n, n), H, INNER))
    refused(s.done(), "all_users_rewritten")


def test_names_do_not_matter() -> None:
    program = stack(["silu", "moe"], tied=True)
    other, back = scrambled(program)
    ours, refused_ours = split(program)
    theirs, refused_theirs = split(other)
    assert [(r.node, r.predicate) for r in refused_ours] == [
        (r.node, r.predicate) for r in refused_theirs
    ]
    for a, b in zip(ours, theirs, strict=True):
        assert (a.id, a.kind, a.value, a.n_scales) == (b.id, b.kind, b.value, b.n_scales)
        assert torch.equal(a.expand, b.expand)
        assert a.consumers == tuple((n, back[p], axis) for n, p, axis in b.consumers)
        assert [x.param for x in a.absorbers] == [back[x.param] for x in b.absorbers]
