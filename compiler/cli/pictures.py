"""``--picture FILE``: a drawing as SVG, as DOT for Graphviz or as JSON for Model Explorer."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from pathlib import Path

from ..ir.errors import UsageError

Drawings = Mapping[str, Callable[[], str]]
"""By a file's ending, what makes its text."""


def check_picture(path: str | None, endings: tuple[str, ...] = (".svg", ".dot")) -> None:
    """Raises UsageError for an ending that no drawing has."""
    if path is not None and Path(path).suffix not in endings:
        words = f"{', '.join(endings[:-1])} or {endings[-1]}"
        raise UsageError(f"--picture: expected a name ending in {words}, found {path!r}")


def write_picture(path: str, drawings: Drawings) -> None:
    """Draw to a file, by its ending.

    Raises:
        UsageError: it cannot be written.
    """
    goal = Path(path).expanduser()
    drawn = drawings[goal.suffix]()
    try:
        goal.write_text(drawn, encoding="utf-8")
    except (FileNotFoundError, IsADirectoryError, NotADirectoryError, PermissionError) as e:
        raise UsageError(f"--picture: expected a file that can be written, found {e}") from None
