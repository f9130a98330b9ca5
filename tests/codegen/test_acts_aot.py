"""The machine code of rows whose inputs are rounded: no spills, the expected instruction."""

from __future__ import annotations

import pytest

from llmc.codegen.aot import compile_variant
from llmc.codegen.problem import Problem
from llmc.codegen.row import KernelRow, TileConfig
from llmc.codegen.rows.float8 import FP8
from llmc.codegen.rows.int8_products import INT8_SPLIT, W4A8, W8A8
from llmc.codegen.rows.rounded import ROUND_E4M3, ROUND_INT8, round_config

SIDES = {"bias": True, "residual": True, "norm": True, "smooth": True, "eps": 1e-6}
INT8 = {"bits": 8, "rounds": "int8 token"}
E4M3 = {"bits": 8, "rounds": "e4m3 token", "weights": "table", "levels": "e4m3"}
VARIANTS = [
    (W8A8, {**INT8, **SIDES}, TileConfig(8, 64, 3)),
    (W8A8, INT8, TileConfig(128, 256, 3, 8)),
    (W8A8, {**INT8, **SIDES, "group": 128}, TileConfig(64, 128, 3)),
    (W8A8, INT8, TileConfig(128, 256, 3, 8)),
    (INT8_SPLIT, {"bits": 8, "rounds": "int8 token limit=6.0", "outliers": 40},
     TileConfig(32, 128, 3)),
    (INT8_SPLIT, {**SIDES, "bits": 8, "rounds": "int8 token limit=6.0", "outliers": 40},
     TileConfig(8, 64, 3)),
    (W4A8, {**INT8, "bits": 4, "group": 128}, TileConfig(8, 128, 3)),
    (W4A8, {**INT8, "bits": 4, "group": 128, "bias": True}, TileConfig(128, 128, 3, 8)),
    (FP8, {**E4M3, **SIDES}, TileConfig(16, 64, 3)),
    (FP8, {**E4M3, "bias": True}, TileConfig(128, 128, 3, 8)),
]  # fmt: skip


def problem(**changes: object) -> Problem:
    """A 4096 x 4096 linear with one scale per row."""
    return Problem(4096, 4096, **{"group": 4096, **changes})  # type: ignore[arg-type]


@pytest.mark.parametrize(
    ("row", "changes", "config", "target"),
    [(*v, v[0].targets[at % len(v[0].targets)]) for at, v in enumerate(VARIANTS)],
    ids=lambda v: getattr(v, "name", str(v)[:40]),
)
def test_products(
    row: KernelRow, changes: dict[str, object], config: TileConfig, target: str
) -> None:
    """No stack, no local memory, and products of eight bits wherever the machine has them."""
    given = problem(**changes)
    assert config in row.configs(given)
    facts = compile_variant(row, given, config, target)
    expected = row.matrix_instruction(target, given.x_dtype, config)
    assert facts.stack == facts.local_memory == 0, facts
    assert expected in facts.matrix, facts
    assert expected.startswith("IMMA" if config.BM == 8 or target == "sm_80" else ("IG", "QG"))
    if not given.limited:
        assert facts.matrix == (expected,), facts
    if config.BM > 16:
        assert facts.loop_stores == 0, "codes take a round trip through shared memory"
    else:
        assert facts.slots <= 7.8, "rounding x costs more than the weights' bytes"


@pytest.mark.parametrize(
    ("row", "changes", "target"),
    [(ROUND_INT8, SIDES, "sm_80"), (ROUND_E4M3, {"rounds": "e4m3 static limit=2.0"}, "sm_90")],
)
def test_rounding(row: KernelRow, changes: dict[str, object], target: str) -> None:
    """A token stays in registers."""
    given = problem(**{"rounds": "int8 token", **changes, "bias": False, "residual": False})
    facts = compile_variant(row, given, round_config(4096), target)
    assert facts.stack == facts.local_memory == 0, facts
    assert facts.matrix == ()
    assert facts.conversions <= 1.0, "integers are read from the bits of a rounded sum"
