"""Imports run down the levels only; the contracts are in pyproject.toml."""

from __future__ import annotations

import os
import re
import shutil
import subprocess
import sys
import tomllib
from pathlib import Path

import pytest


def lint_imports(cwd: Path, *arguments: str) -> subprocess.CompletedProcess[str]:
    """Run import-linter, the one installed beside this Python."""
    beside = Path(sys.executable).parent / "lint-imports"
    tool = str(beside) if beside.exists() else shutil.which("lint-imports")
    if tool is None:
        pytest.fail("import-linter is not installed; `make setup` installs the test extra")
    env = os.environ | {"PYTHONPATH": str(cwd)}
    command = [tool, "--no-cache", *arguments]
    return subprocess.run(
        command, cwd=cwd, env=env, capture_output=True, text=True, timeout=120, check=False
    )


def test_contracts_hold(repo: Path) -> None:
    """Every contract of pyproject.toml is kept."""
    done = lint_imports(repo)
    assert done.returncode == 0, done.stdout[-6000:] + done.stderr[-2000:]
    assert "0 broken" in done.stdout


def test_every_part_of_the_compiler_has_a_level(repo: Path) -> None:
    """A new folder or module of ``compiler/`` must be placed in the contract of levels."""
    settings = tomllib.loads((repo / "pyproject.toml").read_text(encoding="utf-8"))["tool"]
    rows = settings["importlinter"]["contracts"][0]["layers"]
    placed = {name.strip("() ") for row in rows for name in re.split("[:|]", row)}
    parts = {
        f"llmc.compiler.{path.stem}"
        for path in (repo / "compiler").iterdir()
        if path.name != "__init__.py" and (path.suffix == ".py" or (path / "__init__.py").exists())
    }
    assert parts <= placed, f"without a level: {sorted(parts - placed)}"


@pytest.mark.parametrize(
    ("importer", "imported", "contract"),
    [
        ("compiler/ir/low.py", "..pipeline.base", "imports run down the levels"),
        ("compiler/pipeline/low.py", "..runtime.base", "imports run down the levels"),
        ("passes/one.py", "..codegen.base", "imports run down the levels"),
        ("passes/one.py", ".two", "a pass never imports a sibling"),
        ("passes/one.py", "..compiler.capture.base", "passes do not capture"),
        ("codegen/low.py", "..compiler.pipeline.base", "codegen imports only compiler.ir"),
        ("compiler/solvers/low.py", "..ir.base", "solvers know no graph"),
        ("compiler/analysis/low.py", "transformers", "only compiler.capture knows transformers"),
        ("compiler/runtime/low.py", "triton", "only codegen knows triton"),
    ],
)
def test_contracts_bite(
    repo: Path, tmp_path: Path, importer: str, imported: str, contract: str
) -> None:
    """Each contract catches one import that it forbids, in a small tree of the same shape."""
    package = tmp_path / "llmc"
    layers = tomllib.loads((repo / "pyproject.toml").read_text())["tool"]["setuptools"]["packages"]
    for name in layers:
        folder = tmp_path / name.replace(".", "/")
        folder.mkdir(parents=True, exist_ok=True)
        (folder / "__init__.py").touch()
        (folder / "base.py").touch()
    for name in ("one", "two"):
        (package / "passes" / f"{name}.py").touch()
    head = "import" if imported[0] != "." else "from"
    line = f"import {imported}" if head == "import" else _relative(imported)
    (package / importer).write_text(line + "\n")
    done = lint_imports(tmp_path, "--config", str(repo / "pyproject.toml"))
    broken = [row for row in done.stdout.splitlines() if row.endswith("BROKEN")]
    assert done.returncode == 1, done.stdout + done.stderr
    assert any(row.startswith(contract) for row in broken), done.stdout


def _relative(dotted: str) -> str:
    """``..ir.base`` as the statement that imports that module."""
    dots = dotted[: len(dotted) - len(dotted.lstrip("."))]
    *parents, name = dotted.lstrip(".").split(".")
    return f"from {dots}{'.'.join(parents)} import {name}"
