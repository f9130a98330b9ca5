"""The fusion planner: linears and what stands around them become calls of `llmc.fused`.

    rms_norm(x) -> linear(., dequantize(codes, scale)) + r

becomes fused([x, r, gain, codes, scale], body="…"), where the body spells those very calls: the
law is their references, and the value differs only in the order of roundings (a sum of three is
turned where that puts each sum behind a linear, see `fuse_sums`). A layer_norm joins as an rms_norm
does. Linears of one input are joined by rows, gate and up to one call with their product. A target
says which problems it has a kernel for; where it has none, neighbours are left out one by one (the
sum behind, the norm of the result, the activation, the gate product, then what lies before, then
the joining), each a refusal with its reason. Mixtures of experts come first: see `mixture.plan`.
"""

from __future__ import annotations

from collections.abc import Collection
from dataclasses import dataclass, replace
from functools import partial

import torch
from torch import fx

from ..compiler.ir.graph import Program
from ..compiler.ir.ops.fused import values_of
from ..compiler.ir.refusal import Refusal
from ..compiler.ir.segments import refresh_segments
from .fuse_chain import Core
from .fuse_family import Family
from .fuse_find import find
from .fuse_nodes import MAKER, Accept, path_of
from .fuse_norms import norms_of
from .fuse_sums import sums_of
from .fuse_unit import Part, Unit, body_of, join, stored_values
from .fuse_views import read_norms
from .mixture.plan import FusedMixture, fuse_mixtures
from .problem import Problem

BEFORE = ("rounds", "mixed", "smooth", "norm")
FEATURES = frozenset({
    *BEFORE, "residual", "out_norm", "act", "pairs", "concat", "rank", "outliers", "sparse",
    "table", "dense", "masked", "factors", "coded", "signs", "paired", "experts",
    "route", "spans", "out_mixed",
})  # fmt: skip
"""What a target may ask for; what it does not name is never looked for, nor refused. ``dense`` are
weights as they were captured, ``masked`` the floats that a mask keeps; ``experts`` are mixtures of
them, ``route`` those that a kernel chooses itself; ``spans`` keep the factors of joined linears
apart, ``coded`` are factors that are codes."""


@dataclass(frozen=True)
class Fused:
    """One node that fusing made.

    Attributes:
        node: its name. linears: names of those that it replaces. path: module path, for people.
        ops: op rows that it joins, in order of execution. problem: what it computes.
        body: what it means. parts: which values of the body are its canonical parts.
        sections: rows of each linear. residual: name of the body's input that is added, or "".
    """

    node: str
    linears: tuple[str, ...]
    path: str
    ops: tuple[str, ...]
    problem: Problem
    body: str
    parts: tuple[Part, ...]
    sections: tuple[int, ...]
    residual: str = ""

    def canonical(
        self, program: Program, device: torch.device | str = "cpu", wide: torch.dtype | None = None
    ) -> dict[str, torch.Tensor]:
        """Its canonical parts by role, computed from the program's parameters.

        wide: the dtype that floats are brought to first, for an oracle.
        """
        values = stored_values(program, program.node(self.node), device, wide)
        wanted = [r for p in self.parts for r in p.refs if r is not None]
        found = values_of(self.body, values, wanted)
        return join(self.problem, self.parts, found, self.sections)


@dataclass(frozen=True)
class FusePlan:
    """What was fused, and what was not and why."""

    fused: tuple[Fused, ...]
    refused: tuple[Refusal, ...]
    mixtures: tuple[FusedMixture, ...] = ()


def fuse(program: Program, accept: Accept, features: Collection[str] = FEATURES) -> FusePlan:
    """Rewrite `program` in place; what its target does not name in `features` is left alone."""
    home = {name: s.name for s in program.segments for name in s.nodes}
    home |= {new: home[old] for new, old in read_norms(program).items() if old in home}
    mixtures, refused = fuse_mixtures(program, accept, features, home)
    cores, found = find(program, accept, features)
    refused += found
    families: dict[fx.Node, list[Core]] = {}
    for core in cores:
        families.setdefault(core.reads, []).append(core)
    norms, left = norms_of(cores, home) if "out_norm" in features else ({}, [])
    sums = sums_of(program, cores, home, norms) if "residual" in features else {}
    refused += left
    units: list[Unit] = []
    for family in families.values():
        solver = Family(family, accept, frozenset(features), home, sums, norms)
        units += solver.solve()
        refused += solver.refused
    order = {node: i for i, node in enumerate(program.graph.nodes)}
    units.sort(key=lambda u: order[u.root or u.cores[0].result])
    fused = []
    for unit in units:
        place = home.get((unit.root or unit.cores[0].result).name)
        one, made = rewrite(program, unit, order)
        fused.append(one)
        if place is not None:
            home |= dict.fromkeys((n.name for n in made), place)
    if fused or mixtures:
        program.prune()
        _settle(program, home)
    return FusePlan(tuple(fused), tuple(dict.fromkeys(refused)), tuple(mixtures))


def _settle(program: Program, home: dict[str, str]) -> None:
    """Fit segments to the new graph: a new call stays where what it replaces was."""
    mine: dict[str, list[str]] = {s.name: [] for s in program.segments}
    for name, segment in home.items():
        mine[segment].append(name)
    program.segments = [replace(s, nodes=tuple(mine[s.name])) for s in program.segments]
    refresh_segments(program)


# ** rewriting **


def rewrite(program: Program, unit: Unit, order: dict[fx.Node, int]) -> tuple[Fused, list[fx.Node]]:
    """Put one call in a unit's place; the calls that it stands for lose their readers.

    Returns what was made, and the new calls.
    """
    first = unit.cores[0]
    root = unit.root
    place = root or min((c.result for c in unit.cores), key=order.__getitem__)
    body = body_of(unit)
    if root is None:
        for node in body.inputs:
            if node.op == "get_attr" and order.get(node, -1) > order[place]:
                place.prepend(node)
    put = partial(program.emit, made_by=MAKER, like=first.linear)
    made = put("llmc.fused", list(body.inputs), body=body.text, before=place)
    new = [made]
    if root is not None:
        root.replace_all_uses_with(made)
    else:
        start = 0
        for core in unit.cores:
            stop = start + core.problem.N
            piece = put("aten.slice.Tensor", made, -1, start, stop, before=place)
            core.result.replace_all_uses_with(piece)
            new.append(piece)
            start = stop
    residual = unit.residual
    one = Fused(
        made.name, tuple(c.linear.name for c in unit.cores),
        path_of([c.linear for c in unit.cores]), body.ops, unit.problem, body.text, body.parts,
        tuple(c.problem.N for c in unit.cores),
        "" if residual is None else f"a{body.inputs.index(residual)}",
    )  # fmt: skip
    return one, new
