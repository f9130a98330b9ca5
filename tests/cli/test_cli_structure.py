"""Structural passes on the command line: plan, compile, inspect, diff, explain, eval, refusals."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from llmc.compiler.backend import read_options
from llmc.compiler.ir.errors import UsageError

Call = Callable[..., Any]
DROP = "drop_layers:protect_first=0,protect_last=0"


@pytest.fixture(scope="module")
def dropped(
    llmc: Call, tiny: Path, small_run: list[object], tmp_path_factory: pytest.TempPathFactory
) -> Path:
    """One of two blocks left out and the rest in four bits."""
    out = tmp_path_factory.mktemp("dropped") / "out"
    done = llmc("compile", tiny, "--passes", f"w4:group=32,{DROP}", "-o", out, *small_run)
    assert done.code == 0, done.err
    assert done.err.index("2 -> 1") < done.err.index("writing")
    assert "drop_layers: block, drop, change, loss" in done.out
    return out


def test_plan_lists_structure_before_sites(llmc: Call, tiny: Path) -> None:
    done = llmc("plan", tiny, "--passes", f"w4,{DROP}")
    assert done.code == 0
    order = done.out.split("Structure")[0]
    assert order.index("drop_layers") < order.index("w4")
    assert "whole blocks go first" in done.out
    table = done.out.split("Structure")[1].split("Sites")[0]
    assert "2 -> 1" in table
    assert "exact" in table
    data = llmc("plan", tiny, "--passes", f"w4,{DROP}", "--json").json["plan"]
    assert data["structure"][0]["after"]["blocks"] == 1
    assert len(data["sites"]) == 7


def test_inspect_shows_what_was_decided(llmc: Call, dropped: Path) -> None:
    done = llmc("inspect", dropped)
    assert done.code == 0
    assert "00-captured 01-drop_layers 02-w4" in done.out
    assert "drop_layers: drop, without, loss" in done.out
    data = llmc("inspect", dropped, "--json").json
    (row,) = data["structure"]
    assert row["choice"]["blocks"] in ([0], [1])
    tried = {r["without"]: r["loss"] for r in row["records"] if "without" in r}
    assert row["choice"]["blocks"] == [min(tried, key=tried.__getitem__)]
    assert [s["name"] for s in data["segments"]] == ["prologue", "block0", "epilogue"]


def test_diff_shows_the_block_go(llmc: Call, dropped: Path) -> None:
    done = llmc("diff", dropped, "--pass", "drop_layers", "--json")
    assert done.code == 0
    totals = done.json["totals"]
    assert totals["added"] == 0
    assert totals["removed"] > 20
    assert totals["bytes_after"] == 0
    assert llmc("diff", dropped, "--pass", "w4").code == 0


def test_explain_asks_the_graph_that_the_pass_found(llmc: Call, dropped: Path) -> None:
    assert "2 taken, 0 refused" in llmc("explain", "drop_layers", dropped).out
    assert "7 taken, 1 refused" in llmc("explain", "w4", dropped).out


def test_the_result_runs_and_is_measured(llmc: Call, dropped: Path, tiny: Path, text: Path) -> None:
    done = llmc("run", dropped, "--prompt", "def f", "--max-new-tokens", 4)
    assert done.code == 0, done.err
    args = ["--data", text, "--window", 32, "--max-windows", 2, "--no-speed", "--json"]
    done = llmc("eval", dropped, "--baseline", tiny, *args)
    assert done.code == 0, done.err
    assert llmc("verify", dropped).code == 0


def test_typed_order_changes_no_byte(
    llmc: Call, dropped: Path, tiny: Path, small_run: list[object], tmp_path: Path
) -> None:
    out = tmp_path / "o"
    done = llmc("compile", tiny, "--passes", f"{DROP},w4:group=32", "-o", out, *small_run)
    assert done.code == 0, done.err
    hashes = [llmc("inspect", o, "--json").json["content_hash"] for o in (out, dropped)]
    assert hashes[0] == hashes[1]


@pytest.mark.parametrize(
    ("strings", "says"),
    [
        (["w4", DROP], "expected 'drop_layers' before 'w4', found it behind a barrier after it"),
        (["drop_layers:n=2"], "drop_layers:n: expected 1..0 of 2 blocks, found 2"),
        (["drop_layers:n=2,protect_first=0,protect_last=0"], "expected 1..1 of 2 blocks, found 2"),
        (["drop_layers:method=list,blocks=0+1"], "expected a block to stay"),
        (["drop_layers:remove=2"], "drop_layers:remove: expected 0..1, found 2"),
        (["drop_layers:method=first"], "expected one of sleb, influence, angular, list"),
    ],
)
def test_refused_in_one_line(llmc: Call, tiny: Path, strings: list[str], says: str) -> None:
    args = [a for s in strings for a in ("--passes", s)]
    done = llmc("plan", tiny, *args)
    assert done.code == 2
    assert says in done.error


def test_a_graph_of_torch_compile_keeps_its_shapes() -> None:
    with pytest.raises(UsageError, match="expected passes that keep every shape, found 'drop_la"):
        read_options({"passes": "w4,drop_layers"})
