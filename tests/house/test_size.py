"""Files stay short: one subject each, so that a reader can hold one in the head."""

from __future__ import annotations

import ast
from pathlib import Path

CODE_LINES = 400
TEST_LINES = 450


def test_python_files_stay_short(repo: Path, kept_files: list[Path]) -> None:
    """No Python file is longer than its budget."""
    files = [name for name in kept_files if name.suffix == ".py"]
    assert len(files) > 20, f"expected a checkout of llmc in {repo}, found {len(files)} modules"
    long = []
    for name in files:
        budget = TEST_LINES if name.parts[0] == "tests" else CODE_LINES
        lines = len((repo / name).read_text(encoding="utf-8").splitlines())
        if lines > budget:
            long.append(f"{name}: {lines} lines, at most {budget}; split it by subject")
    assert not long, "\n".join(long)


def test_templates_stay_short(repo: Path, kept_files: list[Path]) -> None:
    """Kernel templates keep to the budget of code."""
    long = [
        str(name)
        for name in kept_files
        if name.suffix == ".j2"
        and len((repo / name).read_text(encoding="utf-8").splitlines()) > CODE_LINES
    ]
    assert not long, long


def test_every_module_says_what_it_is(repo: Path, kept_files: list[Path]) -> None:
    """Each module with code in it opens with a docstring."""
    silent = []
    for name in kept_files:
        if name.suffix != ".py":
            continue
        tree = ast.parse((repo / name).read_text(encoding="utf-8"))
        if tree.body and ast.get_docstring(tree) is None:
            silent.append(str(name))
    assert not silent, f"modules without a docstring: {silent}"


def test_no_machine_paths(repo: Path, kept_files: list[Path]) -> None:
    """Committed text names no folder of the machine that it was written on."""
    # Tests name somebody's home on purpose, to prove that such a path is not kept.
    marks = [f"/{name}/" for name in ("work/main", "work/shared", "work/env", "root", "home")]
    text = {".py", ".md", ".toml", ".yaml", ".j2", ".json", ".txt", ""}
    found = [
        f"{name}: {mark}"
        for name in kept_files
        if name.suffix in text and name.name != "tokenizer.json"
        for mark in (marks[:4] if name.parts[0] == "tests" else marks)
        if mark in (repo / name).read_text(encoding="utf-8")
    ]
    assert not found, "\n".join(found)
