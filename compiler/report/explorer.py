"""Graphs as JSON for Model Explorer (ai-edge-model-explorer): one collection, a graph per pass.

A node's namespace is its segment and then its module path, so that layers fold. Parameters are
nodes of their own, with stored dtype and bytes.
"""

from __future__ import annotations

import json
from collections.abc import Collection, Iterable
from typing import Any

from torch import fx

from ..ir.graph import Program, info
from ..ir.literals import show_value_type
from .nodes import Row, node_row, segment_map

# Fields of a node's row that the side panel shows.
_SHOWN = ("text", "dtype", "bytes", "made_by", "path", "source")


def explorer_json(
    label: str, graphs: Iterable[tuple[str, Program]], names: Collection[str] | None = None
) -> str:
    """A collection called ``label`` of (id, program); with ``names``, of those nodes alone."""
    wanted = None if names is None else set(names)
    found = [{"id": name, "nodes": _nodes(program, wanted)} for name, program in graphs]
    return json.dumps({"label": label, "graphs": found}, ensure_ascii=False)


def _nodes(program: Program, wanted: set[str] | None) -> list[dict[str, Any]]:
    places = segment_map(program)
    return [
        _node(program, node, places.get(node.name, ""), wanted)
        for node in program.graph.nodes
        if wanted is None or node.name in wanted
    ]


def _node(program: Program, node: fx.Node, segment: str, wanted: set[str] | None) -> dict[str, Any]:
    row = node_row(program, node, segment)
    kind = show_value_type(info(node).type)
    return {
        "id": node.name,
        "label": _label(program, node, row),
        "namespace": "/".join(filter(None, (segment, *row["path"].split(".")))),
        "attrs": [
            {"key": key, "value": str(row[key])}
            for key in _SHOWN
            if row[key] not in (None, "")
        ],
        "incomingEdges": [
            {"sourceNodeId": source.name, "sourceNodeOutputId": "0", "targetNodeInputId": str(i)}
            for i, source in enumerate(node.all_input_nodes)
            if wanted is None or source.name in wanted
        ],
        "outputsMetadata": [{"id": "0", "attrs": [{"key": "tensor_shape", "value": kind}]}],
    }  # fmt: skip


def _label(program: Program, node: fx.Node, row: Row) -> str:
    """The op, a parameter's name, or an input's."""
    param = program.param_of(node)
    if param is not None:
        return param.names[0] if param.names else param.name
    return str(row["op"]) if node.op == "call_function" else node.name
