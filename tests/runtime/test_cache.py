"""The KV cache as a rewrite: same numbers as the whole text at once, or a refusal that says why."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch

from llmc.compiler.analysis.cacheable import cache_refusals
from llmc.compiler.ir.errors import ModelError
from llmc.compiler.ir.graph import Program, State
from llmc.compiler.ir.types import TensorType
from llmc.compiler.ir.verifier import verify
from llmc.compiler.runtime.cache import Cache, KVState, Rows, add_cache
from llmc.compiler.runtime.executor import Runner

Make = Callable[..., Program]


def ids_of(batch: int, length: int) -> torch.Tensor:
    return torch.randint(0, 32, (batch, length), generator=torch.Generator().manual_seed(length))


@pytest.mark.parametrize(
    "attrs",
    [
        {},
        {"window": 3},
        {"softcap": 2.0},
        {"window": 4, "softcap": 2.0},
        {"masked": False},
        {"positions": False},
        {"positions": False, "masked": False, "window": 3},
        {"window": 2, "dilation": 2, "first": 1},
        {"positions": False, "window": 1, "first": 2},
    ],
)
@pytest.mark.parametrize("cuts", [[1] * 9, [5, 1, 1, 2], [9], [2, 7]])
def test_pieces_equal_the_whole(make_tiny: Make, attrs: dict[str, Any], cuts: list[int]) -> None:
    program = make_tiny(**attrs)
    before = str(program.graph)
    ids = ids_of(2, 9)
    whole = Runner(program).forward(ids)
    cached = Runner(add_cache(program))
    cache = cached.start(2, 2)
    pieces = [cached.forward(part, cache=cache) for part in ids.split(cuts, 1)]
    torch.testing.assert_close(torch.cat(pieces, 1), whole, rtol=1e-4, atol=1e-4)
    assert cache.length == 9
    assert str(program.graph) == before


@pytest.mark.parametrize("masked", [True, False])
def test_left_padded_rows_equal_the_rows_alone(make_tiny: Make, masked: bool) -> None:
    program = make_tiny(masked=masked)
    alone = Runner(program)
    cached = Runner(add_cache(program))
    lengths = [2, 6, 4]
    rows = [ids_of(1, n + 3)[0] for n in lengths]
    width = max(lengths)
    ids = torch.zeros(3, width, dtype=torch.int64)
    valid = torch.zeros(3, width, dtype=torch.bool)
    for i, n in enumerate(lengths):
        ids[i, width - n :] = rows[i][:n]
        valid[i, width - n :] = True
    cache = cached.start(3, 2)
    got = [cached.forward(ids, valid, cache=cache)[:, -1]]
    assert cache.tokens().tolist() == lengths
    for step in range(3):
        new = torch.stack([r[n + step] for r, n in zip(rows, lengths, strict=True)])[:, None]
        got.append(cached.forward(new, cache=cache)[:, -1])
    for i, n in enumerate(lengths):
        want = alone.forward(rows[i][None])[0, n - 1 :]
        torch.testing.assert_close(torch.stack([g[i] for g in got]), want, rtol=1e-4, atol=1e-4)


def test_rewind_and_reset(make_tiny: Make) -> None:
    cached = Runner(add_cache(make_tiny()))
    ids = ids_of(1, 8)
    cache = cached.start(1)
    cached.forward(ids[:, :5], cache=cache)
    want = cached.forward(ids[:, 5:6], cache=cache)
    cache.rewind(1)
    cached.forward(ids[:, 6:], cache=cache)
    cache.rewind(2)
    assert cache.length == 5
    torch.testing.assert_close(cached.forward(ids[:, 5:6], cache=cache), want)
    cache.reset()
    cached.forward(ids[:, :5], cache=cache)
    torch.testing.assert_close(cached.forward(ids[:, 5:6], cache=cache), want)
    with pytest.raises(ModelError, match="at most 6 tokens, found 7"):
        cache.rewind(7)


def test_state_is_declared(make_tiny: Make) -> None:
    program = add_cache(make_tiny(layers=3))
    assert list(program.states) == ["kv0", "kv1", "kv2"]
    assert str(program.states["kv1"].types[0]) == "f32[B, 2, P, 4]"
    assert [n.kwargs["state"] for n in program.calls("llmc.cached_attention")] == list(
        program.states
    )
    assert not list(program.calls("llmc.attention"))


def test_cached_program_obeys_the_laws(make_tiny: Make, pylm_program: Program) -> None:
    for program in (make_tiny(), make_tiny(positions=False), pylm_program):
        verify(add_cache(program))


def test_program_without_positions_gets_them_as_input(make_tiny: Make) -> None:
    names = [n.name for n in add_cache(make_tiny(positions=False)).inputs]
    assert names == ["input_ids", "attention_mask", "position_ids"]


def test_refuses_attention_that_is_not_causal(make_tiny: Make) -> None:
    program = make_tiny(causal=False)
    first = next(program.calls("llmc.attention")).name
    with pytest.raises(ModelError, match=f"cache refused {first}: .*still to come.*1 more"):
        add_cache(program)


def test_refuses_a_bias(make_builder: Any) -> None:
    b = make_builder()
    b.input("input_ids", torch.int64)
    x = b.param(1, 2, 3, 4)
    node = b.emit("llmc.attention", x, x, x, None, None, None, b.param(1, 2, 3, 3), scale=1.0)
    refused = cache_refusals(b.done(node))
    assert [(r.node, r.predicate) for r in refused if r.by == "cache"] == [(node.name, "no_bias")]


def test_refuses_keys_of_another_text(make_builder: Any) -> None:
    b = make_builder()
    b.input("input_ids", torch.int64)
    node = b.emit(
        "llmc.attention", b.param(1, 2, 3, 4), b.param(1, 2, 5, 4), b.param(1, 2, 5, 4), scale=1.0
    )
    refused = cache_refusals(b.done(node))
    assert [(r.node, r.predicate) for r in refused if r.by == "cache"] == [(node.name, "own_keys")]


def test_refuses_a_program_without_attention(make_builder: Any) -> None:
    b = make_builder()
    ids = b.input("input_ids", torch.int64)
    program = b.done(b.emit("aten.embedding.default", b.param(32, 4), ids))
    with pytest.raises(ModelError, match=r"no llmc\.attention"):
        add_cache(program)


def test_refuses_mixing_along_the_sequence(make_builder: Any) -> None:
    b = make_builder()
    ids = b.input("input_ids", torch.int64)
    x = b.emit("aten.embedding.default", b.param(32, 4), ids)
    culprit = b.emit("aten.cumsum.default", x, 1)
    with pytest.raises(ModelError, match=culprit.name):
        add_cache(b.done(culprit))


def test_refuses_a_second_cache(make_tiny: Make) -> None:
    with pytest.raises(ModelError, match="without state"):
        add_cache(add_cache(make_tiny()))


def test_buffers_grow_and_keep_what_they_hold() -> None:
    kept = TensorType((1, 2, 3, 4), torch.float32)
    state = KVState(State("kv0", "kv", (kept, kept.with_shape(1, 2, 3, 6))), 1, 2)
    keys, values = torch.randn(1, 2, 11, 4), torch.randn(1, 2, 11, 6)
    start = 0
    for n in (1, 1, 3, 6):
        piece = slice(start, start + n)
        pos = torch.arange(start, start + n)[None]
        k, v, p, valid = state.append(keys[:, :, piece], values[:, :, piece], pos, None)
        start += n
    assert torch.equal(k, keys)
    assert torch.equal(v, values)
    assert p.tolist() == [list(range(11))]
    assert valid is None
    assert state.capacity >= 11
    assert state.bytes == state.capacity * (2 * 4 * 4 + 2 * 6 * 4 + 8 + 1)


def test_state_refuses_another_batch() -> None:
    kept = TensorType((1, 1, 1, 2), torch.float32)
    cache = Cache([State("kv0", "kv", (kept, kept))], 2)
    one = torch.zeros(1, 1, 1, 2)
    with pytest.raises(ModelError, match="batch of 2, found 1 at state kv0"):
        cache.states["kv0"].append(one, one, torch.zeros(1, 1), None)


@pytest.mark.parametrize(
    "parts", [[[0, 2], [1, 3]], [[0], [1, 2, 3]], [[3], [0, 1, 2]], [[1, 3], [0, 2]]]
)
def test_rows_written_apart_are_the_batch_written_whole(parts: list[list[int]]) -> None:
    kept = TensorType((4, 2, 3, 5), torch.float32)
    declared = State("kv0", "kv", (kept, kept))
    whole, apart = KVState(declared, 4, 2), KVState(declared, 4, 2)
    keys, values = torch.randn(4, 2, 6, 5), torch.randn(4, 2, 6, 5)
    valid = torch.ones(4, 6, dtype=torch.bool)
    valid[1, 0] = False
    for t in range(6):
        pos = torch.full((4, 1), t)
        here = slice(t, t + 1)
        want = whole.append(keys[:, :, here], values[:, :, here], pos, valid[:, here])
        for rows in parts:
            apart.rows = Rows.of(rows)
            got = apart.append(
                keys[rows][:, :, here], values[rows][:, :, here], pos[rows], valid[rows][:, here]
            )
            assert apart.length == t
            for a, b in zip(want[:3], got[:3], strict=True):
                assert torch.equal(a[rows], b)
        apart.advance(1)
        assert apart.rows is None
        assert apart.length == whole.length == t + 1
    last = [s.append(keys[:, :, :1], values[:, :, :1], pos, None) for s in (whole, apart)]
    assert all(torch.equal(a, b) for a, b in zip(*last, strict=True))
    assert torch.equal(whole.tokens(), apart.tokens())


def test_rows_of_another_number_are_refused() -> None:
    kept = TensorType((1, 1, 1, 2), torch.float32)
    state = KVState(State("kv0", "kv", (kept, kept)), 3)
    state.rows = Rows.of([0, 2])
    one = torch.zeros(3, 1, 1, 2)
    with pytest.raises(ModelError, match="batch of 2, found 3 at state kv0"):
        state.append(one, one, torch.zeros(3, 1), None)


def test_unknown_kind_of_state_is_refused() -> None:
    with pytest.raises(ModelError, match="'kv', found 'ring'"):
        Cache([State("s", "ring", ())], 1)
