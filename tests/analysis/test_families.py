"""Groups of 25 model families, found without names: what is cut equals what is masked."""

from __future__ import annotations

import importlib.util
import json
import sys
from collections.abc import Callable
from functools import cache
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest
import torch

ROOT = Path(__file__).resolve().parents[2]
sys.path.insert(0, str(ROOT / "tests"))

import tiny_models  # noqa: E402

# One of each way to write a block; the slow suite tries the others too.
QUICK = ("llama", "qwen3_moe", "gpt2", "gpt_neox", "bloom", "vit")
FAMILIES = [
    pytest.param(f, marks=() if f in QUICK else pytest.mark.slow) for f in tiny_models.FAMILIES
]
KINDS = ("neurons", "heads", "hidden", "experts", "together")


@cache
def bench() -> ModuleType:
    """The script that measures the table."""
    spec = importlib.util.spec_from_file_location(
        "arch_bench", ROOT / "benchmarks/architectures.py"
    )
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


@cache
def program(family: str) -> Any:
    return tiny_models.capture_tiny(family)


@cache
def measured(family: str) -> dict[str, Any]:
    inputs = tiny_models.random_inputs(family, *bench().TOKENS)
    found: dict[str, Any] = bench().measure(program(family), inputs)
    return found


@cache
def record() -> dict[str, Any]:
    found: dict[str, Any] = json.loads(bench().RESULTS.read_text(encoding="utf-8"))
    return found


def row(family: str) -> dict[str, Any]:
    (found,) = (r for r in record()["rows"] if r["family"] == family)
    return dict(found)


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("family", FAMILIES)
def test_sliced_equals_masked(family: str, kind: str) -> None:
    """As the committed table says: equal within its limit, or refused at the same node."""
    cell, known = measured(family)[kind], row(family)[kind]
    if cell is None or "refused" in cell:
        assert cell == known
        return
    assert cell["error"] <= 1e-5
    assert cell["change"] > 1e-3, "nothing was cut that matters"
    assert known["error"] <= 1e-5
    for size in ("groups", "units"):
        assert cell.get(size) == known.get(size)


@pytest.mark.parametrize("family", FAMILIES)
def test_refused_groups_name_a_node(family: str) -> None:
    from llmc.compiler.analysis.groups import dependency_groups

    nodes = {n.name for n in program(family).graph.nodes}
    for group in dependency_groups(program(family)):
        assert {b.node for b in group.blocked} <= nodes
        assert all(b.reason for b in group.blocked)


def test_enough_families_can_be_cut() -> None:
    rows = record()["rows"]
    assert [r["family"] for r in rows] == list(tiny_models.FAMILIES)
    counts = {k: sum(bench().works(r[k]) for r in rows) for k in KINDS}
    assert counts["neurons"] >= 22
    assert counts["heads"] >= 20
    assert counts["hidden"] >= 12
    assert counts["experts"] >= 3


def test_page_is_fresh(same_as_file: Callable[[str, Path], None]) -> None:
    """The page shows the committed figures."""
    same_as_file(bench().page(record()), bench().PAGE)


def test_cut_llama_equals_transformers_with_zeros() -> None:
    """An oracle of another origin: transformers' own model with columns of its weights zeroed."""
    from llmc.compiler.analysis.cut import cut
    from llmc.compiler.analysis.groups import dependency_groups
    from llmc.compiler.ir.interpret import run

    model, small = tiny_models.make("llama"), program("llama").clone()
    groups = {g.id: g for g in dependency_groups(small)}
    heads, neurons = torch.tensor([1]), torch.arange(0, 48, 3)
    keep = {}
    for i, layer in enumerate(model.model.layers):
        keep |= {groups[f"block{i}/kv_group0"]: heads, groups[f"block{i}/neuron0"]: neurons}
        with torch.no_grad():
            # Two query heads of 8 channels share the KV head that goes.
            layer.self_attn.o_proj.weight[:, :16] = 0
            gone = torch.ones(48, dtype=torch.bool)
            gone[neurons] = False
            layer.mlp.down_proj.weight[:, gone] = 0
    cut(small, keep)
    inputs = tiny_models.random_inputs("llama", 2)
    with torch.no_grad():
        want = model(input_ids=inputs["input_ids"]).logits
    torch.testing.assert_close(run(small, inputs), want, rtol=1e-5, atol=1e-5)
    assert small.weight_bytes() < program("llama").weight_bytes()


def test_a_tied_head_costs_its_product() -> None:
    """What the embedding table multiplies as the head counts for a hidden channel."""
    from llmc.compiler.analysis.groups import dependency_groups

    small = program("llama")
    (hidden,) = (g for g in dependency_groups(small) if g.kind == "hidden")
    weights = [small.param_of(n.args[1]) for n in small.calls("aten.linear.default")]
    assert len({p.name for p in weights}) == 15
    assert sum(len(p.names) == 2 for p in weights) == 1
    # Every product reads or writes the 32 hidden channels.
    want = sum(2 * torch.Size(p.shape).numel() / 32 for p in weights)
    assert hidden.flops_per_unit == want
