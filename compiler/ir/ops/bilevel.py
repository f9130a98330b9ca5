"""The row of scales and zero points that are codes of few bits, shared by blocks of output rows."""

from __future__ import annotations

from typing import Any

import torch

from .. import packing
from ..dims import same
from ..errors import ModelError
from ..types import TensorType
from .base import Tie, llmc_op
from .compressed import groups_of


def _bilevel_type(
    codes: TensorType, step: TensorType | None = None, low: TensorType | None = None, *,
    bits: int, block: int, columns: int,
) -> TensorType:  # fmt: skip
    if not 1 <= bits <= 8:
        raise ModelError(f"expected 1 to 8 bits, found {bits}")
    words, blocks = packing.packed_words(columns, bits), groups_of(columns, block)
    if codes.rank != 2 or codes.dtype != torch.int32 or not same(codes.shape[-1], words):
        raise ModelError(f"expected codes i32[G, {words}] for {columns} columns, found {codes}")
    wide = torch.float32
    for part, name in ((step, "step"), (low, "low")):
        if part is None:
            continue
        wide = torch.promote_types(wide, part.dtype)
        if part.shape != (codes.shape[0], blocks):
            raise ModelError(f"expected {name} [G, {blocks}] beside {codes}, found {part}")
    return TensorType((columns, codes.shape[0]), wide)


def decode_bilevel(
    codes: torch.Tensor, step: torch.Tensor | None = None, low: torch.Tensor | None = None, *,
    bits: int, block: int, columns: int,
) -> torch.Tensor:  # fmt: skip
    """q·step + low, turned over: what a weight's groups share, block after block of its rows.

    Args:
        codes: int32 [G, words], one packed row of ``columns`` codes for each group of inputs.
        step, low: [G, blocks], per ``block`` columns; None means 1 and 0.
    Returns:
        [columns, G], at least fp32.
    """
    wide = torch.float32
    for part in (step, low):
        wide = wide if part is None else torch.promote_types(wide, part.dtype)
    q = packing.unpack(codes, bits, columns).to(wide)
    which = torch.arange(columns, device=codes.device) // block
    q = q if step is None else q * step.to(wide)[:, which]
    q = q if low is None else q + low.to(wide)[:, which]
    return q.t().contiguous()


def _bilevel_ties(out: TensorType, *types: Any, **attrs: Any) -> list[Tie]:
    parts = [i for i, t in enumerate(types) if isinstance(t, TensorType)]
    groups = Tie("same", tuple((i, 0) for i in parts), (1,))
    return [groups, Tie("mix", tuple((i, 1) for i in parts), (0,))]


def _bilevel_sample() -> list[tuple[tuple[Any, ...], dict[str, Any]]]:
    g = torch.Generator().manual_seed(0)
    codes = packing.pack(torch.randint(0, 8, (2, 6), generator=g), 3)
    step, low = (torch.rand(2, 2, generator=g, dtype=torch.float64) for _ in range(2))
    attrs = {"bits": 3, "block": 4, "columns": 6}
    return [((codes, step, low), attrs), ((codes,), attrs)]


llmc_op(
    "decode_bilevel",
    "(Tensor codes, Tensor? step=None, Tensor? low=None, *, int bits, int block, int columns) "
    "-> Tensor",
    _bilevel_type,
    decode_bilevel,
    ties=_bilevel_ties,
    samples=_bilevel_sample,
)
