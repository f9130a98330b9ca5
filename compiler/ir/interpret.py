"""Running a program's nodes with torch: the reference meaning of a graph.

Aten ops run as themselves, llmc ops as their row's reference, so autograd flows through everything.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping
from typing import Any

import torch
from torch import fx

from .errors import ModelError
from .graph import Program
from .ops import row_of

Fetch = Callable[[str], torch.Tensor]
Observe = Callable[[fx.Node, Any], None]


def run_nodes(
    nodes: Iterable[fx.Node],
    env: dict[fx.Node, Any],
    fetch: Fetch,
    *,
    states: Mapping[str, Any] | None = None,
    implementations: Mapping[str, Callable[..., Any]] | None = None,
    observe: Observe | None = None,
    keep: Iterable[fx.Node] | None = None,
) -> dict[fx.Node, Any]:
    """Run nodes in order, extending ``env``; a value is dropped after its last use here.

    Args:
        nodes: in topological order; placeholders among them must be in ``env`` already.
        env: values of nodes that lie before.
        fetch: gives a parameter's tensor by name.
        states: objects for the ops that name a state.
        implementations: replacement callables by node name (how a target lowers a node).
        observe: called with (node, value) right after each node ran.
        keep: values to keep; None keeps everything.
    """
    nodes = list(nodes)
    last = _last_uses(nodes, set(keep)) if keep is not None else {}
    for node in nodes:
        if node.op == "placeholder":
            if node not in env:
                raise ModelError(f"expected a value for input {node.name!r}, found none")
        elif node.op == "get_attr":
            env[node] = fetch(str(node.target))
        elif node.op == "call_function":
            args = fx.map_arg(node.args, lambda n: env[n])
            kwargs = dict(fx.map_arg(node.kwargs, lambda n: env[n]))
            row = row_of(node)
            if row.stateful:
                kwargs["state"] = (states or {})[str(kwargs["state"])]
            call = (implementations or {}).get(node.name, row.reference)
            env[node] = call(*args, **kwargs)
        if observe is not None and node.op != "output":
            observe(node, env[node])
        for dead in last.get(node, ()):
            env.pop(dead, None)
    return env


def _last_uses(nodes: list[fx.Node], keep: set[fx.Node]) -> dict[fx.Node, list[fx.Node]]:
    last: dict[fx.Node, fx.Node] = {}
    for node in nodes:
        last[node] = node
        for used in node.all_input_nodes:
            last[used] = node
    out: dict[fx.Node, list[fx.Node]] = {}
    for value, at in last.items():
        if value not in keep and value.op != "placeholder":
            out.setdefault(at, []).append(value)
    return out


def run(
    program: Program,
    inputs: Mapping[str, torch.Tensor],
    *,
    fetch: Fetch | None = None,
    states: Mapping[str, Any] | None = None,
    implementations: Mapping[str, Callable[..., Any]] | None = None,
    observe: Observe | None = None,
) -> Any:
    """The program's output for named inputs.

    Raises:
        ModelError: an input is missing or unknown.
    """
    known = {n.name: n for n in program.inputs}
    unknown = sorted(set(inputs) - set(known))
    if unknown:
        raise ModelError(f"expected inputs {sorted(known)}, found {unknown}")
    env: dict[fx.Node, Any] = {known[k]: v for k, v in inputs.items()}
    out = program.output
    needed = [n for n in program.graph.nodes if n.op != "output"]
    run_nodes(
        needed, env, fetch or program.fetch, states=states, implementations=implementations,
        observe=observe, keep=out.all_input_nodes,
    )  # fmt: skip
    return fx.map_arg(out.args[0], lambda n: env[n])
