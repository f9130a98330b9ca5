"""The trace of a run: graphs that run, events that parse, statistics that add up, and refusals."""

from __future__ import annotations

import json
import sys
from pathlib import Path
from typing import Any

import pytest
import torch

import llmc
from llmc.compiler.ir.errors import ResourceError, UsageError
from llmc.compiler.ir.parser import parse_python
from llmc.compiler.pipeline.trace import tracing


def events(folder: Path) -> list[dict[str, Any]]:
    """The lines of a trace's list of events."""
    return [json.loads(line) for line in (folder / "events.jsonl").read_text().splitlines()]


@pytest.fixture(scope="module")
def traced(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The trace of a small compile with a structural pass before two that are solved together."""
    sys.path.insert(0, str(Path(__file__).parents[1]))
    from tiny_models import make

    folder = tmp_path_factory.mktemp("trace") / "t"
    tokens = torch.randint(0, 64, (2, 16), generator=torch.Generator().manual_seed(0))
    llmc.compile(
        make("llama"),
        "drop_layers:n=1,protect_first=0,protect_last=0,smooth,w4:group=16",
        calibration=tokens,
        trace=folder,
    )
    return folder


def test_graphs_are_numbered_and_run(traced: Path) -> None:
    """One graph as captured, then before and after each pass; each parses, and Python runs it."""
    names = sorted(p.name for p in traced.glob("*.py"))
    assert names == [
        "000_captured.py", "001_drop_layers_after.py", "001_drop_layers_before.py",
        "002_smooth_after.py", "002_smooth_before.py", "003_w4_after.py", "003_w4_before.py",
    ]  # fmt: skip
    for name in names:
        text = (traced / name).read_text()
        parse_python(text)
        space: dict[str, Any] = {}
        exec(compile(text, name, "exec"), space)
        assert callable(space["forward"])
    one, two = (
        (traced / f"{n}.py").read_text() for n in ("001_drop_layers_after", "002_smooth_before")
    )
    assert one == two
    assert "llmc.dequantize" in (traced / "003_w4_after.py").read_text()
    assert "model.layers.0" in one, "provenance is part of a traced graph"


def test_events_say_what_happened_when(traced: Path) -> None:
    """Seconds never fall, memory is told, and what was decided follows what was predicted."""
    found = events(traced)
    times = [e["t"] for e in found]
    assert times == sorted(times)
    assert all(e["peak_bytes"] > 0 for e in found)
    kinds = [e["kind"] for e in found]
    assert kinds.index("captured") < kinds.index("laid") < kinds.index("start") < kinds.index("end")
    laid = [e for e in found if e["kind"] == "laid"]
    assert [e["decided"] for e in laid] == [False, True]
    assert laid[-1]["graphs"] == ["captured", "drop_layers", "smooth", "w4"]
    solved = [e for e in found if e["kind"] == "site"]
    assert solved
    assert set(solved[0]["rows"]) == {"shape", "min", "mean", "max"}


def test_rules_are_counted(traced: Path) -> None:
    """Taken places and near misses of lifts and passes; solving time of each pass."""
    rules = json.loads((traced / "rules.json").read_text())
    assert rules["normalise.rms_norm"]["taken"] > 0
    assert rules["w4"]["taken"] == 2 * rules["w4"]["solved"], "planned twice, solved once"
    assert rules["w4"]["solve_seconds"] > 0
    missed = rules["w4"]["misses"]
    first = next(iter(missed.values()))
    assert first["count"] >= 1
    assert {"node", "reason", "predicate"} <= set(first["first"])


def test_a_folder_of_something_else_is_refused(tmp_path: Path) -> None:
    """Nothing of it is touched; an earlier trace is taken over, and in one process both stay."""
    (tmp_path / "thesis.txt").write_text("mine")
    words = r"expected an empty folder or an earlier trace.*thesis"
    with pytest.raises(UsageError, match=words), tracing(tmp_path):
        pass
    assert [p.name for p in tmp_path.iterdir()] == ["thesis.txt"]
    folder = tmp_path / "t"
    for _ in range(2):
        with tracing(folder):
            pass
    assert (folder / "events.jsonl").is_file()
    assert (folder / "2" / "events.jsonl").is_file()


def test_a_folder_that_cannot_be_written_is_refused(tmp_path: Path) -> None:
    """One line with the place and what to do."""
    (tmp_path / "file").write_text("")
    words = "expected a trace folder that can be written"
    with pytest.raises(ResourceError, match=words) as found, tracing(tmp_path / "file" / "t"):
        pass
    assert "found one that cannot (Not a directory) at " in str(found.value)
    assert "LLMC_TRACE" in str(found.value)


def test_a_failure_is_the_last_event(tmp_path: Path) -> None:
    """What stopped the run is in the trace, and the error goes on."""
    with pytest.raises(ValueError, match="stop"), tracing(tmp_path / "t"):
        raise ValueError("stop")
    assert events(tmp_path / "t")[-1]["error"] == "ValueError: stop"
    with tracing(None) as nothing:
        assert nothing is None
