"""Codes of up to four bits, and up to eight bits in groups, on torch's int4 kernel.

`_weight_int4pack_mm_for_cpu` reads 4-bit codes with w = (q - 8)·s + z. Fewer bits are a part of its
range, around 8, so that z is 0. Codes of five to eight bits are two planes, q = 16·high + low, each
a product of its own: half the speed of four bits, still ahead of decoding. From some number of
tokens on it is faster to decode a block of rows into bf16 and to let oneDNN multiply: the kernel's
own layout is read back, block by block, so that nothing is held twice.

Layout of torch (found by a probe, see `block_rows`): blocks of B rows, then columns, then B/2 bytes
that hold row d in the low and row d + B/2 in the high nibble.
"""

from __future__ import annotations

import functools
from collections.abc import Mapping

import torch

from ..problem import Parts, Problem
from .kernel import CpuKernel, Tensors, centred_codes, grow, round_up, widen

INT4 = "aten::_weight_int4pack_mm_for_cpu"
GROUPS = (256, 128, 64, 32)  # that the kernel serves
ROWS = 64  # rows are padded to whole blocks
_AT_ONCE = 1 << 20  # weights decoded together: 2 MB of bf16


def unit(problem: Problem) -> int:
    """Columns per scale as the kernel sees them: it divides the problem's group. 0 when none."""
    whole = problem.dense_group or problem.K
    found = next((g for g in GROUPS if whole % g == 0), 0)
    return found or (0 if problem.dense_group else GROUPS[-1])


def _int(problem: Problem, low: int, high: int) -> str | None:
    if problem.weights != "int" or problem.bitmap:
        return f"weights={problem.weights}{' bitmap' * problem.bitmap}, expected int codes"
    if not low <= problem.bits <= high:
        return f"bits={problem.bits}, expected {low} to {high}"
    if not unit(problem):
        return f"group={problem.dense_group}, expected a multiple of 32"
    if problem.x_dtype not in ("bf16", "fp16", "fp32"):
        return f"x_dtype={problem.x_dtype}, expected bf16, fp16 or fp32"
    return None


