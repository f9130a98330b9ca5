"""Stacked weights of experts between factors that all of them share: measured, solved, rewritten.

W_e ≈ left · core_e · right. What stands before the experts or behind them is a linear of its own,
once per token: gate_up's right factor on what they read, down's left one on their weighted sum,
exactly, as both are linear there. gate_up's left and down's right factor lie on either side of the
nonlinearity, so the call itself multiplies by them, for each chosen expert. Cores are stacked
weights like those that they replace, and the passes behind meet them as such.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import replace
from functools import partial
from typing import Any

import torch
from torch import Tensor, fx

from ..analysis.linears import ExpertSite
from ..ir.errors import ModelError
from ..ir.events import Event, Listener, silent
from ..ir.graph import Param, Program, info
from ..ir.ops import infer
from ..ir.ops.semantic import experts
from ..solvers.factor import Root, identity, whitening
from ..solvers.tucker import Sizes, Stack
from .compensate import free_name
from .measure import Options, Walk, batches, check_finite
from .statistics import WideGram

WEIGHTS = ("gate_up", "down")
PARTS = ("core", "mix", "left", "right")
"""Ends of the names of the parts of a stack."""


def stacks(site: ExpertSite) -> dict[str, tuple[str, tuple[int, int, int]]]:
    """Parameter and shape [E, R, C] of both weights, by name."""
    e = site.experts
    return {"gate_up": (site.gate_up, (e, *site.into)), "down": (site.down, (e, *site.back))}


def part_name(program: Program, param: str, part: str) -> str:
    """Name of a part of a stack."""
    return free_name(program, f"{param}_{part}")


def shapes(sizes: Sizes) -> dict[str, tuple[int, ...]]:
    """Shapes of the parts as they are stored; the core of mixed matrices is a matrix."""
    (e, rows, columns), (q, r, s) = sizes.stack, sizes.ranks
    mixes, left, right = sizes.cut
    found: dict[str, tuple[int, ...]] = {"core": (q, r * s) if mixes else (q, r, s)}
    found |= {"mix": (e, q)} if mixes else {}
    found |= {"left": (rows, r)} if left else {}
    return found | ({"right": (s, columns)} if right else {})


def stored(made: Stack, sizes: Sizes, dtype: torch.dtype, where: str) -> dict[str, Tensor]:
    """Tensors of the parts, in ``dtype``.

    Raises:
        ModelError: one that is not finite there.
    """
    out = {}
    for part, shape in shapes(sizes).items():
        tensor = getattr(made, part).reshape(shape).to(dtype).contiguous().cpu()
        if not bool(torch.isfinite(tensor).all()):
            raise ModelError(f"expected finite factors in {dtype}, found NaN or Inf", where=where)
        out[part] = tensor
    return out


# ** measuring **


def roots(
    program: Program, sites: Sequence[ExpertSite], tokens: Tensor | None, options: Options,
    listener: Listener = silent,
) -> Iterator[tuple[ExpertSite, dict[str, Root]]]:  # fmt: skip
    """Each site in graph order with the metric of what its two weights read, over all experts.

    tokens: int64 [samples, length]; each expert's inputs are those that are sent to it. None: all
    errors of a weight count alike.
    Raises:
        ModelError: an activation that is not finite.
    """
    if tokens is None:
        for site in sites:
            listener(Event("tick", {"where": site.segment}))
            yield site, dict.fromkeys(WEIGHTS, identity())
        return
    grams = {s.node: {name: WideGram() for name in WEIGHTS} for s in sites}

    def watching(node: fx.Node) -> partial[Tensor]:
        def seen(expert: int, x: Tensor, inner: Tensor) -> None:
            for name, value in zip(WEIGHTS, (x, inner), strict=True):
                check_finite(node, value)
                grams[node.name][name].update(value)

        return partial(experts, seen=seen)

    watched = {s.node: watching(program.node(s.node)) for s in sites}
    walk = Walk(program, device=options.device, implementations=watched)
    last = max(i for i, s in enumerate(walk.segments) if watched.keys() & set(s.nodes))
    with torch.no_grad():
        envs = batches(program, tokens, options)
        for segment in walk.segments[: last + 1]:
            listener(Event("tick", {"where": segment.name}))
            envs = walk.step(segment, envs)
            for site in (s for s in sites if s.segment == segment.name):
                held = grams.pop(site.node)
                found = {n: g.value for n, g in held.items()}
                yield site, {n: whitening(g) for n, g in found.items() if g is not None}


# ** the graph **


def factorise(
    program: Program, site: ExpertSite, sizes: Mapping[str, Sizes], tensors: Mapping[str, Tensor],
    *, made_by: str,
) -> list[str]:  # fmt: skip
    """Put cores and shared factors in the place of one call's weights, in place.

    Args:
        sizes: by weight; one that is not named stays. tensors: of the parts, by name of the
            parameter; those that are missing stay empty.
    Returns:
        Names of the new parameters.
    """
    node = program.node(site.node)
    dense = {name: node.args[3 + i] for i, name in enumerate(WEIGHTS)}
    nodes: dict[tuple[str, str], fx.Node] = {}
    for name, made in sizes.items():
        old = stacks(site)[name][0]
        for part, shape in shapes(made).items():
            param = Param(part_name(program, old, part), shape, program.params[old].dtype)
            nodes[name, part] = program.add_param(
                param, tensors.get(param.name), before=node, made_by=made_by, like=node
            )

    def call(op: str, *args: object, before: fx.Node) -> fx.Node:
        return program.emit(op, *args, before=before, made_by=made_by, like=node)

    def core(name: str) -> Any:
        if (name, "mix") not in nodes:
            return nodes.get((name, "core"), dense[name])
        mixed = call("aten.mm.default", nodes[name, "mix"], nodes[name, "core"], before=node)
        e, (_, r, s) = site.experts, sizes[name].ranks
        return call("aten.reshape.default", mixed, [e, r, s], before=node)

    linear = "aten.linear.default"
    x, enters = node.args[0], nodes.get(("gate_up", "right"))
    if enters is not None:
        x = call(linear, x, enters, before=node)
    inside = [nodes.get(("gate_up", "left")), nodes.get(("down", "right"))]
    shared = inside if inside[1] is not None else [a for a in inside if a is not None]
    node.args = (x, *node.args[1:3], core("gate_up"), core("down"), *shared)
    node.meta["llmc"] = replace(info(node), type=infer(node), made_by=made_by)
    leaves = nodes.get(("down", "left"))
    if leaves is not None:
        readers = list(node.users)
        out = call(linear, node, leaves, before=node.next)
        for reader in readers:
            reader.replace_input_with(node, out)
        # Its factor is read behind the experts alone.
        node.append(leaves)
    program.prune(*(d for d in dense.values() if isinstance(d, fx.Node)))
    return [str(n.target) for n in nodes.values()]
