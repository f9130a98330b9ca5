"""Early exits on the command line: compile, inspect, eval token by token, run."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

Call = Callable[..., Any]


@pytest.fixture(scope="module")
def text_32(text: Path) -> list[object]:
    """Two windows of 32 tokens."""
    return ["--data", text, "--window", 32, "--max-windows", 2, "--new-tokens", 4,
            "--prompt-tokens", 8]  # fmt: skip


def made(llmc: Call, tiny: Path, out: Path, knobs: str) -> Path:
    done = llmc("compile", tiny, "--passes", f"early_exit:{knobs}", "-o", out)
    assert done.code == 0, done.err
    return out


@pytest.fixture(scope="module")
def forced(llmc: Call, tiny: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Every decoded token leaves behind the first of two blocks."""
    return made(llmc, tiny, tmp_path_factory.mktemp("exits") / "out", "threshold=-1")


def test_eval_counts_layers_and_compares_with_the_full_model(
    llmc: Call, tiny: Path, forced: Path, text_32: list[object]
) -> None:
    dense = llmc("eval", tiny, *text_32, "--json").json
    found = llmc("eval", forced, *text_32, "--batch", 2, "--json").json
    exits = found["exits"]
    assert exits["tokens_by_blocks"] == {"1": 62, "2": 0}
    assert exits["blocks_per_token"] == 1.0
    assert exits["decoded_tokens"] == 62
    assert exits["full_perplexity"] == pytest.approx(dense["quality"]["perplexity"], rel=1e-5)
    assert found["quality"]["perplexity"] != pytest.approx(exits["full_perplexity"], rel=1e-6)
    assert 0 <= exits["agreement"] <= 1
    assert found["speed"]["blocks_per_token"] == 1.0
    assert exits["full_speed"]["decode_tokens_per_second"] > 0
    told = llmc("eval", forced, *text_32).out
    assert "1.00 of 2 layers per token (62 decoded, prompts at full depth)" in told
    assert "tokens by layers used  1: 100.0%" in told
    assert "with exits off: x" in told


def test_above_one_evaluates_as_the_full_model(
    llmc: Call, tiny: Path, tmp_path: Path, text_32: list[object]
) -> None:
    out = made(llmc, tiny, tmp_path / "never", "threshold=2")
    found = llmc("eval", out, *text_32, "--no-speed", "--baseline", tiny, "--json").json
    assert found["exits"]["agreement"] == found["quality"]["top1_agreement"] == 1.0
    assert found["quality"]["nll"] == pytest.approx(found["baseline"]["quality"]["nll"], rel=1e-5)
    assert found["exits"]["tokens_by_blocks"] == {"1": 0, "2": 62}
    assert "full_speed" not in found["exits"]


def test_run_tells_the_layers(llmc: Call, forced: Path, tiny: Path) -> None:
    done = llmc("run", forced, "--prompt", "def f", "--max-new-tokens", 5)
    assert done.code == 0
    assert "of 2 layers used per token" in done.err
    data = llmc("run", forced, "--prompt", "def f", "--max-new-tokens", 5, "--json").json
    (used,) = data["layers_used"]
    assert used == ([2, 1, 1, 1, 1])[: len(used)]
    assert data["layers_per_token"] == pytest.approx(sum(used) / len(used))
    plain = llmc("run", tiny, "--prompt", "def f", "--max-new-tokens", 2, "--json").json
    assert plain["layers_used"] is None


def test_inspect_shows_the_exits(llmc: Call, forced: Path) -> None:
    done = llmc("inspect", forced)
    assert "exits    softmax >= -1 behind block0" in done.out
    assert llmc("inspect", forced, "--json").json["exits"]["blocks"] == ["block0"]
    assert "EXITS = " in llmc("inspect", forced, "--python").out
    assert "exits none -> softmax >= -1 behind block0" in llmc("diff", forced).out


def test_an_agreement_that_is_out_of_reach(
    llmc: Call, tiny: Path, small_run: list[object], tmp_path: Path
) -> None:
    done = llmc("compile", tiny, "--passes", "early_exit:agreement=0.99",
                "-o", tmp_path / "out", *small_run)  # fmt: skip
    assert done.code == 4
    assert "the exits would never be taken" in done.error
    assert not (tmp_path / "out").exists()
