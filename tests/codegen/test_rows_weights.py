"""Rows of weight formats with 16-bit activations: numbers, packed bytes, refusals, machine code."""

from __future__ import annotations

import dataclasses
from typing import Any

import pytest
import torch
from numerics import Case, judge, parts_of, run_cases
from weight_rows import ALL, CASES, FACTS, MISSES, TILED

from llmc.codegen import launch
from llmc.codegen.aot import AotFacts, compile_variant
from llmc.codegen.kernels import row
from llmc.codegen.prepack import prepack
from llmc.codegen.problem import Problem
from llmc.codegen.row import TileConfig
from llmc.compiler.ir import packing
from llmc.compiler.ir.errors import ModelError, UsageError

TARGETS = ("sm_80", "sm_90")
# Shared memory that a block may take, bytes.
SHARED = {"sm_80": 163 * 1024, "sm_90": 227 * 1024}


@pytest.fixture(scope="module")
def answers(tmp_path_factory: pytest.TempPathFactory) -> list[dict[str, Any]]:
    """One child process for all cases."""
    return run_cases(CASES, tmp_path_factory.mktemp("kernels"))


@pytest.mark.parametrize("at", range(len(CASES)), ids=lambda i: CASES[i].label)
def test_a_row_computes_its_problem(at: int, answers: list[dict[str, Any]]) -> None:
    """Within the bound, the same twice, and beyond the bound when one part is changed."""
    assert judge(CASES[at], answers[at]) == ""


@pytest.mark.parametrize("name", ALL)
def test_every_tile_has_a_case(name: str) -> None:
    """What the tuner may pick is what the cases above run."""
    assert {c.tile for c in CASES if c.row == name and c.tile} == set(row(name).tiles)


@pytest.mark.parametrize("case", CASES, ids=lambda c: c.label)
def test_packed_bytes_are_what_the_row_moves(case: Case) -> None:
    """At no tokens the bytes are those of the packed weight and of its side vectors."""
    problem = dataclasses.replace(case.problem, bias=False, norm=False, smooth=False)
    problem = dataclasses.replace(problem, pairs="", act="", residual=False)
    parts = parts_of(dataclasses.replace(case, fields=dataclasses.asdict(problem)))
    if problem.bitmap:
        kept = packing.unpack(parts["bitmap"], 1, problem.K).sum(dtype=torch.int64)
        problem = dataclasses.replace(problem, kept=int(kept))
    assert prepack(row(case.row), problem, **parts).bytes == row(case.row).bytes_moved(problem, 0)


@pytest.mark.parametrize(("name", "base", "change", "field"), MISSES)
def test_a_requirement_just_missed_is_refused_by_field(
    name: str, base: dict[str, Any], change: dict[str, Any], field: str
) -> None:
    """The base is served; one change further it is not, and the misfit names the field."""
    assert row(name).misfits(Problem(256, 512, **base)) == []
    missed = dataclasses.replace(Problem(256, 512, **base), **change)
    assert field in [m.field for m in row(name).misfits(missed)]


def check(name: str, fields: dict[str, Any], config: TileConfig, target: str) -> AotFacts:
    """Compile for 4096 x 4096, and hold the laws that every variant keeps."""
    problem = Problem(4096, 4096, **fields)
    facts = compile_variant(row(name), problem, config, target)
    assert facts.stack == 0, facts
    assert facts.local_memory == 0, facts
    expected = row(name).matrix_instruction(target, problem.x_dtype, config)
    assert expected in facts.matrix if problem.rank else facts.matrix == (expected,), facts
    assert facts.shared <= SHARED[target], facts
    return facts


def _told() -> list[Any]:
    """One variant of each row in every run, the others in the long one."""
    names = [f[0] for f in FACTS]
    first = {names.index(n) for n in names}
    return [
        pytest.param(*f, marks=() if at in first else pytest.mark.slow)
        for at, f in enumerate(FACTS)
    ]


@pytest.mark.parametrize(("name", "fields", "config", "target", "slots", "stores"), _told())
def test_machine_code(
    name: str, fields: dict[str, Any], config: TileConfig, target: str, slots: float, stores: int
) -> None:
    """No spill, tensor cores, few issue slots, no conversion of a weight in the loop."""
    facts = check(name, fields, config, target)
    assert 1.0 < facts.slots <= slots
    assert facts.loop_stores <= stores, "weights take a round trip through shared memory"
    assert facts.conversions <= 0.1, "a number is converted per weight"


@pytest.mark.slow
@pytest.mark.parametrize("target", TARGETS)
@pytest.mark.parametrize("name", ALL)
def test_every_tile_compiles_without_spills(name: str, target: str) -> None:
    """The whole tuning grid over the schemes that need most registers, and some that need few."""
    tiles = set()
    for fields in TILED[name]:
        problem = Problem(4096, 4096, **fields)
        for config in row(name).configs(problem):
            if config.stages == row(name).stages[1] and config.split == 1:
                check(name, fields, config, target)
                tiles.add((config.BM, config.BN))
    assert tiles == set(row(name).tiles)


def test_values_of_another_dtype_are_refused() -> None:
    """Dense values are read as x's dtype: a weight packed in bf16 cannot meet x in fp16."""
    fields = {"weights": "dense", "scale_dtype": "", "n": 2, "m": 4}
    case = Case("w16_24", {"N": 64, "K": 128, "x_dtype": "bf16", **fields}, 1)
    packed = prepack(row("w16_24"), case.problem, **parts_of(case))
    x = torch.zeros(1, 128, dtype=torch.float16)
    with pytest.raises(UsageError, match="expected x in bf16 as the values"):
        launch.problem_of_call(packed, {"x": x})
    with pytest.raises(ModelError, match=r"bfloat16 values, found torch\.float16"):
        prepack(row("w16_24"), case.problem, **(parts_of(case) | {"values": x.new_zeros(64, 64)}))


def test_codes_that_stand_for_no_number_are_refused() -> None:
    """e4m3's NaN and the fourth ternary code."""
    for name, levels, bits, code in [("w8_float", "e4m3", 8, 0x7F), ("w2_lut", "ternary", 2, 3)]:
        problem = Problem(1, 32, bits=bits, group=0, weights="table", levels=levels)
        codes = packing.pack(torch.full((1, 32), code), bits)
        with pytest.raises(ModelError, match=f"codes of {levels} numbers"):
            prepack(row(name), problem, codes=codes, scale=torch.ones(1, 1).half())
