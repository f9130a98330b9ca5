"""What a kernel of the CPU target is: torch's own parts in one or more ways over one packing."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass

import torch

from ...compiler.ir import packing
from ..problem import Parts, Problem

Tensors = dict[str, torch.Tensor]
Way = Callable[[Problem, torch.Tensor, Mapping[str, torch.Tensor]], torch.Tensor]
"""(problem, x [M, K], packed) -> x · Wᵀ [M, N] in any floating dtype, without sides."""


@dataclass(frozen=True)
class CpuKernel:
    """How a family of problems is computed.

    Attributes:
        name: of the torch op at its heart, for people.
        misfit: why it cannot serve a problem, None when it can.
        pack: canonical parts of the weight (see `problem.PARTS`) -> tensors in the kernel's layout.
        ways: by name; all give the same result up to rounding, which is fastest depends on M.
        usual: (M, way) from which number of tokens on a way is taken where nothing was measured.
        key: scheme as its packing has it; measurements hold for a key and a shape.
        grid: it puts its input on the problem's grid itself.
        note: what differs from the reference.
    """

    name: str
    misfit: Callable[[Problem], str | None]
    pack: Callable[[Problem, Parts], Tensors]
    ways: Mapping[str, Way]
    usual: tuple[tuple[int, str], ...]
    key: Callable[[Problem], str]
    grid: bool = False
    note: str = "scales and activations in bf16"


def dense_codes(problem: Problem, parts: Parts) -> tuple[torch.Tensor, torch.Tensor]:
    """Codes uint8 [N, K] and the zero point of each group [N, G] in fp32; N:M codes are spread.

    A code that the mask drops becomes its group's zero point.
    """
    q = packing.unpack(parts["codes"], problem.bits, problem.columns)
    middle = torch.tensor(float(1 << (problem.bits - 1)))
    zero = parts.get("zero")
    zero = middle.expand(problem.N, problem.groups) if zero is None else zero.float()
    if not problem.m:
        return q, zero
    which = (torch.arange(problem.columns) // max(problem.group, 1)) if problem.dense_group else 0
    wide = q.to(torch.int16) - zero.to(torch.int16)[:, which].reshape(problem.N, -1)
    spread = packing.expand_nm(wide, parts["meta"], problem.n, problem.m, problem.K)
    dense = problem.dense_group or problem.K
    back = zero.to(torch.int16).repeat_interleave(dense, 1)[:, : problem.K]
    return (spread + back).to(torch.uint8), zero


def centred_codes(problem: Problem, parts: Parts) -> tuple[torch.Tensor, torch.Tensor]:
    """Codes int16 [N, K] less a middle, and the zero points [N, G] that are left, fp32.

    Where every difference to the zero point has room in the kernel's bits, nothing is left of it.
    """
    q, zero = dense_codes(problem, parts)
    if problem.asym and problem.bits in (4, 8):
        middle = float(1 << (problem.bits - 1))
        return q.to(torch.int16) - int(middle), zero - middle
    at = zero.to(torch.int16).repeat_interleave(problem.dense_group or problem.K, 1)
    return q.to(torch.int16) - at[:, : problem.K], torch.zeros_like(zero)


def round_up(count: int, unit: int) -> int:
    """The next multiple of ``unit`` that is not below."""
    return -(-count // unit) * unit


def grow(value: torch.Tensor, rows: int, columns: int) -> torch.Tensor:
    """[rows', columns'] with zeros behind, up to [rows, columns]."""
    short = (0, columns - value.shape[1], 0, rows - value.shape[0])
    return torch.nn.functional.pad(value, short) if any(short) else value


def widen(x: torch.Tensor, columns: int) -> torch.Tensor:
    """x [M, K] in bf16, contiguous, with zeros behind up to ``columns``."""
    x = x.to(torch.bfloat16)
    return grow(x, len(x), columns).contiguous()
