"""A program as one of torch.export, in plain aten ops: it knows llmc no more.

Weights stay as they are stored, codes among them; what decodes them is part of the graph.
"""

from __future__ import annotations

import logging
import warnings
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import fx

from ...ir.errors import GateError, UsageError
from ...ir.graph import Program
from ...ir.interpret import run
from ...ir.ops import ROWS

# The largest difference of a logit, as a share of the largest: other compilers sum in other orders.
TOLERANCE = 1e-4
_EXAMPLE = (2, 16)
_FRESH = (3, 11)
_MOST_ROWS = 1024

Instead = Callable[[fx.Graph, torch.nn.Module, fx.Node, dict[fx.Node, fx.Node]], fx.Node | None]
"""What stands for a node of the program in the new graph; None for a copy of it."""


def module_of(program: Program, instead: Instead | None = None) -> fx.GraphModule:
    """The program's graph over buffers; only those that are read are there."""
    root, graph = torch.nn.Module(), fx.Graph()
    made: dict[fx.Node, fx.Node] = {}
    for node in program.graph.nodes:
        if node.op == "get_attr":
            # Fetched in order of use, one at a time.
            name = f"w{len(made)}"
            root.register_buffer(name, program.fetch(str(node.target)))
            made[node] = graph.get_attr(name)
            continue
        new = instead(graph, root, node, made) if instead is not None else None
        if new is None:
            new = graph.node_copy(node, lambda n: made[n])
            new.meta = {}
        made[node] = new
    graph.eliminate_dead_code()
    read = {n.target for n in graph.find_nodes(op="get_attr")}
    for name in [n for n, _ in root.named_buffers() if n not in read]:
        delattr(root, name)
    return fx.GraphModule(root, graph)


def exported(program: Program, instead: Instead | None = None) -> Any:
    """torch.export's program of it: batch and length are free, ops of llmc decomposed.

    Raises:
        UsageError: a program with state, or one that torch.export refuses.
    """
    from torch._dynamo.exc import UserError

    if program.states:
        raise UsageError("expected a program without a KV cache, found one")
    module = module_of(program, instead)
    rows, length = (torch.export.Dim(n, min=1, max=m) for n, m in (
        ("batch", _MOST_ROWS), ("length", _longest(program))))  # fmt: skip
    shapes = tuple({0: rows, 1: length} for _ in program.inputs)
    table = {r.target: r.reference for name, r in ROWS.items()
             if name.startswith("llmc.") and not r.stateful}  # fmt: skip
    given = tuple(example(program, *_EXAMPLE).values())
    with quiet(), torch.no_grad():
        try:
            made = torch.export.export(module, given, dynamic_shapes=shapes, strict=False)
            return made.run_decompositions(table)
        except (UserError, RuntimeError, ValueError) as error:
            text = " ".join(str(error).split())[:200]
            raise UsageError(f"expected a graph that torch.export takes, found {text}") from error


def _longest(program: Program) -> int:
    context = program.facts.get("context")
    return context if isinstance(context, int) and context > 1 else 1 << 20


def example(program: Program, rows: int, length: int) -> dict[str, torch.Tensor]:
    """Random token ids of that shape, with positions and a mask without padding, by input."""
    vocab = program.facts.get("vocab")
    top = vocab if isinstance(vocab, int) else 2
    g = torch.Generator().manual_seed(rows)
    whole = {
        "input_ids": torch.randint(top, (rows, length), generator=g),
        "position_ids": torch.arange(length).expand(rows, -1).contiguous(),
        "attention_mask": torch.ones(rows, length, dtype=torch.bool),
    }
    return {n.name: whole[n.name] for n in program.inputs}


def compare(program: Program, model: Callable[[dict[str, torch.Tensor]], torch.Tensor]) -> float:
    """The largest difference of a logit, as a share of the largest one, on a shape of its own.

    Raises:
        GateError: it is more than :data:`TOLERANCE`.
    """
    inputs = example(program, *_FRESH)
    with torch.no_grad():
        want, have = run(program, inputs), model(inputs)
    if tuple(have.shape) != tuple(want.shape):
        raise GateError(f"expected logits {list(want.shape)}, found {list(have.shape)}")
    apart = float((have.float() - want).abs().max() / want.abs().max().clamp(min=1e-30))
    if not apart <= TOLERANCE:
        raise GateError(f"expected logits within {TOLERANCE:g} of the largest, found {apart:.3g}")
    return apart


@contextmanager
def quiet(*loggers: str) -> Iterator[None]:
    """Without what torch's own modules warn about themselves, by warnings and by loggers' names."""
    before = [(log, log.level) for log in map(logging.getLogger, loggers)]
    for log, _ in before:
        log.setLevel(logging.ERROR)
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            yield
    finally:
        for log, level in before:
            log.setLevel(level)
