"""Shifts, key scales and orders of channels on hand-built programs, exact in fp64."""

from __future__ import annotations

import pytest
import torch
from analysis_build import HEADS, KV, D, H, Stack, inputs, logits, stack

from llmc.compiler.analysis.blocks import apply_segments
from llmc.compiler.analysis.groups import dependency_groups
from llmc.compiler.analysis.key_scales import key_sites
from llmc.compiler.analysis.migrate import (
    MigrationSite,
    migrated,
    migration_sites,
    shift_biases,
    shift_ready,
    shifted,
)
from llmc.compiler.analysis.permute import moved, permute, why_fixed
from llmc.compiler.ir.errors import UsageError
from llmc.compiler.ir.refusal import Refusal

WIDE = torch.float64


def close(a: torch.Tensor, b: torch.Tensor, relative: float = 1e-10) -> None:
    assert (a - b).abs().max() <= relative * b.abs().max()


def sites_of(program, find):
    apply_segments(program)
    found = find(program)
    return [s for s in found if isinstance(s, MigrationSite)], [
        r for r in found if isinstance(r, Refusal)
    ]


def applied(program, *changes):
    new = program.clone()
    for change in changes:
        for name, tensor in change(new).items():
            new.set_tensor(name, tensor)
    return new


@pytest.mark.parametrize("mlp", ["relu", "silu"])
def test_a_shift_and_a_scale_leave_the_logits(mlp: str) -> None:
    program = stack([mlp], norm="layer", bias=True)
    sites, _ = sites_of(program, migration_sites)
    ready = [s for s in sites if shift_ready(program, s)]
    # The head has no bias, and no norm makes the other values.
    assert [s.id for s in ready] == ["block0/norm0", "block0/norm1"]
    g = torch.Generator().manual_seed(0)
    values = inputs(program)
    for site in ready:
        z = torch.randn(site.n_scales, generator=g, dtype=WIDE)
        s = torch.randn(site.n_scales, generator=g, dtype=WIDE).exp()
        new = applied(program, lambda p: shifted(p, site, z), lambda p: migrated(p, site, s))  # noqa: B023
        close(logits(new, values, WIDE), logits(program, values, WIDE))
        half = applied(program, lambda p: shifted(p, site, z))  # noqa: B023
        norm, _ = shift_biases(program, site)
        half.set_tensor(norm, program.weights.load(norm))
        assert (logits(half, values, WIDE) - logits(program, values, WIDE)).abs().max() > 1e-3


def test_what_cannot_be_shifted_says_why() -> None:
    program = stack(["silu"])
    sites, _ = sites_of(program, migration_sites)
    reasons = {s.kind: shift_biases(program, s) for s in sites}
    assert all(norm is None for norm, _ in reasons.values())
    assert "has no bias" in reasons["norm"][1]
    unbiased = stack(["silu"], norm="layer")
    sites, _ = sites_of(unbiased, migration_sites)
    norm, found = shift_biases(unbiased, sites[0])
    assert norm is not None
    assert set(found.values()) == {None}
    assert not shift_ready(unbiased, sites[0])


@pytest.mark.parametrize(("kv", "bias"), [(4, False), (2, True), (1, True)])
@pytest.mark.parametrize("interleaved", [None, False, True])
def test_key_scales_tied_over_pairs_are_exact(kv: int, bias: bool, interleaved: bool | None):
    s = Stack()
    n = s.norm(s.x)
    q = s.heads(s.linear(n, HEADS * D, H, bias=bias), HEADS)
    k = s.heads(s.linear(n, kv * D, H, bias=bias), kv)
    v = s.heads(s.linear(n, kv * D, H, bias=bias), kv)
    if interleaved is not None:
        q, k = (turned(s, x, interleaved) for x in (q, k))
    s.x = s.add(s.x, s.linear(s.attend(q, k, v), H, HEADS * D))
    program = s.done()
    sites, refused = sites_of(program, key_sites)
    assert not refused
    (site,) = sites
    assert site.n_scales == kv * D // (1 if interleaved is None else 2)
    scales = torch.randn(site.n_scales, generator=s.random, dtype=WIDE).exp()
    values = inputs(program)
    new = applied(program, lambda p: migrated(p, site, scales))
    close(logits(new, values, WIDE), logits(program, values, WIDE))
    assert not torch.equal(new.weights.load("p2"), program.weights.load("p2"))


