"""Tables for people: drawn by rich on a terminal, plain aligned columns everywhere else."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field
from typing import TextIO


@dataclass
class Table:
    """A titled table of text cells; ``right`` names columns whose cells are aligned right."""

    title: str
    head: Sequence[str]
    rows: list[Sequence[str]] = field(default_factory=list)
    right: Iterable[str] = ()


def plain(table: Table) -> str:
    """The table without colour or lines: columns two spaces apart, no trailing spaces."""
    right = set(table.right)
    cells = [list(table.head), *[[" ".join(str(c).split()) for c in row] for row in table.rows]]
    widths = [max(len(row[i]) for row in cells) for i in range(len(table.head))]
    lines = [table.title] if table.title else []
    for row in cells:
        parts = [
            c.rjust(w) if h in right else c.ljust(w)
            for c, w, h in zip(row, widths, table.head, strict=True)
        ]
        lines.append("  ".join(parts).rstrip())
    return "\n".join(lines) + "\n"


def show(table: Table, stream: TextIO) -> None:
    """Print a table; rich honours NO_COLOR and the terminal's width."""
    if not stream.isatty():
        stream.write(plain(table) + "\n")
        stream.flush()
        return
    from rich import box
    from rich.console import Console
    from rich.table import Table as Rich
    from rich.text import Text

    right = set(table.right)
    drawn = Rich(title=table.title or None, box=box.SIMPLE_HEAD, title_justify="left")
    for head in table.head:
        drawn.add_column(head, justify="right" if head in right else "left", overflow="fold")
    for row in table.rows:
        drawn.add_row(*[Text(str(c)) for c in row])
    Console(file=stream).print(drawn)


def size(count: float | None) -> str:
    """Bytes in a few characters, in powers of 1000: ``1.23 MB``."""
    if count is None:
        return "-"
    for unit in ("B", "kB", "MB", "GB", "TB"):
        if abs(count) < 999.5 or unit == "TB":
            return f"{count:.0f} {unit}" if unit == "B" else f"{count:.3g} {unit}"
        count /= 1000
    raise AssertionError("unreachable")


def counted(count: int, noun: str) -> str:
    """``1 site``, ``2 sites``, ``0 near misses``."""
    ending = "" if count == 1 else "es" if noun.endswith(("s", "ch")) else "s"
    return f"{count:,} {noun}{ending}"


def number(value: float | None, digits: int = 4) -> str:
    """A number in a few characters, ``-`` for none."""
    if value is None:
        return "-"
    if isinstance(value, int):
        return f"{value:,}"
    return f"{value:.{digits}g}"


def seconds(value: float) -> str:
    """A duration: ``8.1 s``, ``2 min 05 s``."""
    if value < 60:
        return f"{value:.1f} s"
    return f"{int(value // 60)} min {int(value % 60):02d} s"
