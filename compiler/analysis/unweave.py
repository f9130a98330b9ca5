"""Laying a fused projection that interleaves q, k and v in each head out as q, then k, then v.

Exact: the matrix's rows are put in another order, and its result is cut into three runs that take
the places of the three values. Heads of keys can then be cut without those of queries.
"""

from __future__ import annotations

import torch
from torch import Tensor, fx

from ..ir.errors import ModelError
from ..ir.graph import Program
from ..ir.segments import refresh_segments
from ..ir.weights import CutWeights
from .heads import AttentionSite, Rows
from .labels import run_of, trace
from .ties import shape_of

_BY = "unweave"


def unweave(program: Program, sites: list[AttentionSite]) -> None:
    """Rewrite the interleaved ones among the sites in place; nothing is read.

    Raises:
        ModelError: something else reads the fused result.
    """
    moved: dict[str, dict[int, Tensor]] = {}
    for site in sites:
        if site.interleaved:
            moved |= _one(program, site)
    if moved:
        program.weights = CutWeights(program.weights, moved)
        refresh_segments(program)


def _one(program: Program, site: AttentionSite) -> dict[str, dict[int, Tensor]]:
    core = program.node(site.node)
    rows = [r for r in (site.q, site.k, site.v) if r is not None]
    places: dict[str, list[tuple[Rows, fx.Node]]] = {}
    for r, value in zip(rows, core.args[:3], strict=True):
        assert isinstance(value, fx.Node)
        places.setdefault(r.node, []).append((r, run_of(trace(value), r.index)))
    moved: dict[str, dict[int, Tensor]] = {}
    for name, parts in places.items():
        linear = program.node(name)
        order = torch.cat([r.index.flatten() for r, _ in parts])
        width = (shape_of(linear) or ())[-1]
        if not torch.equal(order.sort().values, torch.arange(len(order))) or width != len(order):
            raise ModelError(
                f"expected q, k and v to be all of {name}, found {len(order)} of {width} channels"
            )
        start = 0
        for r, old in parts:
            end = start + r.index.numel()
            _replace(program, linear, old, start, end)
            start = end
        if len(linear.users) != len(parts):
            raise ModelError(f"expected q, k and v alone to read {name}, found others")
        for param in (parts[0][0].param, parts[0][0].bias):
            if param is not None:
                moved[param] = {0: order}
    return moved


def _replace(program: Program, linear: fx.Node, old: fx.Node, start: int, end: int) -> None:
    """Put channels start … end of the linear in the place of ``old``."""
    lead, shape = (shape_of(linear) or ())[:-1], shape_of(old) or ()
    literal = [a for a, d in enumerate(shape) if isinstance(d, int)]
    rest = [a for a in range(len(shape)) if a not in literal]
    if [shape[a] for a in rest] != list(lead):
        raise ModelError(f"expected the batch and sequence of {linear.name} in {old.name}")

    def emit(op: str, *args: object) -> fx.Node:
        return program.emit(op, *args, before=old, made_by=_BY, like=old)

    new = emit("aten.slice.Tensor", linear, len(lead), start, end)
    if len(literal) > 1:
        new = emit("aten.unflatten.int", new, len(lead), [shape[a] for a in literal])
    made = [*rest, *literal]
    if made != sorted(made):
        new = emit("aten.permute.default", new, [made.index(a) for a in range(len(shape))])
    old.replace_all_uses_with(new)
    program.prune(old)
