"""A state's own buffers say what ``append`` gives, whoever wrote them."""

from __future__ import annotations

from typing import Any

import pytest
import torch

from llmc.compiler.ir.caches import CacheScheme
from llmc.compiler.ir.dims import BATCH, PAST
from llmc.compiler.ir.errors import ModelError
from llmc.compiler.ir.graph import State
from llmc.compiler.ir.held import Held
from llmc.compiler.ir.types import TensorType
from llmc.compiler.runtime.cache import Cache
from llmc.compiler.runtime.rows import Rows

KINDS = {
    "kv": None,
    "int8": CacheScheme("int8", 8, keys="token"),
    "fp8": CacheScheme("fp8", 8, keys="token"),
    "kivi": CacheScheme("kivi", 4, group=8, residual=16),
}
WIDTHS = (16, 8)


def make(kind: str) -> Any:
    types = tuple(TensorType((BATCH, 2, PAST, n), torch.float32) for n in WIDTHS)
    scheme = KINDS[kind]
    kept = None if scheme is None else {"kv0": (scheme, dict[str, torch.Tensor]())}
    return Cache([State("kv0", kind, types)], 2, 8, "cpu", kept).states["kv0"]


def steps() -> Any:
    """Steps of several tokens, over the borders where codes replace numbers."""
    g, at = torch.Generator().manual_seed(0), 0
    for count in (5, 1, 16, 9, 1, 1, 12):
        k, v = (torch.randn(2, 2, count, n, generator=g) for n in WIDTHS)
        valid = torch.tensor([[True], [at != 1]]).expand(2, count) if at == 1 else None
        yield k, v, torch.arange(at, at + count).expand(2, count), valid
        at += count


def read(state: Any, held: Held) -> list[torch.Tensor]:
    """Keys and values of all tokens, by the description alone."""
    out = []
    for n, side in enumerate((held.keys, held.values)):
        if side.tail is None:
            out.append(side.parts[0][:, :, : held.tokens])
            continue
        kept = state._sides[n]
        parts = [p[:, :, : side.due // m.step] for p, m in zip(side.parts, kept._made, strict=True)]
        coded = kept.codec.decode(parts, WIDTHS[n], torch.float32)
        slots = (torch.arange(side.due, held.tokens) - side.base) % side.tail.shape[2]
        out.append(torch.cat([coded, side.tail[:, :, slots]], 2))
    return out


@pytest.mark.parametrize("kind", KINDS)
def test_held_says_what_append_gives(kind: str) -> None:
    """Step by step; and the states go on alike, whichever way tokens went in."""
    mine, theirs = make(kind), make(kind)
    for step in steps():
        held = mine.hold(*step)
        keys, values, pos, valid = theirs.append(*step)
        assert held is not None
        for a, b in zip(read(mine, held), (keys, values), strict=True):
            assert torch.equal(a, b)
        assert torch.equal(held.pos[:, : held.tokens], pos)
        assert (held.valid is None) == (valid is None)
        assert valid is None or torch.equal(held.real[:, : held.tokens], valid)
        assert held.start + step[0].shape[2] == held.tokens == mine.length == theirs.length


@pytest.mark.parametrize("kind", ["kv", "kivi"])
def test_somebody_else_may_write(kind: str) -> None:
    """``write`` gets the buffers before they are read, and the state makes codes of what is due."""
    mine, theirs = make(kind), make(kind)
    for k, v, pos, valid in steps():

        def write(
            held: Held, real: Any, k: Any = k, v: Any = v, pos: Any = pos, valid: Any = valid
        ) -> None:
            assert real is valid
            new = slice(held.start, held.tokens)
            held.pos[:, new] = pos
            held.real[:, new] = True if real is None else real
            for side, x in ((held.keys, k), (held.values, v)):
                at = torch.arange(held.start, held.tokens)
                if side.tail is None:
                    side.parts[0][:, :, new] = x
                else:
                    side.tail[:, :, at % side.tail.shape[2]] = x

        held = mine.hold(k, v, pos, valid, write)
        keys, values, *_ = theirs.append(k, v, pos, valid)
        assert held is not None
        for a, b in zip(read(mine, held), (keys, values), strict=True):
            assert torch.equal(a, b)


def test_what_a_state_cannot_hold_changes_nothing() -> None:
    """Some rows of a batch, and more new tokens than the ring has room for beside the old."""
    state = make("kivi")
    k, v = (torch.zeros(2, 2, 17, n) for n in WIDTHS)
    assert state.hold(k, v, torch.arange(17).expand(2, 17), None) is None
    plain = make("kv")
    plain.rows = Rows.of([0])
    assert plain.hold(k[:1], v[:1], torch.arange(17)[None], None) is None
    assert (state.length, plain.length) == (0, 0)
    with pytest.raises(ModelError, match="batch of 2, found 1"):
        make("kv").hold(k[:1], v[:1], torch.arange(17)[None], None)
