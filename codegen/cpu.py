"""Torch's own CPU kernels for compressed linears: which problems they serve, and their packing.

They compute in bf16 (their only fast dtype), so scales and activations are rounded to bf16; the
plan says so. A 2:4 weight is spread to dense 4-bit codes, masked ones at the zero point: its mask
saves nothing here, and the resident bytes say that too.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch

from ..compiler.ir import packing
from .kernels import Problem

INT4 = "aten::_weight_int4pack_mm_for_cpu"
INT8 = "aten::_weight_int8pack_mm"


@dataclass(frozen=True)
class CpuKernel:
    """One torch kernel: its name, why it cannot serve a problem, how to pack for it and call it.

    `pack(problem, codes, scale, zero, meta)` gives (codes, scale) in the kernel's layout;
    `call(problem, x [M, K] bf16, codes, scale)` gives y [M, N] bf16.
    """

    name: str
    misfit: Callable[[Problem], str | None]
    pack: Callable[..., tuple[torch.Tensor, torch.Tensor]]
    call: Callable[[Problem, torch.Tensor, torch.Tensor, torch.Tensor], torch.Tensor]


def _int4_misfit(problem: Problem) -> str | None:
    group = problem.dense_group or problem.K
    if problem.bits != 4:
        return f"bits={problem.bits}, expected 4"
    if problem.m and (problem.n, problem.m) != (2, 4):
        return f"{problem.n}:{problem.m} sparse, expected dense or 2:4"
    if group not in (32, 64, 128, 256):
        return f"group={group}, expected 32, 64, 128 or 256"
    if problem.K % group:
        return f"K={problem.K}, expected a multiple of the group {group}"
    if problem.N % 16:
        return f"N={problem.N}, expected a multiple of 16"
    return None


def _int4_pack(
    problem: Problem,
    codes: torch.Tensor,
    scale: torch.Tensor,
    zero: torch.Tensor | None,
    meta: torch.Tensor | None,
) -> tuple[torch.Tensor, torch.Tensor]:
    """uint8 [N, K/2] in torch's layout, and bf16 [G, N, 2] of (scale, (8 - zero) * scale)."""
    q = packing.unpack(codes, 4, problem.columns).to(torch.int32)
    offset = torch.full_like(scale, 8.0) if zero is None else zero.to(scale.dtype)
    if meta is not None:
        which = torch.arange(problem.columns, device=q.device) // problem.group
        offsets = offset.to(torch.int32)[:, which.clamp_max(problem.groups - 1)]
        # A masked code must be its group's zero point, so spread the distance from it.
        spread = packing.expand_nm(q - offsets, meta, problem.n, problem.m, problem.K)
        dense = problem.dense_group or problem.K
        q = spread + offset.to(torch.int32).repeat_interleave(dense, 1)[:, : problem.K]
    packed = torch.ops.aten._convert_weight_to_int4pack_for_cpu(q.contiguous(), 1)
    wide = scale.float()
    both = torch.stack([wide.T, ((8.0 - offset.float()) * wide).T], -1)
    return packed, both.to(torch.bfloat16).contiguous()


def _int4_call(
    problem: Problem, x: torch.Tensor, codes: torch.Tensor, scale: torch.Tensor
) -> torch.Tensor:
    group = problem.dense_group or problem.K
    return torch.ops.aten._weight_int4pack_mm_for_cpu(x, codes, group, scale)


def _int8_misfit(problem: Problem) -> str | None:
    if problem.bits != 8:
        return f"bits={problem.bits}, expected 8"
    if problem.m:
        return f"{problem.n}:{problem.m} sparse, expected dense"
    if problem.asym:
        return "zero points, expected symmetric codes"
    if problem.dense_group:
        return f"group={problem.dense_group}, expected one scale per row"
    if problem.K % 16:
        return f"K={problem.K}, expected a multiple of 16 (torch crashes on others)"
    return None


def _int8_pack(
    problem: Problem,
    codes: torch.Tensor,
    scale: torch.Tensor,
    zero: torch.Tensor | None,
    meta: torch.Tensor | None,
) -> tuple[torch.Tensor, torch.Tensor]:
    """int8 [N, K] of q - 128, and bf16 [N]."""
    q = packing.unpack(codes, 8, problem.K).to(torch.int16) - 128
    return q.to(torch.int8).contiguous(), scale[:, 0].to(torch.bfloat16).contiguous()


def _int8_call(
    problem: Problem, x: torch.Tensor, codes: torch.Tensor, scale: torch.Tensor
) -> torch.Tensor:
    return torch.ops.aten._weight_int8pack_mm(x, codes, scale)


KERNELS = (
    CpuKernel(INT4, _int4_misfit, _int4_pack, _int4_call),
    CpuKernel(INT8, _int8_misfit, _int8_pack, _int8_call),
)


def choose(problem: Problem) -> tuple[CpuKernel | None, str]:
    """The kernel that serves `problem`, or None and each kernel's reason."""
    reasons = []
    for kernel in KERNELS:
        why = kernel.misfit(problem)
        if why is None:
            return kernel, ""
        reasons.append(f"{kernel.name}: {why}")
    return None, "; ".join(reasons)


def implementation(kernel: CpuKernel, problem: Problem) -> Callable[..., torch.Tensor]:
    """`llmc.fused_linear` over tensors that `kernel.pack` made; takes no residual and no gain."""

    def call(
        x: torch.Tensor,
        codes: torch.Tensor,
        scale: torch.Tensor,
        zero: torch.Tensor | None = None,
        meta: torch.Tensor | None = None,
        bias: torch.Tensor | None = None,
        *rest: Any,
        **attrs: Any,
    ) -> torch.Tensor:
        rows = x.reshape(-1, problem.K).to(torch.bfloat16).contiguous()
        if not len(rows):
            return x.new_empty(*x.shape[:-1], problem.N)
        y = kernel.call(problem, rows, codes, scale).to(x.dtype)
        if bias is not None:
            y = y + bias
        return y.reshape(*x.shape[:-1], problem.N)

    return call
