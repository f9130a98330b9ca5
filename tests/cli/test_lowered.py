"""Kernels as the report tells them: each once, with limits, variants, sources and facts."""

from __future__ import annotations

import json

import pytest
import torch

import llmc
from llmc.compiler.cli.lowered import FACTS, lowered
from llmc.compiler.ir.graph import Program
from llmc.compiler.pipeline.zoo import decoder


@pytest.fixture(scope="module")
def coded() -> Program:
    """Two blocks in 4 bits, groups of 128 as the documented variants have."""
    program = decoder(hidden=256, inner=512, heads=4, kv=2, size=64, blocks=2)
    tokens = torch.randint(0, 20, (1, 8), generator=torch.Generator().manual_seed(0))
    return llmc.compile(program, passes="w4:group=128,solver=rtn", calibration=tokens).program


def test_a_kernel_stands_once_with_its_variants(coded: Program) -> None:
    """Alike nodes share a row; a variant that was compiled ahead of time shows its facts."""
    told = lowered(coded, "triton")
    assert told is not None
    assert [r["name"] for r in told["rows"]] == ["w4a16", "w16"]
    kernel, head = told["rows"]
    assert [v["nodes"] for v in head["variants"]] == [1]
    assert sum(v["nodes"] for v in kernel["variants"]) == len(told["fused"]) - 1
    assert sum(int(row[4]) for row in told["table"].rows) == len(told["fused"])
    assert ("asym", "no or yes") in kernel["limits"].rows
    assert all(value for _, value in kernel["limits"].rows)
    known = {f["variant"] for f in json.loads(FACTS.read_text())["facts"] if "variant" in f}
    for variant in kernel["variants"]:
        assert f"def {variant['name']}(" in variant["source"]
        assert bool(variant["facts"].rows) == (variant["name"] in known)
    gate = next(v for v in kernel["variants"] if v["name"].endswith("_norm_silu_gate"))
    assert {row[0] for row in gate["facts"].rows} == {"sm_80", "sm_90"}


def test_launches_of_alike_blocks_stand_once(coded: Program) -> None:
    """The two blocks start the same kernels."""
    told = lowered(coded, "triton")
    assert told is not None
    (row,) = [r for r in told["launches"].rows if r[0].startswith("block")]
    assert row[:3] == ("block0", "2", str(told["launches_per_block"]))


def test_a_call_of_two_kernels_shows_both() -> None:
    """What rounds the input and multiplies codes is a kernel of its own beside the row chosen."""
    program = decoder(hidden=256, inner=512, heads=4, kv=2, size=64)
    tokens = torch.randint(0, 20, (1, 8), generator=torch.Generator().manual_seed(0))
    done = llmc.compile(program, passes="a8,w8:group=128,solver=rtn", calibration=tokens)
    told = lowered(done.program, "triton")
    assert told is not None
    names = [r["name"] for r in told["rows"]]
    assert {"round_int8", "w8a8_codes"} <= set(names)
    assert len(set(names)) == len(names)


def test_another_target_has_no_sources(coded: Program) -> None:
    """torch's kernels are told by name; a program without linears has no section."""
    told = lowered(coded, "cpu")
    assert told is not None
    assert told["rows"] == []
    assert told["launches"].rows == []
    assert told["table"].rows