def turned(s: Stack, x, interleaved: bool):
    """Rotated by an angle per position and pair; both channels of a pair read one angle."""
    at = s.call("aten.unsqueeze.default", s.pos, -1)
    wide = s.call("aten.mul.Tensor", at, s.param(D // 2))
    if interleaved:
        wide = s.call("aten.repeat_interleave.self_int", wide, 2, -1)
    else:
        wide = s.call("aten.cat.default", [wide, wide], -1)
    cos, sin = (s.call(f"aten.{f}.default", wide) for f in ("cos", "sin"))
    cos, sin = (s.call("aten.unsqueeze.default", t, 1) for t in (cos, sin))
    return s.call("llmc.rope", x, cos, sin, interleaved=interleaved)


def test_a_norm_behind_the_keys_is_a_reason() -> None:
    s = Stack()
    n = s.norm(s.x)
    q, k, v = (s.heads(s.linear(n, c * D, H), c) for c in (HEADS, KV, KV))
    q, k = (s.norm(x, width=D) for x in (q, k))
    s.x = s.add(s.x, s.linear(s.attend(q, k, v), H, HEADS * D))
    sites, refused = sites_of(s.done(), key_sites)
    assert not sites
    assert [r.predicate for r in refused] == ["no_key_norm"]
    assert refused[0].node.startswith("attention")


@pytest.mark.parametrize("attrs", [{}, {"bias": True, "norm": "layer"}, {"tied": True}])
def test_orders_leave_the_logits(attrs: dict) -> None:
    tied = attrs.pop("tied", False)
    program = stack(["silu", "moe"], tied=tied, **attrs)
    apply_segments(program)
    groups = [g for g in dependency_groups(program) if why_fixed(program, g) is None]
    assert {g.kind for g in groups} == {"neuron", "hidden"}
    g = torch.Generator().manual_seed(1)
    values = inputs(program)
    every = program.clone()
    names = permute(every, {x: torch.randperm(x.units, generator=g) for x in groups})
    assert {m.param for x in groups for m in x.members} == set(names)
    close(logits(every, values, WIDE), logits(program, values, WIDE))
    assert any(not torch.equal(every.weights.load(n), program.weights.load(n)) for n in names)


def test_an_order_and_its_inverse_is_nothing() -> None:
    program = stack(["silu"])
    apply_segments(program)
    neurons = next(g for g in dependency_groups(program) if g.kind == "neuron")
    order = torch.randperm(neurons.units, generator=torch.Generator().manual_seed(2))
    new = program.clone()
    permute(new, {neurons: order})
    permute(new, {neurons: order.argsort()})
    for name in program.params:
        assert torch.equal(new.weights.load(name), program.weights.load(name))


def test_several_indices_of_a_unit_keep_their_places() -> None:
    unit_of = torch.tensor([0, 1, 2, -1, 0, 1, 2])
    assert moved(unit_of, torch.tensor([2, 0, 1])).tolist() == [2, 0, 1, 3, 6, 4, 5]


def test_heads_and_bad_orders_are_refused() -> None:
    program = stack(["silu"])
    apply_segments(program)
    groups = dependency_groups(program)
    heads = next(g for g in groups if g.kind == "kv_group")
    with pytest.raises(UsageError, match="place of a kv group has a meaning"):
        permute(program, {heads: torch.arange(heads.units)})
    neurons = next(g for g in groups if g.kind == "neuron")
    with pytest.raises(UsageError, match="a permutation of"):
        permute(program, {neurons: torch.zeros(neurons.units, dtype=torch.long)})
