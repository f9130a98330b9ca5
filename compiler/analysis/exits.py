"""Where a program can be left early: between blocks, where nothing but the residual stream flows.

A token may leave behind a block if the head can read the stream there instead of at the end, and if
every later block can be given that stream too, so that its keys and values are made from it.
"""

from __future__ import annotations

from torch import fx

from ..ir.graph import Program, info
from ..ir.refusal import Refusal
from ..ir.types import same_type, show_type
from .blocks import EPILOGUE, PROLOGUE
from .depth import Span, spans

_BY = "exits"


def exit_spans(program: Program) -> list[Span] | Refusal:
    """All blocks of a segmented program in order, or why none may be left early."""
    found = spans(program)
    names = [s.name for s in program.segments]
    if not found or names != [PROLOGUE, *(s.block for s in found), EPILOGUE]:
        why = f"expected blocks on one residual stream between prologue and epilogue, found {names}"
        return _refusal(program.output, "has_blocks", why)
    home = {program.node(n): s.name for s in program.segments for n in s.nodes}
    before = [None, *(program.node(s.leaves) for s in found)]
    for name, stream in zip(names[1:], before, strict=True):
        for node in _reads(program, name, home):
            if node is not stream and node.op == "call_function" and home[node] != PROLOGUE:
                why = f"{name} reads it from {home[node]}, where a token may have left before"
                return _refusal(node, "stream_alone", why)
    first = info(program.node(found[0].enters)).type
    for span in found:
        node = program.node(span.leaves)
        if not same_type(first, info(node).type):
            why = f"the stream is {show_type(first)} at first and {show_type(info(node).type)} here"
            return _refusal(node, "shape_kept", why)
    return found


def head_nodes(program: Program) -> list[fx.Node]:
    """Calls of the epilogue that make the first output, the logits, in order."""
    mine = [program.node(n) for n in program.segments[-1].nodes]
    needed = set(program.output.all_input_nodes[:1])
    for node in reversed(mine):
        if node in needed:
            needed.update(node.all_input_nodes)
    return [n for n in mine if n in needed and n.op == "call_function"]


def _reads(program: Program, name: str, home: dict[fx.Node, str]) -> list[fx.Node]:
    """Values of other segments that a segment reads; of the epilogue, what the head reads."""
    if name == EPILOGUE:
        nodes = head_nodes(program)
    else:
        nodes = [n for n, segment in home.items() if segment == name]
    return [*dict.fromkeys(i for n in nodes for i in n.all_input_nodes if home[i] != name)]


def _refusal(node: fx.Node, predicate: str, why: str) -> Refusal:
    return Refusal(_BY, node.name, why, predicate, info(node).path)
