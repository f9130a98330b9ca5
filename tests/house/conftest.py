"""What the tests of the house share."""

from __future__ import annotations

import subprocess
from pathlib import Path

import pytest

LEFT_OUT = {"build", "out", "dist", "text", "__pycache__"}


@pytest.fixture(scope="session")
def kept_files(repo: Path) -> list[Path]:
    """Every file that git keeps or would keep, relative to the root.

    In a copy without git: all files but those in hidden folders and where make and builds write.
    """
    if (repo / ".git").exists():
        listed = subprocess.run(
            ["git", "ls-files", "-z", "--cached", "--others", "--exclude-standard"],
            cwd=repo,
            capture_output=True,
            text=True,
            check=True,
        ).stdout
        names = [Path(name) for name in listed.split("\0") if name]
        return [name for name in names if (repo / name).is_file()]
    found = []
    for path in sorted(repo.rglob("*")):
        name = path.relative_to(repo)
        hidden = any(part.startswith(".") or part.endswith(".egg-info") for part in name.parts)
        if path.is_file() and not hidden and LEFT_OUT.isdisjoint(name.parts):
            found.append(name)
    return found
