"""Torch's own CPU kernels for compressed linears: which problems they serve, and their packing.

Those of weights alone compute in bf16 (their only fast dtype), so scales and activations are
rounded to bf16; the plan says so. Where inputs are int8 too, sums of products are exact integers.
A 2:4 weight is spread to dense 4-bit codes, masked ones at the zero point: its mask
saves nothing here, and the resident bytes say that too.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

import torch

from ..compiler.ir import packing
from .problem import Problem

INT4 = "aten::_weight_int4pack_mm_for_cpu"
INT8 = "aten::_weight_int8pack_mm"
INT8X8 = "aten::_int_mm"


@dataclass(frozen=True)
class CpuKernel:
    """One torch kernel: its name, why it cannot serve a problem, how to pack for it and call it.

    `pack(problem, codes, scale, zero, meta)` gives (codes, scale) in the kernel's layout;
    `call(problem, x [M, K], codes, scale)` gives y [M, N], in bf16 where ``wide`` is not set.
    `note` says what differs from the reference.
    """

    name: str
    misfit: Callable[[Problem], str | None]
    pack: Callable[..., tuple[torch.Tensor, torch.Tensor]]
    call: Callable[..., torch.Tensor]
    wide: bool = False
    note: str = "scales and activations in bf16"


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


def _int8x8_misfit(problem: Problem) -> str | None:
    if problem.rounded.removesuffix(" limit") not in ("int8 token", "int8 tensor", "int8 static"):
        return f"inputs on grid {problem.rounded or 'none'}, expected int8 with one scale"
    if problem.x_dtype == "bf16":
        return "x_dtype=bf16, expected one that holds 8-bit codes times a scale"
    if problem.m:
        return f"{problem.n}:{problem.m} sparse, expected dense"
    if problem.asym:
        return "zero points, expected symmetric codes"
    if problem.dense_group:
        return f"group={problem.dense_group}, expected one scale per row"
    return None


def _int8x8_pack(
    problem: Problem,
    codes: torch.Tensor,
    scale: torch.Tensor,
    zero: torch.Tensor | None,
    meta: torch.Tensor | None,
) -> tuple[torch.Tensor, torch.Tensor]:
    """int8 [N, K] of q - 2**(bits-1), and fp32 [N]."""
    q = packing.unpack(codes, problem.bits, problem.K).to(torch.int16) - (1 << (problem.bits - 1))
    return q.to(torch.int8).contiguous(), scale[:, 0].float().contiguous()


def _int8x8_call(
    problem: Problem, x: torch.Tensor, codes: torch.Tensor, scale: torch.Tensor,
    unit: torch.Tensor | None = None, limit: float = 0.0,
) -> torch.Tensor:  # fmt: skip
    """x comes as code times scale; its largest magnitude is 127 scales, which gives both back.

    Rows beyond the limit were not rounded and take products of floats.
    """
    x = x.float()
    loose = (x.abs() > limit).any(-1) if limit else None
    if unit is None:
        top = x.abs().amax(-1, keepdim=True) if " token" in problem.rounded else x.abs().amax()
        unit = torch.where(top > 0, top / 127, torch.ones_like(top))
    total = torch._int_mm(torch.round(x / unit).clamp(-127, 127).to(torch.int8), codes.t())
    y = total.float() * unit * scale
    if loose is not None and bool(loose.any()):
        y[loose] = x[loose] @ (codes.float() * scale[:, None]).t()
    return y


KERNELS = (
    CpuKernel(
        INT8X8, _int8x8_misfit, _int8x8_pack, _int8x8_call, True, "sums of products are integers"
    ),
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


def implementation(
    kernel: CpuKernel, problem: Problem, given: Mapping[str, Any] | None = None
) -> Callable[..., torch.Tensor]:
    """`llmc.fused_linear` over tensors that `kernel.pack` made, low rank beside it included.

    It takes no residual and no gain.

    given: what the kernel knows of its input's grid.
    """
    known = given if kernel.wide and given else {}

    def call(
        x: torch.Tensor,
        codes: torch.Tensor,
        scale: torch.Tensor,
        zero: torch.Tensor | None = None,
        meta: torch.Tensor | None = None,
        bias: torch.Tensor | None = None,
        residual: torch.Tensor | None = None,
        gain: torch.Tensor | None = None,
        left: torch.Tensor | None = None,
        right: torch.Tensor | None = None,
        **attrs: Any,
    ) -> torch.Tensor:
        given = x.reshape(-1, problem.K)
        rows = (given if kernel.wide else given.to(torch.bfloat16)).contiguous()
        if not len(rows):
            return x.new_empty(*x.shape[:-1], problem.N)
        y = kernel.call(problem, rows, codes, scale, **known).to(x.dtype)
        if bias is not None:
            y = y + bias
        if left is not None and right is not None:
            y = torch.addmm(y, torch.nn.functional.linear(given, right), left.t())
        return y.reshape(*x.shape[:-1], problem.N)

    return call
