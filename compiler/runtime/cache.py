"""The KV cache as a rewrite: every attention node becomes one that appends to declared state.

The rewrite is allowed only where the token-wise proof holds: everything but attention treats tokens
one by one, so running new tokens alone against the kept keys and values is the same computation.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from typing import Any

import torch
from torch import fx

from ..analysis.cacheable import argument, cache_refusals
from ..analysis.slopes import Slopes, slopes_of
from ..ir.caches import PLAIN, CacheScheme
from ..ir.dims import BATCH, PAST, SEQ
from ..ir.errors import ModelError
from ..ir.graph import Info, Program, State, tensor_type
from ..ir.held import Held, HeldSide, Write
from ..ir.ops.heads import SLOPES
from ..ir.segments import refresh_segments
from ..ir.types import TensorType
from .cached_inputs import BY, before_rotation, latent, slopes
from .rows import Rows, Step

_ATTRIBUTES = ("scale", "causal", "window", "softcap", "dilation", "first")


def add_cache(program: Program) -> Program:
    """A clone of ``program`` whose attention nodes append to state ``kv0``, ``kv1``, …

    The clone's inputs describe only the new tokens; ``position_ids`` [B, S] becomes an input when
    the program has none, as kept keys need positions.
    Raises:
        ModelError: the program cannot be cached; the message names the first culprit node.
    """
    if program.states:
        raise ModelError(f"expected a program without state, found {sorted(program.states)}")
    refused = cache_refusals(program)
    if refused:
        more = f" (and {len(refused) - 1} more)" if len(refused) > 1 else ""
        raise ModelError(f"expected a program that can have a KV cache: {refused[0]}{more}")
    out = program.clone()
    for i, node in enumerate(list(out.calls("llmc.attention"))):
        q, k, v = node.args[:3]
        assert isinstance(k, fx.Node)
        assert isinstance(v, fx.Node)
        q_pos = argument(node, 3, "q_pos")
        if q_pos is None:
            q_pos = _positions(out)
        name = f"kv{i}"
        attrs: dict[str, Any] = {a: node.kwargs[a] for a in _ATTRIBUTES if a in node.kwargs}
        scheme, rest = out.caches.pop(node.name, None), tuple[fx.Node | None, ...]()
        if scheme is not None and scheme.kind == "latent":
            k, rest = latent(out, node, attrs)
        elif scheme is not None and scheme.turned:
            k, rest = before_rotation(node, attrs)
        found = slopes_of(node)
        if isinstance(found, Slopes):
            rest = (*rest, *[None] * (SLOPES - 7 - len(rest)), slopes(out, node, found))
        cached = out.emit(
            "llmc.cached_attention", q, k, v, q_pos, argument(node, 5, "k_valid"), None,
            argument(node, 7, "sinks"), *rest, before=node, made_by=BY, like=node, state=name,
            **attrs,
        )  # fmt: skip
        node.replace_all_uses_with(cached)
        out.graph.erase_node(node)
        kind = PLAIN if scheme is None else scheme.kind
        out.states[name] = State(name, kind, tuple(_kept(tensor_type(t)) for t in (k, v)))
        if scheme is not None:
            out.caches[name] = scheme
    out.prune()
    refresh_segments(out)
    return out


def _positions(program: Program) -> fx.Node:
    for node in program.inputs:
        if node.name == "position_ids":
            return node
    with program.graph.inserting_after(program.inputs[-1]):
        node = program.graph.placeholder("position_ids")
    node.meta["llmc"] = Info(TensorType((BATCH, SEQ), torch.int64), made_by=BY)
    return node


def _kept(t: TensorType) -> TensorType:
    return t.with_shape(t.shape[0], t.shape[1], PAST, t.shape[3])


Pair = tuple[torch.Tensor, torch.Tensor]
# Cosines and sines of the new tokens' positions, and how channels pair up; see ``llmc.rope``.
Turn = tuple[torch.Tensor, torch.Tensor, bool]
# The matrix and the bias that make keys of latents.
Up = tuple[torch.Tensor, torch.Tensor | None]


class KVState:
    """One layer's keys and values in buffers that grow by doubling, with positions and validity.

    Args:
        state: the declared state: k [B, KV, P, D] and v [B, KV, P, E].
        batch: rows; capacity: tokens to make room for at first.
    Attributes:
        pending: validity of the next tokens where the graph carries none.
        rows: which rows the next tokens are of; None for all. While it is set, ``append`` writes
            behind what is kept and ``advance`` counts the tokens once all rows are written.
        step: the running forward, None outside of ``Cache.begin``.
        angles: a table by position where keys are kept before their rotation, else None.
    """

    angles: Any = None

    def __init__(
        self, state: State, batch: int, capacity: int = 256, device: torch.device | str = "cpu"
    ) -> None:
        k, v = state.types
        self.name, self.length, self.device = state.name, 0, torch.device(device)
        self._shapes = [(batch, int(t.shape[1]), int(t.shape[3]), t.dtype) for t in (k, v)]
        self.batch = batch
        self.pending: torch.Tensor | None = None
        self.rows: Rows | None = None
        self.step: Step | None = None
        self._allocate(capacity)

    def _allocate(self, capacity: int) -> None:
        self.capacity = capacity
        self._buffers(capacity)
        self._pos = torch.zeros(self.batch, capacity, dtype=torch.int64, device=self.device)
        self._valid = torch.ones(self.batch, capacity, dtype=torch.bool, device=self.device)
        self._padded = False

    def _buffers(self, capacity: int) -> None:
        """Make room for keys and values of that many tokens."""
        self._kv = [
            torch.empty(b, h, capacity, d, dtype=dtype, device=self.device)
            for b, h, d, dtype in self._shapes
        ]

    def _growing(self) -> list[torch.Tensor]:
        """What grows with the tokens, [B, *, T, *] or [B, T]; filled from the front."""
        return [*self._kv, self._pos, self._valid]

    @property
    def bytes(self) -> int:
        """Bytes of the buffers, filled or not."""
        return sum(t.nbytes for t in self._growing())

    def reserve(self, tokens: int) -> None:
        """Make room for ``tokens`` in all; what is kept stays."""
        if tokens <= self.capacity:
            return
        old, padded = self._growing(), self._padded
        self._allocate(max(tokens, 2 * self.capacity))
        for mine, theirs in zip(self._growing(), old, strict=True):
            axis = 2 if mine.dim() == 4 else 1
            mine.narrow(axis, 0, theirs.shape[axis]).copy_(theirs)
        self._padded = padded

    def append(
        self, k: torch.Tensor, v: torch.Tensor, pos: torch.Tensor, valid: torch.Tensor | None,
        turn: Turn | None = None, up: Up | None = None,
    ) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor, torch.Tensor | None]:  # fmt: skip
        """Keep new tokens; return all: k [B, KV, T, D], v [B, KV, T, E], int and bool [B, T].

        The last is None while no token is padding. Views: read them before the next append.
        A graph that carries no validity (``valid`` None) takes the one given to ``Cache.begin``.
        ``turn`` is the rotation of keys that come before theirs, ``up`` what makes keys of latents;
        not every kind of state takes them.
        Raises:
            ModelError: another batch than the state was made for.
        """
        at, start, end, real = self._admit(k, valid)
        self._mark(at, start, end, pos, real)
        keys, values = self._join(at, start, end, k, v, turn, up)
        if self.rows is None:
            self.length = end
        return keys, values, self._pos[at, :end], self._valid[at, :end] if self._padded else None

    def hold(
        self, k: torch.Tensor, v: torch.Tensor, pos: torch.Tensor, valid: torch.Tensor | None,
        write: Write | None = None,
    ) -> Held | None:  # fmt: skip
        """Keep new tokens as ``append`` does, but give the buffers themselves, nothing decoded.

        None, and nothing is kept, where ``holds`` says no. ``write`` puts tokens, positions and
        validity into the buffers instead of the state; it fills k too, where k is read as it is.
        Raises:
            ModelError: another batch than the state was made for.
        """
        if not self.holds(k.shape[2]):
            return None
        at, start, end, real = self._admit(k, valid)
        sides = self._places(start, end, k, v)
        held = Held(*sides, self._pos, self._valid, self._padded, start, end, self.counter)
        if write is None:
            self._mark(at, start, end, pos, real)
        else:
            write(held, real)
        self._settle(start, end, None if write is not None else (k, v))
        self.length = end
        return held

    def holds(self, tokens: int) -> bool:
        """Whether ``hold`` takes that many new tokens now."""
        return self.rows is None

    @property
    def counter(self) -> torch.Tensor | None:
        """int32 [1], how many tokens are kept, where the running forward is being recorded."""
        return None if self.step is None else self.step.counter

    def _places(
        self, start: int, end: int, k: torch.Tensor, v: torch.Tensor
    ) -> tuple[HeldSide, HeldSide]:
        """Where keys and values lie once tokens ``start`` … ``end`` - 1 are in."""
        return HeldSide((self._kv[0],), end), HeldSide((self._kv[1],), end)

    def _settle(self, start: int, end: int, new: Pair | None) -> None:
        """Keep new keys and values behind ``start``; None where they are in the buffers by now."""
        for mine, theirs in zip(self._kv, new or (), strict=False):
            mine[:, :, start:end] = theirs

    def _admit(
        self, k: torch.Tensor, valid: torch.Tensor | None
    ) -> tuple[Any, int, int, torch.Tensor | None]:
        """Make room for new tokens: (rows, start, end) of where they go, and which are real."""
        rows = self.rows
        expected = self.batch if rows is None else rows.count
        if k.shape[0] != expected:
            raise ModelError(
                f"expected a batch of {expected}, found {k.shape[0]}", where=f"state {self.name}"
            )
        at: Any = slice(None) if rows is None else rows.index
        start, end = self.length, self.length + k.shape[2]
        self.reserve(end)
        if valid is None:
            valid = self.pending if rows is None or self.pending is None else self.pending[at]
        if valid is not None:
            self._padded = self._padded or (self.step or Step()).padded(valid)
        return at, start, end, valid

    def _mark(
        self, at: Any, start: int, end: int, pos: torch.Tensor, real: torch.Tensor | None
    ) -> None:
        """Keep positions and validity of new tokens."""
        self._pos[at, start:end] = pos
        self._valid[at, start:end] = True if real is None else real

    def _join(
        self, at: Any, start: int, end: int, k: torch.Tensor, v: torch.Tensor,
        turn: Turn | None, up: Up | None,
    ) -> tuple[torch.Tensor, torch.Tensor]:  # fmt: skip
        """Keep k and v of rows ``at`` behind ``start``; keys and values of all their tokens."""
        if turn is not None or up is not None:
            said = "rotated keys, found a rotation" if up is None else "keys, found latents"
            raise ModelError(f"expected {said}", where=f"state {self.name}")
        self._kv[0][at, :, start:end] = k
        self._kv[1][at, :, start:end] = v
        return self._kv[0][at, :, :end], self._kv[1][at, :, :end]

    def advance(self, tokens: int) -> None:
        """Count tokens that were appended row by row; all rows are whole again."""
        self.rows = None
        self.length += tokens

    def tokens(self) -> torch.Tensor:
        """int64 [B]: real tokens kept in each row."""
        return self._valid[:, : self.length].sum(1)

    def check_rewind(self, tokens: int) -> None:
        """Raises ModelError where the last ``tokens`` tokens cannot be taken back."""
        if not 0 <= tokens <= self.length:
            raise ModelError(
                f"expected to rewind at most {self.length} tokens, found {tokens}",
                where=f"state {self.name}",
            )

    def rewind(self, tokens: int) -> None:
        """Forget the last ``tokens`` tokens.

        Raises:
            ModelError: fewer are kept.
        """
        self.check_rewind(tokens)
        self.length -= tokens

    def reset(self) -> None:
        """Forget everything; the buffers stay."""
        self.length, self._padded = 0, False


# A record and its tensors by part.
Kept = tuple[CacheScheme, dict[str, torch.Tensor]]


class Cache:
    """All states of one running batch, by name.

    Args:
        kept: record and tensors of the states that are kept in another way than they come.
    Attributes:
        prompt: tokens that were kept when decoding token by token began.
        counter: int32 [1], how many tokens are kept, while steps are recorded.
    """

    def __init__(
        self,
        states: Iterable[State],
        batch: int,
        capacity: int = 256,
        device: torch.device | str = "cpu",
        kept: Mapping[str, Kept] | None = None,
    ) -> None:
        from .kept import KeptState
        from .latent import LatentState

        self.batch, self.prompt = batch, 0
        self.counter: torch.Tensor | None = None
        self.states: dict[str, KVState] = {}
        for s in states:
            how = (kept or {}).get(s.name)
            if s.kind != (PLAIN if how is None else how[0].kind):
                raise ModelError(f"expected state of kind 'kv', found {s.kind!r}", where=s.name)
            if how is None:
                self.states[s.name] = KVState(s, batch, capacity, device)
            elif s.kind == "latent":
                self.states[s.name] = LatentState(s, batch, capacity, device, how[0])
            else:
                self.states[s.name] = KeptState(s, batch, capacity, device, *how)

    @property
    def length(self) -> int:
        """Tokens kept, padding included."""
        return next((s.length for s in self.states.values()), 0)

    @property
    def bytes(self) -> int:
        """Bytes of all buffers, and of the angles that several states may share."""
        shared = {id(s.angles): s.angles.bytes for s in self.states.values() if s.angles}
        return sum(s.bytes for s in self.states.values()) + sum(shared.values())

    def rewind(self, tokens: int) -> None:
        """Forget the last ``tokens`` tokens of every state, or of none where one refuses.

        Raises:
            ModelError: fewer are kept, or codes have replaced what would be needed again.
        """
        for s in self.states.values():
            s.check_rewind(tokens)
        for s in self.states.values():
            s.rewind(tokens)

    def reset(self) -> None:
        """Forget everything."""
        for s in self.states.values():
            s.reset()

    def begin(self, valid: torch.Tensor | None, whole: torch.Tensor | None = None) -> None:
        """Start a step: which of the next tokens are real, bool [B, S], None for all.

        ``whole`` is a validity that is known to name no padding.
        """
        step = Step(whole, self.counter)
        pending = valid if valid is not None and step.padded(valid) else None
        for s in self.states.values():
            s.pending, s.step, s.rows = pending, step, None

    def tokens(self) -> torch.Tensor:
        """int64 [B]: real tokens kept in each row, which is the next token's position."""
        return next(iter(self.states.values())).tokens()
