"""Dependency groups: parameter axes that must be cut, scaled or permuted together."""

from __future__ import annotations

import networkx as nx

from .dimensions import Dimensions


def parameter_groups(dimensions: Dimensions) -> nx.Graph:
    """Graph whose nodes are (parameter name, axis); its connected components are the groups.

    Axes of one class are joined by an edge ``kind="same"``, axes of classes that a relation ties by
    an edge of that relation's kind. Each node carries ``size``, ``dim`` (the class id) and
    ``blocked`` (why its class may not be cut, empty where nothing forbids it).
    """
    g = nx.Graph()
    first: dict[int, tuple[str, int]] = {}
    for c in dimensions.classes:
        if c.kind != "channel":
            continue
        for p in c.params:
            g.add_node(p, size=c.size, dim=c.id, blocked=c.blocked)
            if c.id in first:
                g.add_edge(first[c.id], p, kind="same")
            first.setdefault(c.id, p)
    # Classes without a parameter link their neighbours, so relations are followed class by class.
    links = nx.Graph()
    for r in dimensions.relations:
        links.add_edges_from((a, b, {"kind": r.kind}) for a in r.ins for b in r.outs)
    for part in nx.connected_components(links):
        named = [first[c] for c in sorted(part) if c in first]
        kinds = sorted({d["kind"] for _, _, d in links.subgraph(part).edges(data=True)})
        for other in named[1:]:
            g.add_edge(named[0], other, kind="+".join(kinds))
    return g
