"""The machine code of the rows, compiled without a GPU: no spills, the expected instruction."""

from __future__ import annotations

import pytest

from llmc.codegen.aot import AotFacts, compile_variant
from llmc.codegen.problem import Problem
from llmc.codegen.row import KernelRow, TileConfig
from llmc.codegen.rows.int4 import W4A16, W4A16_24

TARGETS = ("sm_80", "sm_90")
# Shared memory that a block may take, bytes.
SHARED = {"sm_80": 163 * 1024, "sm_90": 227 * 1024}
SIDES = {"bias": True, "residual": True, "norm": True}
# Row, problem, tile, and the most issue slots per weight that it may take in the loop.
MAIN = [
    (W4A16, {}, TileConfig(8, 64), 2.7),
    (W4A16, {"asym": True, "x_dtype": "bf16"}, TileConfig(8, 64), 2.9),
    (W4A16, {"asym": True}, TileConfig(16, 64), 3.5),
    (W4A16, {}, TileConfig(8, 128), 2.3),
    (W4A16, {"asym": True}, TileConfig(8, 128), 2.3),
    (W4A16, {"asym": True, "group": 0}, TileConfig(16, 128), 2.7),
    (W4A16, {"x_dtype": "bf16"}, TileConfig(16, 128), 2.7),
    (W4A16, {"asym": True, "x_dtype": "bf16"}, TileConfig(16, 128), 2.7),
    (W4A16, {"asym": True, "x_dtype": "bf16", **SIDES}, TileConfig(8, 64), 3.6),
    (W4A16, {"group": 64, "asym": True, **SIDES}, TileConfig(16, 64), 5.5),
    (W4A16, {"group": 16, "asym": True}, TileConfig(8, 64), 4.1),
    (W4A16_24, {}, TileConfig(8, 32, 3, warps=2), 3.4),
    (W4A16_24, {"asym": True, "x_dtype": "bf16", **SIDES}, TileConfig(16, 64, 3), 9.0),
]


def problem_of(row: KernelRow, **changes: object) -> Problem:
    """A 4096 x 4096 linear with `group` in dense columns."""
    fields: dict[str, object] = {"group": 128, **changes}
    if row is W4A16_24:
        fields |= {"n": 2, "m": 4, "group": int(str(fields["group"])) // 2}
    return Problem(4096, 4096, **fields)  # type: ignore[arg-type]


def check(row: KernelRow, problem: Problem, config: TileConfig, target: str) -> AotFacts:
    """Compile, and hold the laws that every variant keeps."""
    facts = compile_variant(row, problem, config, target)
    expected = row.matrix_instruction(target, problem.x_dtype, config)
    assert facts.stack == 0, facts
    assert facts.local_memory == 0, facts
    assert facts.matrix == (expected,), facts
    assert facts.shared <= SHARED[target], facts
    return facts


@pytest.mark.parametrize("target", TARGETS)
@pytest.mark.parametrize(("row", "changes", "config", "slots"), MAIN)
def test_main_variants(
    row: KernelRow, changes: dict[str, object], config: TileConfig, slots: float, target: str
) -> None:
    """No stack, no local memory, tensor cores, and few issue slots and stores in the loop."""
    facts = check(row, problem_of(row, **changes), config, target)
    assert 1.0 < facts.slots <= slots
    if row is W4A16 or not changes.get("norm"):
        assert facts.loop_stores <= 2, "weights or x take more than one trip through shared memory"
    if not changes.get("norm"):
        assert facts.conversions == 0, "an integer is converted per weight"


def test_the_loop_reader_sees_a_spill() -> None:
    """A tile left out of the grid for spilling is caught by the same reader."""
    problem = problem_of(W4A16, group=32, asym=True, **SIDES)
    facts = compile_variant(W4A16, problem, TileConfig(64, 128), "sm_80")
    assert facts.stack > 0
    assert facts.local_memory > 0


@pytest.mark.slow
@pytest.mark.parametrize("target", TARGETS)
@pytest.mark.parametrize("row", [W4A16, W4A16_24], ids=lambda r: r.name)
def test_every_tile_compiles_without_spills(row: KernelRow, target: str) -> None:
    """The whole tuning grid over the schemes that need most registers, and some that need few."""
    schemes: list[dict[str, object]] = [
        {"group": group, "asym": asym, "x_dtype": dtype, **dict.fromkeys(SIDES, sides)}
        for group, asym, dtype, sides in [
            (32, True, "fp16", True), (32, True, "bf16", False), (32, False, "fp16", True),
            (64, True, "bf16", True), (128, True, "fp16", False), (128, False, "bf16", True),
            (256, True, "fp16", True), (0, False, "fp16", False), (0, True, "bf16", True),
            (32, True, "fp32", True), (128, False, "fp32", False),
        ]
    ]  # fmt: skip
    tiles = set()
    for scheme in schemes:
        problem = problem_of(row, **scheme)
        for config in row.configs(problem):
            if config.stages == row.stages[1] and config.split == 1:
                check(row, problem, config, target)
                tiles.add((config.BM, config.BN))
    assert tiles == set(row.tiles)
