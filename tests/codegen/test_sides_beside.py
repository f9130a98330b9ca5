"""What stands beside the codes in the same launch: a product of low rank, and sparse entries."""

from __future__ import annotations

from typing import Any

import numerics
import pytest
import sides_cases
import torch
from numerics import judge
from sides_cases import case

from llmc.codegen import workspace
from llmc.codegen.aot import compile_variant
from llmc.codegen.prepack import prepack
from llmc.codegen.problem import Problem
from llmc.codegen.row import TileConfig
from llmc.codegen.rows.int4 import W4A16
from llmc.compiler.ir.ops.sparse import add_csr

CASES = [
    case(1, 33, 96, rank=1, spoil="left"),
    case(3, 40, 330, rank=20, spoil="right"),
    case(17, 65, 200, rank=32, asym=True, group=0, tile=(8, 64)),
    case(2, 70, 300, rank=7, norm=True, smooth=True, x_dtype="fp32", bias=True),
    case(3, 36, 160, "w4a16_24", rank=16, residual=True, stride="halves"),
    case(2, 50, 200, rank=9, pairs="gate", act="silu", bias=True, spoil="left"),
    case(1, 33, 96, sparse=True, spoil="csr_values"),
    case(3, 130, 100, sparse=True, residual=True, stride="padded"),
    case(9, 70, 300, sparse=True, norm=True, x_dtype="fp32", tile=(16, 64)),
    case(3, 36, 160, "w4a16_24", sparse=True, rank=3, smooth=True),
    case(2, 50, 136, sparse=True, pairs="gate", act="gelu", spoil="csr_values"),
    # several programs to a tile
    case(1, 70, 500, tile=(8, 64, 3, 4, 2), spoil="codes"),
    case(9, 40, 400, asym=True, bias=True, residual=True, tile=(8, 64, 3, 4, 4), spoil="zero"),
    case(3, 64, 300, group=0, norm=True, x_dtype="fp32", tile=(16, 32, 3, 2, 2), spoil="gain"),
    case(2, 50, 500, pairs="gate", act="silu", tile=(8, 64, 3, 4, 2)),
    case(9, 70, 400, rank=20, sparse=True, norm=True, x_dtype="fp32", tile=(8, 32, 3, 2, 3)),
    case(3, 40, 520, "w4a16_24", rank=4, tile=(8, 32, 2, 2, 2)),
    case(1, 40, 96, tile=(8, 32, 3, 2, 8), spoil="codes"),
]


@pytest.mark.parametrize("at", range(len(CASES)), ids=lambda i: CASES[i].label)
def test_sides_are_what_they_mean(at: int) -> None:
    """Against the oracle in fp64; the same bits twice; a spoiled part goes beyond the bound."""
    assert judge(CASES[at], sides_cases.answers(CASES)[at]) == ""


def test_counted_bytes_are_those_of_the_packed_tensors() -> None:
    """left and right, padded as packed; rank 64 costs at most 15 % over plain 4-bit weights."""
    parts = numerics.parts_of(case(1, 70, 300, rank=20))
    problem = Problem(70, 300, group=64, rank=20)
    assert prepack(W4A16, problem, **parts).bytes == W4A16.bytes_moved(problem, 0)
    plain, ranked = (Problem(4096, 4096, rank=r) for r in (0, 64))
    config = W4A16.default_config(ranked, 1)
    moved = [W4A16.bytes_moved(p, 1) + workspace.moved(p, config, 1) for p in (plain, ranked)]
    assert 1.0 < moved[1] / moved[0] < 1.15


def test_workspace_is_as_large_as_its_contents() -> None:
    """Tiles times programs times sums, products of right by runs of columns, and their counters."""
    config = TileConfig(8, 64, split=4)
    assert workspace.sizes(Problem(4096, 4096), config, 9) == (64 * 2 * 4 * 72 * 8, 128)
    ranked = Problem(4096, 4096, rank=40)
    assert workspace.sizes(ranked, TileConfig(8, 64), 9) == (2 * 8 * 48 * 8, 4)
    assert workspace.sizes(Problem(64, 64), TileConfig(8, 64), 9) == (0, 0)
    assert workspace.moved(Problem(4096, 4096), config, 1) == 2 * 4 * 4 * 4096
    assert workspace.moved(ranked, TileConfig(8, 64), 2) == 2 * 4 * 8 * 48 * 2


def test_bytes_of_a_call_count_entries_as_packed() -> None:
    """Four for every place of the padded rows, four per run of 64 rows, and what rows count."""
    given = case(1, 130, 96, sparse=True)
    packed = prepack(W4A16, given.problem, **numerics.parts_of(given))
    places = packed["entry_starts"][-1] * 64
    beside = 4 * int(places) + 4 * 4
    config = TileConfig(8, 32, split=2)
    partial = 8 * 5 * 2 * 32
    own = W4A16.bytes_moved(given.problem, 1)
    assert workspace.call_bytes(packed, config, 1) == own + beside + partial
    assert packed.bytes == W4A16.bytes_moved(given.problem, 0) + beside


@pytest.mark.parametrize(("M", "N", "processors"), [(1, 64, 132), (64, 64, 1), (700, 4096, 132)])
def test_makers_fit_on_the_processors(M: int, N: int, processors: int) -> None:
    """Programs that others wait for: of all tiles together no more than processors, or one each."""
    problem, config = Problem(N, 4096, rank=128), TileConfig(8, 32)
    makers = workspace.constants(problem, config, M, processors)["MAKERS"]
    rows = -(-M // 8)
    assert makers == 1 or makers * rows <= processors
    assert makers <= N // 32


def test_entries_lie_in_runs_of_64_rows() -> None:
    """Every entry once; the places between them hold 0."""
    parts = numerics.parts_of(case(1, 130, 96, sparse=True))
    packed = prepack(W4A16, Problem(130, 96, group=64, sparse=True), **parts)
    starts = packed["entry_starts"].tolist()
    dense = torch.zeros(192, 96)
    for tile in range(3):
        for n in range(starts[tile], starts[tile + 1]):
            for lane in range(64):
                at = int(packed["entry_index"][n * 64 + lane])
                dense[tile * 64 + lane, at] += packed["entry_values"][n * 64 + lane].float()
    values = parts["csr_values"].float()
    wanted = add_csr(torch.zeros(130, 96), values, parts["csr_index"], parts["csr_starts"])
    assert torch.equal(dense[:130], wanted)
    assert not dense[130:].any()


SPLIT_SIDES = {"rank": 64, "sparse": True, "norm": True, "x_dtype": "bf16", "asym": True}


@pytest.mark.parametrize(
    ("changes", "config", "target"),
    [
        ({"rank": 64}, TileConfig(8, 128), "sm_90"),
        ({"sparse": True}, TileConfig(16, 128), "sm_80"),
        ({}, TileConfig(8, 128, split=4), "sm_90"),
        (SPLIT_SIDES, TileConfig(16, 64, split=4), "sm_80"),
        (SPLIT_SIDES, TileConfig(16, 64, split=4), "sm_90"),
    ],
)
def test_sides_leave_the_main_loop_alone(
    changes: dict[str, Any], config: TileConfig, target: str
) -> None:
    """No stack and no local memory; without a norm no store and few issue slots in the loop."""
    facts = compile_variant(W4A16, Problem(4096, 4096, **changes), config, target)
    assert (facts.stack, facts.local_memory) == (0, 0)
    if not changes.get("norm"):
        assert facts.loop_stores == 0
        assert facts.slots <= 3.4
