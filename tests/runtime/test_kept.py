"""States of codes: what is exact, when codes replace numbers; cuts and rewinds do not show."""

from __future__ import annotations

from typing import Any

import pytest
import torch

from llmc.compiler.ir.caches import CacheScheme
from llmc.compiler.ir.dims import BATCH, PAST
from llmc.compiler.ir.errors import ModelError
from llmc.compiler.ir.graph import State
from llmc.compiler.ir.ops.semantic import rope
from llmc.compiler.ir.packing import packed_words
from llmc.compiler.ir.types import TensorType
from llmc.compiler.pipeline.caches import levels, ranges
from llmc.compiler.runtime.cache import Cache, KVState, Rows
from llmc.compiler.runtime.kept import REWIND, KeptState

HEADS, WIDTH, R = 2, 16, 8
KIVI = CacheScheme("kivi", 4, 4, R)
SCHEMES = {
    "int8": CacheScheme("int8", 8, keys="token"),
    "int8_static": CacheScheme("int8", 8, keys="channel"),
    "fp8": CacheScheme("fp8", 8, keys="token"),
    "kivi2": CacheScheme("kivi", 2, 4, R),
    "kivi4": KIVI,
    "kivi8": CacheScheme("kivi", 8, 8, R),
    "kvquant": CacheScheme("kvquant", 3, first=1, outliers=0.1),
    "kvquant_turned": CacheScheme("kvquant", 2, first=2, outliers=0.1, turned=True),
}


def stream(tokens: int, batch: int = 2, seed: int = 0) -> tuple[torch.Tensor, torch.Tensor]:
    g = torch.Generator().manual_seed(seed)
    k, v = (torch.randn(batch, HEADS, tokens, WIDTH, generator=g) for _ in range(2))
    return k, v


def tensors(scheme: CacheScheme) -> dict[str, torch.Tensor]:
    k, v = stream(256, seed=9)
    rows = k.transpose(1, 2).flatten(0, 1)
    if scheme.kind == "kvquant":
        table = levels(v.flatten().clamp(-2, 2) / 2, None, scheme.bits, norm=False)
        span = ranges(rows, scheme.outliers)
        return {"key_range": span, "key_levels": table, "value_levels": table}
    return {"key_scale": rows.abs().amax(0) / 127} if scheme.keys == "channel" else {}


def state(scheme: CacheScheme | None, batch: int = 2, capacity: int = 4) -> KVState:
    t = TensorType((BATCH, HEADS, PAST, WIDTH), torch.float32)
    declared = State("kv0", "kv" if scheme is None else scheme.kind, (t, t))
    if scheme is None:
        return KVState(declared, batch, capacity)
    return KeptState(declared, batch, capacity, "cpu", scheme, tensors(scheme))


def feed(
    s: KVState, k: torch.Tensor, v: torch.Tensor, cuts: list[int], valid: torch.Tensor | None = None
) -> Any:
    """Append a stream piece by piece; what the last piece is given."""
    out = None
    at = s.length
    for n in cuts:
        here = slice(at, at + n)
        part = None if valid is None else valid[:, here]
        pos = torch.arange(at, at + n).expand(len(k), n)
        if valid is not None:
            pos = (valid.long().cumsum(1) - 1).clamp_min(0)[:, here]
        out = s.append(k[:, :, here], v[:, :, here], pos, part, **turning(s, pos))
        at += n
    return out


