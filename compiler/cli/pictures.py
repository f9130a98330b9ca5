"""``--picture FILE``: a drawing as SVG, or as DOT for Graphviz, by the file's ending."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

from ..ir.errors import UsageError

_ENDINGS = (".svg", ".dot")


def check_picture(path: str | None) -> None:
    """Raises UsageError for an ending that no drawing has."""
    if path is not None and Path(path).suffix not in _ENDINGS:
        raise UsageError(f"--picture: expected a name ending in .svg or .dot, found {path!r}")


def write_picture(path: str, svg: Callable[[], str], dot: Callable[[], str]) -> None:
    """Draw to a file.

    Raises:
        UsageError: it cannot be written.
    """
    goal = Path(path).expanduser()
    drawn = svg() if goal.suffix == ".svg" else dot()
    try:
        goal.write_text(drawn, encoding="utf-8")
    except (FileNotFoundError, IsADirectoryError, NotADirectoryError, PermissionError) as e:
        raise UsageError(f"--picture: expected a file that can be written, found {e}") from None
