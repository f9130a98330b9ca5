"""Inputs put on a grid before weights of floats: made by the product's own programs, or before it.

Cases are judged as those of `numerics`: against what the problem means, in fp64.
"""

from __future__ import annotations

from dataclasses import replace
from itertools import product
from pathlib import Path
from typing import Any

import pytest
from numerics import Case, judge, run_cases

from llmc.codegen import made, workspace
from llmc.codegen.kernels import ROWS, choose, row
from llmc.codegen.problem import Problem
from llmc.codegen.render import arguments, makes, render
from llmc.codegen.row import TileConfig
from llmc.codegen.variants import typical

NORM = {"norm": True, "eps": 1e-5}
CENTRED = {**NORM, "centred": True}
DENSE = {"bits": 16, "group": 0, "weights": "dense", "scale_dtype": "", "N": 40, "K": 136}
INT4 = {"N": 40, "K": 130}
INT8 = {"bits": 8, "group": 0, "N": 40, "K": 130}
FP4 = {"bits": 4, "weights": "table", "levels": "e2m1", "group": 32, "N": 40, "K": 130}
SPLIT = (8, 32, 3, 2, 2)  # programs share columns


def _case(
    name: str, M: int, fields: dict[str, Any], rounds: str, spoil: str = "", **more: Any
) -> Case:
    tile = more.pop("tile", None)
    return Case(name, {**fields, "rounds": rounds, **more}, M, spoil=spoil, tile=tile, seed=3)


CASES = [
    _case("w16", 1, DENSE, "int8 token", "values", **NORM),
    _case("w16", 3, DENSE, "int8 token limit=2.0", "gain", **NORM, residual=True),
    _case("w16", 2, DENSE, "int8 static", "in_scale", x_dtype="fp32"),
    _case("w16", 2, DENSE, "int4 token power", "smooth", smooth=True, x_dtype="fp32"),
    _case("w16", 2, DENSE, "e5m2 token", **CENTRED, smooth=True, act="silu", pairs="gate"),
    _case("w16", 2, {**DENSE, "K": 520}, "int8 token", tile=SPLIT, bias=True, **NORM),
    _case("w16", 17, DENSE, "int8 token", **NORM),  # a launch before
    _case("w16", 9, DENSE, "e4m3 static limit=1.5", tile=(8, 32), **CENTRED),  # two tiles of tokens
    _case("w16", 70, DENSE, "int8 static group=32", "in_scale", **CENTRED),  # and torch's product
    _case("w4_float", 1, FP4, "e4m3 token", "codes", **NORM),
    _case("w4_float", 5, FP4, "e4m3 token power", "gain", **NORM, smooth=True, x_dtype="fp32"),
    _case("w4_float", 3, FP4, "e2m1 token group=16", smooth=True, x_dtype="fp32"),
    _case("w16", 3, DENSE, "pairs4 token", "gain", **NORM, smooth=True, x_dtype="fp32"),
    _case("w16", 2, DENSE, "pairs8 token power", "values", **NORM, x_dtype="fp32"),
    _case("w4a16", 5, INT4, "pairs4 static", "in_scale", **CENTRED, x_dtype="fp32"),
    _case("w8a16", 17, INT8, "pairs8 static group=16", "in_scale"),
    _case("w4a16", 3, INT4, "int8 token group=64", "scale", **NORM, bias=True),
    _case("w4a16", 2, {**INT4, "asym": True, "rank": 4}, "int8 token", "right", **NORM),
    _case("w4a16", 2, {**INT4, "sparse": True}, "e4m3 token", "csr_values", **NORM, x_dtype="fp32"),
    _case("w8a16", 3, INT8, "e4m3 token", "codes", **NORM, x_dtype="bf16"),
    _case("w8a16", 20, INT8, "int8 token group=32", "codes", **NORM, x_dtype="fp32"),
    _case("w3a16", 2, {"bits": 3, "N": 40, "K": 130}, "int8 token", "codes", **NORM),
    _case("w4_lut", 2, {"weights": "table", "table": "row", "N": 40, "K": 130}, "int8 token",
          "table", **NORM),
    _case("w16_24", 2, {**DENSE, "n": 2, "m": 4}, "int8 token", "meta", **NORM),
    _case("w16_bitmap", 2, {**DENSE, "bitmap": True}, "int8 token", "values", **NORM),
    _case("factors", 2, {**DENSE, "weights": "factors", "rank": 8}, "int8 token", "left", **NORM),
]  # fmt: skip


@pytest.mark.parametrize("half", range(2))
def test_made_inputs_are_what_problems_mean(half: int, tmp_path: Path) -> None:
    """Within the bound, the same twice, and beyond the bound when a part is changed."""
    cases = CASES[half::2]
    told = zip(cases, run_cases(cases, tmp_path), strict=True)
    found = "\n".join(f"{c.label}: {why}" for c, got in told if (why := judge(c, got)))
    assert not found, found


FIELDS: dict[str, dict[str, Any]] = {
    "w16": DENSE, "w4_float": FP4, "w4a16": INT4, "w8a16": INT8, "w3a16": {"bits": 3, **INT4},
    "factors": {**DENSE, "weights": "factors", "rank": 8},
}  # fmt: skip


