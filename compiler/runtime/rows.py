"""Which rows of a batch a call is about."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch


@dataclass(frozen=True)
class Rows:
    """Some rows of a batch: a run of them as a slice, which copies nothing, else their indices."""

    index: slice | torch.Tensor
    count: int

    @staticmethod
    def of(rows: Sequence[int], device: torch.device | str = "cpu") -> Rows:
        """Ascending row numbers, at least one."""
        if rows[-1] - rows[0] + 1 == len(rows):
            return Rows(slice(rows[0], rows[-1] + 1), len(rows))
        return Rows(torch.tensor(rows, device=device), len(rows))
