"""Planning mixtures: a layer of experts, its router too, becomes one call of `llmc.fused`.

    rms_norm(x) -> linear(., router) -> softmax -> topk -> experts(., index, weight, up, down) + r

Its body spells those very calls. A target says whether it has a kernel for either product; where it
has none, neighbours are left out: the sum behind, then the norm, then the router, each a refusal
with its reason.
"""

from __future__ import annotations

from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch
from torch import fx

from ...compiler.ir.graph import Program, info
from ...compiler.ir.ops import row_of
from ...compiler.ir.ops.fused import Step, values_of, write
from ...compiler.ir.refusal import Refusal
from ..fuse_nodes import LINEAR, MAKER, Accept, Unfit, is_op, is_sum, only_user, refusal
from ..fuse_sums import turn
from ..fuse_unit import Part, join, spell, stored_values
from ..problem import Problem
from .find import EXPERTS, Mixture, Side, read_mixture
from .groups import FLAT
from .shared import appended, odd, rows_of
from .split import one


@dataclass(frozen=True)
class FusedMixture:
    """One node that stands for a layer of experts.

    Attributes:
        node: its name. linears: names of the products that it replaces. path: module path, for
            people. ops: op rows that it joins, in order of execution.
        up, down: what the two kernels compute. body: what both mean.
        up_parts, down_parts: which values of the body are their canonical parts.
        residual: name of the body's input that is added, or "".
        told: names of the inputs that are index and weight, where no kernel chooses.
        flat: whether its result has a row for each token, whatever the shape of its input.
    """

    node: str
    linears: tuple[str, ...]
    path: str
    ops: tuple[str, ...]
    up: Problem
    down: Problem
    body: str
    up_parts: tuple[Part, ...]
    down_parts: tuple[Part, ...]
    residual: str = ""
    told: tuple[str, ...] = ()
    flat: bool = False

    def canonical(
        self, program: Program, device: torch.device | str = "cpu", wide: torch.dtype | None = None
    ) -> tuple[dict[str, torch.Tensor], dict[str, torch.Tensor]]:
        """Canonical parts of both products by role, experts below each other.

        wide: the dtype that floats are brought to first, for an oracle.
        """
        values = stored_values(program, program.node(self.node), device, wide)
        wanted = [r for p in (*self.up_parts, *self.down_parts) for r in p.refs if r is not None]
        found = values_of(self.body, values, wanted)
        both = []
        for problem, parts in ((self.up, self.up_parts), (self.down, self.down_parts)):
            chosen = [Part(p.role, p.refs[:1], p.offset) for p in parts]
            made = join(problem, tuple(chosen), found, (problem.N,))
            if "values" in made and made["values"].dim() == 3:
                made["values"] = made["values"].flatten(0, 1)
            if problem.always:
                more = tuple(Part(p.role, p.refs[1:]) for p in parts if p.refs[1:])
                sections = rows_of(problem, len(more[0].refs))
                made = appended(problem, made, join(one(problem), more, found, sections))
            both.append(made)
        return both[0], both[1]


def fuse_mixtures(
    program: Program, accept: Accept, features: Collection[str], home: dict[str, str]
) -> tuple[list[FusedMixture], list[Refusal]]:
    """Rewrite every call of experts that both kernels serve, in place.

    home: segment of each node, by name; that of new nodes is told to it.
    """
    made: list[FusedMixture] = []
    refused: list[Refusal] = []
    for experts in list(program.calls(EXPERTS)) if "experts" in features else ():
        try:
            fits, left = _fitting(program, experts, accept, features, home)
        except Unfit as why:
            refused.append(refusal(experts, why.reason, why.predicate))
            continue
        refused += left
        if fits is not None:
            place = home.get(fits.root.name)
            one, new = rewrite(program, fits)
            made.append(one)
            if place is not None:
                home |= dict.fromkeys((n.name for n in new), place)
    if made:
        program.prune()
    return made, refused


def _fitting(
    program: Program, experts: fx.Node, accept: Accept, features: Collection[str],
    home: dict[str, str],
) -> tuple[Mixture | None, list[Refusal]]:  # fmt: skip
    """As much of a layer as kernels serve, and why not more; with the expert that all tokens go to
    where they do, else without.

    Raises:
        Unfit: its weights are stored in no form that a kernel could read.
    """
    found, left = read_mixture(experts, features, home, shared=True)
    apart = [r for r in left if r.predicate == "shared"]
    if found.shared is not None:
        fits, more = fit(found, accept)
        if fits is not None:
            return fits, [*left, *more]
        apart = [refusal(found.shared.sum, odd(r.reason).reason, "shared") for r in more]
    if "residual" in features:
        _turned(program, experts, home)
    found, left = read_mixture(experts, features, home)
    fits, more = fit(found, accept)
    return fits, [*apart, *more, *(left if fits is not None else [])]


