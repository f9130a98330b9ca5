"""State whose keys and values are kept as codes: what a call brings is attended as it came.

A call reads what was kept before it as codes say, and its own tokens in full precision; then the
tokens that are due become codes. Which are due follows from the number of tokens alone, so one
stream of keys and values leaves one state however it was cut into calls.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from ..ir.caches import CacheScheme
from ..ir.errors import ModelError
from ..ir.graph import State
from ..ir.held import HELD, HeldSide
from .angles import turn_in
from .cache import KVState, Pair, Turn, Up
from .codecs import Codec, Part, codecs

# Tokens that may be taken back where codes replace numbers: so many more numbers are held.
REWIND = 16


class Apart:
    """Numbers that are kept apart and exact, sorted by token: place in [B, KV, D], and value."""

    def __init__(
        self, shape: tuple[int, int, int], dtype: torch.dtype, device: torch.device
    ) -> None:
        self._shape, self.count = shape, 0
        self._token = torch.empty(0, dtype=torch.int32, device=device)
        self._place, self._value = self._token.clone(), self._token.to(dtype)

    @property
    def bytes(self) -> int:
        return sum(t.nbytes for t in (self._token, self._place, self._value))

    def put(self, rows: Tensor, start: int, x: Tensor, apart: Tensor) -> None:
        """Keep the numbers of x [B', KV, S, D] that ``apart`` marks; ``rows`` are its rows."""
        token, row, head, channel = apart.permute(2, 0, 1, 3).nonzero().unbind(1)
        end = self.count + len(token)
        if end > len(self._token):
            parts = (self._token, self._place, self._value)
            room = max(end, 2 * len(self._token))
            made = [t.new_empty(room) for t in parts]
            for mine, old in zip(made, parts, strict=True):
                mine[: self.count] = old[: self.count]
            self._token, self._place, self._value = made
        _, heads, width = self._shape
        new = slice(self.count, end)
        self._token[new] = (token + start).int()
        self._place[new] = ((rows[row] * heads + head) * width + channel).int()
        self._value[new] = x[row, head, token, channel]
        self.count = end

    def into(self, x: Tensor, rows: Tensor) -> None:
        """Write them into x [B', KV, T, D], whose rows are ``rows``."""
        batch, heads, width = self._shape
        place, at = self._place[: self.count].long(), self._token[: self.count].long()
        local = torch.full((batch,), -1, device=x.device)
        local[rows] = torch.arange(len(rows), device=x.device)
        row = local[place // (heads * width)]
        some = row >= 0
        inner = place % (heads * width)
        x[row[some], (inner // width)[some], at[some], (inner % width)[some]] = self._value[
            : self.count
        ][some]

    def rewind(self, tokens: int) -> None:
        """Forget all tokens but the first ``tokens``."""
        self.count = int((self._token[: self.count] < tokens).sum())


class _Side:
    """Keys, or values: codes, the newest numbers in a ring, the first tokens, what is apart."""

    def __init__(
        self, codec: Codec, scheme: CacheScheme, shape: tuple[int, int, int, torch.dtype],
        device: torch.device, whole: bool,
    ) -> None:  # fmt: skip
        batch, heads, width, dtype = shape
        self.codec, self.whole, self.residual = codec, whole, scheme.residual
        self.shape, self.device = shape, device
        ring = scheme.residual + REWIND if scheme.residual else 0
        self.ring = torch.zeros(batch, heads, ring, width, dtype=dtype, device=device)
        self.first = self.ring.new_zeros(batch, heads, scheme.first, width)
        self.apart = Apart((batch, heads, width), dtype, device)
        self.parts: list[Tensor] = []
        self._made: list[Part] = codec.parts(heads, width)

    def due(self, tokens: int) -> int:
        """How many of so many tokens are codes."""
        if not self.residual:
            return tokens
        # Keys wait until R are there and then all become codes; of values the newest R never are.
        return (
            tokens // self.residual * self.residual
            if self.whole
            else max(0, tokens - self.residual)
        )

    def room(self, capacity: int) -> None:
        """Make room for the codes of that many tokens."""
        tokens, batch = self.due(capacity), self.shape[0]
        self.parts = [
            torch.zeros(batch, p.rows, tokens // p.step, p.columns, dtype=p.dtype,
                        device=self.device)
            for p in self._made
        ]  # fmt: skip

    @property
    def bytes(self) -> int:
        """Bytes beside the parts."""
        return self.ring.nbytes + self.first.nbytes + self.apart.bytes

    def held(self, at: Any, tokens: int) -> Tensor:
        """The newest numbers of rows ``at``, of tokens that are no codes yet."""
        slots = torch.arange(self.due(tokens), tokens, device=self.device)
        return self.ring[at][:, :, slots % max(self.ring.shape[2], 1)]

    def coded(self, at: Any, rows: Tensor, tokens: int) -> Tensor:
        """What codes say of rows ``at``, [B', KV, due, D]."""
        due = self.due(tokens)
        _, heads, width, dtype = self.shape
        if not due:
            return self.ring.new_zeros(len(rows), heads, 0, width)
        parts = [t[at][:, :, : due // p.step] for t, p in zip(self.parts, self._made, strict=True)]
        out = self.codec.decode(parts, width, dtype)
        if self.apart.count:
            self.apart.into(out, rows)
        return out

    def take(self, at: Any, rows: Tensor, start: int, new: Tensor) -> None:
        """Make codes of what new tokens, from ``start`` on, bring due; keep the newest numbers."""
        done, due = self.due(start), self.due(start + new.shape[2])
        if due > done:
            waiting = torch.cat([self.held(at, start), new], 2)
            self.encode(at, rows, done, waiting[:, :, : due - done])
        self.write(at, start, new)

    def write(self, at: Any, start: int, x: Tensor) -> None:
        """Put the newest of x [B', KV, S, D], tokens from ``start`` on, into the ring."""
        ring = self.ring.shape[2]
        if ring:
            skip = max(0, x.shape[2] - ring)
            slots = torch.arange(start + skip, start + x.shape[2], device=self.device) % ring
            new = x[:, :, skip:]
            if isinstance(at, Tensor):  # two lists of indices make the leading axes
                self.ring[at[:, None], :, slots] = new.transpose(1, 2)
            else:
                self.ring[at, :, slots] = new

    def encode(self, at: Any, rows: Tensor, start: int, x: Tensor) -> None:
        """Make codes of x [B', KV, S, D], tokens from ``start`` on."""
        apart = self.codec.apart(x)
        if apart is not None:
            self.apart.put(rows, start, x, apart)
        end = start + x.shape[2]
        for mine, new, p in zip(self.parts, self.codec.encode(x, apart), self._made, strict=True):
            mine[at, :, start // p.step : end // p.step] = new


class KeptState(KVState):
    """One layer's keys and values as a :class:`CacheScheme` says; the interface of `KVState`.

    Args:
        scheme: the record; tensors: those that belong to it, by part.
    """

    def __init__(
        self, state: State, batch: int, capacity: int, device: torch.device | str,
        scheme: CacheScheme, tensors: dict[str, Tensor],
    ) -> None:  # fmt: skip
        k, v = state.types
        made = codecs(scheme, tensors, int(v.shape[1]), int(v.shape[3]))
        device = torch.device(device)
        shapes = [(batch, int(t.shape[1]), int(t.shape[3]), t.dtype) for t in (k, v)]
        self.scheme, self._oldest = scheme, 0
        self._sides = [
            _Side(c, scheme, s, device, whole)
            for c, s, whole in zip(made, shapes, (True, False), strict=True)
        ]
        super().__init__(state, batch, capacity, device)

    def _buffers(self, capacity: int) -> None:
        for side in self._sides:
            side.room(capacity)

    def _growing(self) -> list[Tensor]:
        return [*(t for s in self._sides for t in s.parts), self._pos, self._valid]

    @property
    def bytes(self) -> int:
        return super().bytes + sum(s.bytes for s in self._sides)

    def _join(
        self, at: Any, start: int, end: int, k: Tensor, v: Tensor, turn: Turn | None, up: Up | None
    ) -> tuple[Tensor, Tensor]:
        if up is not None:
            raise ModelError("expected keys, found latents", where=f"state {self.name}")
        if (turn is not None) != self.scheme.turned:
            found = "none" if turn is None else "one"
            raise ModelError(f"expected {'a' if turn is None else 'no'} rotation of keys, "
                             f"found {found}", where=f"state {self.name}")  # fmt: skip
        rows = torch.arange(self.batch, device=self.device)[at]
        early = self._early(at, start, end)
        out: list[Tensor] = []
        for side, new in zip(self._sides, (k, v), strict=True):
            before = torch.cat([side.coded(at, rows, start), side.held(at, start)], 2)
            if early is not None:
                self._exact(side, at, rows, early, before, new, start)
            out.append(torch.cat([before, new], 2))
            if self.rows is None:
                side.take(at, rows, start, new)
                continue
            if not side.residual:
                side.encode(at, rows, start, new)
            side.write(at, start, new)
        if self.rows is None:
            self._aged(end)
        if turn is not None:
            turn_in(self, turn, self._pos[at, start:end])
            out[0] = self.angles.turned(out[0], self._pos[at, :end])
        return out[0], out[1]

    def holds(self, tokens: int) -> bool:
        """So many new tokens leave those in the ring that were no codes before them."""
        return super().holds(tokens) and self.scheme.kind in HELD and tokens <= REWIND

    def _places(self, start: int, end: int, k: Tensor, v: Tensor) -> tuple[HeldSide, HeldSide]:
        out = []
        for side, new in zip(self._sides, (k, v), strict=True):
            fixed = getattr(side.codec, "scale", None)
            parts = (*side.parts, *([] if fixed is None else [fixed]))
            # New tokens are read as they came: from the ring, or from what brings them.
            ringed = side.residual > 0
            tail, base = (side.ring, 0) if ringed else (new, start)
            out.append(HeldSide(parts, side.due(start), tail, base))
        return out[0], out[1]

    def _settle(self, start: int, end: int, new: Pair | None) -> None:
        rows = torch.arange(self.batch, device=self.device)
        if new is None:
            self._from_ring(rows, start, end)
        else:
            for side, theirs in zip(self._sides, new, strict=True):
                side.take(slice(None), rows, start, theirs)
        self._aged(end)

    def _early(self, at: Any, start: int, end: int) -> Tensor | None:
        """bool [B', T]: the first tokens, by position and not by place; None where none is kept."""
        if not self.scheme.first:
            return None
        return (self._pos[at, :end] < self.scheme.first) & self._valid[at, :end]

    def _exact(
        self, side: _Side, at: Any, rows: Tensor, early: Tensor, before: Tensor, new: Tensor,
        start: int,
    ) -> None:  # fmt: skip
        """Write the first tokens' numbers over what codes say, and keep those among the new."""
        pos = self._pos[at]
        row, token = early[:, :start].nonzero().unbind(1)
        before[row, :, token] = side.first[rows[row], :, pos[row, token]]
        row, token = early[:, start:].nonzero().unbind(1)
        side.first[rows[row], :, pos[row, start + token]] = new[row, :, token]

    def advance(self, tokens: int) -> None:
        start, end = self.length, self.length + tokens
        super().advance(tokens)
        self._from_ring(torch.arange(self.batch, device=self.device), start, end)
        self._aged(end)

    def _from_ring(self, rows: Tensor, start: int, end: int) -> None:
        """Make codes of what tokens ``start`` … ``end`` - 1, in the ring by now, bring due."""
        for side in self._sides:
            done, due = side.due(start), side.due(end)
            if side.residual and due > done:
                slots = torch.arange(done, due, device=self.device) % side.ring.shape[2]
                side.encode(slice(None), rows, done, side.ring[:, :, slots])

    def _aged(self, end: int) -> None:
        """The ring holds no token before this one any more."""
        self._oldest = max(self._oldest, end - self._sides[0].ring.shape[2])

    def check_rewind(self, tokens: int) -> None:
        """With a residual window the last ``REWIND`` tokens can always be taken back, or all.

        Raises:
            ModelError: fewer are kept, or numbers that would be needed again are codes by now.
        """
        super().check_rewind(tokens)
        left, residual = self.length - tokens, self.scheme.residual
        if residual and left > 0 and tokens > 0 and max(0, left - residual) < self._oldest:
            most = self.length - self._oldest - residual
            raise ModelError(
                f"expected to rewind at most {most} tokens of a cache whose older tokens are "
                f"codes, found {tokens}",
                where=f"state {self.name}",
            )

    def rewind(self, tokens: int) -> None:
        super().rewind(tokens)
        self._forgot()

    def reset(self) -> None:
        super().reset()
        self._forgot()

    def _forgot(self) -> None:
        if not self.length:
            self._oldest = 0
        for side in self._sides:
            side.apart.rewind(self.length)
