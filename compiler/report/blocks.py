"""The graph block by block before and after: blocks that differ only in names are told once."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

from torch import fx

from ..ir.graph import Program
from .difference import Change, pairs
from .nodes import call_text, segment_map


@dataclass(frozen=True)
class View:
    """One distinct block.

    Attributes:
        segment: its name; "" where no segment takes the nodes.
        alike: other blocks that look the same but for names.
        lines: its nodes in order, each beside itself before.
    """

    segment: str
    alike: tuple[str, ...]
    lines: tuple[Change, ...]

    @property
    def bytes(self) -> tuple[int, int]:
        """Of the parameters read here, before and after."""
        before, after = (
            sum(r["bytes"] for r in side if r is not None and r["op"] == "param")
            for side in zip(*((c.before, c.after) for c in self.lines), strict=True)
        )
        return before, after

    @property
    def changed(self) -> int:
        """How many nodes are not as they were."""
        return sum(c.kind != "same" for c in self.lines)

    def names(self, after: bool) -> list[str]:
        """Nodes of one side."""
        rows = [c.after if after else c.before for c in self.lines]
        return [r["name"] for r in rows if r is not None]


def views(before: Program, after: Program) -> list[View]:
    """Every distinct block, in graph order."""
    home = _homes(before, after)
    parts: dict[str, list[Change]] = {}
    for change in pairs(before, after):
        own = change.before is None
        parts.setdefault(home.get(change.segment, change.segment) if own else change.segment,
                         []).append(change)  # fmt: skip
    old, new = _texts(before), _texts(after)
    found: dict[tuple[object, ...], tuple[str, list[Change], list[str]]] = {}
    for segment, part in parts.items():
        key = tuple(
            (c.kind, *(_looks(r, t) for r, t in ((c.before, old), (c.after, new)))) for c in part
        )
        if key in found:
            found[key][2].append(segment)
        else:
            found[key] = (segment, part, [])
    return [View(s, tuple(more), tuple(part)) for s, part, more in found.values()]


def _looks(row: dict[str, object] | None, texts: dict[str, str]) -> tuple[object, ...] | None:
    if row is None:
        return None
    return (texts[str(row["name"])], row["type"], row["dtype"], row["bytes"])


def _homes(before: Program, after: Program) -> dict[str, str]:
    """Blocks of ``after`` by the block of ``before`` they were: dropping blocks renumbers them."""
    here, there = segment_map(before), segment_map(after)
    out: dict[str, str] = {}
    for node in after.graph.nodes:
        if node.op == "call_function" and node.name in here:
            out.setdefault(there[node.name], here[node.name])
    return out


def _texts(program: Program) -> dict[str, str]:
    """Each call with its values told by their place in the block, so that names do not matter."""
    where = segment_map(program)
    place: dict[str, str] = {}
    count: dict[str, int] = {}
    for node in program.graph.nodes:
        segment = where[node.name]
        count[segment] = count.get(segment, 0) + 1
        place[node.name] = f"%{count[segment]}"

    def told(segment: str) -> Callable[[fx.Node], str]:
        return lambda n: place[n.name] if where[n.name] == segment else "outside"

    return {
        n.name: "param" if n.op == "get_attr" else call_text(n, told(where[n.name]))
        for n in program.graph.nodes
    }