@pytest.mark.parametrize("name", FIELDS)
def test_any_grid_of_tokens_own_is_served_and_others_are_refused_by_field(name: str) -> None:
    """Few bits and small floats, per token or stored; not of all tokens, nor of groups that no
    power of two counts, nor with columns apart, nor among experts."""
    base = Problem(**{"K": 256, **FIELDS[name]})
    kinds = ("int2", "int8", "e4m3", "e5m2", "e2m1")
    tails = ("token", "token power", "static", "static group=48", "token group=64 limit=1.5")
    for words in ("pairs4 token", "pairs8 static group=16", *map(" ".join, product(kinds, tails))):
        assert not row(name).misfits(replace(base, rounds=words))
    for words in ("int9 token", "int8 tensor", "int8 token group=48", "int8 token group=2048",
                  "pairs8 token group=64", "pairs5 token", "int8", "int8 token odd"):  # fmt: skip
        assert [m.field for m in row(name).misfits(replace(base, rounds=words))] == ["rounds"]
    assert "K" in [m.field for m in row(name).misfits(replace(base, K=255, rounds="pairs4 token"))]
    apart = replace(base, rounds="int8 token", outliers=3)
    assert "outliers" in [m.field for m in row(name).misfits(apart)]
    experts = {"N": 512, "experts": 8, "chosen": 2, "routed": "down", "rounds": "int8 token"}
    assert "rounds" in [m.field for m in row(name).misfits(replace(base, **experts))]  # type: ignore[arg-type]


def test_products_of_codes_come_first() -> None:
    """Weights of eight bits meet codes of x where a row multiplies them; elsewhere floats."""
    eight = Problem(64, 256, bits=8, group=0, rounds="int8 token")
    for change, name in [
        ({}, "w8a8"),
        ({"bits": 4}, "w4a8"),
        ({"asym": True}, "w8a16"),
        ({"rank": 8}, "w8a16"),
        ({"rounds": "int8 token group=64"}, "w8a16"),
        ({"rounds": "e4m3 token"}, "w8a16"),
        ({"bits": 4, "group": 16}, "w4a16"),
    ]:
        found, why = choose(replace(eight, **change))  # type: ignore[arg-type]
        assert found is not None, why
        assert found.name == name


@pytest.mark.parametrize("name", [r.name for r in ROWS if r.product == "float"])
def test_what_makes_nothing_is_as_it_was(name: str) -> None:
    """No argument, no constant and no line of the source tells of grids."""
    problem = typical(row(name))
    assert problem is not None
    assert not makes(row(name), problem)
    assert {a.name for a in arguments(row(name), problem)}.isdisjoint({"made", "makers"})
    source = render(row(name), problem).source
    assert "_make_input" not in source
    assert "HANDS" not in source


def test_limits_are_no_part_of_the_source() -> None:
    """Layers differ by their limits alone, and share one kernel; a group is a part."""
    base = Problem(**DENSE, rounds="int8 token limit=1.5")
    same = replace(base, rounds="int8 token limit=2.5")
    assert render(row("w16"), base).digest == render(row("w16"), same).digest
    other = replace(base, rounds="int8 token group=8 limit=1.5")
    assert render(row("w16"), base).digest != render(row("w16"), other).digest


def test_a_token_is_made_by_one_program_of_few() -> None:
    """As many as a tile has tokens, never more than there are, nor than all tiles have room for;
    one where programs run in turn."""
    problem = Problem(512, 512, rounds="int8 token")

    def hands(config: TileConfig, M: int, processors: int = 132) -> int:
        return workspace.constants(problem, config, M, processors)["HANDS"]

    assert hands(TileConfig(8, 32), 1) == 8
    assert hands(TileConfig(16, 128), 1) == 4
    assert hands(TileConfig(16, 128, split=2), 1) == 8
    assert hands(TileConfig(16, 32), 16 * 64) == 2
    assert hands(TileConfig(16, 32), 16, processors=1) == 1
    assert workspace.made_sizes(problem, TileConfig(8, 32), 9) == (9 * 512, 4)
    assert "HANDS" not in workspace.constants(replace(problem, rounds=""), TileConfig(8, 32), 1, 9)


def test_many_tokens_are_made_by_a_launch_before() -> None:
    """What follows it is the plain product; bytes count what is written and read again."""
    problem = Problem(**DENSE, rounds="int8 token", **NORM)
    assert not made.goes_before(row("w16"), problem, made.FEW)
    assert made.goes_before(row("w16"), problem, made.FEW + 1)
    assert not made.goes_before(row("w8a8"), Problem(64, 64, bits=8, rounds="int8 token"), 512)
    assert made.without(problem) == Problem(**DENSE)
    assert not row("made_input").misfits(made.making(problem))
    plain = replace(problem, rounds="")
    more = row("w16").bytes_moved(problem, 3) - row("w16").bytes_moved(plain, 3)
    assert more == 2 * 2 * 3 * DENSE["K"]
