"""Canonical storage of compressed weights -> the tile layout that a kernel row reads.

A tile is 64 output features x one loop step of dense columns, stored contiguously so that a thread
copies 16 bytes at a time. Rows are padded to 64 and columns to a step: padded columns meet x = 0
and padded rows are never stored. Scale and zero point of a group share one 32-bit word (16-bit
scale bits low, zero point high), because 4 bytes is the least that an asynchronous copy moves.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any

import torch

from ..compiler.ir import packing
from ..compiler.ir.errors import ModelError, UsageError
from . import coded, spans
from .by_row import order_rows
from .centre import centre
from .ending import units_of
from .grids import parse
from .mixture.fit import among, router_rows
from .problem import DTYPES, PARTS, Parts, Problem
from .row import RANK_STEP, TILE_ROWS, KernelRow, packed_groups


@dataclass(frozen=True)
class Packed:
    """A prepacked weight: the row it was packed for, its problem and its tensors by argument.

    ``sides`` are those that stay as they are: bias, gain and whatever else a call would bring.
    ``kept`` is what launches keep from call to call; a copy of a weight keeps its own.
    """

    row: KernelRow
    problem: Problem
    tensors: dict[str, torch.Tensor]
    sides: dict[str, torch.Tensor]
    kept: dict[str, Any] = field(default_factory=dict, init=False, repr=False, compare=False)

    def __getitem__(self, name: str) -> torch.Tensor:
        return self.tensors[name]

    @property
    def bytes(self) -> int:
        """Resident bytes of this copy, sides aside."""
        return sum(t.nbytes for t in self.tensors.values())


# Parts that reach a kernel as they are stored.
SIDES = ("bias", "gain", "smooth", "out_gain")


def prepack(row: KernelRow, problem: Problem, **parts: torch.Tensor | None) -> Packed:
    """Pack canonical parts (see `problem.PARTS`) for a row.

    UsageError when the row refuses the problem; ModelError when a tensor does not fit it.
    """
    misfits = row.misfits(problem)
    if misfits:
        raise UsageError("; ".join(str(r) for r in misfits), where=f"kernel row {row.name}")
    given = {name: t for name, t in parts.items() if t is not None}
    check_parts(problem, given)
    sides = {name: given[name] for name in SIDES if name in given}
    # What is read as it is stored is put in order only where sums over its rows are made of it.
    left = {"values"} if row.as_stored and not problem.centred else set[str]()
    ordered, moved = order_rows(problem, {n: t for n, t in given.items() if n not in left})
    if problem.pairs and not problem.out_mixed and "bias" in moved:
        sides["bias"] = pad(moved["bias"][:, None], TILE_ROWS, 1)[:, 0].contiguous()
    tensors = row.pack(row, *((problem, given) if row.as_stored else (ordered, moved)))
    if problem.rank and problem.weights != "factors":
        tensors |= low_rank(ordered, moved)
    if problem.sparse:
        tensors |= entries(ordered, moved)
    if problem.centred:
        tensors |= centre(ordered, moved)
    if problem.out_mixed:
        expect("out_turn", given.get("out_turn"), (problem.N,))
        turn = given["out_turn"].double()
        tensors["turn"] = (units_of(problem).to(turn) / turn).float().contiguous()
    if problem.rounds:
        tensors |= in_grid(problem, given)
    if problem.route:
        expect("router", given.get("router"), (router_rows(problem), problem.K))
        router = given["router"].float() if problem.wide_router else given["router"]
        tensors["router"] = router.contiguous()
    if problem.corrected:
        expect("correction", given.get("correction"), (among(problem),))
        tensors["correction"] = given["correction"].float().contiguous()
    return Packed(row, problem, tensors, sides)


def check_parts(problem: Problem, parts: Parts) -> None:
    """ModelError unless codes, scales, zero points and positions fit the problem."""
    unknown = sorted(set(parts) - set(PARTS))
    if unknown:
        raise ModelError(f"expected parts among {list(PARTS)}, found {unknown}")
    N, G = problem.N, problem.groups
    if problem.coded:
        coded.check(problem, parts)
    elif problem.scale_dtype and problem.weights != "signs":
        expect("scale", parts.get("scale"), (N, G))
        if parts["scale"].dtype != DTYPES.get(problem.scale_dtype):
            raise ModelError(f"expected {DTYPES.get(problem.scale_dtype)} scales, found "
                             f"{parts['scale'].dtype}")  # fmt: skip
    if problem.asym and not problem.coded:
        expect("zero", parts.get("zero"), (N, G))
    elif "zero" in parts:
        raise ModelError("expected no zero points for a symmetric problem, found some")
    if problem.weights in ("int", "table", "paired"):
        words = packing.packed_words(problem.columns, problem.bits)
        expect("codes", parts.get("codes"), (N, words))
    if problem.centred:
        there = {"gain": True, "shift": "shift" in parts, "smooth": problem.smooth}
        for role in [r for r, has in there.items() if has]:
            expect(role, parts.get(role), (problem.K,))
    if problem.m and "meta" not in parts:
        raise ModelError("expected the positions of the kept values, found none")


def in_grid(problem: Problem, parts: Parts) -> dict[str, torch.Tensor]:
    """The stored scales of x's grid, and the limit beyond which tokens are not rounded, in fp32."""
    grid, made = parse(problem.rounds), dict[str, torch.Tensor]()
    assert grid is not None
    if problem.static:
        expect("in_scale", parts.get("in_scale"), (-(-problem.K // (grid.group or problem.K)),))
        made["in_scale"] = parts["in_scale"].float().contiguous()
    if problem.limited:
        device = next(iter(parts.values())).device
        made["limit"] = torch.tensor([grid.limit], device=device)
    return made


def low_rank(problem: Problem, parts: Parts) -> dict[str, torch.Tensor]:
    """left [Np, Rp], or the blocks of its sections, and right [Rp, K up to whole 128s]."""
    left, right = parts.get("left"), parts.get("right")
    expect("left", left, (problem.N, problem.rank))
    expect("right", right, (problem.rank, problem.K))
    assert left is not None
    assert right is not None
    if problem.spans:
        return spans.blocks(problem, parts)
    return {
        "left": pad(left, TILE_ROWS, RANK_STEP).contiguous(),
        "right": pad(right, RANK_STEP, 128).contiguous(),
    }


def entries(problem: Problem, parts: Parts) -> dict[str, torch.Tensor]:
    """Compressed rows -> for every 64 rows, the n-th entry of each together, up to the longest.

    entry_index and entry_values [sum of lengths, 64], entry_starts [Np/64 + 1] where each 64 begin.
    """
    starts = parts["csr_starts"].to(torch.int64)
    expect("csr_starts", starts, (problem.N + 1,))
    index, values = parts["csr_index"], parts["csr_values"]
    if index.numel() and not 0 <= int(index.min()) <= int(index.max()) < problem.K:
        raise ModelError(f"expected entries in columns below {problem.K}, found {int(index.max())}")
    lengths = starts.diff()
    short = -problem.N % TILE_ROWS
    longest = torch.nn.functional.pad(lengths, (0, short)).reshape(-1, TILE_ROWS).amax(1)
    begins = torch.nn.functional.pad(longest.cumsum(0), (1, 0))
    rows = torch.repeat_interleave(torch.arange(problem.N, device=starts.device), lengths)
    nth = torch.arange(len(rows), device=starts.device) - starts[rows]
    at = (begins[rows // TILE_ROWS] + nth) * TILE_ROWS + rows % TILE_ROWS
    room = int(begins[-1]) * TILE_ROWS
    narrow = torch.int16 if problem.K <= 1 << 15 else torch.int32
    return {
        "entry_starts": begins.to(torch.int32),
        "entry_index": index.new_zeros(room, dtype=narrow).scatter(0, at, index.to(narrow)),
        "entry_values": values.new_zeros(room).scatter(0, at, values),
    }


def scale_tiles(row: KernelRow, problem: Problem, parts: Parts) -> torch.Tensor:
    """scale [N, G] and zero [N, G] of `parts` -> int32 [Np/64, Gp, 64]."""
    scale, zero = parts["scale"], parts.get("zero")
    word = scale.contiguous().view(torch.int16).to(torch.int64) & 0xFFFF
    if zero is not None:
        word = word | (zero.to(torch.int64) << 16)
    word = pad(word, TILE_ROWS, 1)
    short = packed_groups(row, problem) - word.shape[1]
    word = torch.nn.functional.pad(word, (0, short))
    tiles = word.reshape(word.shape[0] // TILE_ROWS, TILE_ROWS, -1).permute(0, 2, 1)
    return wrap(tiles).contiguous()


def words(nibbles: torch.Tensor) -> torch.Tensor:
    """[..., 8] values of 4 bits -> int32 [...], element i at bit 4 i."""
    shifts = torch.arange(0, 32, 4, device=nibbles.device)
    return wrap((nibbles << shifts).sum(-1)).contiguous()


def wrap(value: torch.Tensor) -> torch.Tensor:
    """int64 in [0, 2**32) -> the int32 with the same bits."""
    return torch.where(value >= 1 << 31, value - (1 << 32), value).to(torch.int32)


def pad(value: torch.Tensor, rows: int, columns: int) -> torch.Tensor:
    """[rows, columns] with zeros behind, up to multiples of both."""
    short = (0, -value.shape[1] % columns, 0, -value.shape[0] % rows)
    return torch.nn.functional.pad(value, short)


def expect(name: str, tensor: torch.Tensor | None, shape: tuple[int, ...]) -> None:
    """ModelError unless a tensor has that shape."""
    if tensor is None or tuple(tensor.shape) != shape:
        found = "none" if tensor is None else list(tensor.shape)
        raise ModelError(f"expected {name} of shape {list(shape)}, found {found}")
