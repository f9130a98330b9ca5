"""What the matrices behind cut units do to make up for them: a bias, moved weights, or both.

A bias keeps the calibration mean of the output (FLAP, arXiv 2312.11983); moved weights are the
least-squares best on the inputs that stay (OBS). Both are of the matrix that reads the group.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from ..analysis.groups import Group
from ..ir.errors import ModelError
from ..ir.events import Listener, silent
from ..ir.graph import Param, Program
from ..solvers import importance as score
from .measure import Options
from .readings import Reading, fitting, measured, readings
from .width import UNIT_OF

KINDS = ("none", "bias", "weights", "both")
REPAIRED = ("neuron", "head")
"""Units whose readers are repaired: a hidden channel has too many, an expert has no bias."""


@dataclass(frozen=True)
class Bias:
    """A bias that a matrix gets or that changes: the call, the parameter, whether it is new."""

    node: str
    param: str
    weight: str
    new: bool

    def to_json(self) -> dict[str, Any]:
        return {"node": self.node, "param": self.param, "weight": self.weight, "new": self.new}


def repaired(program: Program, groups: Sequence[Group]) -> list[tuple[Group, Reading]]:
    """The readings that are repaired: of neurons and heads, by matrices that one call reads."""
    return [
        (g, r)
        for g in groups
        if UNIT_OF[g.kind] in REPAIRED
        for r in readings(program, g)
        if r.kind == "linear" and len(program.param_node(r.param.name).users) == 1
    ]


def biases(program: Program, groups: Sequence[Group]) -> list[Bias]:
    """The biases that repairing the groups' readers takes, by name and place; one of each call."""
    out = []
    for r in {r.node: r for _, r in repaired(program, groups)}.values():
        old = r.node.args[2] if len(r.node.args) > 2 else r.node.kwargs.get("bias")
        known = program.param_of(old)
        if known is not None and len(program.param_node(known.name).users) == 1:
            out.append(Bias(r.node.name, known.name, r.param.name, False))
        elif old is None:
            out.append(Bias(r.node.name, free_name(program, f"{r.param.name}_bias"),
                            r.param.name, True))  # fmt: skip
    return out


def free_name(program: Program, name: str) -> str:
    """The name, or a longer one that no parameter has."""
    while name in program.params:
        name += "_"
    return name


def add_bias(program: Program, bias: Bias, tensor: Tensor | None) -> None:
    """Give the call its bias; without a tensor the parameter is declared and stays empty."""
    node = program.node(bias.node)
    weight = program.params[bias.weight]
    if bias.new:
        # The source's own name of the matrix says how its module would call a bias.
        stems = (n.removesuffix("weight") for n in weight.names if n.endswith(".weight"))
        param = Param(bias.param, weight.shape[:1], weight.dtype, tuple(s + "bias" for s in stems))
        made = program.add_param(param, None, before=node, made_by="prune_width", like=node)
        node.args = (*node.args[:2], made)
        node.kwargs = {k: v for k, v in node.kwargs.items() if k != "bias"}
    if tensor is not None:
        program.set_tensor(bias.param, tensor)


def compensations(
    program: Program,
    keep: Mapping[Group, Tensor],
    kind: str,
    damp: float,
    tokens: Tensor,
    options: Options,
    listener: Listener = silent,
) -> dict[str, Tensor]:
    """New tensors of the matrices that read what is cut, and of their biases, as they are stored.

    A matrix that reads several groups is repaired once, for all the columns that it loses.

    Args:
        keep: int64 ascending units that stay, by group; all groups that are cut.
        kind: ``bias``, ``weights`` or ``both``; damp: of the least squares.
    Returns:
        By parameter name, cut along every axis that ``keep`` cuts.
    Raises:
        ModelError: a repair that is not finite.
    """
    out: dict[str, Tensor] = {}
    lost = [g for g, units in keep.items() if len(units) < g.units]
    places = {b.node: b for b in biases(program, lost)}
    moves, done = kind in ("weights", "both"), set[str]()
    statistics = (["gram"] if moves else []) + (["moments"] if kind != "weights" else [])
    for part in fitting(program, lost, "gram" if moves else "moments", options.budget):
        reads = {r.param.name: r for _, r in repaired(program, part)}
        reads = {name: r for name, r in reads.items() if name not in done}
        done |= set(reads)
        stats = measured(program, list(reads.values()), statistics, tokens, options, listener)
        for r in reads.values():
            found: dict[str, Any] = {s: stats.get(r.value, s) for s in statistics}
            rows, columns = (_left(keep, r.param, axis) for axis in (0, 1))
            weight = program.weights.load(r.param.name).cpu()
            # The solve is where the statistics are; what is stored, and its bias, is on the host.
            now = _moved(weight, found, columns, damp).cpu() if moves else weight[:, columns]
            if moves:
                out[r.param.name] = _stored(now[rows], r.param, r.param)
            if kind != "weights" and r.node.name in places:
                bias = places[r.node.name]
                gain = score.shift(weight, now, found["moments"].mean.cpu(), columns)
                old = None if bias.new else program.weights.load(bias.param).cpu().double()
                total = gain if old is None else gain + old
                like = r.param if bias.new else program.params[bias.param]
                out[bias.param] = _stored(total[rows], like, r.param)
    return out


def _moved(weight: Tensor, found: Mapping[str, Any], columns: Tensor, damp: float) -> Tensor:
    """The kept columns by least squares; with an intercept where the mean is repaired too."""
    second = found["gram"].value.double() / found["gram"].tokens
    if "moments" in found:
        mean = found["moments"].mean.to(second)
        second = second - mean[:, None] * mean[None]
    return score.refit(weight.to(second.device), second, columns.to(second.device), damp)


def _columns(unit_of: Tensor, kept: Tensor, units: int) -> Tensor:
    """Indices of an axis that stay: those of kept units, and those of no unit."""
    stays = torch.zeros(units + 1, dtype=torch.bool)
    stays[kept] = True
    stays[-1] = True
    return stays[unit_of].nonzero().view(-1)


def _left(keep: Mapping[Group, Tensor], param: Param, axis: int) -> Tensor:
    """Indices of a parameter's axis that no group cuts away."""
    stays = torch.ones(param.shape[axis], dtype=torch.bool)
    for group, kept in keep.items():
        for m in group.members:
            if m.param == param.name and m.axis == axis:
                mine = torch.zeros(param.shape[axis], dtype=torch.bool)
                mine[_columns(m.unit_of, kept, group.units)] = True
                stays &= mine
    return stays.nonzero().view(-1)


def _stored(value: Tensor, like: Param, where: Param) -> Tensor:
    if not bool(torch.isfinite(value).all()):
        name = (where.names or (where.name,))[0]
        raise ModelError(f"expected a finite repair of {name}, found NaN or Inf")
    return value.to(like.dtype).cpu().contiguous()
