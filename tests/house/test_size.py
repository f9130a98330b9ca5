"""Files stay short: one subject each, so that a reader can hold one in the head."""

from __future__ import annotations

import subprocess
from pathlib import Path

CODE_LINES = 400
TEST_LINES = 450


def kept_files(repo: Path, *suffixes: str) -> list[Path]:
    """Every file of the repository, committed or new, that git does not ignore."""
    listed = subprocess.run(
        ["git", "ls-files", "--cached", "--others", "--exclude-standard"],
        cwd=repo,
        capture_output=True,
        text=True,
        check=True,
    ).stdout.splitlines()
    return [repo / name for name in listed if name.endswith(suffixes) and (repo / name).is_file()]


def test_python_files_stay_short(repo: Path) -> None:
    """No Python file is longer than its budget."""
    files = kept_files(repo, ".py")
    assert len(files) > 20, "git listed hardly any file: is this a checkout?"
    long = []
    for path in files:
        name = path.relative_to(repo)
        budget = TEST_LINES if name.parts[0] == "tests" else CODE_LINES
        lines = len(path.read_text(encoding="utf-8").splitlines())
        if lines > budget:
            long.append(f"{name}: {lines} lines, at most {budget}; split it by subject")
    assert not long, "\n".join(long)


def test_templates_stay_short(repo: Path) -> None:
    """Kernel templates keep to the budget of code."""
    long = [
        str(path.relative_to(repo))
        for path in kept_files(repo, ".j2")
        if len(path.read_text(encoding="utf-8").splitlines()) > CODE_LINES
    ]
    assert not long, long


def test_every_module_says_what_it_is(repo: Path) -> None:
    """Each module with code in it opens with a docstring."""
    import ast

    silent = []
    for path in kept_files(repo, ".py"):
        tree = ast.parse(path.read_text(encoding="utf-8"))
        if tree.body and ast.get_docstring(tree) is None:
            silent.append(str(path.relative_to(repo)))
    assert not silent, f"modules without a docstring: {silent}"


def test_no_machine_paths(repo: Path) -> None:
    """Committed text names no folder of the machine that it was written on."""
    marks = [f"/{name}/" for name in ("work/main", "work/shared", "work/env", "root", "home")]
    found = [
        f"{path.relative_to(repo)}: {mark}"
        for path in kept_files(repo, ".py", ".md", ".toml", ".yaml", ".j2", ".json", "Makefile")
        for mark in marks
        if mark in path.read_text(encoding="utf-8") and path.name != "tokenizer.json"
    ]
    assert not found, "\n".join(found)