def _turned(program: Program, experts: fx.Node, home: dict[str, str]) -> None:
    """(experts + shared) + r -> shared + (experts + r), where a linear ends what all tokens read:
    either kernel then has one sum behind it."""
    behind = only_user(experts)
    y = behind if behind is not None and any(is_op(behind, op) for op in FLAT) else experts
    inner = only_user(y)
    outer = None if inner is None else only_user(inner)
    if inner is None or outer is None or not (is_sum(inner) and is_sum(outer)):
        return
    both = [a for a in inner.args if isinstance(a, fx.Node) and (a is y or is_op(a, LINEAR))]
    order = {node: i for i, node in enumerate(program.graph.nodes)}
    turn(outer, dict.fromkeys(both), order, home)


def fit(found: Mixture, accept: Accept) -> tuple[Mixture | None, list[Refusal]]:
    """As much of a mixture as both kernels serve, and what was left out and why."""
    reasons: dict[str, str] = {}
    nodes: dict[str, fx.Node | None] = {
        "residual": found.add,
        "norm": None if found.norm is None else found.norm.node,
        "route": None if found.route is None else found.route.linear,
    }
    why = ""
    for less, out in found.fewer():
        why = unserved(less, accept)
        if not why:
            text = "the {} is not fused with its experts: {}"
            left = [(nodes[n], text.format(n, reasons[n])) for n in out if n in reasons]
            return less, [refusal(node, t, "kernel") for node, t in left if node is not None]
        reasons |= {name: why for name in nodes if name not in out}
    return None, [refusal(found.experts, why, "kernel")]


def unserved(mixture: Mixture, accept: Accept) -> str:
    """Why a target has no kernels for a mixture, "" when it has both."""
    for problem, what in zip(mixture.problems, ("gate and up", "down"), strict=True):
        why = accept(problem)
        if why:
            return f"{what} of experts: {why}"
    return ""


# ** rewriting **


def rewrite(program: Program, mixture: Mixture) -> tuple[FusedMixture, list[fx.Node]]:
    """Put one call in a mixture's place; the calls that it stands for lose their readers.

    Returns what was made, and the new calls.
    """
    inputs = [mixture.x]
    residual, root = mixture.residual, mixture.root
    for node in (residual, *mixture.told):
        if node is not None and node not in inputs:
            inputs.append(node)
    steps, names = spell([root], mixture.nodes, inputs, mixture.sizes)
    body = write(steps)
    made = program.emit(
        "llmc.fused", inputs, body=body, before=root, made_by=MAKER, like=mixture.experts
    )
    root.replace_all_uses_with(made)
    new = [made, *_renormed(program, mixture)]
    up, down = mixture.problems
    route = mixture.route
    products = [mixture.experts] if route is None else [route.linear, mixture.experts]
    products += [] if mixture.shared is None else mixture.shared.linears
    fused = FusedMixture(
        made.name, tuple(n.name for n in products), info(mixture.experts).path, _ops(steps),
        up, down, body, tuple(_up_parts(mixture, names)), tuple(_down_parts(mixture, names)),
        "" if residual is None else names[residual], tuple(names[n] for n in mixture.told),
        mixture.back is None and mixture.add is None,
    )  # fmt: skip
    return fused, new


def _renormed(program: Program, mixture: Mixture) -> list[fx.Node]:
    """Linears that read the norm in the shape that experts read it get one of their own, made of
    what was put in that shape before: their kernels take in what they read itself."""
    h, mine = mixture.h, mixture.nodes
    others = [u for u in h.users if u not in mine]
    if mixture.norm is None or h is mixture.norm.node or not others:
        return []
    norm = mixture.norm.node
    put = partial(program.emit, before=h, made_by=MAKER, like=norm)
    rows = put("aten.reshape.default", norm.args[0], list(h.args[1]))  # type: ignore[arg-type]
    how: dict[str, Any] = dict(norm.kwargs)
    again = put(row_of(norm).name, rows, *norm.args[1:], **how)
    for other in others:
        other.replace_input_with(h, again)
    return [rows, again]


def _ops(steps: list[Step]) -> tuple[str, ...]:
    return tuple(s.op for s in steps)


def _parts(
    side: Side, names: dict[fx.Node, str], more: Sequence[Mapping[str, fx.Node]]
) -> list[Part]:
    """Of experts, and behind them of the matrices of the one that all tokens go to."""
    return [
        Part(role, (names[node], *(names[m[role]] for m in more)))
        for role, node in side.parts.items()
    ]


def _down_parts(mixture: Mixture, names: dict[fx.Node, str]) -> list[Part]:
    shared = mixture.shared
    return _parts(mixture.down, names, () if shared is None else (shared.down,))


def _up_parts(mixture: Mixture, names: dict[fx.Node, str]) -> list[Part]:
    shared = mixture.shared
    parts = _parts(mixture.up, names, () if shared is None else shared.ups)
    if mixture.route is not None:
        parts += [Part(role, (names[n],)) for role, n in mixture.route.parts.items()]
    if shared is not None and shared.gate is not None:
        parts.append(Part("gate", (names[shared.gate],)))
    if mixture.norm is not None:
        offset = float(str(mixture.norm.node.kwargs.get("offset", 0.0)))
        for role, node in mixture.norm.parts.items():
            parts.append(Part(role, (names[node],), offset if role == "gain" else 0.0))
    return parts
