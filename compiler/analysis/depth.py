"""Blocks as units of depth: the stream before and after each, and leaving some of them out.

A block is left out by letting whoever reads the stream behind it read the stream before it. That is
sound where nothing else that the block makes from the stream is read elsewhere.
"""

from __future__ import annotations

from collections.abc import Collection
from dataclasses import dataclass

import networkx as nx
from torch import fx

from ..ir.errors import ModelError
from ..ir.graph import Program, Segment, info
from ..ir.refusal import Refusal
from ..ir.types import same_type, show_type
from .blocks import is_block, residual_stream, segments_of

_BY = "depth"


@dataclass(frozen=True)
class Span:
    """One block on the residual stream.

    Attributes:
        block: name of the segment; index: its place among the blocks.
        enters, leaves: names of the stream's values before and behind the block.
    """

    block: str
    index: int
    enters: str
    leaves: str

    @property
    def id(self) -> str:
        return self.block

    @property
    def kind(self) -> str:
        return "block"

    @property
    def segment(self) -> str:
        return self.block

    @property
    def node(self) -> str:
        """Where a refusal points."""
        return self.leaves


def spans(program: Program) -> list[Span]:
    """The blocks of a segmented program in order; empty where it has none."""
    links = residual_stream(program)
    owner = {n: s.name for s in segments_of(program) for n in s.nodes}
    last: dict[str, str] = {}
    for name in links:
        last[owner[name]] = name
    out: list[Span] = []
    before = ""
    for segment in segments_of(program):
        leaves = last.get(segment.name, "")
        if is_block(segment.name) and before and leaves:
            out.append(Span(segment.name, len(out), before, leaves))
        before = leaves or before
    return out


def depth_sites(program: Program) -> list[Span | Refusal]:
    """Blocks that may be left out, and those that may not, with the node that forbids it."""
    out: list[Span | Refusal] = []
    found = spans(program)
    if not found:
        why = "the program has no repeated blocks on one residual stream"
        return [Refusal(_BY, program.output.name, why, "has_blocks")]
    for span in found:
        out.append(_refusal(program, span) or span)
    return out


def _refusal(program: Program, span: Span) -> Refusal | None:
    return _other_way_out(program, span) or _shape_kept(program, span)


def _other_way_out(program: Program, span: Span) -> Refusal | None:
    """A value, other than the stream, that the block makes from the stream for others to read."""
    segment = segment_named(program, span.block)
    made = nx.descendants(_flow(program, segment, span.enters), span.enters)
    for name in segment.live_out:
        if name == span.leaves or name not in made:
            continue
        node = program.node(name)
        reader = next(u.name for u in node.users if u.name not in segment.nodes)
        why = f"{reader} reads {name}, which {span.block} makes beside the stream"
        return Refusal(_BY, name, why, "one_way_out", info(node).path)
    return None


def beside(program: Program, span: Span) -> list[fx.Node]:
    """The block's nodes that others need though it is left out (shared weights), in order."""
    segment = segment_named(program, span.block)
    wanted = [n for n in segment.live_out if n != span.leaves]
    flow = _flow(program, segment, span.enters)
    needed = set(wanted).union(*(nx.ancestors(flow, n) for n in wanted))
    return [program.node(n) for n in segment.nodes if n in needed]


def segment_named(program: Program, name: str) -> Segment:
    """The segment of that name."""
    return next(s for s in segments_of(program) if s.name == name)


def _flow(program: Program, segment: Segment, enters: str) -> nx.DiGraph:
    """What flows into what inside a segment, by name."""
    flow = nx.DiGraph()
    flow.add_nodes_from((enters, *segment.nodes))
    for name in segment.nodes:
        flow.add_edges_from((i.name, name) for i in program.node(name).all_input_nodes)
    return flow


def _shape_kept(program: Program, span: Span) -> Refusal | None:
    before, after = (info(program.node(n)).type for n in (span.enters, span.leaves))
    if same_type(before, after):
        return None
    why = f"the stream is {show_type(before)} before the block and {show_type(after)} behind it"
    return Refusal(_BY, span.leaves, why, "shape_kept", info(program.node(span.leaves)).path)


def leave_out(program: Program, blocks: Collection[str]) -> list[str]:
    """Take blocks out of a segmented program, in place; its segments are to be made anew.

    Returns:
        Names of the parameters that nothing reads any more; they are gone.
    Raises:
        ModelError: a block that is not there or may not be left out; the node is named.
    """
    stands: dict[fx.Node, fx.Node] = {}
    found = {s.block: s for s in spans(program) if s.block in set(blocks)}
    missing = sorted(set(blocks) - set(found))
    if missing:
        raise ModelError(f"expected blocks of the program, found {missing[0]!r}")
    for span in found.values():
        refused = _refusal(program, span)
        if refused is not None:
            raise ModelError(f"expected a block that may be left out, found {refused.reason}",
                             where=f"node {refused.node}")  # fmt: skip
        enters, leaves = program.node(span.enters), program.node(span.leaves)
        stands[leaves] = stands.get(enters, enters)
    before = set(program.params)
    for leaves, enters in stands.items():
        leaves.replace_all_uses_with(enters)
    program.prune()
    program.segments = []
    return sorted(before - set(program.params))


def own_bytes(program: Program) -> dict[str, int]:
    """Stored bytes that go with each block: of the parameters that nothing else reads."""
    home = {n: s.name for s in segments_of(program) for n in s.nodes}
    out = dict.fromkeys((s.block for s in spans(program)), 0)
    for node in program.graph.nodes:
        param = program.param_of(node)
        places = {home[u.name] for u in node.users}
        if param is not None and len(places) == 1 and (block := places.pop()) in out:
            out[block] += param.bytes
    return out
