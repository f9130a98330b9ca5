"""The rows: what they require, refuse and cost."""

from __future__ import annotations

import dataclasses

import pytest

from llmc.codegen.kernels import ROWS, choose, row
from llmc.codegen.problem import Problem
from llmc.codegen.row import TileConfig
from llmc.codegen.rows.int4 import W4A16, W4A16_24
from llmc.compiler.ir.errors import UsageError

DENSE = Problem(N=256, K=512)
SPARSE = Problem(N=256, K=512, group=64, n=2, m=4)


@pytest.mark.parametrize(
    ("name", "change", "field"),
    [
        ("w4a16", {"bits": 3}, "bits"),
        ("w4a16", {"group": 48}, "group"),
        ("w4a16", {"group": 96}, "group"),
        ("w4a16", {"group": 192}, "group"),
        ("w4a16", {"group": 8}, "group"),
        ("w4a16", {"group": 24}, "group"),
        ("w4a16", {"n": 2, "m": 4, "group": 64}, "m"),
        ("w4a16", {"K": 15}, "K"),
        ("w4a16", {"x_dtype": "float64"}, "x_dtype"),
        ("w4a16", {"scale_dtype": "fp32"}, "scale_dtype"),
        ("w4a16_24", {"bits": 8}, "bits"),
        ("w4a16_24", {"n": 1}, "n"),
        ("w4a16_24", {"m": 8}, "m"),
        ("w4a16_24", {"group": 8}, "group"),
        ("w4a16_24", {"group": 48}, "group"),
        ("w4a16_24", {"K": 510}, "K"),
        ("w4a16_24", {"scale_dtype": "fp32"}, "scale_dtype"),
    ],
)
def test_a_requirement_just_missed_is_refused_by_field(
    name: str, change: dict[str, object], field: str
) -> None:
    """The misfit names the field and its value."""
    base = SPARSE if name == "w4a16_24" else DENSE
    problem = dataclasses.replace(base, **change)  # type: ignore[arg-type]
    found = row(name).misfits(problem)
    assert field in [m.field for m in found]
    assert f"{field}=" in str(found[0]) or len(found) > 1


@pytest.mark.parametrize("group", [16, 32, 64, 128, 256, 512, 0, 4096])
def test_what_is_just_inside_is_served(group: int) -> None:
    """Every promised group, one scale per row among them, under every flag."""
    flags = {"asym": True, "bias": True, "residual": True, "norm": True}
    for dtype in ("fp16", "bf16", "fp32"):
        dense = Problem(N=1, K=2048, group=group, x_dtype=dtype, **flags)
        sparse = dataclasses.replace(dense, group=group // 2, n=2, m=4)
        assert choose(dense) == (W4A16, [])
        assert group == 16 or choose(sparse) == (W4A16_24, [])


def test_when_no_row_serves_all_say_why() -> None:
    """Each row contributes at least one misfit."""
    chosen, why = choose(dataclasses.replace(DENSE, bits=7))
    assert chosen is None
    assert {m.row for m in why} == {r.name for r in ROWS}


def test_bytes_are_the_weights_as_packed_and_each_side_once() -> None:
    """g128, sym: half a byte per code, four bytes per group; x and y at two bytes."""
    weights = 4096 * 4096 // 2 + 4096 * 32 * 4
    assert W4A16.bytes_moved(Problem(N=4096, K=4096), 1) == weights + 2 * (4096 + 4096)
    side = Problem(N=4096, K=4096, bias=True, residual=True, norm=True)
    extra = W4A16.bytes_moved(side, 3) - W4A16.bytes_moved(Problem(N=4096, K=4096), 3)
    assert extra == 2 * 4096 + 2 * 3 * 4096 + 4 * 4096
    sparse = Problem(N=4096, K=4096, group=64, n=2, m=4)
    assert W4A16_24.bytes_moved(sparse, 1) == 4096 * 4096 * 3 // 8 + 4096 * 32 * 4 + 2 * 8192


def test_the_default_tile_covers_the_tokens_and_fills_the_gpu() -> None:
    """BM is the least that holds M; BN the widest that still gives every processor a block."""
    wide = Problem(N=28672, K=4096)
    assert W4A16.default_config(wide, 1) == TileConfig(8, 128)
    assert W4A16.default_config(wide, 9) == TileConfig(16, 128)
    assert W4A16.default_config(wide, 1000) == TileConfig(64, 64)
    assert W4A16.default_config(Problem(N=4096, K=4096), 1) == TileConfig(8, 128, split=4)
    assert W4A16.default_config(Problem(N=4096, K=512), 1) == TileConfig(8, 32, warps=2)
    assert W4A16_24.default_config(dataclasses.replace(wide, n=2, m=4), 1).BM == 8


def test_a_tile_never_reads_past_the_padded_rows() -> None:
    """BN = 128 is out of the grid when the padded rows are an odd number of 64s."""
    assert {c.BN for c in W4A16.configs(Problem(N=65, K=256))} == {32, 64, 128}
    assert {c.BN for c in W4A16.configs(Problem(N=64, K=256))} == {32, 64}
    assert {c.BN for c in W4A16_24.configs(Problem(N=130, K=256))} == {32, 64}


def test_unknown_row_suggests_a_near_name() -> None:
    """One line, with the known rows."""
    with pytest.raises(UsageError, match=r"did you mean 'w4a16'"):
        row("w4a15")
