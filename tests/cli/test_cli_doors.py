"""Help, suggestions, exit codes, and what is printed where."""

from __future__ import annotations

import errno
import json
import os
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from llmc.compiler.cli import app as module_app
from llmc.compiler.cli.app import COMMANDS
from llmc.compiler.cli.output import size
from llmc.compiler.ir.errors import GateError, ModelError, ResourceError, UsageError


def test_help_is_quick(tmp_path: Path) -> None:
    """``llmc --help`` answers in half a second, in the best of three runs."""
    code = "from llmc.compiler.cli import main; main()"
    seconds = []
    for _ in range(3):
        began = time.perf_counter()
        done = subprocess.run(
            [sys.executable, "-c", code, "--help"], cwd=tmp_path, capture_output=True, text=True,
            check=False,
        )  # fmt: skip
        seconds.append(time.perf_counter() - began)
        assert done.returncode == 0
        assert all(name in done.stdout for name in COMMANDS)
    assert min(seconds) < 0.5, seconds


@pytest.mark.parametrize("command", COMMANDS)
def test_every_command_has_examples_and_json(llmc: Callable[..., Any], command: str) -> None:
    """Each command's help shows examples as typed, and --json, --quiet."""
    done = llmc(command, "--help")
    assert done.code == 0
    assert f"  llmc {command} " in done.out or f"  llmc {command}\n" in done.out
    assert "--json" in done.out
    assert "--quiet" in done.out


@pytest.mark.parametrize(
    ("args", "hint"),
    [
        (["comple"], "did you mean 'compile'?"),
        (["zzz"], "llmc --help"),
        (["passes", "--jsno"], "--json"),
        (["passes", "smoth"], "did you mean 'smooth'?"),
        (["run", "somewhere"], "--prompt"),
        (["compile", "m", "--passes", "w4", "-o", "o", "--samples", "many"], "--samples"),
        (["plan", "m", "--passes", "w4", "--budget-ram", "4 lots"], "4GB"),
        (["plan", "m"], "passes or a recipe"),
    ],
)
def test_wrong_words_suggest_the_nearest(
    llmc: Callable[..., Any], args: list[str], hint: str
) -> None:
    """A wrong command, option or value exits 2 with one line that says what to type."""
    done = llmc(*args)
    assert done.code == 2
    assert hint in done.error
    assert done.out == ""


@pytest.mark.parametrize(
    ("error", "code", "says"),
    [
        (UsageError("a wrong flag"), 2, "a wrong flag"),
        (ModelError("a bad model"), 3, "a bad model"),
        (GateError("a gate"), 4, "a gate"),
        (ResourceError("no room"), 5, "no room"),
        (OSError(errno.ENOSPC, "No space left on device", "/x/y"), 5, "No space left"),
        (OSError(errno.EROFS, "Read-only file system"), 5, "Read-only"),
        (MemoryError(), 5, "memory"),
        (RuntimeError("DefaultCPUAllocator: can't allocate memory: you tried"), 5, "memory"),
        (KeyboardInterrupt(), 130, "interrupted"),
        (ValueError("odd\nlines"), 1, "a bug in llmc: ValueError: odd lines (LLMC_DEBUG=1"),
        (BrokenPipeError(), 141, None),
    ],
)
def test_exit_codes(
    monkeypatch: pytest.MonkeyPatch, llmc: Callable[..., Any], error: BaseException, code: int,
    says: str | None,
) -> None:  # fmt: skip
    """Each kind of failure has its code and exactly one line."""
    from llmc.compiler.pipeline import registry

    def fail() -> None:
        raise error

    monkeypatch.setattr(registry, "all_passes", fail)
    monkeypatch.setattr(os, "dup2", lambda a, b: b)
    done = llmc("passes")
    assert done.code == code
    if says is None:
        assert done.err == ""
    else:
        assert says in done.error


def test_debug_shows_the_traceback(
    monkeypatch: pytest.MonkeyPatch, llmc: Callable[..., Any]
) -> None:
    """LLMC_DEBUG=1 adds the traceback to the one line."""
    from llmc.compiler.pipeline import registry

    def fail() -> None:
        raise ValueError("odd")

    monkeypatch.setattr(registry, "all_passes", fail)
    monkeypatch.setenv("LLMC_DEBUG", "1")
    assert "Traceback" in llmc("passes").err


