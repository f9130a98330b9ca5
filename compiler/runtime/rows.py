"""What one call is about: which rows of a batch, and what its layers share."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

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


class Step:
    """One forward of a batch, shared by all layers: what is costly to ask is asked once.

    Attributes:
        counter: int32 [1], how many tokens were kept before, where the forward is recorded.
        angles: for each tensor of cosines that was seen, the table that keeps them.
    """

    def __init__(
        self, whole: torch.Tensor | None = None, counter: torch.Tensor | None = None
    ) -> None:
        self._seen = [] if whole is None else [(whole, False)]
        self.counter = counter
        self.angles: list[tuple[torch.Tensor, Any]] = []

    def padded(self, valid: torch.Tensor) -> bool:
        """Whether any of these tokens is padding; waits for the device once per tensor."""
        for tensor, answer in self._seen:
            if tensor is valid:
                return answer
        self._seen.append((valid, not bool(valid.all())))
        return self._seen[-1][1]
