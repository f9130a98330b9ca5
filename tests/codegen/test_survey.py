"""A lowering told from types alone: launches of a decode step, bytes, and what is left."""

from __future__ import annotations

import json
from typing import Any

import pytest

from llmc.codegen.survey import survey
from llmc.codegen.targets import BANDWIDTH
from llmc.compiler.ir.graph import DictWeights, Program
from llmc.compiler.pipeline import recipe, zoo
from llmc.compiler.pipeline.plan import make_plan
from llmc.compiler.runtime.cache import add_cache


def planned(text: str, **how: Any) -> Program:
    """A small llama with its cache, as it would be compiled; without a single tensor."""
    given = {"hidden": 256, "inner": 512, "size": 64, "rope": 1.0}
    program = zoo.decoder(**(given | how))
    plan = make_plan(program, recipe.from_strings([text]))
    plan.program.weights = DictWeights()
    return add_cache(plan.program)


def told(text: str, target: str = "triton", tokens: int = 1, **how: Any) -> dict[str, Any]:
    page = survey(planned(text, **how), target, tokens, "fp16", BANDWIDTH)
    assert json.loads(json.dumps(page)) == page
    return page


@pytest.mark.parametrize(
    "text",
    [
        "w4:group=128",
        "smooth,w4:group=128",
        "prune24,w4:group=128",
        "prune48",
        "w8",
        "w4:group=64,lorc",
        "int8_split",
        "kv8",
        "kivi",
        "share_heads:kv=1",
        "smooth",
        "a8",
        "a8:act=static",
        "w4:group=128,a8:kind=e4m3",
        "zeroquant_fp",
        "olive",
        "prune24,a8,kv8",
        "w6",
        "w5",
        "bcq",
        "binary",
    ],
)
def test_a_decode_step_starts_six_kernels_per_block(text: str) -> None:
    """q, k and v behind the norm; turn and write; attend; out and sum; gate and up behind the
    norm; down and sum; and the head that nobody compressed behind the last norm."""
    page = told(text)
    assert page["launches_per_block"] == 6
    for name in ("block0", "block1"):
        block = page["blocks"][name]
        assert block["launches"] == 6
        kinds = [c.split("_default")[0] for c in block["calls"]]
        assert kinds == ["fused", "cached_attention", "fused", "fused", "fused"]
    assert [len(r["sections"]) for r in page["fused"]][:4] == [3, 1, 2, 1]
    assert len(page["attention"]) == 2
    assert page["not_fused"] == []
    head = page["fused"][-1]
    assert (head["kernel"], head["problem"]["norm"], head["launches"]) == ("w16", True, 1)


def test_bytes_are_those_of_the_parameters_and_of_the_row() -> None:
    """Codes and scales of q, k and v together; more tokens move more activations."""
    page, more = told("w4:group=128"), told("w4:group=128", tokens=4)
    qkv = page["fused"][0]
    rows = sum(qkv["sections"])
    assert rows == 256 + 2 * 128
    assert qkv["stored_bytes"] == rows * 256 // 2 + rows * 2 * 2 + 256 * 4
    assert more["fused"][0]["bytes"] - qkv["bytes"] == 3 * 2 * (256 + rows)
    assert page["bytes"] == sum(r["bytes"] for r in page["fused"])
    assert qkv["floor_us"] == pytest.approx(1e6 * qkv["bytes"] / BANDWIDTH)


def test_what_no_row_serves_is_told_by_the_rows_that_come_closest() -> None:
    """Groups of eight columns: every linear of codes is refused with the field in the way."""
    page = told("w4:group=8")
    reasons = [r["reason"] for r in page["not_fused"] if r["predicate"] == "kernel"]
    assert [r["kernel"] for r in page["fused"]] == ["w16"]
    assert reasons
    assert all("group=8, expected" in r for r in reasons)


def test_the_cpu_is_asked_for_what_it_has() -> None:
    """Rows are joined; no norm, gate or sum is taken in there."""
    page = told("w4:group=128", "cpu")
    assert [len(r["sections"]) for r in page["fused"]] == [3, 1, 2, 1] * 2
    assert not any(r["problem"]["norm"] or r["problem"]["residual"] for r in page["fused"])
    assert page["attention"] == []


def test_a_row_that_rounds_inputs_may_start_two_kernels() -> None:
    """One for a token, where each program rounds it; for many, a kernel that rounds goes before."""
    one, many = told("a8,w8:group=row"), told("a8,w8:group=row", tokens=512)
    assert {r["launches"] for r in one["fused"]} == {1}
    assert {r["launches"] for r in many["fused"] if r["kernel"] != "w16"} == {2}
    assert one["launches_per_block"] == 6
    assert many["launches_per_block"] == 10
    floats = told("w4:group=128,a8:kind=e4m3", tokens=512)
    assert {r["launches"] for r in floats["fused"] if r["kernel"] != "w16"} == {2}


@pytest.mark.parametrize(
    "text", ["w4:group=128", "a8,w8:group=row", "w4:group=64,lorc", "int8_split"]
)
def test_layers_that_are_no_llama_need_no_more(text: str) -> None:
    """Layer norms join like others, whatever reads them."""
    page = told(text, norm="layer", mlp="gelu")
    assert page["launches_per_block"] == 6
    centred = [r["problem"]["centred"] for r in page["fused"]]
    assert centred[:8] == [True, False, True, False] * 2


@pytest.mark.parametrize("mlp", ["gelu", "gated"])
@pytest.mark.parametrize("norm", ["layer", "rms"])
def test_attention_and_mlp_side_by_side_need_no_more(norm: str, mlp: str) -> None:
    """q, k, v and what leads into the MLP take the norm in; either way out takes a sum."""
    page = told("w4:group=128", norm=norm, mlp=mlp, parallel=True)
    assert page["launches_per_block"] == 6
    first = [r["problem"] for r in page["fused"]][:4]
    assert [p["norm"] for p in first].count(True) == 2
    assert [p["residual"] for p in first].count(True) == 2


def test_a_program_without_blocks_has_no_launches_per_block() -> None:
    program = planned("w4:group=128")
    program.segments = []
    page = survey(program, "triton", 1, "bf16", BANDWIDTH)
    assert page["launches_per_block"] is None
    assert page["fused"]
