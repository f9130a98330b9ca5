"""What structural passes did, as tables: sizes around each, and the rows that they measured."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

from .text import Table, number, size

# Rows of one measurement that are shown without -v.
_SHOWN = 24


def structure_table(steps: list[dict[str, Any]]) -> Table:
    """Each structural pass with parameters, bytes and blocks before and after it."""
    numbers = ("sites", "parameters", "after", "bytes", "bytes after", "blocks")
    table = Table("Structure", ("pass", *numbers, "sizes"), right=numbers)
    for s in steps:
        a, b = s["before"], s["after"]
        blocks = str(a["blocks"])
        if a["blocks"] != b["blocks"]:
            blocks += f" -> {b['blocks']}"
        table.rows.append((
            s["pass"], str(s["sites"]), number(a["parameters"]), number(b["parameters"]),
            size(a["bytes"]), size(b["bytes"]), blocks, "exact" if s["exact"] else "bound",
        ))  # fmt: skip
    return table


def record_tables(steps: list[dict[str, Any]], full: bool = False) -> Iterable[Table]:
    """The rows of each pass's measurements; rows with the same fields form one table.

    What a row is about comes before what was measured: names, then counts, then fractions.
    """
    for s in steps:
        groups: dict[tuple[str, ...], list[dict[str, Any]]] = {}
        for row in s.get("records", []):
            fields = sorted(row, key=lambda f: (_place(row[f]), f))
            groups.setdefault(tuple(fields), []).append(row)
        for head, rows in groups.items():
            shown = rows if full else rows[:_SHOWN]
            more = f" (first {len(shown)} of {len(rows)}; -v shows all)"
            title = f"{s['pass']}: {', '.join(head)}" + (more if len(shown) < len(rows) else "")
            right = [f for f in head if all(not isinstance(r[f], str) for r in rows)]
            table = Table(title, head, right=right)
            table.rows = [tuple(_cell(r[f]) for f in head) for r in shown]
            yield table


def _place(value: Any) -> int:
    return 0 if isinstance(value, str) else 1 + isinstance(value, (float, list, dict))


def _cell(value: Any) -> str:
    if isinstance(value, bool):
        return str(value).lower()
    if isinstance(value, list):
        return " ".join(map(_cell, value))
    return number(value, 5) if value is None or isinstance(value, (int, float)) else str(value)
