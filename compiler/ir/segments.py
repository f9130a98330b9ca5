"""Segments from cut points: what flows into and out of each run of nodes, recomputed."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

from torch import fx

from .errors import ModelError
from .graph import Program, Segment


def make_segments(graph: fx.Graph, cuts: Sequence[tuple[str, int]]) -> list[Segment]:
    """Segments that start at the given positions of the graph.

    Args:
        cuts: (name, index of the first node), ascending, the first at 0.
    Raises:
        ModelError: a segment that is empty.
    """
    nodes = list(graph.nodes)
    rank = {n: i for i, n in enumerate(nodes)}
    ends = [*(at for _, at in cuts[1:]), len(nodes)]
    out = []
    for (name, start), end in zip(cuts, ends, strict=True):
        if start >= end:
            raise ModelError(f"expected nodes in segment {name!r}, found none")
        out.append(segment_of(name, nodes[start:end], rank))
    return out


def segment_of(name: str, mine: Sequence[fx.Node], rank: Mapping[fx.Node, int]) -> Segment:
    """The segment that these nodes form; ``rank``, a node's place in the graph, orders live-ins."""
    here = set(mine)
    live_in = {i for n in mine for i in n.all_input_nodes} - here
    return Segment(
        name,
        tuple(n.name for n in mine),
        tuple(n.name for n in sorted(live_in, key=rank.__getitem__)),
        tuple(n.name for n in mine if any(u not in here for u in n.users)),
    )


def refresh_segments(program: Program) -> None:
    """Fit a program's segments to its rewritten graph, keeping their names.

    A new node belongs to the segment of the first older node behind it, which is where
    ``Program.emit`` put it.
    """
    if not program.segments:
        return
    owner = {n: s.name for s in program.segments for n in s.nodes}
    order = list(program.graph.nodes)
    members: dict[str, list[fx.Node]] = {s.name: [] for s in program.segments}
    home = program.segments[-1].name
    for node in reversed(order):
        home = owner.get(node.name, home)
        members[home].append(node)
    rank = {n: i for i, n in enumerate(order)}
    program.segments = [
        segment_of(name, mine[::-1], rank) for name, mine in members.items() if mine
    ]
