"""What a pass changed: two graphs compared node by node, alike blocks told once."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from ..ir.graph import Program
from .nodes import Row, node_row, segment_map
from .text import Table, size


@dataclass(frozen=True)
class Change:
    """One node before and after; None where it does not exist."""

    segment: str
    before: Row | None
    after: Row | None

    @property
    def kind(self) -> str:
        """``added``, ``removed``, ``changed`` or ``same``."""
        if self.before is None:
            return "added"
        if self.after is None:
            return "removed"
        told = ("text", "type", "dtype", "bytes")
        return "changed" if any(self.before[k] != self.after[k] for k in told) else "same"

    def to_json(self) -> dict[str, Any]:
        return {
            "kind": self.kind, "segment": self.segment, "before": self.before, "after": self.after
        }  # fmt: skip


def changes(before: Program, after: Program) -> list[Change]:
    """Nodes that differ in call, type or stored dtype, in graph order; names are stable."""
    return [c for c in pairs(before, after) if c.kind != "same"]


def pairs(before: Program, after: Program) -> list[Change]:
    """Every node beside itself, in graph order."""
    here, there = segment_map(before), segment_map(after)
    old = {n.name: node_row(before, n, here[n.name]) for n in before.graph.nodes}
    new = {n.name: node_row(after, n, there[n.name]) for n in after.graph.nodes}
    out: list[Change] = []
    waiting = [name for name in old if name not in new]
    order = {name: i for i, name in enumerate(old)}
    for name, row in new.items():
        was = old.get(name)
        if was is not None:
            while waiting and order[waiting[0]] < order[name]:
                gone = waiting.pop(0)
                out.append(Change(here[gone], old[gone], None))
        out.append(Change(there[name] if was is None else here[name], was, row))
    out += [Change(here[gone], old[gone], None) for gone in waiting]
    return out


@dataclass(frozen=True)
class Hunk:
    """Changes of one segment, and the other segments that changed alike."""

    segment: str
    changes: tuple[Change, ...]
    alike: tuple[str, ...] = ()


def hunks(found: list[Change], collapse: bool = True) -> list[Hunk]:
    """Changes by segment; segments whose changes differ only in names are told once."""
    by_segment: dict[str, list[Change]] = {}
    for change in found:
        by_segment.setdefault(change.segment, []).append(change)
    out: dict[Any, tuple[str, tuple[Change, ...], list[str]]] = {}
    for segment, part in by_segment.items():
        key = tuple(_shape(c) for c in part) if collapse else segment
        if key in out:
            out[key][2].append(segment)
        else:
            out[key] = (segment, tuple(part), [])
    return [Hunk(s, c, tuple(more)) for s, c, more in out.values()]


def _shape(change: Change) -> tuple[Any, ...]:
    sides = (change.before, change.after)
    return tuple(None if r is None else (r["op"], r["type"], r["dtype"], r["bytes"]) for r in sides)


def unified(hunk: Hunk) -> str:
    """A hunk as lines with - and +."""
    alike = f" (and {len(hunk.alike)} more alike: {_span(hunk.alike)})" if hunk.alike else ""
    lines = [f"@@ {hunk.segment or 'graph'}{alike} @@"]
    for c in hunk.changes:
        for sign, row in (("-", c.before), ("+", c.after)):
            if row is not None:
                lines.append(f"{sign} {row['name']} = {row['text']}  # {row['type']}{_stored(row)}")
    return "\n".join(lines)


def side_by_side(hunk: Hunk) -> Table:
    """A hunk as two columns."""
    alike = f" (and {len(hunk.alike)} more alike: {_span(hunk.alike)})" if hunk.alike else ""
    table = Table(f"{hunk.segment or 'graph'}{alike}", ("before", "after"))
    for c in hunk.changes:
        cells = [
            "" if r is None else f"{r['name']} = {r['text']} {r['type']}{_stored(r)}"
            for r in (c.before, c.after)
        ]
        table.rows.append(cells)
    return table


def _span(names: tuple[str, ...]) -> str:
    return names[0] if len(names) == 1 else f"{names[0]} .. {names[-1]}"


def _stored(row: Row) -> str:
    if row["op"] != "param":
        return ""
    return f" {size(row['bytes'])} as {row['dtype']}"


def totals(found: list[Change]) -> dict[str, int]:
    """Counts, and the bytes of parameters before and after."""
    out = {"added": 0, "removed": 0, "changed": 0, "bytes_before": 0, "bytes_after": 0}
    for c in found:
        out[c.kind] += 1
        for key, row in (("bytes_before", c.before), ("bytes_after", c.after)):
            if row is not None and row["op"] == "param":
                out[key] += row["bytes"]
    return out
