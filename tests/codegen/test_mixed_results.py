"""Results that a kernel rotates back, and all that is behind: by the programs that come last.

Cases are judged as those of `numerics`: against what the problem means, in fp64.
"""

from __future__ import annotations

from typing import Any

import pytest
from numerics import Case, judge, run_cases

from llmc.codegen.kernels import row
from llmc.codegen.problem import Problem

CODES = {"bits": 2, "group": 0, "weights": "table", "levels": "midrise", "K": 160}
NORM = {"norm": True, "eps": 1e-5}
GATE = {"pairs": "gate", "act": "silu"}
SPLIT = (8, 32, 3, 2, 2)  # programs share columns


def _case(M: int, sections: str, spoil: str = "", name: str = "w2_lut", **more: Any) -> Case:
    tile = more.pop("tile", None)
    rows = sum(map(int, sections.split()))
    fields = {**CODES, "N": rows, "out_mixed": sections, **more}
    return Case(name, fields, M, spoil=spoil, tile=tile, seed=3)


CASES = [
    _case(1, "256", "out_turn", **NORM, residual=True),
    _case(3, "64 32 32", "codes", bias=True),
    _case(2, "96 96", "bias", **GATE, bias=True),  # 3 runs of 32 each
    _case(1, "208", "out_turn", act="gelu", residual=True),
    _case(2, "112", "out_gain", act="tanh", out_norm=True, out_eps=1e-5, residual=True, bias=True),
    _case(9, "128 16", tile=(8, 32), **NORM),  # two tiles of tokens
    _case(17, "80 80", "out_turn", **GATE, bias=True, residual=True),  # calls behind it
    _case(2, "192", tile=SPLIT, K=1040, bias=True, **NORM),
    _case(2, "320", "gain", mixed=True, **NORM, residual=True),  # 5 runs of 64, and x mixed too
    _case(1, "8192", "", "w2a16", weights="int", levels="", K=32, tile=(8, 128)),  # 2 of 4096
    _case(2, "48", "scale", "w8a16", bits=8, weights="int", levels="", x_dtype="fp32", **NORM),
    _case(2, "112", "left", "w4a16", bits=4, weights="int", levels="", rank=4, sparse=True),
]  # fmt: skip


@pytest.fixture(scope="module")
def found(tmp_path_factory: pytest.TempPathFactory) -> list[dict[str, Any]]:
    """What the child process found, case by case."""
    return run_cases(CASES, tmp_path_factory.mktemp("mixed_back"))


@pytest.mark.parametrize("at", range(len(CASES)), ids=lambda i: CASES[i].label)
def test_mixed_results_are_what_problems_mean(at: int, found: list[dict[str, Any]]) -> None:
    """Within the bound, the same twice, and beyond the bound when a part is changed."""
    assert judge(CASES[at], found[at]) == ""


@pytest.mark.parametrize(
    ("change", "field"),
    [
        ({"out_mixed": "32 16"}, "out_mixed"),  # of 64 rows
        ({"out_mixed": "56 8"}, "out_mixed"),  # runs of 8
        ({"out_mixed": "64x2"}, "out_mixed"),
        ({"N": 16 * 67, "out_mixed": "1072"}, "out_mixed"),  # 67 runs
        ({"rank": 8, "spans": "32x4 32x4"}, "spans"),
    ],
)
def test_what_cannot_be_mixed_back_is_refused_by_field(change: dict[str, Any], field: str) -> None:
    """Sections of other widths, too short runs, too many; what has no place behind a mix."""
    problem = Problem(**{**CODES, "N": 64, "out_mixed": "64", **change})
    assert field in [m.field for m in row("w2_lut").misfits(problem)]


@pytest.mark.parametrize("name", ["w16", "factors", "w8a8"])
def test_rows_that_leave_no_rows_say_so(name: str) -> None:
    """Floats as they are stored, factors and products of codes."""
    assert "out_mixed" in {m.field for m in row(name).misfits(Problem(64, 256, out_mixed="64"))}
