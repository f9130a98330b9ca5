"""Codes of five to eight bits with one scale per row: torch's int8 kernel, or decoded to bf16.

An integer of eight bits is exact in bf16, so decoding is one conversion and the scale multiplies
the result: y = s·(x·qᵀ), plus (middle - zero)·s times the sum of x where there are zero points.
"""

from __future__ import annotations

from collections.abc import Mapping

import torch

from ..problem import Parts, Problem
from .kernel import CpuKernel, Tensors, centred_codes, grow, round_up, widen

INT8 = "aten::_weight_int8pack_mm"
_STEP = 16  # the kernel crashes on bf16 columns that are no multiple of it
_AT_ONCE = 1 << 20


def misfit(problem: Problem) -> str | None:
    if problem.weights != "int" or problem.bitmap:
        return f"weights={problem.weights}{' bitmap' * problem.bitmap}, expected int codes"
    if not 5 <= problem.bits <= 8:
        return f"bits={problem.bits}, expected 5 to 8"
    if problem.dense_group:
        return f"group={problem.dense_group}, expected one scale per row"
    return None


def middle_codes(problem: Problem, parts: Parts) -> tuple[torch.Tensor, torch.Tensor | None]:
    """int8 [N, K] of the codes less a middle, and what zero points are left add per unit of x:
    fp32 [N], None where it is nothing.
    """
    q, zero = centred_codes(problem, parts)
    moved = -zero[:, 0] * parts["scale"][:, 0].float() if bool(zero.any()) else None
    return q.to(torch.int8).contiguous(), moved


def _pack(problem: Problem, parts: Parts) -> Tensors:
    codes, moved = middle_codes(problem, parts)
    scale = parts["scale"][:, 0].to(torch.bfloat16).contiguous()
    packed = {"codes": grow(codes, problem.N, round_up(problem.K, _STEP)), "scale": scale}
    return packed if moved is None else packed | {"moved": moved}


def _small(problem: Problem, x: torch.Tensor, packed: Mapping[str, torch.Tensor]) -> torch.Tensor:
    codes = packed["codes"]
    wide = widen(x, codes.shape[1])
    return _moved(torch.ops.aten._weight_int8pack_mm(wide, codes, packed["scale"]), wide, packed)


def _decode(problem: Problem, x: torch.Tensor, packed: Mapping[str, torch.Tensor]) -> torch.Tensor:
    codes = packed["codes"]
    wide = widen(x, codes.shape[1])
    y = wide.new_empty(len(wide), problem.N)
    step = max(1, _AT_ONCE // codes.shape[1])
    weight = torch.empty(min(step, problem.N), codes.shape[1], dtype=torch.bfloat16)
    for at in range(0, problem.N, step):
        now = slice(at, min(at + step, problem.N))
        part = weight[: now.stop - at].copy_(codes[now])
        torch.mm(wide, part.t(), out=y[:, now])
    return _moved(y.mul_(packed["scale"]), wide, packed)


def _moved(y: torch.Tensor, x: torch.Tensor, packed: Mapping[str, torch.Tensor]) -> torch.Tensor:
    moved = packed.get("moved")
    return y if moved is None else torch.addr(y.float(), x.float().sum(-1), moved)


BYTES = CpuKernel(
    INT8, misfit, _pack, {"int8pack": _small, "decode": _decode},
    ((1, "int8pack"), (16, "decode")), lambda p: f"int8 row{' z' * (p.asym and p.bits == 8)}",
)  # fmt: skip
