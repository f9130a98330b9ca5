"""Node names that are exactly as wanted; ``torch.fx`` would change a name such as ``slice``."""

from __future__ import annotations

import keyword
from collections.abc import Mapping

from torch import fx


def set_name(node: fx.Node, name: str) -> None:
    """Rename one node; the graph's table learns the name, so that later nodes get others."""
    if node.name != name:
        node.name = name
        node.graph._graph_namespace._rename_object(node, name)


def set_names(graph: fx.Graph, names: Mapping[fx.Node, str]) -> None:
    """Rename many nodes at once, swaps included, and rebuild the graph's table of names."""
    for node, name in names.items():
        node.name = name
    fresh = fx.graph._Namespace()
    for node in graph.nodes:
        fresh.associate_name_with_obj(node.name, node)
        fresh._rename_object(node, node.name)
    graph._graph_namespace = fresh


def is_name(text: str) -> bool:
    """Whether a node can have this name in Python source."""
    return text.isidentifier() and text.isascii() and not keyword.iskeyword(text)
