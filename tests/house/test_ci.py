"""The CI script fails when the tests fail, and when hardly any ran."""

from __future__ import annotations

import os
import shutil
import subprocess
from pathlib import Path

import pytest


@pytest.mark.parametrize(
    ("last_line", "status", "expected"),
    [
        ("== 5000 passed in 60.0s ==", 0, 0),
        ("== 1 failed, 5000 passed in 60.0s ==", 1, 2),
        ("== 3 passed in 1.0s ==", 0, 1),
        ("== 3 passed, 5000 skipped in 1.0s ==", 0, 1),
        ("== no tests ran in 0.1s ==", 0, 1),
        ("== no tests ran in 0.1s ==", 5, 2),
    ],
)
def test_ci_run_judges_the_closing_line(
    repo: Path, tmp_path: Path, last_line: str, status: int, expected: int
) -> None:
    """``.ci/run`` beside a Makefile that only prints: its exit code follows what the tests said."""
    (tmp_path / ".ci").mkdir()
    shutil.copy(repo / ".ci" / "run", tmp_path / ".ci" / "run")
    recipe = f"check:\n\t@true\ntest:\n\t@echo '{last_line}'; exit {status}\n"
    (tmp_path / "Makefile").write_text(recipe)
    env = {key: value for key, value in os.environ.items() if not key.startswith("MAKE")}
    done = subprocess.run(
        ["bash", str(tmp_path / ".ci" / "run")],
        env=env,
        capture_output=True,
        text=True,
        timeout=60,
        check=False,
    )
    assert done.returncode == expected, done.stdout + done.stderr


def test_ci_run_can_be_executed(repo: Path) -> None:
    """The script carries its executable bit."""
    assert os.access(repo / ".ci" / "run", os.X_OK)
