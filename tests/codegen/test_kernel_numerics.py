"""Every linear row against what its problem means, over cases drawn from its own requirements.

200 cases here, 2,000 in the long run; both cover every row, every feature and every tile.
"""

from __future__ import annotations

import subprocess
from pathlib import Path

import pytest
from numerics import Case, judge, run_cases
from numerics_cases import TOKENS, allowed, near_misses, parts_named, sample

from llmc.codegen.kernels import ROWS
from llmc.codegen.problem import FEATURES
from llmc.codegen.row import KernelRow

CHUNKS = 4
SHARDS = 16
# Words that a case may not spoil, as they would be no compressed rows any more.
INDICES = ("csr_index", "csr_starts")
# What a weight is made of, by kind.
WEIGHTS = ("codes", "values", "signs", "left", "left_codes")
each_row = pytest.mark.parametrize("row", ROWS, ids=lambda r: r.name)


def wrong(cases: list[Case], cache: Path) -> str:
    """What is wrong, one line per case."""
    told = zip(cases, run_cases(cases, cache), strict=True)
    return "\n".join(f"{c.label}: {why}" for c, found in told if (why := judge(c, found)))


@pytest.fixture(scope="module")
def drawn() -> list[Case]:
    """The cases of CI."""
    return sample(200)


@pytest.mark.parametrize("chunk", range(CHUNKS))
def test_rows_compute_what_problems_mean(chunk: int, drawn: list[Case], tmp_path: Path) -> None:
    """Within the bound, the same twice, and beyond the bound when a part is changed."""
    found = wrong(drawn[chunk::CHUNKS], tmp_path)
    assert not found, found


@pytest.mark.slow
@pytest.mark.parametrize("shard", range(SHARDS))
def test_rows_compute_what_problems_mean_at_length(shard: int, tmp_path: Path) -> None:
    """Other draws: 2,000 of them over all shards."""
    found = wrong(sample(2000, seed=1)[shard::SHARDS], tmp_path)
    assert not found, found


@each_row
def test_the_cases_cover_a_row(row: KernelRow, drawn: list[Case]) -> None:
    """Every value that a row names, every tile, one token, odd features, tails and every part."""
    cases = [c for c in drawn if c.row == row.name]
    problems = [c.problem for c in cases]
    for name in dict.fromkeys([*FEATURES, *row.choices]):
        seen = {getattr(p, name) for p in problems}
        assert seen >= set(allowed(row, name)), f"{name}: only {seen}"
    assert {c.tile[:2] for c in cases if c.tile} == set(row.tiles)
    assert {1, max(TOKENS)} <= {c.M for c in cases} | {max(TOKENS)}
    assert any(p.N % 2 for p in problems)
    assert any(p.K % row.step for p in problems)


def test_every_part_is_spoiled(drawn: list[Case]) -> None:
    """Each kind of tensor is changed in some case, and of every row the weight is."""
    named = {part for c in drawn for part in parts_named(c.problem)}
    assert {c.spoil for c in drawn} >= named - set(INDICES)
    spoilt = {c.row for c in drawn if c.spoil in WEIGHTS}
    assert spoilt == {r.name for r in ROWS}


@each_row
def test_what_is_just_missed_is_refused_by_field(row: KernelRow) -> None:
    """For every requirement and every choice, the nearest problem outside names its field."""
    for need, inside, outside in near_misses(row):
        assert not row.misfits(inside)
        found = row.misfits(outside)
        assert need.field in [m.field for m in found], (need, outside)
        told = next(m for m in found if m.field == need.field)
        assert f"{row.name}: {need.field}=" in str(told)


def test_a_child_that_dies_is_told(tmp_path: Path) -> None:
    """A case that cannot be read ends the child; a case that raises is one wrong answer."""
    broken = Case("no such row", {"N": 1, "K": 16}, 1)
    assert "no kernel row" in wrong([broken], tmp_path)
    with pytest.raises((RuntimeError, subprocess.SubprocessError)):
        run_cases([Case("w4a16", {}, 1, tile=5)], tmp_path)  # type: ignore[arg-type]
