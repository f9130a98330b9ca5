"""Where a state keeps keys and values, for kernels that read its buffers as they are."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

from torch import Tensor

# Kinds of coded state whose buffers can be read so.
HELD = ("int8", "fp8", "kivi")


@dataclass(frozen=True)
class HeldSide:
    """One layer's keys, or values.

    Attributes:
        parts: buffers [B, KV, capacity, *]: numbers; or codes, scales and lows as the state's codec
            makes them, a stored scale [KV, D] last.
        due: tokens 0 … due-1 are found in ``parts``.
        tail: numbers [B, KV, R, D] of the others; token t is at (t - base) mod R. None where all
            are found in ``parts``.
    """

    parts: tuple[Tensor, ...]
    due: int
    tail: Tensor | None = None
    base: int = 0


@dataclass(frozen=True)
class Held:
    """One layer's cache after a step's tokens went in.

    Attributes:
        pos: int64 [B, capacity]; real: bool [B, capacity], False for padding.
        padded: whether some token is padding.
        start, tokens: how many were kept before the step and are kept now.
        counter: int32 [1], ``start`` on the device, where the step is recorded to be repeated.
    """

    keys: HeldSide
    values: HeldSide
    pos: Tensor
    real: Tensor
    padded: bool
    start: int
    tokens: int
    counter: Tensor | None = None

    @property
    def valid(self) -> Tensor | None:
        """``real``, or None while no token is padding."""
        return self.real if self.padded else None


# What puts new tokens where the buffers say: (buffers, validity of the tokens bool [B, S] or None).
Write = Callable[[Held, Tensor | None], None]
