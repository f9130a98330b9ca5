"""Lowering mixtures: packed tensors, kernels and what is told of them."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch

from ...compiler.ir.graph import Program
from .. import cpu as cpu_kernels
from ..gains import asked, in_range, round_scales
from ..kernels import choose
from ..prepack import prepack
from ..problem import Problem
from ..put import Weights, put
from . import cpu
from .place import DOWN, UP, MixtureCall
from .plan import FusedMixture
from .split import one
from .told import moved_cpu, told


@dataclass(frozen=True)
class PlacedMixture:
    """One lowered mixture: what was fused into it and which kernels run it.

    Attributes:
        kernels: of gate and up, and of down. bytes: moved by one call at one token.
        resident: bytes of the tensors made for it. stored: of the parameters that they replace.
        note: what the kernels do differently from the reference.
    """

    fused: FusedMixture
    kernels: tuple[str, str]
    bytes: int
    resident: int
    stored: int
    note: str = ""

    def json(self, bandwidth: float) -> dict[str, Any]:
        """A row of what was fused; floors at ``bandwidth`` bytes per second."""
        floor = round(1e6 * self.bytes / bandwidth, 3)
        return told(self.fused, self.kernels, (self.fused.up, self.fused.down)) | {
            "bytes": self.bytes, "floor_us": floor, "resident_bytes": self.resident,
            "stored_bytes": self.stored, "note": self.note,
        }  # fmt: skip


def on_triton(
    program: Program, fused: FusedMixture, device: torch.device, machine: str
) -> tuple[MixtureCall, PlacedMixture]:
    """Pack a mixture for kernel rows, in place.

    ModelError where its tensors do not fit them.
    """
    packed, rows, notes = [], [], dict[str, None]()
    both = fused.canonical(program, device)
    for wanted, parts in zip((fused.up, fused.down), both, strict=True):
        problem = asked(wanted)
        row, _ = choose(problem, machine)
        assert row is not None
        fits, note = in_range(problem, parts)
        fits, more = round_scales(problem, fits)
        notes |= dict.fromkeys(n for n in (note, more) if n)
        packed.append((prepack(row, problem, **fits), fits))
        rows.append(row)
    problems = packed[0][0].problem, packed[1][0].problem
    traffic = sum(r.bytes_moved(p, 1) for r, p in zip(rows, problems, strict=True))
    weights = [
        Weights(parts, given, p.tensors | p.sides, prefix)
        for parts, (p, given), prefix in zip(
            (fused.up_parts, fused.down_parts), packed, (UP, DOWN), strict=True
        )
    ]
    names = rows[0].name, rows[1].name
    return _put(program, fused, "triton", names, problems, weights, traffic, "; ".join(notes))


def on_cpu(program: Program, fused: FusedMixture) -> tuple[MixtureCall, PlacedMixture]:
    """Pack a mixture for torch's own kernels, expert by expert, in place.

    ModelError where experts' tensors differ in size.
    """
    names, notes, weights = [], dict[str, None](), []
    both = fused.canonical(program)
    sides = ((fused.up, fused.up_parts, UP), (fused.down, fused.down_parts, DOWN))
    for (problem, parts, prefix), canonical in zip(sides, both, strict=True):
        kernel, _ = cpu_kernels.choose(one(problem))
        assert kernel is not None
        names.append(kernel.name)
        choice = cpu_kernels.ways_by_tokens(kernel, one(problem))
        notes[f"{kernel.note}; {choice}" if len(kernel.ways) > 1 else kernel.note] = None
        tensors = cpu.pack(kernel, problem, canonical)
        weights.append(Weights(parts, canonical, tensors, prefix))
    traffic = moved_cpu(fused.up, fused.down, 1)
    kernels, problems = (names[0], names[1]), (fused.up, fused.down)
    return _put(program, fused, "cpu", kernels, problems, weights, traffic, "; ".join(notes))


def _put(
    program: Program, fused: FusedMixture, target: str, kernels: tuple[str, str],
    problems: tuple[Problem, Problem], weights: list[Weights], traffic: int, note: str,
) -> tuple[MixtureCall, PlacedMixture]:  # fmt: skip
    kept = {"x": "a0"} | ({"residual": fused.residual} if fused.residual else {})
    kept |= dict(zip(("index", "weight"), fused.told, strict=False))
    done = put(program, program.node(fused.node), kept, weights)
    made = MixtureCall(target, kernels, problems, done.names, fused.flat)
    return made, PlacedMixture(fused, kernels, traffic, done.resident, done.stored, note)