def angles(pos: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    angle = (pos[..., None] * torch.linspace(1, 0.1, WIDTH))[:, None]
    return angle.cos(), angle.sin()


def turning(s: KVState, pos: torch.Tensor) -> dict[str, Any]:
    if not isinstance(s, KeptState) or not s.scheme.turned:
        return {}
    return {"turn": (*angles(pos), False)}


def seen(s: KVState, **more: Any) -> tuple[torch.Tensor, torch.Tensor]:
    """What a state holds: as the next token's read gives it, that token left aside."""
    k, v = stream(1, s.batch, seed=77)
    n = s.length
    got = feed(s, torch.cat([k.new_zeros(s.batch, HEADS, n, WIDTH), k], 2),
               torch.cat([v.new_zeros(s.batch, HEADS, n, WIDTH), v], 2), [1], **more)  # fmt: skip
    s.rewind(1)
    return got[0][:, :, :n].clone(), got[1][:, :, :n].clone()


def test_below_the_window_a_state_is_the_plain_one_to_the_bit() -> None:
    k, v = stream(R)
    plain, kept = state(None), state(KIVI)
    for n in range(R - 1):
        a, b = (feed(s, k, v, [1]) for s in (plain, kept))
        assert all(torch.equal(x, y) for x, y in zip(a[:3], b[:3], strict=True)), n
    for x, y in zip(seen(plain), seen(kept), strict=True):
        assert torch.equal(x, y)


def test_at_the_window_keys_become_codes_and_values_do_not() -> None:
    k, v = stream(3 * R)
    kept = state(KIVI)
    got = feed(kept, k, v, [1] * R)
    # The call that fills the window still reads numbers; the next one reads codes.
    assert torch.equal(got[0], k[:, :, :R])
    keys, values = seen(kept)
    assert not torch.equal(keys, k[:, :, :R])
    assert torch.equal(values, v[:, :, :R])
    for n in range(R + 1, 3 * R):
        feed(kept, k, v, [1])
        keys, values = seen(kept)
        coded = n // R * R
        assert torch.equal(keys[:, :, coded:], k[:, :, coded:n])
        assert (keys[:, :, :coded] != k[:, :, :coded]).float().mean() > 0.5
        # Of values the newest R are numbers, always exactly so many.
        assert torch.equal(values[:, :, n - R :], v[:, :, n - R : n])
        assert (values[:, :, : n - R] != v[:, :, : n - R]).float().mean() > 0.5


def test_a_prompt_attends_itself_in_full_precision() -> None:
    k, v = stream(5 * R)
    kept = state(KIVI)
    got = feed(kept, k, v, [5 * R])
    assert torch.equal(got[0], k)
    assert torch.equal(got[1], v)


@pytest.mark.parametrize("name", SCHEMES)
@pytest.mark.parametrize("cuts", [[61], [1] * 61, [R, 1, R, 1, 43]])
def test_cuts_leave_one_state(name: str, cuts: list[int]) -> None:
    k, v = stream(61)
    whole, cut = state(SCHEMES[name]), state(SCHEMES[name], capacity=64)
    feed(whole, k, v, [33, 28])
    feed(cut, k, v, cuts)
    for x, y in zip(seen(whole), seen(cut), strict=True):
        assert torch.equal(x, y)


@pytest.mark.parametrize("name", SCHEMES)
@pytest.mark.parametrize("back", [1, 5, REWIND])
def test_rewinding_restores(name: str, back: int) -> None:
    k, v = stream(60)
    other = stream(60, seed=1)
    one, two = state(SCHEMES[name]), state(SCHEMES[name])
    feed(one, k, v, [20, *[1] * 21])
    feed(two, k, v, [20, *[1] * 21])
    left = torch.cat([other[0][:, :, :41], other[0][:, :, 41:]], 2)
    feed(two, left, other[1], [back])
    two.rewind(back)
    for x, y in zip(seen(one), seen(two), strict=True):
        assert torch.equal(x, y)
    feed(one, k, v, [1] * 12)
    feed(two, k, v, [3, 9])
    for x, y in zip(seen(one), seen(two), strict=True):
        assert torch.equal(x, y)


def test_rewinding_to_what_is_codes_by_now_is_refused() -> None:
    k, v = stream(60)
    kept = state(KIVI)
    feed(kept, k, v, [60])
    with pytest.raises(ModelError, match=f"rewind at most {REWIND} tokens.* found {REWIND + 1}"):
        kept.rewind(REWIND + 1)
    kept.rewind(REWIND)
    with pytest.raises(ModelError, match="at most 0 tokens"):
        kept.rewind(1)
    kept.rewind(kept.length)
    assert kept.length == 0
    feed(kept, k, v, [60])
    fresh = state(KIVI)
    feed(fresh, k, v, [60])
    for x, y in zip(seen(kept), seen(fresh), strict=True):
        assert torch.equal(x, y)
    with pytest.raises(ModelError, match="found 99"):
        kept.rewind(99)


def test_a_cache_rewinds_all_states_or_none() -> None:
    t = TensorType((BATCH, HEADS, PAST, WIDTH), torch.float32)
    states = [State("kv0", "kv", (t, t)), State("kv1", "kivi", (t, t))]
    cache = Cache(states, 2, 4, kept={"kv1": (KIVI, {})})
    for s in cache.states.values():
        feed(s, *stream(60), [60])
    with pytest.raises(ModelError, match="at state kv1"):
        cache.rewind(40)
    assert [s.length for s in cache.states.values()] == [60, 60]
    cache.rewind(10)
    assert [s.length for s in cache.states.values()] == [50, 50]


@pytest.mark.parametrize("name", SCHEMES)
def test_reset_forgets(name: str) -> None:
    k, v = stream(40)
    used, fresh = state(SCHEMES[name]), state(SCHEMES[name])
    feed(used, *stream(50, seed=5), [50])
    used.reset()
    feed(used, k, v, [40])
    feed(fresh, k, v, [40])
    for x, y in zip(seen(used), seen(fresh), strict=True):
        assert torch.equal(x, y)


@pytest.mark.parametrize("name", SCHEMES)
@pytest.mark.parametrize("parts", [[[0, 2], [1]], [[0], [1, 2]]])
def test_rows_written_apart_are_the_batch_written_whole(name: str, parts: list[list[int]]) -> None:
    k, v = stream(40, batch=3)
    whole, apart = state(SCHEMES[name], 3), state(SCHEMES[name], 3)
    feed(whole, k, v, [7])
    feed(apart, k, v, [7])
    for t in range(7, 40):
        pos = torch.full((3, 1), t)
        want = feed(whole, k, v, [1])
        for rows in parts:
            apart.rows = Rows.of(rows)
            some = pos[rows]
            got = apart.append(
                k[rows, :, t : t + 1], v[rows, :, t : t + 1], some, None, **turning(apart, some)
            )
            assert torch.equal(got[0], want[0][rows])
            assert torch.equal(got[1], want[1][rows])
        apart.advance(1)
    for x, y in zip(seen(whole), seen(apart), strict=True):
        assert torch.equal(x, y)


@pytest.mark.parametrize("name", ["kvquant", "kvquant_turned"])
def test_first_tokens_and_outliers_are_exact(name: str) -> None:
    scheme = SCHEMES[name]
    k, v = stream(40)
    k[:, 1, 20, 3], v[:, 0, 20, 4] = 50.0, -60.0
    kept = state(scheme)
    feed(kept, k, v, [40])
    keys, values = seen(kept)
    pos = torch.arange(40).expand(2, 40)
    want = rope(k, *angles(pos)) if scheme.turned else k
    assert torch.equal(keys[:, :, : scheme.first], want[:, :, : scheme.first])
    assert torch.equal(values[:, :, : scheme.first], v[:, :, : scheme.first])
    assert (values[:, 0, 20, 4] == -60.0).all()
    if not scheme.turned:
        assert (keys[:, 1, 20, 3] == 50.0).all()
    low, high = tensors(scheme)["key_range"][:, None, :, None]
    apart = (k < low) | (k > high)
    error = (keys - want).abs()
    if not scheme.turned:
        assert error[apart].max() == 0
    assert 0 < error.mean() < 0.6


def test_first_tokens_are_those_behind_the_padding() -> None:
    k, v = stream(20)
    valid = torch.ones(2, 20, dtype=torch.bool)
    valid[0, :5] = False
    kept = state(SCHEMES["kvquant"])
    feed(kept, k, v, [8, 12], valid)
    more = torch.cat([valid, valid[:, :1] | True], 1)
    keys, _ = seen(kept, valid=more)
    assert torch.equal(keys[0, :, 5], k[0, :, 5])
    assert torch.equal(keys[1, :, 0], k[1, :, 0])
    assert not torch.equal(keys[0, :, 0], k[0, :, 0])


def test_bytes_are_counted_to_the_last() -> None:
    n, b, numbers = 64, 2, HEADS * WIDTH
    book = b * n * (8 + 1)  # positions and validity
    want = {
        "int8": b * n * (2 * numbers + 2 * 2 * HEADS),
        "int8_static": b * n * (2 * numbers + 2 * HEADS),
        "fp8": b * n * (2 * numbers + 2 * 2 * HEADS),
    }
    for bits, name, group in ((2, "kivi2", 4), (4, "kivi4", 4), (8, "kivi8", 8)):
        words = 4 * HEADS * packed_words(WIDTH, bits)
        keys = n * words + n // group * numbers * 4
        values = (n - R) * (words + HEADS * WIDTH // group * 4)
        want[name] = b * (keys + values + 2 * (R + REWIND) * numbers * 4)
    for name, size in want.items():
        assert state(SCHEMES[name], capacity=n).bytes == size + book, name
    kept = state(SCHEMES["kvquant"], capacity=n)
    empty = b * n * (2 * 4 * HEADS * packed_words(WIDTH, 3) + 4) + b * 2 * numbers * 4 + book
    assert kept.bytes == empty
    feed(kept, *stream(30), [30])
    assert kept.bytes > empty


def test_angles_are_kept_once_for_all_layers() -> None:
    scheme = SCHEMES["kvquant_turned"]
    t = TensorType((BATCH, HEADS, PAST, WIDTH), torch.float32)
    names = ("kv0", "kv1")
    cache = Cache([State(n, "kvquant", (t, t)) for n in names], 2, 16,
                  kept={n: (scheme, tensors(scheme)) for n in names})  # fmt: skip
    k, v = stream(12)
    want = None
    for part in (slice(0, 5), slice(5, 6), slice(6, 12)):
        cache.begin(None)
        pos = torch.arange(12)[part].expand(2, -1)
        turn = (*angles(pos), False)
        for s in cache.states.values():
            want = s.append(k[:, :, part], v[:, :, part], pos, None, turn)[0]
    one, two = cache.states.values()
    assert one.angles is two.angles
    assert cache.bytes == one.bytes + two.bytes + one.angles.bytes
    last = rope(k[:, :, 6:], *angles(torch.arange(6, 12).expand(2, -1)))
    assert torch.equal(want[:, :, 6:], last)


def test_a_rotation_is_given_where_it_is_wanted_and_nowhere_else() -> None:
    k, v = stream(3)
    pos = torch.arange(3).expand(2, 3)
    with pytest.raises(ModelError, match="expected a rotation of keys, found none"):
        state(SCHEMES["kvquant_turned"]).append(k, v, pos, None)
    for plain in (state(SCHEMES["kvquant"]), state(None)):
        with pytest.raises(ModelError, match="rotat"):
            plain.append(k, v, pos, None, (*angles(pos), False))


@pytest.mark.parametrize("dtype", [torch.float64, torch.bfloat16])
@pytest.mark.parametrize("name", SCHEMES)
def test_other_dtypes(name: str, dtype: torch.dtype) -> None:
    t = TensorType((BATCH, HEADS, PAST, WIDTH), dtype)
    scheme = SCHEMES[name]
    s = KeptState(State("a", scheme.kind, (t, t)), 2, 4, "cpu", scheme, tensors(scheme))
    k, v = (x.to(dtype) for x in stream(30))
    got = feed(s, k, v, [12, *[1] * 18])
    assert got[0].dtype == got[1].dtype == dtype
    assert torch.isfinite(got[0]).all()
    assert (got[1] - v).abs().max() < 2
