"""Online rotations around linears: taken into their launches, both of them, or told why not."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from lowering_programs import Maker, Weight
from test_survey import planned, told

from llmc.codegen.fuse import FEATURES, fuse
from llmc.codegen.targets import triton_accept
from llmc.compiler.ir.ops.rotation import mixed_by


def test_rotations_on_both_sides_are_part_of_six_launches() -> None:
    """Sections keep widths of their own; the head, which nothing rotates, stays as it was."""
    page = told("quip")
    assert page["launches_per_block"] == 6
    assert page["not_fused"] == []
    found = [r["problem"] for r in page["fused"]]
    assert [p["out_mixed"] for p in found[:4]] == ["256 128 128", "256", "512 512", "256"]
    assert [p["mixed"] for p in found] == [True] * 8 + [False]
    assert [p["norm"] for p in found[:4]] == [True, False, True, False]
    assert [p["residual"] for p in found[:4]] == [False, True, False, True]
    assert [p["pairs"] for p in found[:4]] == ["", "", "gate", ""]


@pytest.mark.parametrize(
    ("text", "how"),
    [
        ("quip", {"hidden": 192, "inner": 320}),  # runs of 64, three and five of them
        ("quip:sides=in", {}),
        ("quip:sides=out", {}),
        ("quip", {"bias": True, "norm": "layer", "mlp": "gelu"}),
    ],
)
def test_other_widths_sides_and_models_need_no_more(text: str, how: dict[str, Any]) -> None:
    """Odd factors, one side alone, biases behind the rotation, layer norms, another width."""
    page = told(text, **how)
    assert page["launches_per_block"] == 6
    assert page["not_fused"] == []
    problems = [r["problem"] for r in page["fused"][:-1]]
    assert all(bool(p["out_mixed"]) == ("=in" not in text) for p in problems)
    assert all(p["mixed"] == ("=out" not in text) for p in problems)
    assert all(p["bias"] == how.get("bias", False) for p in problems)


def test_a_width_that_no_kernel_mixes_keeps_its_own_calls() -> None:
    """67 runs of 16: gate, up and down are refused by the field, and multiply all the same."""
    assert mixed_by(1072) == (67, 16)
    page = told("quip", inner=1072)
    told_of = {r["reason"] for r in page["not_fused"]}
    assert any("out_mixed=1072" in t or "out_mixed is not fused" in t for t in told_of)
    assert any("K=1072, expected at most" in t for t in told_of)
    assert [r["problem"]["out_mixed"] for r in page["fused"][:4]] == [
        "256 128 128",
        "256",
        "",
        "256",
    ]
    assert [r["problem"]["mixed"] for r in page["fused"][:4]] == [True, True, True, False]


def test_the_cpu_leaves_rotations_as_they_are() -> None:
    """Its kernels are not asked for them, so nothing is refused either."""
    page = told("quip:bits=4", "cpu")
    assert not any(r["problem"]["mixed"] or r["problem"]["out_mixed"] for r in page["fused"])
    assert not any("rotat" in r["reason"] or "mixed" in r["reason"] for r in page["not_fused"])
    program = planned("quip:bits=4")
    before = len(list(program.calls("llmc.rotate")))
    assert before == 2 * (4 + 7)  # of two blocks: four values that are read, seven that are made


def _around(**change: Any) -> tuple[Any, Any]:
    """rotate⁻¹(linear(rotate(x))) with something changed, and what fusing it gave."""
    m = Maker(torch.float16)
    x = m.input("x", 64)
    into = m.param("into", torch.ones(64))
    v = m.call("llmc.rotate", x, into, inverse=change.get("inverse_in", False))
    y = m.linear(v, "w", Weight(64, 64))
    scale = m.param("turn", torch.ones(64)) if not change.get("computed") else m.input("s", 64)
    if change.get("computed"):
        scale = m.call("aten.select.int", m.call("aten.select.int", scale, 0, 0), 0, 0)
    u = m.call("llmc.rotate", y, scale, inverse=change.get("inverse_out", True))
    u = m.call("aten.add.Tensor", u, y) if change.get("read") else u
    u = m.call("aten.add.Tensor", u, v) if change.get("kept") else u
    program = m.output(u)
    return program, fuse(program, triton_accept, FEATURES)


@pytest.mark.parametrize(
    ("change", "mixed", "back"),
    [
        ({}, True, "64"),
        ({"inverse_in": True}, False, "64"),
        ({"inverse_out": False}, True, ""),
        ({"computed": True}, True, ""),
        ({"read": True}, True, ""),
        ({"kept": True}, False, "64"),
    ],
)
def test_what_is_no_such_rotation_stays(change: dict[str, Any], mixed: bool, back: str) -> None:
    """Turned the other way round, by what is not stored, or read by others as well."""
    _, plan = _around(**change)
    (one,) = plan.fused
    assert (one.problem.mixed, one.problem.out_mixed) == (mixed, back)
    if "kept" in change:
        (why,) = plan.refused
        assert why.predicate == "all_readers_fused"
