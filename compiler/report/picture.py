"""A picture of dependency groups: DOT text for Graphviz, or an SVG with a layout of its own.

A box is a group and a pill in it a parameter axis, coloured by role. A dashed line joins the axes
of one parameter, so that cutting in two boxes at once is seen to meet in one tensor.
"""

from __future__ import annotations

import itertools
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from html import escape

from ..analysis.groups import MODEL, Member
from ..ir.graph import Program
from .groups import UNITS, Alike, per_unit

COLOURS = {
    "writes": "#cfe3f7", "reads": "#d8f0d3", "norm": "#fbe8c8", "table": "#e8daf3",
    "other": "#e6e6e6",
}  # fmt: skip
_MOST = 18
_PILL, _GAP, _HEAD, _WIDTH, _PAD = 20, 5, 40, 330, 10


@dataclass(frozen=True)
class _Pill:
    """One parameter axis at its place."""

    member: Member
    x: float
    y: float
    text: str


def dot(program: Program, rows: Sequence[Alike]) -> str:
    """The groups as an undirected Graphviz graph, one cluster each."""
    lines = ["graph groups {", '  node [shape=box style="rounded,filled" fontsize=10];']
    seen: dict[str, list[str]] = {}
    for i, row in enumerate(rows):
        lines += [f"  subgraph cluster_{i} {{", f"    label={_quoted(_title(row))};"]
        lines += ["    style=dashed;"] if row.first.blocked else []
        for m in row.first.members:
            name = f"g{i}.{m.param}.{m.axis}"
            seen.setdefault(m.param, []).append(name)
            label, fill = _quoted(_label(program, row, m)), COLOURS[m.role]
            lines.append(f'    {_quoted(name)} [label={label} fillcolor="{fill}"];')
        lines.append("  }")
    for names in seen.values():
        pairs = itertools.pairwise(names)
        lines += [f"  {_quoted(a)} -- {_quoted(b)} [style=dashed];" for a, b in pairs]
    return "\n".join([*lines, "}"]) + "\n"


def _quoted(text: str) -> str:
    return '"' + text.replace("\\", "\\\\").replace('"', '\\"') + '"'


def _title(row: Alike) -> str:
    g = row.first
    many = f", in {row.where}" if len(row.groups) > 1 else ""
    return f"{g.id}{many}: {g.units:,} units"


def _label(program: Program, row: Alike, m: Member) -> str:
    names = program.params[m.param].names
    known = names[0] if names else m.param
    return f"{known} [{m.axis}] {m.role} {per_unit(row.first, m):,}"


def svg(program: Program, rows: Sequence[Alike]) -> str:
    """The groups as one SVG: a column per segment, those that span the model first."""
    columns: dict[str, list[Alike]] = {MODEL: []}
    for row in rows:
        columns.setdefault(row.first.segment, []).append(row)
    pills: dict[str, list[_Pill]] = {}
    boxes: list[str] = []
    height = width = 0.0
    for at, mine in enumerate(c for c in columns.values() if c):
        x, y = _PAD + at * (_WIDTH + 6 * _PAD), float(_PAD)
        width = x + _WIDTH + _PAD
        for row in mine:
            drawn, tall = _box(program, row, x, y, pills)
            boxes += drawn
            y += tall + 2 * _PAD
        height = max(height, y)
    size = f'width="{width:.0f}" height="{height:.0f}" viewBox="0 0 {width:.0f} {height:.0f}"'
    return "\n".join([
        f'<svg xmlns="http://www.w3.org/2000/svg" {size} font-family="sans-serif" font-size="11">',
        '<rect width="100%" height="100%" fill="white"/>', *_lines(pills), *boxes, "</svg>",
    ]) + "\n"  # fmt: skip


def _box(
    program: Program, row: Alike, x: float, y: float, pills: dict[str, list[_Pill]]
) -> tuple[list[str], float]:
    """One group at a place, and how tall it is; its pills are added to those of its parameters."""
    g = row.first
    shown = g.members[:_MOST]
    left = len(g.members) - len(shown)
    count = len(shown) + bool(left)
    tall = _HEAD + count * (_PILL + _GAP) + _GAP
    dashes = ' stroke-dasharray="6 3"' if g.blocked else ""
    about = f"{UNITS[g.kind]}, {g.bytes_per_unit:,.0f} bytes each"
    about = f"blocked: {g.blocked[0].reason}" if g.blocked else about
    inside = [
        f'<rect x="{x:.0f}" y="{y:.0f}" width="{_WIDTH}" height="{tall:.0f}" rx="8" fill="white" '
        f'fill-opacity="0.85" stroke="#555"{dashes}/>',
        _text(x + _PAD, y + 16, _title(row), "bold"),
        _text(x + _PAD, y + 31, about),
    ]
    for i, m in enumerate(shown):
        top = y + _HEAD + i * (_PILL + _GAP)
        pill = _Pill(m, x + _PAD, top, _label(program, row, m))
        pills.setdefault(m.param, []).append(pill)
        inside.append(
            f'<rect x="{pill.x:.0f}" y="{top:.0f}" width="{_WIDTH - 2 * _PAD}" height="{_PILL}" '
            f'rx="9" fill="{COLOURS[m.role]}"/>'
        )
        inside.append(_text(pill.x + 8, top + 14, pill.text))
    if left:
        top = y + _HEAD + len(shown) * (_PILL + _GAP)
        inside.append(_text(x + _PAD + 8, top + 14, f"and {left:,} more"))
    return inside, tall


def _text(x: float, y: float, text: str, weight: str = "normal") -> str:
    # About 52 letters fit into a box; the end of a long name says more than its start.
    fits = text if len(text) <= 52 else "…" + text[-51:]
    if weight == "bold" and len(text) > 52:
        fits = text[:51] + "…"
    return f'<text x="{x:.0f}" y="{y:.0f}" font-weight="{weight}">{escape(fits)}</text>'


def _lines(pills: dict[str, list[_Pill]]) -> Iterator[str]:
    """Dashed curves between the axes of one parameter."""
    for places in pills.values():
        for a, b in itertools.pairwise(places):
            right, left = (a, b) if a.x <= b.x else (b, a)
            x0, y0 = right.x + _WIDTH - 2 * _PAD, right.y + _PILL / 2
            x1, y1 = left.x if left.x > right.x else x0, left.y + _PILL / 2
            bend = max(30.0, abs(x1 - x0) / 2)
            x2 = x1 - bend if x1 > x0 else x1 + bend
            yield (
                f'<path d="M{x0:.0f},{y0:.0f} C{x0 + bend:.0f},{y0:.0f} {x2:.0f},{y1:.0f} '
                f'{x1:.0f},{y1:.0f}" fill="none" stroke="#999" stroke-dasharray="3 3"/>'
            )
