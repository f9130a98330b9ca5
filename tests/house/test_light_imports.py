"""``import llmc`` and ``llmc --help`` load nothing heavy."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import pytest

HEAVY = ["torch", "transformers", "triton", "sklearn", "onnx", "scipy", "sympy", "networkx"]
# Prints which of HEAVY the code before it has loaded; runs in a fresh interpreter.
PROBE = (
    f"\nimport json, sys\nprint('LOADED ' + json.dumps([m for m in {HEAVY} if m in sys.modules]))"
)


def loaded_by(code: str, cwd: Path) -> list[str]:
    """Which heavy packages a fresh interpreter has loaded after running ``code``."""
    done = subprocess.run(
        [sys.executable, "-c", code + PROBE],
        cwd=cwd,
        capture_output=True,
        text=True,
        timeout=120,
        check=False,
    )
    assert done.returncode == 0, done.stderr[-3000:]
    line = [row for row in done.stdout.splitlines() if row.startswith("LOADED ")][-1]
    return list(json.loads(line.removeprefix("LOADED ")))


def test_probe_sees_a_heavy_import(tmp_path: Path) -> None:
    """The probe itself works: it reports a package that was imported."""
    assert loaded_by("import networkx", tmp_path) == ["networkx"]


def test_import_llmc_is_light(tmp_path: Path) -> None:
    """The face of the package loads none of the heavy packages."""
    assert loaded_by("import llmc; assert llmc.__version__", tmp_path) == []


def test_errors_are_light(tmp_path: Path) -> None:
    """A wrong flag must be refused without waiting for torch."""
    assert loaded_by("from llmc.compiler.ir.errors import UsageError", tmp_path) == []


@pytest.mark.parametrize("arguments", [["--help"], ["compile", "--help"], ["--version"]])
def test_help_is_light(tmp_path: Path, arguments: list[str]) -> None:
    """Help texts load no torch: they answer while torch would still be loading."""
    code = (
        "import sys\n"
        f"sys.argv = ['llmc', *{arguments}]\n"
        "from llmc.compiler.cli import main\n"
        "try:\n    main()\nexcept SystemExit as end:\n    assert not end.code, end.code\n"
    )
    assert "torch" not in loaded_by(code, tmp_path)
