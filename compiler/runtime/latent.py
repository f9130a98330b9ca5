"""State whose keys are kept as what a last matrix makes them of, and made when they are read.

A latent of R numbers stands for the keys of all heads. Every step multiplies all latents that it
reads by the matrix: memory is saved for that work.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from ..ir.caches import CacheScheme
from ..ir.errors import ModelError
from ..ir.graph import State
from .angles import turn_in
from .cache import KVState, Turn, Up


class LatentState(KVState):
    """One layer's latents and values; the interface of `KVState`.

    Args:
        state: k [B, 1, P, R] and v [B, KV, P, E]; scheme: the record.
    """

    def __init__(
        self, state: State, batch: int, capacity: int, device: torch.device | str,
        scheme: CacheScheme,
    ) -> None:  # fmt: skip
        self.scheme = scheme
        super().__init__(state, batch, capacity, device)

    def holds(self, tokens: int) -> bool:
        """Never: keys have to be made first."""
        return False

    def _join(
        self, at: Any, start: int, end: int, k: Tensor, v: Tensor, turn: Turn | None, up: Up | None
    ) -> tuple[Tensor, Tensor]:
        if up is None or (turn is not None) != self.scheme.turned:
            raise ModelError(
                "expected latents, what makes keys of them and their rotation as the record says, "
                "found others", where=f"state {self.name}",
            )  # fmt: skip
        latents, values = super()._join(at, start, end, k, v, None, None)
        made = torch.nn.functional.linear(latents[:, 0], *up)
        heads = values.shape[1]
        keys = made.unflatten(2, (heads, -1)).transpose(1, 2)
        if turn is not None:
            turn_in(self, turn, self._pos[at, start:end])
            keys = self.angles.turned(keys, self._pos[at, :end])
        return keys, values