def test_passes_show_every_knob(llmc: Callable[..., Any]) -> None:
    """The table and the JSON come from the passes themselves."""
    from llmc.compiler.pipeline.registry import all_passes

    done = llmc("passes", "--json")
    rows = {r["name"]: r for r in done.json["passes"]}
    assert set(rows) == set(all_passes())
    for name, made in all_passes().items():
        free = set(made.knobs()) - set(made.variants[name])
        assert {k["name"] for k in rows[name]["knobs"]} == free
    shown = llmc("passes", "w4")
    assert "arXiv 2210.17323" in shown.out
    assert all(k["name"] in shown.out for k in rows["w4"]["knobs"])
    assert "bits " not in shown.out.split("knob")[1]


def test_tables_are_plain_without_a_terminal(llmc: Callable[..., Any]) -> None:
    """No escape codes and no box lines in a pipe."""
    done = llmc("passes")
    assert "\x1b" not in done.out
    assert not any(c in done.out for c in "│━─")


def test_tables_are_drawn_on_a_terminal() -> None:
    """On a terminal rich draws the same cells; NO_COLOR is its business."""
    import io

    from llmc.compiler.report.text import Table, show

    class Terminal(io.StringIO):
        def isatty(self) -> bool:
            return True

    stream = Terminal()
    show(Table("Title", ("a", "b"), [("[x]", "y")], right=("b",)), stream)
    assert "[x]" in stream.getvalue()
    assert "Title" in stream.getvalue()


@pytest.mark.parametrize(
    ("text", "count"), [("4GB", 4 * 10**9), ("512MiB", 512 << 20), ("7", 7), ("1.5k", 1536)]
)
def test_sizes_read(text: str, count: int) -> None:
    """Decimal and binary suffixes."""
    assert size(text) == count


def test_json_has_no_nan(llmc: Callable[..., Any], capsys: pytest.CaptureFixture[str]) -> None:
    """Numbers that JSON lacks become null."""
    from llmc.compiler.cli.output import Out

    Out(as_json=True).data("x", {"a": float("nan"), "b": [float("inf"), 1.5]})
    assert json.loads(capsys.readouterr().out)["b"] == [None, 1.5]


def test_version(llmc: Callable[..., Any]) -> None:
    """--version prints the package's version."""
    from llmc import __version__

    assert llmc("--version").out.strip() == f"llmc {__version__}"


def test_heartbeat_without_a_terminal(capsys: pytest.CaptureFixture[str]) -> None:
    """Long work says so now and then where no bar can be drawn, and never with --quiet."""
    from llmc.compiler.cli.output import Out
    from llmc.compiler.cli.progress import Progress

    with Progress("solving", Out(), heartbeat=0.0) as progress:
        progress.steps(4)
        progress.at(1, "block0")
    assert "solving 1/4 block0" in capsys.readouterr().err
    with Progress("solving", Out(quiet=True), heartbeat=0.0) as progress:
        progress.at(1, "block0")
    with Progress("solving", Out()) as progress:
        progress.at(1, "block0")
    assert capsys.readouterr().err == ""


def test_bar_on_a_terminal(monkeypatch: pytest.MonkeyPatch) -> None:
    """On a terminal the bar follows the events, and lines go above it."""
    import io

    from llmc.compiler.cli.output import Out
    from llmc.compiler.cli.progress import Solving
    from llmc.compiler.ir.events import Event

    class Terminal(io.StringIO):
        def isatty(self) -> bool:
            return True

    stream = Terminal()
    monkeypatch.setattr(sys, "stderr", stream)
    monkeypatch.setenv("TERM", "xterm")
    record = {"site": "block0/linear0", "role": "q", "scheme": "w4 g32", "loss": 0.5, "damp": 0.01,
              "tokens": 128, "fallbacks": ["damping raised"]}  # fmt: skip
    with Solving("solving", Out(verbose=True)) as bar:
        bar(Event("start", {"steps": 2}))
        bar(Event("block", {"segment": "block0"}))
        bar(Event("tick", {}))
        bar(Event("site", record))
        bar(Event("block", {"segment": "block1"}))
        assert (bar.done, bar.total) == (1, 2)
        bar(Event("end", {"records": 1}))
        assert bar.done == 2
    assert "block0/linear0" in stream.getvalue()
    assert "damping raised" in stream.getvalue()


def test_app_is_one_object() -> None:
    """The entry point and the module give the same group."""
    from llmc.compiler.cli.app import app

    assert module_app is app
