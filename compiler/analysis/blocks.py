"""Segments of a program: a prologue, the repeated blocks and an epilogue, found by dominance.

The residual stream is the chain of values through which *every* path from the embedded tokens to
the output runs. Between two links of that chain lies a chunk; a block starts at a chunk whose
attention reads keys made from the stream itself, and ends before the next one. Where a model has no
such chunk, a block is the shortest chunk sequence that repeats. Names are never looked at.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from itertools import pairwise

import networkx as nx
from torch import fx

from ..ir.graph import Program, Segment, info
from ..ir.segments import segment_of
from ..ir.types import SymType
from .canon import chunk_label
from .ties import ATTENTION, WHOLE_ATTENTION, constants, op_name, shape_of

PROLOGUE, EPILOGUE, MAIN = "prologue", "epilogue", "main"


@dataclass(frozen=True)
class _Chain:
    """The residual stream: ``links`` from source to target, and each node's place along it."""

    links: tuple[fx.Node, ...]
    chunk_of: dict[fx.Node, int]

    def members(self) -> list[list[fx.Node]]:
        out: list[list[fx.Node]] = [[] for _ in range(len(self.links))]
        for node, i in self.chunk_of.items():
            out[i].append(node)
        return out


def _data_graph(graph: fx.Graph) -> nx.DiGraph:
    """What flows into what; lengths are no data."""
    g = nx.DiGraph()
    for n in graph.nodes:
        g.add_node(n)
        for i in n.all_input_nodes:
            if not isinstance(info(i).type, SymType):
                g.add_edge(i, n)
    return g


def _dominators(g: nx.DiGraph, source: fx.Node, target: fx.Node) -> list[fx.Node]:
    """Values on every path from source to target, in order, both included."""
    parents = nx.immediate_dominators(g, source)
    if target not in parents:
        return []
    chain = [target]
    while chain[-1] is not source:
        chain.append(parents[chain[-1]])
    return chain[::-1]


def _chain(program: Program) -> _Chain | None:
    """The residual stream: of the chains that cut most blocks apart, the one that feeds most."""
    g = _data_graph(program.graph)
    sources: dict[fx.Node, None] = {}
    for p in program.inputs:
        for n in (p, *p.users):
            if shape_of(n) is not None and op_name(n) not in ATTENTION:
                sources[n] = None
    best: _Chain | None = None
    score = (0, 0, 1)
    for target in program.output.all_input_nodes:
        for source in sources:
            links = _dominators(g, source, target)
            if len(links) < 2:
                continue
            found = _Chain(tuple(links), _chunks(program.graph, g, links))
            anchors = sum(_attends_itself(c, set(c)) for c in found.members())
            mine = (anchors, len(found.chunk_of), len(links))
            if mine > score:
                best, score = found, mine
    return best


def _chunks(graph: fx.Graph, g: nx.DiGraph, links: list[fx.Node]) -> dict[fx.Node, int]:
    """Chunk number of every call that the stream flows into: i lies behind link i."""
    place = {n: i for i, n in enumerate(links)}
    chunk_of: dict[fx.Node, int] = {}
    reached = nx.descendants(g, links[0])
    for n in graph.nodes:
        if n in reached and n.op == "call_function":
            chunk_of[n] = max(place.get(i, chunk_of.get(i, 0)) for i in n.all_input_nodes)
    return chunk_of


def _attends_itself(chunk: Sequence[fx.Node], inside: set[fx.Node]) -> bool:
    """Whether some attention here reads keys made from the stream (not from another encoder)."""
    return any(op_name(n) in WHOLE_ATTENTION and n.args[1] in inside for n in chunk)


def _is_residual(chunk: Sequence[fx.Node], start: fx.Node) -> bool:
    """Whether the stream goes round something here, which a norm or a head does not have."""
    return sum(start in n.all_input_nodes for n in chunk) > 1


def _starts(chain: _Chain, chunks: list[list[fx.Node]], labels: list[str]) -> tuple[list[int], int]:
    """First chunks of the blocks and the chunk after the last block; empty without blocks."""
    anchors = [i for i, c in enumerate(chunks) if _attends_itself(c, set(c))]
    if not anchors:
        return _period(labels)
    gaps = [tuple(labels[a:b]) for a, b in pairwise(anchors)]
    for back in range(min((len(x) for x in gaps), default=1)):
        if back > anchors[0]:
            break
        starts = [a - back for a in anchors]
        whole = {tuple(labels[a:b]) for a, b in pairwise(starts)}
        last = starts[-1]
        ends = [last + len(w) for w in whole if tuple(labels[last : last + len(w)]) == w]
        if ends:
            return starts, max(ends)
    # The last block is like no other (or the only one): it ends with its last residual chunk.
    residual = [
        i for i in range(anchors[-1], len(chunks)) if _is_residual(chunks[i], chain.links[i])
    ]
    return anchors, max([*residual, anchors[-1]]) + 1


