"""``llmc tune --target triton`` without a GPU: what it would time, and why it does not."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

from llmc.codegen.tuning import choices
from llmc.codegen.tuning.grid import BUCKETS, MOST, TOKENS

Call = Callable[..., Any]


@pytest.fixture(autouse=True)
def no_gpu(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A machine without a GPU, whatever it runs on, and a cache of the test's own."""
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    choices.gpu.cache_clear()


def test_a_dry_run_lists_buckets_and_tiles(llmc: Call) -> None:
    """Every bucket of every scheme, twelve tiles at most, and that nothing can be measured."""
    done = llmc("tune", "--target", "triton", "--dry-run")
    assert done.code == 0, done.err
    for words in ("17-32", ">256", "cannot be measured here: no CUDA device"):
        assert words in done.out
    told = llmc("tune", "--target", "triton", "--dry-run", "--json").json
    assert {t["tokens"] for t in told["trials"]} == set(TOKENS)
    assert all(2 <= len(t["candidates"]) <= MOST for t in told["trials"])
    assert len(told["trials"]) % len(BUCKETS) == 0
    assert told["machine"]["compiler"].startswith("triton ")


def test_tuning_needs_a_gpu(llmc: Call) -> None:
    """Exit 5, the reason and what can be done; nothing is written."""
    done = llmc("tune", "--target", "triton")
    assert done.code == 5
    assert "cannot tune for triton: no CUDA device" in done.error


def test_a_plan_says_where_tiles_come_from(llmc: Call, artefact: Path) -> None:
    """Untuned, and why."""
    told = llmc("kernels", artefact, "--json").json
    assert told["tiles"].startswith("untuned: no CUDA device")
