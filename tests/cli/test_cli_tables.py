"""Windows and tables on the command line: plan, compile, diff, verify, generate, eval, refusals."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

Call = Callable[..., Any]


@pytest.mark.parametrize("table", ["tt_embed:cores=2", "lowrank_embed:multiple=1"])
def test_compiles_what_it_planned(
    llmc: Call, tiny: Path, small_run: list[object], tmp_path: Path, table: str
) -> None:
    passes = ("--passes", f"window:size=8,globals=1,{table}", "--passes", "w4:group=none")
    told = llmc("plan", tiny, *passes, "--json")
    assert told.code == 0, told.err
    planned = told.json["plan"]["predicted"]
    assert planned["exact"]
    out = tmp_path / "out"
    done = llmc("compile", tiny, *passes, "-o", out, *small_run, "--json")
    assert done.code == 0, done.err
    data = llmc("inspect", out, "--json").json
    assert [row["pass"] for row in data["structure"]] == ["window", table.split(":")[0]]
    assert all(row["exact"] for row in data["structure"])
    assert data["structure"][-1]["after"]["bytes"] < data["structure"][0]["before"]["bytes"]
    assert llmc("verify", out).code == 0
    shown = llmc("diff", out, "--pass", "window").out
    assert "first=1" in shown
    assert "window=8" in shown
    shown = llmc("diff", out, "--pass", table.split(":")[0]).out
    assert ("llmc.tt_lookup" if "tt" in table else "_left") in shown


@pytest.mark.parametrize(
    ("passes", "told"),
    [
        (["tt_embed:shape=3x5"], "expected factors of"),
        (["window:size=0"], "window:size: expected 1.."),
        (["w4:group=32", "window"], "expected 'window' before 'w4'"),
    ],
)
def test_refuses_in_one_line(llmc: Call, tiny: Path, passes: list[str], told: str) -> None:
    done = llmc("plan", tiny, *(a for p in passes for a in ("--passes", p)))
    assert done.code == 2
    assert told in done.err
    assert done.err.strip().count("\n") <= 1
