"""Row of the attention mask by rule: which keys a query may read, from positions and validity."""

from __future__ import annotations

from typing import Any

import torch

from ..dims import same
from ..errors import ModelError
from ..types import TensorType
from .attention import allowed
from .base import Tie, llmc_op


def _infer(
    q_pos: TensorType, k_pos: TensorType, k_valid: TensorType | None = None, **attrs: Any
) -> TensorType:
    for t, name in ((q_pos, "q_pos"), (k_pos, "k_pos"), (k_valid, "k_valid")):
        if t is not None and t.rank != 2:
            raise ModelError(f"expected {name} of rank 2, found {t}")
    if k_valid is not None and not same(k_valid.shape[1], k_pos.shape[1]):
        raise ModelError(f"expected validity per key, found {k_valid} and {k_pos}")
    if not same(q_pos.shape[0], k_pos.shape[0]):
        raise ModelError(f"expected one batch, found {q_pos} and {k_pos}")
    return TensorType((q_pos.shape[0], 1, q_pos.shape[1], k_pos.shape[1]), torch.bool)


def may_read(
    q_pos: torch.Tensor,
    k_pos: torch.Tensor,
    k_valid: torch.Tensor | None = None,
    *,
    causal: bool = True,
    window: int | None = None,
) -> torch.Tensor:
    """bool [B, 1, S, T]: which keys each query may read.

    Args:
        q_pos: int [B, S]; k_pos: int [B, T]; k_valid: bool [B, T], False for padding.
        window: a query at p reads keys at p-window+1 … p (… p+window-1 when not causal).
    """
    return allowed(q_pos, k_pos, k_valid, causal, window)


def _ties(
    out: TensorType, q: TensorType, k: TensorType, valid: TensorType | None = None, **attrs: Any
) -> list[Tie]:
    keys = [(1, 1)] + ([(2, 1)] if valid is not None else [])
    batch = [(0, 0), (1, 0)] + ([(2, 0)] if valid is not None else [])
    return [
        Tie("same", tuple(batch), (0,)),
        Tie("same", ((0, 1),), (2,)),
        Tie("same", tuple(keys), (3,)),
    ]


def _samples() -> list[tuple[tuple[Any, ...], dict[str, Any]]]:
    pos = torch.tensor([[0, 1, 2], [0, 0, 1]])
    valid = torch.tensor([[True, True, True], [False, True, True]])
    return [((pos, pos), {}), ((pos, pos, valid), {"causal": False, "window": 2})]


llmc_op(
    "may_read",
    "(Tensor q_pos, Tensor k_pos, Tensor? k_valid=None, *, bool causal=True, int? window=None) "
    "-> Tensor",
    _infer,
    may_read,
    ties=_ties,
    samples=_samples,
)
