"""Tuning GPU kernels without a GPU: buckets, pruning, the cache, and what a launch takes from it.

Times come from an injected clock that is a formula; none of them is said to be measured.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path

import pytest
import torch

from llmc.codegen.aot import AotFacts
from llmc.codegen.kernels import ROWS
from llmc.codegen.problem import Problem
from llmc.codegen.row import KernelRow, TileConfig
from llmc.codegen.rows.int4 import W4A16
from llmc.codegen.tuning import choices, grid, triton
from llmc.codegen.tuning.cache import Entry, Machine, Table
from llmc.codegen.tuning.cache import write as put
from llmc.codegen.tuning.tuners import tuner
from llmc.codegen.variants import typical
from llmc.compiler.ir.errors import ResourceError

PLAIN = Problem(4096, 4096)
GPU = Machine("triton", "Some GPU", compiler="triton 3.6.0")


@pytest.fixture(autouse=True)
def own_cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Nobody's measurements but those of a test."""
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    choices.forget()


def write(table: Table) -> Path:
    """Put a table into the cache and have it read."""
    choices.forget()
    return put(table)


def facts(config: TileConfig, **changes: object) -> AotFacts:
    """Lawful facts of a tile, changed."""
    plain = AotFacts("w4a16", "n", "sm_90", config, 90, 0, 4096, (), 0, 0, 2.5, 0.0)
    return replace(plain, **changes)  # type: ignore[arg-type]


@pytest.mark.parametrize(
    ("M", "tokens", "text"),
    [(0, 1, "1"), (1, 1, "1"), (2, 8, "2-8"), (8, 8, "2-8"), (9, 16, "9-16"), (16, 16, "9-16"),
     (17, 32, "17-32"), (33, 64, "33-64"), (64, 64, "33-64"), (65, 256, "65-256"),
     (256, 256, "65-256"), (257, 2048, ">256"), (100000, 2048, ">256")],
)  # fmt: skip
def test_buckets(M: int, tokens: int, text: str) -> None:
    """Every number of tokens lies in one bucket, which one number stands for."""
    assert grid.bucket(M) == tokens
    assert grid.bucket_text(grid.bucket(M)) == text


@pytest.mark.parametrize("row", ROWS, ids=lambda r: r.name)
def test_candidates_are_few_and_tiles_of_the_row(row: KernelRow) -> None:
    """At most twelve for each bucket, each in the row's grid, none twice, none that wastes most."""
    problem = typical(row)
    assert problem is not None
    for tokens in grid.TOKENS:
        found = grid.candidates(row, problem, tokens)
        assert 1 <= len(found) <= grid.MOST
        assert len(set(found)) == len(found)
        assert set(found) <= set(row.configs(problem))
        assert found[0] == row.default_config(problem, tokens)
        if len(found) == grid.MOST:
            assert len({(c.BM, c.BN, c.split) for c in found}) >= 3
        sizes = {c.BM for c in row.configs(problem)}
        if min(sizes) >= tokens:
            assert min(sizes) in {c.BM for c in found}


def test_facts_prune() -> None:
    """A spill, shared memory beyond the block's and many more slots drop a tile; unknown stays."""
    everything = grid.candidates(W4A16, PLAIN, 16, most=1000)
    spilt, wide, slow, unknown = everything[1], everything[2], everything[3], everything[4]

    def of(row: KernelRow, problem: Problem, config: TileConfig) -> AotFacts | None:
        told = {
            spilt: facts(config, stack=16, local_memory=4),
            wide: facts(config, shared=300 * 1024),
            slow: facts(config, slots=9.0),
            unknown: None,
        }
        return told.get(config, facts(config))

    left = grid.candidates(W4A16, PLAIN, 16, of, most=1000)
    assert set(everything) - set(left) == {spilt, wide, slow}
    # The same shared memory that one machine has another may lack.
    limit = facts(wide, shared=200 * 1024)
    assert grid.refused(limit, "sm_90") is None
    assert "shared memory" in str(grid.refused(limit, "sm_80"))


def test_when_every_tile_breaks_a_rule_the_untuned_one_is_left() -> None:
    """There is always one candidate."""
    found = grid.candidates(W4A16, PLAIN, 1, lambda r, p, c: facts(c, stack=8))
    assert found == (W4A16.default_config(PLAIN, 1),)


