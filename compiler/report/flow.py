"""A picture of a graph's data flow: DOT text for Graphviz, or an SVG with a layout of its own.

A box is a call with its type and the bytes of the parameters that it reads; values flow down. What
is computed from parameters alone, such as the decoding of a weight, stands right above its reader.
"""

from __future__ import annotations

from collections.abc import Collection, Sequence
from dataclasses import dataclass

from markupsafe import Markup
from torch import fx

from ..ir.graph import Program, info
from ..ir.literals import show_value_type
from ..ir.types import SymType
from .markup import box, num, svg, tag, text
from .nodes import op_of
from .text import size

MOST = 160
"""Calls that fit into one picture."""
_WIDE, _TALL, _GAP, _DROP, _PAD = 164.0, 36.0, 12.0, 20.0, 10.0


@dataclass(frozen=True)
class Flow:
    """Calls in layers.

    Attributes:
        layers: names by layer, from the top, in the order in which they are drawn.
        edges: (name of the value, name of its reader), both drawn.
        labels: two lines of each box; the first is the op.
        stores: calls that read parameters.
    """

    layers: tuple[tuple[str, ...], ...]
    edges: tuple[tuple[str, str], ...]
    labels: dict[str, tuple[str, str]]
    stores: frozenset[str]


def flow(program: Program, names: Collection[str]) -> Flow:
    """The calls among ``names`` and what flows between them; lengths are left out."""
    wanted = set(names)
    calls = [
        n for n in program.graph.nodes
        if n.name in wanted and n.op not in ("get_attr", "output")
        and not isinstance(info(n).type, SymType)
    ]  # fmt: skip
    shown = set(calls)
    reads = {n: [i for i in n.all_input_nodes if i in shown] for n in calls}
    edges = tuple((i.name, n.name) for n in calls for i in reads[n])
    labels, stores = {}, set()
    for n in calls:
        params = [p for i in n.all_input_nodes if (p := program.param_of(i)) is not None]
        kept = f" · {size(sum(p.bytes for p in params))}" if params else ""
        labels[n.name] = (op_of(n), f"{show_value_type(info(n).type)}{kept}")
        if params:
            stores.add(n.name)
    return Flow(_ordered(_layers(calls, reads), reads), edges, labels, frozenset(stores))


def _layers(calls: Sequence[fx.Node], reads: dict[fx.Node, list[fx.Node]]) -> list[list[fx.Node]]:
    """Each call below all that it reads; constants and sources as low as their readers allow."""
    depth: dict[fx.Node, int] = {}
    known: dict[fx.Node, bool] = {}
    for n in calls:
        depth[n] = 1 + max((depth[i] for i in reads[n]), default=-1)
    users: dict[fx.Node, list[fx.Node]] = {}
    for n in calls:
        for i in reads[n]:
            users.setdefault(i, []).append(n)
    for n in reversed(calls):
        if n in users and (not reads[n] or _constant(n, known)):
            depth[n] = min(depth[u] for u in users[n]) - 1
    out: list[list[fx.Node]] = [[] for _ in range(max(depth.values(), default=-1) + 1)]
    for n in calls:
        out[depth[n]].append(n)
    return [layer for layer in out if layer]


def _constant(node: fx.Node, known: dict[fx.Node, bool]) -> bool:
    """Whether a value follows from parameters alone."""
    if node not in known:
        known[node] = node.op == "get_attr" or (
            node.op == "call_function" and bool(node.all_input_nodes)
            and all(_constant(i, known) for i in node.all_input_nodes)
        )  # fmt: skip
    return known[node]


def _ordered(
    layers: list[list[fx.Node]], reads: dict[fx.Node, list[fx.Node]]
) -> tuple[tuple[str, ...], ...]:
    """Neighbours near each other: each layer sorted by the mean place of what it touches."""
    users: dict[fx.Node, list[fx.Node]] = {}
    for n, mine in reads.items():
        for i in mine:
            users.setdefault(i, []).append(n)
    place = {n: float(i) for layer in layers for i, n in enumerate(layer)}
    for sweep in range(4):
        down = sweep % 2 == 0
        for layer in layers if down else reversed(layers):
            near = reads if down else users
            means = {
                n: sum(place[i] for i in found) / len(found) if (found := near.get(n, ())) else
                place[n] for n in layer
            }  # fmt: skip
            layer.sort(key=lambda n: means[n])
            for at, n in enumerate(layer):
                place[n] = at - (len(layer) - 1) / 2
    return tuple(tuple(n.name for n in layer) for layer in layers)