def _plane(problem: Problem, q: torch.Tensor, scale: torch.Tensor, z: torch.Tensor) -> Tensors:
    """Torch's packing of one plane: uint8 [Np, Kp/2], and bf16 [Kp/unit, Np, 2]."""
    g = unit(problem)
    rows, columns = round_up(problem.N, ROWS), round_up(problem.K, g)
    spread = (problem.dense_group or columns) // g
    both = [
        grow(t.float().repeat_interleave(spread, 1)[:, : columns // g], rows, columns // g).T
        for t in (scale, z)
    ]
    whole = grow(q.to(torch.int32), rows, columns).contiguous()
    return {
        "codes": torch.ops.aten._convert_weight_to_int4pack_for_cpu(whole, 1),
        "scale": torch.stack(both, -1).to(torch.bfloat16).contiguous(),
    }


def _pack4(problem: Problem, parts: Parts) -> Tensors:
    q, zero = centred_codes(problem, parts)
    scale = parts["scale"].float()
    return _plane(problem, q + 8, scale, -zero * scale)


def _pack8(problem: Problem, parts: Parts) -> Tensors:
    """Planes one behind the other: 16·s·(high - 8) + s·(low - 8) + (8 - zero)·s."""
    q, zero = centred_codes(problem, parts)
    q, scale = q + 128, parts["scale"].float()
    high = _plane(problem, q >> 4, 16 * scale, torch.zeros_like(scale))
    low = _plane(problem, q & 15, scale, (8.0 - zero) * scale)
    return {name: torch.stack([high[name], low[name]]) for name in low}


def _small4(problem: Problem, x: torch.Tensor, packed: Mapping[str, torch.Tensor]) -> torch.Tensor:
    g = unit(problem)
    wide = widen(x, round_up(problem.K, g))
    y = torch.ops.aten._weight_int4pack_mm_for_cpu(wide, packed["codes"], g, packed["scale"])
    return y[:, : problem.N]


def _small8(problem: Problem, x: torch.Tensor, packed: Mapping[str, torch.Tensor]) -> torch.Tensor:
    g = unit(problem)
    wide = widen(x, round_up(problem.K, g))
    codes, scale = packed["codes"], packed["scale"]
    high = torch.ops.aten._weight_int4pack_mm_for_cpu(wide, codes[0], g, scale[0])
    low = torch.ops.aten._weight_int4pack_mm_for_cpu(wide, codes[1], g, scale[1])
    return (high.float() + low.float())[:, : problem.N]


@functools.cache
def block_rows() -> int:
    """Rows of a block in torch's layout on this machine; 0 when it is laid out in no known way."""
    probe = torch.randint(0, 16, (ROWS, 32), generator=torch.Generator().manual_seed(0))
    probe = probe.to(torch.int32)
    packed = torch.ops.aten._convert_weight_to_int4pack_for_cpu(probe, 1)
    for rows in (64, 32):
        both = packed.reshape(ROWS // rows, 32, rows // 2)
        whole = torch.cat([both & 15, both >> 4], -1).permute(0, 2, 1).reshape(ROWS, 32)
        if torch.equal(whole.to(torch.int32), probe):
            return rows
    return 0


def _decode(problem: Problem, x: torch.Tensor, packed: Mapping[str, torch.Tensor]) -> torch.Tensor:
    """Blocks of rows to bf16, each multiplied while it is in the cache."""
    rows = block_rows()
    if not rows:
        return (_small4 if problem.bits <= 4 else _small8)(problem, x, packed)
    g = unit(problem)
    planes = packed["codes"].reshape(-1, *packed["codes"].shape[-2:])
    scale = packed["scale"].reshape(-1, *packed["scale"].shape[-3:])[-1]
    N, K = planes.shape[1], round_up(problem.K, g)
    blocks = planes.view(len(planes), N // rows, K, rows // 2)
    # Scale and offset of a block: [blocks, 2 halves, K/g, B/2].
    s, z = (
        scale[..., i].reshape(K // g, N // rows, 2, rows // 2).permute(1, 2, 0, 3).contiguous()
        for i in (0, 1)
    )
    shifted = problem.asym and problem.bits in (4, 8)
    if problem.bits > 4:
        z = z - 8 * s
    step = max(1, _AT_ONCE // (K * rows))
    wide = widen(x, K)
    y = wide.new_empty(len(wide), N)
    codes = torch.empty(step, 2, K, rows // 2, dtype=torch.uint8)
    values = torch.empty(step, 2, K // g, g, rows // 2, dtype=torch.bfloat16)
    weight = torch.empty(K, step * rows, dtype=torch.bfloat16)
    for at in range(0, N // rows, step):
        count = min(step, N // rows - at)
        now = slice(at, at + count)
        _unpack(blocks[:, now], codes[:count])
        values[:count].copy_(codes[:count].view(torch.int8).view(count, 2, K // g, g, rows // 2))
        out = weight[:, : count * rows].view(K // g, g, count, 2, rows // 2).permute(2, 3, 0, 1, 4)
        if shifted:
            offset = z[now].unsqueeze(3)
            torch.addcmul(offset, values[:count], s[now].unsqueeze(3), out=out)
        else:
            torch.mul(values[:count], s[now].unsqueeze(3), out=out)
        torch.mm(wide, weight[:, : count * rows], out=y[:, at * rows : (at + count) * rows])
    return y[:, : problem.N]


def _unpack(planes: torch.Tensor, out: torch.Tensor) -> None:
    """Codes less 8 (one plane) or less 128 (two), as the bytes of int8 [blocks, 2, K, B/2]."""
    low, high = out[:, 0], out[:, 1]
    last = planes[-1]
    torch.bitwise_and(last, 15, out=low)
    torch.bitwise_right_shift(last, 4, out=high)
    if len(planes) == 1:
        out.view(torch.int8).sub_(8)
        return
    first = planes[0]
    low.bitwise_or_(first << 4)
    high.bitwise_or_(first & 0xF0)
    out.bitwise_xor_(0x80)


def _key4(problem: Problem) -> str:
    return f"int4 g{unit(problem)}{' z' * (problem.asym and problem.bits == 4)}"


def _key8(problem: Problem) -> str:
    return f"int4x2 g{unit(problem)}{' z' * (problem.asym and problem.bits == 8)}"


NIBBLES = CpuKernel(
    INT4, lambda p: _int(p, 1, 4), _pack4, {"int4pack": _small4, "decode": _decode},
    ((1, "int4pack"), (32, "decode")), _key4,
)  # fmt: skip
PLANES = CpuKernel(
    f"{INT4} x2", lambda p: _int(p, 5, 8), _pack8, {"int4pack": _small8, "decode": _decode},
    ((1, "int4pack"), (16, "decode")), _key8,
)  # fmt: skip