def _period(labels: list[str]) -> tuple[list[int], int]:
    """Longest run of one repeated chunk sequence of at least one op that is not a lone link."""
    best: tuple[int, int, int] = (0, 0, 0)  # (covered, -period, -start)
    for period in range(1, len(labels) // 2 + 1):
        start = 0
        while start + 2 * period <= len(labels):
            count = 1
            while (
                labels[start : start + period]
                == labels[start + count * period : start + (count + 1) * period]
            ):
                count += 1
            if count > 1:
                best = max(best, (count * period, -period, -start))
                start += (count - 1) * period
            start += 1
    covered, period, start = best[0], -best[1], -best[2]
    if not covered:
        return [], 0
    return list(range(start, start + covered, period)), start + covered


def _place(program: Program) -> dict[fx.Node, int] | None:
    """Segment number of every node: 0 prologue, 1..n blocks, n+1 epilogue; None without blocks."""
    chain = _chain(program)
    if chain is None:
        return None
    chunks, free = chain.members(), constants(program.graph)
    labels = [chunk_label(c, chain.links[i], weights=free) for i, c in enumerate(chunks)]
    starts, end = _starts(chain, chunks, labels)
    if not starts:
        return None
    seg: dict[fx.Node, int] = {chain.links[0]: 0}
    for n, i in chain.chunk_of.items():
        seg[n] = len(starts) + 1 if i >= end else sum(i >= s for s in starts)
    fixed = len(starts) + 1
    for n in reversed(list(program.graph.nodes)):
        if n in seg:
            continue
        used = {seg[u] for u in n.users}
        if n.op == "output":
            seg[n] = fixed
        elif n.op == "placeholder":
            seg[n] = 0
        elif n in free:
            # A parameter, or what is made of parameters alone, lies with its first user.
            seg[n] = min(used, default=0)
        else:
            # Made from inputs beside the stream (rotary angles, masks, lengths).
            seg[n] = 0
    return seg


def _names(last: int) -> list[str]:
    return [PROLOGUE, *(f"block{i}" for i in range(last - 1)), EPILOGUE]


def segment(program: Program) -> list[Segment]:
    """Segments in a topological order; every node lies in exactly one.

    The nodes of one segment need not be contiguous in the graph yet, see :func:`apply_segments`.
    A graph without blocks is one segment named ``main``. ``live_in`` and ``live_out`` are exact:
    they name values (parameters and inputs too) that another segment defines, or reads.
    """
    seg = _place(program)
    nodes = list(program.graph.nodes)
    if seg is None:
        return [Segment(MAIN, tuple(n.name for n in nodes), (), ())]
    rank = {n: i for i, n in enumerate(nodes)}
    members: list[list[fx.Node]] = [[] for _ in range(max(seg.values()) + 1)]
    for n in nodes:
        members[seg[n]].append(n)
    names = _names(len(members) - 1)
    return [segment_of(name, mine, rank) for name, mine in zip(names, members, strict=True)]


def apply_segments(program: Program) -> list[Segment]:
    """Order the graph so that segments are contiguous, and record them in ``program.segments``."""
    program.segments = segment(program)
    by_name = {n.name: n for n in program.graph.nodes}
    previous: fx.Node | None = None
    for s in program.segments:
        for name in s.nodes:
            node = by_name[name]
            if previous is not None:
                previous.append(node)
            previous = node
    program.graph.lint()
    return program.segments


def segments_of(program: Program) -> list[Segment]:
    """The recorded segments, or fresh ones where the program has none."""
    return program.segments or segment(program)


def residual_stream(program: Program) -> list[str]:
    """Names of the values through which every path from the tokens to the output runs, in order."""
    chain = _chain(program)
    return [] if chain is None else [n.name for n in chain.links]


def is_block(name: str) -> bool:
    """Whether a segment's name is that of a repeated block."""
    return name not in (PROLOGUE, EPILOGUE, MAIN)


def block_classes(program: Program, *, attributes: bool = True) -> dict[str, int]:
    """Isomorphism class of each block, numbered in order of appearance.

    With ``attributes`` two blocks of one class run the same code on other weights (ops, attributes,
    shapes, dtypes and data flow are equal); without, only ops and data flow are.
    """
    by_name = {n.name: n for n in program.graph.nodes}
    known: dict[str, int] = {}
    out = {}
    for s in segments_of(program):
        if is_block(s.name):
            label = chunk_label([by_name[n] for n in s.nodes], None, attributes=attributes)
            out[s.name] = known.setdefault(label, len(known))
    return out
