"""A lowered program as a plain torch module of registered ops: to export, compile or pack it."""

from __future__ import annotations

from typing import Any

import torch
from torch import fx

from ..compiler.ir.errors import UsageError
from ..compiler.ir.graph import Program
from ..compiler.ir.ops import row_of
from .cpu.products import plain
from .mixture.place import MixtureCall
from .placed import Implementation
from .targets import Lowered


def as_module(lowered: Lowered, *, device: torch.device | str = "cpu") -> fx.GraphModule:
    """Every call is a registered op with a fake kernel; parameters are buffers.

    Its inputs are those of the program, in order; its result is the program's.
    Raises:
        UsageError: a program with state, which lives outside of a graph.
    """
    program = lowered.program
    if program.states:
        raise UsageError(
            f"expected a program without state, found {len(program.states)} caches",
            hint="lower it without a KV cache",
        )
    root, graph = torch.nn.Module(), fx.Graph()
    nodes: dict[fx.Node, fx.Node] = {}
    for node in program.graph.nodes:
        if node.op == "get_attr":
            name = f"w{len(nodes)}"
            root.register_buffer(name, _value(program, node).to(device))
            nodes[node] = graph.get_attr(name)
            continue
        new = graph.node_copy(node, lambda n: nodes[n])
        new.meta = {}
        made = lowered.implementations.get(node.name)
        if isinstance(made, (Implementation, MixtureCall)):
            new.target = made.op
            new.args, new.kwargs = made.as_op(new.args[0])  # type: ignore[arg-type]
        elif node.op == "call_function":
            new.target = row_of(node).target
            if "device" in new.kwargs:
                new.kwargs = {**new.kwargs, "device": torch.device(device)}
        nodes[node] = new
    return fx.GraphModule(root, graph)


def _value(program: Program, node: fx.Node) -> Any:
    return plain(program.fetch(str(node.target)))
