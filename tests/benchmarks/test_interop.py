"""The table of exports and loaders: limits, what was not run, and rows that others register."""

from __future__ import annotations

import importlib
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest


@pytest.fixture
def bench(repo: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Callable[[str], Any]]:
    """The scripts of benchmarks/ by name."""
    monkeypatch.syspath_prepend(str(repo / "benchmarks"))
    yield importlib.import_module
    for name in [n for n in sys.modules if n.startswith("interop")]:
        del sys.modules[name]


def test_a_row_fails_beyond_its_limits(bench: Callable[[str], Any]) -> None:
    """NaN and what is missing fail too; a loader that is not there is told apart."""
    base, table = bench("interop_base"), bench("interop")

    def state(weights: float | None, logits: float | None) -> str:
        row = base.Row("a", "b", 0.0, 1e-5, lambda subject: base.Found(weights, logits))
        return str(table.measure(row, None)["state"])

    assert state(0.0, 1e-6) == "ok"
    for found in ((1e-9, 0.0), (0.0, 2e-5), (0.0, float("nan")), (0.0, None), (None, 0.0)):
        assert state(*found) == "failed"

    def absent(subject: Any) -> Any:
        raise base.NotRun("not installed; make interop does")

    record = table.measure(base.Row("a", "b", 0.0, None, absent), None)
    assert (record["state"], record["note"]) == ("not run", "not installed; make interop does")
    assert table.say(record).startswith("not run a ")


def test_every_built_format_has_rows(bench: Callable[[str], Any]) -> None:
    """Whatever writes codes is read by somebody else."""
    base, table = bench("interop_base"), bench("interop")
    for module in table.MODULES:
        bench(module)
    exports = [row.export for row in base.ROWS]
    for form in ("compressed-tensors pack", "compressed-tensors int", "compressed-tensors float",
                 "gptq v1", "gptq v2", "awq"):  # fmt: skip
        assert any(e.startswith(form) for e in exports)
    assert len(base.ROWS) == len({(r.export, r.loader) for r in base.ROWS})
