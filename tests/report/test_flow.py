"""Pictures of data flow and blocks that are told once: nothing is lost, values flow down."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING
from xml.etree import ElementTree

import pytest

from llmc.compiler.ir.types import SymType
from llmc.compiler.report.blocks import views
from llmc.compiler.report.flow import alone, dot, flow, picture

if TYPE_CHECKING:
    from collections.abc import Callable

    from llmc.compiler.ir.graph import Program


@pytest.fixture(scope="module")
def pair(made: Callable[[str], Path]) -> tuple[Program, Program]:
    """The captured graph of the joint recipe and its last one."""
    from llmc.compiler.runtime import artefact

    found = artefact.load(made("smooth,w4:group=16,prune24"))
    return found.graph(found.graphs[0]), found.graph(found.graphs[-1])


def drawn_names(program: Program) -> set[str]:
    return {
        n.name for n in program.graph.nodes
        if n.op not in ("get_attr", "output") and not isinstance(n.meta["llmc"].type, SymType)
    }  # fmt: skip


@pytest.mark.parametrize("side", [0, 1])
def test_values_flow_down(pair: tuple[Program, Program], side: int) -> None:
    """Each call has one place, below all that it reads; every read between calls is an edge."""
    program = pair[side]
    found = flow(program, [n.name for n in program.graph.nodes])
    places = [name for layer in found.layers for name in layer]
    assert sorted(places) == sorted(drawn_names(program))
    level = {name: i for i, layer in enumerate(found.layers) for name in layer}
    reads = {
        (i.name, n.name) for n in program.graph.nodes for i in n.all_input_nodes
        if i.name in level and n.name in level
    }  # fmt: skip
    assert set(found.edges) == reads
    assert all(level[a] < level[b] for a, b in found.edges)


def test_decoding_stands_above_its_reader(pair: tuple[Program, Program]) -> None:
    """A weight's decoding ends right above the linear that reads it."""
    program = pair[1]
    found = flow(program, [n.name for n in program.graph.nodes])
    level = {name: i for i, layer in enumerate(found.layers) for name in layer}
    linears = [n for n in program.calls("aten.linear.default") if n.args[1].op == "call_function"]
    assert len(linears) == 14
    assert all(level[n.name] - level[n.args[1].name] == 1 for n in linears)


def test_a_picture_draws_every_call_and_edge(pair: tuple[Program, Program]) -> None:
    """One box per call, one curve per edge, all inside the frame; the DOT text has the same."""
    program = pair[1]
    found = flow(program, [n.name for n in program.graph.nodes])
    root = ElementTree.fromstring(alone(picture(found, "<&>")))
    space = "{http://www.w3.org/2000/svg}"
    boxes = list(root.iter(f"{space}rect"))
    assert len(boxes) == len(drawn_names(program))
    assert len(list(root.iter(f"{space}path"))) == len(found.edges)
    width, height = float(root.get("width", "")), float(root.get("height", ""))
    for b in boxes:
        assert 0 <= float(b.get("x", "")) <= width - float(b.get("width", ""))
        assert 0 <= float(b.get("y", "")) <= height - float(b.get("height", ""))
    assert root.get("aria-label") == "<&>"
    assert dot(found).count(" -> ") == len(found.edges)


def test_views_cover_both_graphs(pair: tuple[Program, Program]) -> None:
    """Each node of each graph is in one view or in a block like one, and alike blocks are found."""
    found = views(*pair)
    assert [(v.segment, v.alike) for v in found if v.alike] == [("block0", ("block1",))]
    for side, program in enumerate(pair):
        told = sum(len(v.names(bool(side))) * (1 + len(v.alike)) for v in found)
        assert told == len(program.graph.nodes)
    stored = [sum(v.bytes[i] * (1 + len(v.alike)) for v in found) for i in (0, 1)]
    assert stored == [p.weight_bytes() for p in pair]


def test_an_unchanged_graph_has_no_changes(pair: tuple[Program, Program]) -> None:
    """A graph beside itself: the same blocks, nothing changed."""
    found = views(pair[0], pair[0])
    assert [v.changed for v in found] == [0] * len(found)
    assert len(found) == 3
