"""Canonical storage of compressed weights -> the tile layout that a kernel row reads.

A tile is 64 output features x one loop step of dense columns, stored contiguously so that a thread
copies 16 bytes at a time. Rows are padded to 64 and columns to a step: padded columns meet x = 0
and padded rows are never stored. Scale and zero point of a group share one 32-bit word (16-bit
scale bits low, zero point high), because 4 bytes is the least that an asynchronous copy moves.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch

from ..compiler.ir import packing
from ..compiler.ir.errors import ModelError, UsageError
from .kernels import TILE_ROWS, KernelRow, Problem, packed_groups


@dataclass(frozen=True)
class Packed:
    """A prepacked weight: the row it was packed for, its problem and its two tensors.

    codes: int32 tiles (layout in the row's `args`). scale: int32 [Np/64, Gp, 64].
    """

    row: KernelRow
    problem: Problem
    codes: torch.Tensor
    scale: torch.Tensor

    @property
    def bytes(self) -> int:
        """Resident bytes of this copy."""
        return self.codes.nbytes + self.scale.nbytes


def prepack(
    row: KernelRow,
    problem: Problem,
    codes: torch.Tensor,
    scale: torch.Tensor,
    zero: torch.Tensor | None = None,
    meta: torch.Tensor | None = None,
) -> Packed:
    """Pack canonical codes [N, words], scale [N, G], zero [N, G] and kept positions [N, words].

    UsageError when the row refuses the problem; ModelError when a tensor does not fit it.
    """
    misfits = row.misfits(problem)
    if misfits:
        raise UsageError("; ".join(str(r) for r in misfits), where=f"kernel row {row.name}")
    N, G = problem.N, problem.groups
    _expect("scale", scale, (N, G))
    if problem.asym:
        _expect("zero", zero, (N, G))
    elif zero is not None:
        raise ModelError("expected no zero points for a symmetric problem, found some")
    q = packing.unpack(codes, problem.bits, problem.columns).to(torch.int64)
    _expect("codes", q, (N, problem.columns))
    if problem.m:
        if meta is None:
            raise ModelError("expected the positions of the kept values, found none")
        tiles = _sparse_tiles(row, problem, q, meta, zero)
    else:
        tiles = _dense_tiles(row, problem, q)
    return Packed(row, problem, tiles, _scale_tiles(row, problem, scale, zero))


def _dense_tiles(row: KernelRow, problem: Problem, q: torch.Tensor) -> torch.Tensor:
    """q [N, K] -> int32 [Np/64, Kp/128, 64, 16].

    Column 32 j + 2 w + e of a step is nibble j + 4 e of word w.
    """
    q = _pad(q, TILE_ROWS, row.step)
    q = q.reshape(q.shape[0] // TILE_ROWS, TILE_ROWS, -1, 4, 16, 2).permute(0, 2, 1, 4, 5, 3)
    return _words(q.flatten(-2))


def _sparse_tiles(
    row: KernelRow,
    problem: Problem,
    q: torch.Tensor,
    meta: torch.Tensor,
    zero: torch.Tensor | None,
) -> torch.Tensor:
    """Kept q [N, K/2] and their positions -> int32 [Np/64, Kp/256, 3, 64, 8].

    The sections are first kept code ^ zero, second kept code ^ zero, and the keep mask (bit i:
    column i of the block is kept); nibble p of word w belongs to block 8 p + w of the step.
    """
    where = packing.unpack(meta, packing.nm_bits(problem.m), problem.columns).to(torch.int64)
    _expect("meta", where, (problem.N, problem.columns))
    if zero is None:
        q = q ^ 8
    else:
        columns = torch.arange(problem.columns, device=q.device)
        q = q ^ zero.to(torch.int64)[:, columns // (problem.dense_group // 2 or problem.columns)]
    first, second = q[:, 0::2], q[:, 1::2]
    if bool((where[:, 0::2] >= where[:, 1::2]).any()):
        raise ModelError("expected ascending kept positions in each block of 4, found others")
    keep = (1 << where[:, 0::2]) | (1 << where[:, 1::2])
    sections = []
    for nibbles in (first, second, keep):
        nibbles = _pad(nibbles, TILE_ROWS, row.step // 4)
        nibbles = nibbles.reshape(nibbles.shape[0] // TILE_ROWS, TILE_ROWS, -1, 8, 8)
        sections.append(_words(nibbles.permute(0, 2, 1, 4, 3)))
    return torch.stack(sections, 2).contiguous()


def _scale_tiles(
    row: KernelRow, problem: Problem, scale: torch.Tensor, zero: torch.Tensor | None
) -> torch.Tensor:
    """scale [N, G] and zero [N, G] -> int32 [Np/64, Gp, 64]."""
    dtype = torch.bfloat16 if problem.scale_dtype == "bf16" else torch.float16
    if scale.dtype != dtype:
        raise ModelError(f"expected {dtype} scales, found {scale.dtype}")
    word = scale.contiguous().view(torch.int16).to(torch.int64) & 0xFFFF
    if zero is not None:
        word = word | (zero.to(torch.int64) << 16)
    word = _pad(word, TILE_ROWS, 1)
    short = packed_groups(row, problem) - word.shape[1]
    word = torch.nn.functional.pad(word, (0, short))
    tiles = word.reshape(word.shape[0] // TILE_ROWS, TILE_ROWS, -1).permute(0, 2, 1)
    return _wrap(tiles).contiguous()


def _words(nibbles: torch.Tensor) -> torch.Tensor:
    """[..., 8] values of 4 bits -> int32 [...], element i at bit 4 i."""
    shifts = torch.arange(0, 32, 4, device=nibbles.device)
    return _wrap((nibbles << shifts).sum(-1)).contiguous()


def _wrap(value: torch.Tensor) -> torch.Tensor:
    """int64 in [0, 2**32) -> the int32 with the same bits."""
    return torch.where(value >= 1 << 31, value - (1 << 32), value).to(torch.int32)


def _pad(value: torch.Tensor, rows: int, columns: int) -> torch.Tensor:
    short = (0, -value.shape[1] % columns, 0, -value.shape[0] % rows)
    return torch.nn.functional.pad(value, short)


def _expect(name: str, tensor: torch.Tensor | None, shape: tuple[int, ...]) -> None:
    if tensor is None or tuple(tensor.shape) != shape:
        found = "none" if tensor is None else list(tensor.shape)
        raise ModelError(f"expected {name} of shape {list(shape)}, found {found}")
