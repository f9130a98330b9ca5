"""The angles of positions, kept once for all layers whose keys are rotated when they are read."""

from __future__ import annotations

from torch import Tensor

from ..ir.ops.semantic import rope
from .cache import KVState, Turn
from .rows import Step


class Angles:
    """Cosines and sines by position, for all rows and for every layer that shares them."""

    def __init__(self, turn: Turn) -> None:
        cos, _, self.interleaved = turn
        self._table = cos.new_zeros(2, 0, cos.shape[-1])

    @property
    def bytes(self) -> int:
        return self._table.nbytes

    def put(self, turn: Turn, pos: Tensor) -> None:
        """Keep the angles of positions int [B, S]; cosines and sines broadcast to [B, 1, S, D]."""
        top = int(pos.max()) + 1
        if top > self._table.shape[1]:
            old, room = self._table, max(top, 2 * self._table.shape[1])
            self._table = old.new_zeros(2, room, old.shape[-1])
            self._table[:, : old.shape[1]] = old
        for row, part in zip(self._table, turn[:2], strict=True):
            row[pos] = part[:, 0].expand(*pos.shape, -1)

    def turned(self, keys: Tensor, pos: Tensor) -> Tensor:
        """Rotated keys [B, KV, T, D] at positions [B, T]."""
        cos, sin = (row[pos][:, None] for row in self._table)
        return rope(keys, cos, sin, interleaved=self.interleaved)


def turn_in(state: KVState, turn: Turn, pos: Tensor) -> None:
    """Keep the angles of new tokens at ``pos`` [B, S], once for all layers that share them."""
    step = state.step or Step()
    for cos, table in step.angles:
        if cos is turn[0] and state.angles in (None, table):
            state.angles = table
            return
    if state.angles is None:
        state.angles = Angles(turn)
    state.angles.put(turn, pos)
    step.angles.append((turn[0], state.angles))