def picture(found: Flow, label: str) -> Markup:
    """The flow as one SVG, coloured by the page's style sheet."""
    wide = max((len(layer) for layer in found.layers), default=1) * (_WIDE + _GAP)
    place: dict[str, tuple[float, float]] = {}
    for i, layer in enumerate(found.layers):
        left = _PAD + (wide - len(layer) * (_WIDE + _GAP) + _GAP) / 2
        for j, name in enumerate(layer):
            place[name] = (left + j * (_WIDE + _GAP), _PAD + i * (_TALL + _DROP))
    level = {name: i for i, layer in enumerate(found.layers) for name in layer}
    right = wide + _PAD
    drawn: list[Markup] = []
    for a, b in found.edges:
        x0, y0 = place[a][0] + _WIDE / 2, place[a][1] + _TALL
        x1, y1 = place[b][0] + _WIDE / 2, place[b][1]
        passed = [place[n][0] for layer in found.layers[level[a] + 1 : level[b]] for n in layer]
        beside = 0.0
        if any(x <= (x0 + x1) / 2 <= x + _WIDE for x in passed):
            # Around the boxes in between: a curve reaches three quarters of the way to its handles.
            beside = (max(passed) + _WIDE + _GAP - max(x0, x1)) / 0.75
            right = max(right, max(x0, x1) + beside * 0.75 + _GAP)
        bend = max(_DROP * 0.6, (y1 - y0) * (0.15 if beside else 0.4))
        drawn.append(tag("path", class_="edge", d=(
            f"M{num(x0)},{num(y0)}C{num(x0 + beside)},{num(y0 + bend)} "
            f"{num(x1 + beside)},{num(y1 - bend)} {num(x1)},{num(y1)}"
        )))  # fmt: skip
    for name, (x, y) in place.items():
        op, kind = found.labels[name]
        stored = "node stored" if name in found.stores else "node"
        drawn += [
            box(x, y, _WIDE, _TALL, tag("title", f"{name}: {op} {kind}"), class_=stored, rx=5),
            text(x + 8, y + 15, _fit(op), class_="op"),
            text(x + 8, y + 29, _fit(kind), class_="kind"),
        ]
    tall = _PAD * 2 + len(found.layers) * (_TALL + _DROP) - _DROP
    return svg(right + _PAD, tall, label, *drawn, class_="plot flow")


def _fit(content: str, most: int = 27) -> str:
    return content if len(content) <= most else content[: most - 1] + "…"


def alone(drawn: Markup) -> str:
    """A picture as a file of its own: the name space and light colours."""
    style = tag("style", (
        ".node{fill:#fff;stroke:#666}.stored{fill:#dceafa}.edge{fill:none;stroke:#999}"
        "text{font:11px sans-serif}.op{font-weight:bold}"
    ))  # fmt: skip
    head, _, rest = drawn.partition(">")
    return f'{head} xmlns="http://www.w3.org/2000/svg">{style}{rest}\n'


def dot(found: Flow) -> str:
    """The flow as a Graphviz graph."""
    lines = ["digraph program {", "  node [shape=box style=rounded fontsize=10];"]
    for layer in found.layers:
        for name in layer:
            label = _quoted("\n".join(found.labels[name]))
            filled = ' style="rounded,filled" fillcolor="#dceafa"' if name in found.stores else ""
            lines.append(f"  {_quoted(name)} [label={label}{filled}];")
    lines += [f"  {_quoted(a)} -> {_quoted(b)};" for a, b in found.edges]
    return "\n".join([*lines, "}"]) + "\n"


def _quoted(content: str) -> str:
    escaped = content.replace("\\", "\\\\").replace('"', '\\"').replace("\n", "\\n")
    return f'"{escaped}"'
