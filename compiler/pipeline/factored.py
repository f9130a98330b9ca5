"""The graph of factored weights: linear(x, W, b) becomes linear(linear(x, B), A, b).

Linears that read one value may share B: the latent is then computed once. Both factors are ordinary
parameters in the weight's stored dtype, and whatever comes later meets two plain linears.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import replace

from torch import Tensor, fx

from ..analysis.linears import LinearSite
from ..ir.graph import Param, Program
from ..ir.names import set_name
from .compensate import free_name

LEFT, RIGHT = "left", "right"
"""Ends of the names of A [m, k] and B [k, n]."""


def names(program: Program, sites: Sequence[LinearSite]) -> tuple[str, list[str]]:
    """Names of the right factor, which the sites share, and of each one's left factor."""
    right = free_name(program, f"{sites[0].param}_{RIGHT}")
    return right, [free_name(program, f"{s.param}_{LEFT}") for s in sites]


def factorise(
    program: Program, sites: Sequence[LinearSite], rank: int, tensors: Mapping[str, Tensor], *,
    made_by: str,
) -> list[str]:  # fmt: skip
    """Put two linears in the place of each site's one, in place; without tensors they stay empty.

    The sites read one value; the first one's place is where the latent is computed.
    Returns:
        Names of the new parameters.
    """
    nodes = [program.node(s.node) for s in sites]
    order = {n: i for i, n in enumerate(program.graph.nodes)}
    first = min(nodes, key=order.__getitem__)
    right, lefts = names(program, sites)

    def add(name: str, shape: tuple[int, int], site: LinearSite, before: fx.Node) -> fx.Node:
        weight = program.params[site.param]
        # The source's own name of the matrix says how a module would call its parts.
        stems = (n.removesuffix("weight") for n in weight.names if n.endswith(".weight"))
        end = RIGHT if name == right else LEFT
        param = Param(name, shape, weight.dtype, tuple(f"{s}{end}.weight" for s in stems))
        return program.add_param(
            param, tensors.get(name), before=before, made_by=made_by, like=before
        )

    down = add(right, (rank, sites[0].in_features), sites[0], first)
    latent = program.emit(
        "aten.linear.default", first.args[0], down, before=first, made_by=made_by, like=first
    )
    taken, name = {n.name for n in order}, f"{first.name}_latent"
    while name in taken:
        name += "_"
    set_name(latent, name)
    for site, node, left in zip(sites, nodes, lefts, strict=True):
        up = add(left, (site.out_features, rank), site, node)
        weight = node.args[1]
        assert isinstance(weight, fx.Node)
        node.args = (latent, up, *node.args[2:])
        node.meta["llmc"] = replace(node.meta["llmc"], made_by=made_by)
        program.prune(weight)
    return [right, *lefts]