def test_the_estimate_prefers_tiles_that_fill_the_gpu() -> None:
    """A small matrix wants more programs than one wave has processors; many tokens a large tile."""
    tiles = grid.candidates(W4A16, PLAIN, 1, most=1000)

    def cost(config: TileConfig) -> float:
        return grid.estimate(W4A16, PLAIN, 1, config, 132)

    least = min(tiles, key=cost)
    assert -(-PLAIN.N // least.BN) * least.split >= 128
    many = min(tiles, key=lambda c: grid.estimate(W4A16, PLAIN, 2048, c, 132))
    assert many.BM > least.BM


def test_tiles_as_text() -> None:
    """Text and tile are each other's; what is no tile is none."""
    for config in W4A16.configs(PLAIN):
        assert grid.config_of(grid.config_text(config)) == config
    for text in ("8x", "8x64 warps", "8x64 speed 3", "x stages 2"):
        assert grid.config_of(text) is None


def fastest(best: TileConfig) -> triton.Timer:
    """A clock that finds one tile fastest."""

    def timer(
        row: KernelRow, problem: Problem, M: int, tiles: Sequence[TileConfig]
    ) -> dict[TileConfig, float]:
        return {c: 1e-6 if c == best else 2e-6 + 1e-9 * i for i, c in enumerate(tiles)}

    return timer


def known(row: KernelRow, problem: Problem, config: TileConfig) -> AotFacts:
    """Facts that refuse nothing."""
    return facts(config)


def test_a_launch_takes_what_was_measured() -> None:
    """Trials, an injected clock, the cache, and back: the bucket's tile, for every M in it."""
    trials = triton.trials([PLAIN], (1, 16))
    assert [t.tokens for t in trials] == [1, 16]
    best = grid.candidates(W4A16, PLAIN, 16)[3]
    seconds = triton.measure(trials[1], timer=fastest(best), facts_of=known)
    assert min(seconds, key=lambda n: seconds[n]) == grid.config_text(best)
    write(Table(GPU, (Entry(trials[1].key, 16, seconds),)))
    for M in (9, 16):
        assert choices.tuned_config(W4A16, PLAIN, M, GPU) == best
    sides = replace(PLAIN, bias=True, residual=True, out_norm=True, out_eps=1e-6)
    assert triton.trials([sides], (1, 16)) == trials
    assert choices.tuned_config(W4A16, sides, 12, GPU) == best
    for M in (1, 8, 17):
        assert choices.tuned_config(W4A16, PLAIN, M, GPU) is None
    for other in ({"norm": True}, {"asym": True}, {"N": 8192}, {"x_dtype": "bf16"}):
        assert choices.tuned_config(W4A16, replace(PLAIN, **other), 16, GPU) is None
    assert choices.reason(GPU) == "measured here"


@pytest.mark.parametrize(
    ("change", "words"),
    [({"name": "Other GPU"}, "nothing was measured on this machine"),
     ({"compiler": "triton 3.7.0"}, "expected compiler triton 3.7.0, found triton 3.6.0"),
     ({"llmc": "99.0"}, "expected llmc 99.0, found"),
     ({"torch": "99.0"}, "expected torch 99.0, found")],
)  # fmt: skip
def test_what_another_machine_measured_is_not_used(change: dict[str, str], words: str) -> None:
    """Another GPU's or version's table is ignored, and the plan says why."""
    best = grid.candidates(W4A16, PLAIN, 16)[0]
    entry = Entry(grid.key_of(W4A16, PLAIN), 16, {grid.config_text(best): 1e-6})
    write(Table(GPU, (entry,)))
    assert choices.tuned_config(W4A16, PLAIN, 16, GPU) == best
    here = replace(GPU, **change)
    assert choices.tuned_config(W4A16, PLAIN, 16, here) is None
    assert words in choices.reason(here)
    assert choices.reason(here).startswith("untuned: ")


def test_a_tile_that_the_row_has_no_more_is_not_used() -> None:
    """An entry from before the grid changed, or by hand, never reaches a launch."""
    key = grid.key_of(W4A16, PLAIN)
    for name in ("512x512 stages 4 warps 4", "nonsense"):
        write(Table(GPU, (Entry(key, 1, {name: 1e-6}),)))
        assert choices.tuned_config(W4A16, PLAIN, 1, GPU) is None


def test_a_broken_table_is_told() -> None:
    """The reason names the file's fault; the untuned tile serves."""
    path = write(Table(GPU))
    path.write_text("{")
    choices.forget()
    assert choices.tuned_config(W4A16, PLAIN, 1, GPU) is None
    assert "cannot be read" in choices.reason(GPU)


def test_what_is_shipped_is_used_where_nothing_was_measured(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A shipped table counts for its GPU alone; the user's own comes first."""
    import json

    best, other = grid.candidates(W4A16, PLAIN, 1)[:2]
    key = grid.key_of(W4A16, PLAIN)
    table = Table(GPU, (Entry(key, 1, {grid.config_text(best): 1e-6}),))
    (tmp_path / "shipped").mkdir()
    (tmp_path / "shipped" / "some.json").write_text(json.dumps(table.to_json()))
    monkeypatch.setattr(choices, "SHIPPED", tmp_path / "shipped")
    choices.forget()
    assert choices.tuned_config(W4A16, PLAIN, 1, GPU) == best
    assert choices.reason(GPU) == "shipped"
    assert choices.tuned_config(W4A16, PLAIN, 1, replace(GPU, name="Other")) is None
    write(Table(GPU, (Entry(key, 1, {grid.config_text(other): 1e-6}),)))
    assert choices.tuned_config(W4A16, PLAIN, 1, GPU) == other


def test_a_clock_that_runs_no_tile_is_an_error() -> None:
    """Nothing is kept when nothing ran."""
    (trial,) = triton.trials([PLAIN], (1,))
    with pytest.raises(ResourceError, match="that runs, found none"):
        triton.measure(trial, timer=lambda *a: {}, facts_of=known)


def test_without_a_gpu_nothing_is_measured() -> None:
    """The tuner says why, and a launch takes the untuned tile."""
    found = tuner("triton")
    assert found.tokens == grid.TOKENS
    if not torch.cuda.is_available():
        assert found.unavailable() == "no CUDA device"
        assert choices.tuned_config(W4A16, PLAIN, 1) is None
        assert "no CUDA device" in choices.reason()
