"""The analyses on captured models: blocks, sites and exact migrations, whatever the names."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable
from typing import Any

import pytest
import torch
from analysis_build import inputs, logits, scrambled

from llmc.compiler.analysis.blocks import apply_segments, block_classes, segment
from llmc.compiler.analysis.cost import CostModel
from llmc.compiler.analysis.linears import ExpertSite, LinearSite, linear_sites
from llmc.compiler.analysis.migrate import MigrationSite, migrated, migration_sites
from llmc.compiler.analysis.tokenwise import prove_tokenwise
from llmc.compiler.ir.refusal import Refusal

Captured = Callable[[str], Any]

# blocks; roles in one block; kinds of migrations in one block; predicates of refusals in the model
LLAMA = ["q", "k", "v", "o", "gate", "up", "down"]
GATED = ["norm", "value", "norm", "product"]
EXPECTED: dict[str, tuple[int, list[str], list[str], dict[str, int]]] = {
    "llama": (3, LLAMA, GATED, {}),
    "mqa_tied": (1, LLAMA, GATED, {"param_read_once": 1}),
    "qwen2": (3, LLAMA, GATED, {}),
    "qwen3": (3, LLAMA, GATED, {}),
    "gemma2": (3, LLAMA, GATED, {"param_read_once": 1}),
    "gpt2": (
        2, ["qkv", "o", "fc1", "fc2"], ["norm", "value", "norm"],
        {"param_read_once": 1, "absorbable": 2},
    ),
    "opt": (
        3, ["q", "k", "v", "o", "fc1", "fc2"], ["norm", "value", "norm", "linear"],
        {"param_read_once": 1},
    ),
    "mixtral": (3, ["q", "k", "v", "o", "router"], ["norm", "value", "norm"],
                {"product_is_value": 3}),
    "phi3": (3, ["qkv", "o", "gate_up", "down"], GATED, {}),
    "bert": (
        3, ["q", "k", "v", "o", "fc1", "fc2"], ["value"],
        {"all_users_rewritten": 6, "absorbable": 3, "param_read_once": 1, "within_segment": 1},
    ),
}  # fmt: skip


@pytest.mark.parametrize("name", list(EXPECTED))
def test_model(captured: Captured, name: str) -> None:
    blocks, roles, kinds, refusals = EXPECTED[name]
    program = captured(name)
    values = inputs(program, vocab=96, length=6)
    before = logits(program, values, torch.float32)
    apply_segments(program)
    assert torch.equal(logits(program, values, torch.float32), before)
    assert [s.name for s in program.segments] == [
        "prologue", *(f"block{i}" for i in range(blocks)), "epilogue",
    ]  # fmt: skip
    assert all(len(s.live_out) == 1 for s in program.segments[1:-1])
    assert len(set(block_classes(program, attributes=False).values())) == 1
    assert prove_tokenwise(program) == []

    linears = linear_sites(program)
    for i in range(blocks):
        mine = [s for s in linears if isinstance(s, LinearSite) and s.segment == f"block{i}"]
        assert [s.role for s in mine] == roles
    tied = [s for s in linears if isinstance(s, Refusal)]
    heads = [s for s in linears if isinstance(s, LinearSite) and s.head]
    assert len(tied) + len(heads) == 1
    experts = [s for s in linears if isinstance(s, ExpertSite)]
    assert len(experts) == (blocks if name == "mixtral" else 0)

    found = migration_sites(program)
    for i in range(blocks):
        mine = [s for s in found if isinstance(s, MigrationSite) and s.segment == f"block{i}"]
        assert [s.kind for s in mine] == kinds
    assert Counter(s.predicate for s in found if isinstance(s, Refusal)) == refusals

    want = logits(program, values, torch.float64)
    g = torch.Generator().manual_seed(0)
    for site in found:
        if isinstance(site, MigrationSite):
            s = torch.exp(torch.randn(site.n_scales, generator=g, dtype=torch.float64) * 0.7)
            for param, tensor in migrated(program, site, s).items():
                program.set_tensor(param, tensor)
    error = (logits(program, values, torch.float64) - want).abs().max() / want.abs().max()
    assert error < 1e-10
    error = (logits(program, values, torch.float32) - before).abs().max() / before.abs().max()
    assert error < 1e-5


@pytest.mark.parametrize("name", ["llama", "gemma2", "mixtral"])
def test_names_do_not_matter(captured: Captured, name: str) -> None:
    program = captured(name)
    other, back = scrambled(program, seed=5)
    assert segment(other) == segment(program)
    apply_segments(program)
    apply_segments(other)
    assert block_classes(other) == block_classes(program)
    ours, theirs = linear_sites(program), linear_sites(other)
    for a, b in zip(ours, theirs, strict=True):
        if isinstance(a, LinearSite):
            assert {**vars(b), "param": back[b.param]} == vars(a)
    pairs = zip(migration_sites(program), migration_sites(other), strict=True)
    for c, d in pairs:
        if isinstance(c, MigrationSite):
            assert (c.id, c.value, c.n_scales) == (d.id, d.value, d.n_scales)
            assert torch.equal(c.expand, d.expand)
        else:
            assert (c.node, c.predicate, c.reason) == (d.node, d.predicate, d.reason)


def test_alternating_windows_are_two_classes(captured: Captured) -> None:
    program = captured("gemma2")
    assert list(block_classes(program).values()) == [0, 1, 0]


def test_cost_of_a_captured_model(captured: Captured) -> None:
    program = captured("llama")
    apply_segments(program)
    table = CostModel(program, 1, 32).table()
    assert table["total"]["weights"] == program.weight_bytes()
    blocks = [r["flops"] for r in table["segments"] if r["name"].startswith("block")]
    assert len(set(blocks)) == 1
