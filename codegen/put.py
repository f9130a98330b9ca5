"""Packed tensors put where a fused node read canonical ones: parameters of their own."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import torch
from torch import fx

from ..compiler.ir.graph import Param, Program
from .fuse_nodes import MAKER
from .fuse_unit import Part


@dataclass(frozen=True)
class Weights:
    """The tensors that a kernel reads, and the parts that they were packed from.

    prefix: of their names among the inputs of the node.
    """

    parts: Sequence[Part]
    canonical: Mapping[str, torch.Tensor]
    tensors: Mapping[str, torch.Tensor]
    prefix: str = ""


@dataclass(frozen=True)
class Put:
    """What became of a node: names of its inputs in order; bytes of the tensors that were made for
    it, and of the parameters that they replace."""

    names: tuple[str, ...]
    resident: int
    stored: int


def put(
    program: Program, node: fx.Node, kept: Mapping[str, str], weights: Sequence[Weights]
) -> Put:
    """Let a fused node read packed tensors; parameters that nobody else reads are let go.

    kept: which of its inputs stay, by the name that they get. A part that stays as it is stays the
    parameter that it was.
    """
    before = dict(program.params)
    old: list[fx.Node] = list(node.args[0])  # type: ignore[arg-type]
    names, inputs, resident = list(kept), [old[int(ref[1:])] for ref in kept.values()], 0
    for group in weights:
        alone = {
            p.role: old[int(p.refs[0][1:])]
            for p in group.parts
            if len(p.refs) == 1 and p.refs[0] is not None and p.refs[0][0] == "a"
        }
        base = _stem(program, group.parts, old)
        for role, tensor in group.tensors.items():
            there, name = alone.get(role), f"{group.prefix}{role}"
            names.append(name)
            same = there is not None and tensor is group.canonical.get(role)
            if same and there is not None and _same(program, there, tensor):
                inputs.append(there)
                continue
            shape = tuple(tensor.shape)
            param = Param(f"{base}.packed.{name}", shape, tensor.dtype, trained=True, keep=True)
            inputs.append(program.add_param(param, tensor, before=node, made_by=MAKER, like=node))
            resident += tensor.nbytes
    node.args = (inputs,)
    program.prune(*(n for n in old if n.op == "get_attr"))
    stored = sum(p.bytes for name, p in before.items() if name not in program.params)
    return Put(tuple(names), resident, stored)


def _same(program: Program, node: fx.Node, tensor: torch.Tensor) -> bool:
    """Whether a parameter's value is that very tensor, or its copy on another device."""
    value = program.fetch(str(node.target))
    return value.dtype == tensor.dtype and torch.equal(value, tensor.to(value.device))


def _stem(program: Program, parts: Sequence[Part], inputs: Sequence[fx.Node]) -> str:
    """What the packed tensors are called after: `p2` where the first part is `p2.codes`."""
    first = parts[0].refs[0] or ""
    found = inputs[int(first[1:])] if first[:1] == "a" else None
    param = program.param_of(found) or next(p for n in inputs if (p := program.param_of(n)))
    return param.name.rpartition(".")[0] or param.name
