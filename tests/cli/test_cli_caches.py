"""Caches of codes on the command line: compile, inspect, diff, eval token by token, run, export."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

Call = Callable[..., Any]


@pytest.fixture(scope="module")
def made(llmc: Call, tiny: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    out = tmp_path_factory.mktemp("caches") / "out"
    done = llmc("compile", tiny, "--passes", "w8,kivi:bits=2,group=4,residual=8", "-o", out)
    assert done.code == 0, done.err
    return out


def test_eval_goes_through_the_cache(llmc: Call, tiny: Path, made: Path, text: Path) -> None:
    asked = ["--data", text, "--window", 32, "--max-windows", 2, "--new-tokens", 4,
             "--prompt-tokens", 8]  # fmt: skip
    found = llmc("eval", made, *asked, "--baseline", tiny, "--json").json
    cache = found["cache"]
    assert cache["kinds"] == ["kivi"]
    assert cache["bits"] == [2]
    assert cache["kept"] == cache["states"] == 2
    assert cache["bytes"] == 32 * cache["bytes_per_token"]
    assert found["quality"]["perplexity"] != pytest.approx(cache["full_perplexity"], rel=1e-7)
    assert 0 < cache["agreement"] <= 1
    told = llmc("eval", made, *asked, "--no-speed").out
    assert "KV cache (kivi, 2 bits): " in told
    assert "agreement with the full cache" in told


def test_it_is_told_and_writes_text(llmc: Call, made: Path) -> None:
    said = "2 x kivi 2 bits, groups of 4, the newest 8 as they are"
    assert f"caches   {said}" in llmc("inspect", made).out
    assert f"caches plain -> {said}" in llmc("diff", made, "--pass", "kivi").out
    ran = llmc("run", made, "--prompt", "def f(", "--max-new-tokens", 12)
    assert ran.code == 0, ran.err


@pytest.mark.parametrize(
    ("passes", "code", "message"),
    [
        ("kivi:bits=3", 2, "kivi:bits: expected 2, 4 or 8, found 3"),
        ("kivi:residual=100", 2, "residual=96"),
        ("kv8,kivi", 2, "expected one pass that writes caches"),
        ("kvquant:weight=plain", 2, "did you mean 'weigh'"),
    ],
)
def test_knobs_are_refused(
    llmc: Call, tiny: Path, tmp_path: Path, passes: str, code: int, message: str
) -> None:
    done = llmc("compile", tiny, "--passes", passes, "-o", tmp_path / "out")
    assert done.code == code
    assert message in done.err
    assert not (tmp_path / "out").exists()


def test_formats_without_a_place_for_it_are_refused(
    llmc: Call, made: Path, tmp_path: Path
) -> None:  # fmt: skip
    done = llmc("export", made, "-o", tmp_path / "hf", "--format", "hf")
    assert done.code == 2
    assert "a plain KV cache, found kivi" in done.err
