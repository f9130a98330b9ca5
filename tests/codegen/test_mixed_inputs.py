"""Inputs that a kernel rotates: normed, times a vector, their channels mixed.

Cases are judged as those of `numerics`: against what the problem means, in fp64.
"""

from __future__ import annotations

from typing import Any

import pytest
from numerics import Case, judge, run_cases

from llmc.codegen.kernels import row
from llmc.codegen.mixing import mixing
from llmc.codegen.problem import Problem

NORM = {"norm": True, "eps": 1e-5}
CENTRED = {**NORM, "centred": True}
CODES = {"bits": 2, "group": 0, "weights": "table", "levels": "midrise", "N": 40}
SPLIT = (8, 32, 3, 2, 2)  # programs share columns


def _case(M: int, K: int, spoil: str = "", name: str = "w2_lut", **more: Any) -> Case:
    tile = more.pop("tile", None)
    fields = {**CODES, "K": K, "mixed": True, **more}
    return Case(name, fields, M, spoil=spoil, tile=tile, seed=3)


CASES = [
    _case(1, 256, "gain", **NORM),
    _case(3, 64, "smooth", smooth=True),
    _case(2, 96, **NORM, bias=True, residual=True),  # 3 runs of 32
    _case(1, 208, "codes", **CENTRED),  # 13 runs of 16
    _case(2, 320, smooth=True, act="silu", pairs="gate"),  # 5 runs of 64
    _case(9, 128, tile=(8, 32), **NORM),  # two tiles of tokens
    _case(17, 192, "gain", **NORM),  # a launch before
    _case(2, 1152, tile=SPLIT, smooth=True),  # 9 runs of 128
    _case(1, 8192, **NORM),  # two runs of 4096
    _case(2, 160, "values", "w16", bits=16, weights="dense", levels="", scale_dtype="",
          x_dtype="fp32", **NORM),
    _case(2, 448, "right", "w8a16", bits=8, weights="int", levels="", rank=4, **NORM),
]  # fmt: skip


@pytest.fixture(scope="module")
def found(tmp_path_factory: pytest.TempPathFactory) -> list[dict[str, Any]]:
    """What the child process found, case by case."""
    return run_cases(CASES, tmp_path_factory.mktemp("mixed"))


@pytest.mark.parametrize("at", range(len(CASES)), ids=lambda i: CASES[i].label)
def test_mixed_inputs_are_what_problems_mean(at: int, found: list[dict[str, Any]]) -> None:
    """Within the bound, the same twice, and beyond the bound when a part is changed."""
    assert judge(CASES[at], found[at]) == ""


@pytest.mark.parametrize(
    ("change", "field"),
    [
        ({"K": 8 * 31}, "K"),  # runs of 8: no matrix instruction takes so few
        ({"K": 16 * 67}, "K"),  # 67 runs
        ({"K": 1 << 17}, "K"),
        ({"rounds": "int8 token"}, "rounds"),
    ],
)
def test_what_cannot_be_mixed_is_refused_by_field(change: dict[str, Any], field: str) -> None:
    """Too short runs, too many of them, too many channels; a grid behind the mix."""
    problem = Problem(**{**CODES, "K": 256, "mixed": True, **change})
    assert field in [m.field for m in row("w2_lut").misfits(problem)]


def test_products_of_codes_do_not_mix() -> None:
    """Rows whose input is codes say that by the field."""
    problem = Problem(64, 256, bits=8, group=0, rounds="int8 token", mixed=True, smooth=True)
    assert {"mixed", "rounds"} <= {m.field for m in row("w8a8").misfits(problem)}


@pytest.mark.parametrize("width", [16, 64, 96, 896, 4096, 11008, 14336, 28672, 53248, 65536])
def test_runs_cover_a_width(width: int) -> None:
    """Whole runs of whole tiles, and an odd factor that only what is left has."""
    found = mixing(width)
    assert found is not None
    terms = found.terms()
    assert terms["run"] * found.rest == width
    assert terms["tile"] % found.deep == 0 == terms["run"] % terms["columns"]
    assert found.rest % found.odd == 0 == (found.rest // found.odd) & (found.rest // found.odd - 1)
