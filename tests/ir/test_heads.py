"""Norms and rotations inside cached attention: against their definitions, and what does not fit."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch._subclasses.fake_tensor import FakeTensorMode

from llmc.compiler.ir.errors import ModelError
from llmc.compiler.ir.ops.attention import attention, cached_attention
from llmc.compiler.ir.ops.base import row
from llmc.compiler.ir.ops.heads import GAINS, K_LAST, ready, turn_of
from llmc.compiler.ir.ops.semantic import rope
from llmc.compiler.ir.types import TensorType

H, KV, D, S = 4, 2, 6, 5


def randn(*shape: int) -> torch.Tensor:
    g = torch.Generator().manual_seed(sum(shape))
    return torch.randn(*shape, generator=g, dtype=torch.float64)


@pytest.mark.parametrize("offset", [0.0, 1.0])
@pytest.mark.parametrize("gains", [True, False])
@pytest.mark.parametrize("norm", ["head", "row"])
def test_a_norm_goes_over_a_head_or_over_all_of_a_token(
    norm: str, gains: bool, offset: float
) -> None:
    """x / rms · (offset + gain), number by number."""
    x, eps = randn(2, H, S, D), 1e-3
    gain = randn(H * D if norm == "row" else D) if gains else None
    found = ready(x, gain, None, None, norm=norm, eps=eps, offset=offset)
    want = torch.zeros_like(x)
    for b in range(2):
        for s in range(S):
            for h in range(H):
                over = x[b, :, s] if norm == "row" else x[b, h, s]
                rms = float(over.square().mean() + eps) ** 0.5
                for d in range(D):
                    at = h * D + d if norm == "row" else d
                    by = 1.0 if gain is None else float(gain[at]) + offset
                    want[b, h, s, d] = x[b, h, s, d] / rms * by
    torch.testing.assert_close(found, want, rtol=1e-13, atol=1e-13)


def test_a_norm_behind_reads_what_is_rotated() -> None:
    """Rounded as a call of its own, all channels of a head together."""
    x, gain = randn(1, H, S, D).half(), randn(D).half()
    cos, sin = randn(1, 1, S, 4).float(), randn(1, 1, S, 4).float() + 1
    how: dict[str, Any] = {"eps": 1e-5, "offset": 1.0}
    found = ready(x, gain, cos, sin, norm="behind", rotate=True, **how)
    turned = ready(x, None, cos, sin, rotate=True)
    assert torch.equal(found, ready(turned, gain, None, None, norm="head", **how))
    other = ready(x, gain, cos, sin, norm="head", rotate=True, **how)
    assert float((other - found).abs().max()) > 0.1


@pytest.mark.parametrize(("woven", "interleaved"), [(False, False), (False, True), (True, False)])
def test_last_channels_are_those_of_all_heads(woven: bool, interleaved: bool) -> None:
    """As joined, taken apart and rotated by calls of their own; no axis of them may be cut."""
    q, k, v, last = randn(2, H, S, D), randn(2, KV, S, 2), randn(2, KV, S, 3), randn(2, 1, S, 4)
    cos, sin, pos = randn(2, 1, S, 4), randn(2, 1, S, 4) + 1, torch.arange(S).expand(2, S)
    how: dict[str, Any] = {"rotate": True, "interleaved": interleaved, "last": True, "woven": woven}
    found = cached_attention(
        q, k, v, pos, None, None, None, cos, sin, *(None,) * 5, last, scale=0.4, state=Memory(),
        **how,
    )  # fmt: skip
    order = [0, 2, 1, 3] if woven else [0, 1, 2, 3]

    def turned(x: torch.Tensor) -> torch.Tensor:
        return rope(x[..., order], cos, sin, interleaved=interleaved)

    ready_q = torch.cat([q[..., :2], turned(q[..., 2:])], -1)
    ready_k = torch.cat([k, turned(last).expand(-1, KV, -1, -1)], -1)
    torch.testing.assert_close(found, attention(ready_q, ready_k, v, pos, pos, scale=0.4))
    op, kinds = row("llmc.cached_attention"), [
        TensorType(tuple(t.shape), t.dtype) for t in (q, k, v, pos, cos, last)
    ]  # fmt: skip
    given = (*kinds[:4], None, None, None, kinds[4], kinds[4], *(None,) * 5, kinds[5])
    out = op.infer(*given, scale=0.4, state="kv0", **how)
    assert out.shape == (2, S, H, 3)
    assert op.ties is not None
    ties = op.ties(out, *given, scale=0.4, state="kv0", **how)
    mixed = {axis for t in ties if t.kind == "mix" for axis in t.ins}
    assert {(0, 3), (1, 3), (K_LAST, 3)} <= mixed
    assert not [t for t in ties if t.kind == "contract"]


def test_queries_are_scaled_once_they_are_rotated() -> None:
    q, k, v, by = randn(2, H, S, D), randn(2, KV, S, D), randn(2, KV, S, 3), randn(2, 1, S, 1)
    cos, sin, pos = randn(2, 1, S, D), randn(2, 1, S, D) + 1, torch.arange(S).expand(2, S)
    given = (q, k, v, pos, None, None, None, cos, sin, *(None,) * 6, by)
    found = cached_attention(*given, scale=0.4, state=Memory(), rotate=True)
    want = attention(rope(q, cos, sin) * by, rope(k, cos, sin), v, pos, pos, scale=0.4)
    torch.testing.assert_close(found, want)


def test_slopes_are_added_by_distance() -> None:
    """softmax(q·kᵀ·scale + slope · (key - query)), entry by entry, whatever comes first."""
    q, k, v, slopes = randn(1, H, S, D), randn(1, H, S, D), randn(1, H, S, 3), randn(H)
    pos = torch.arange(7, 7 + S)[None]
    found = cached_attention(
        q, k, v, pos, *(None,) * 9, slopes, scale=0.4, state=Memory()
    )  # fmt: skip
    for h in range(H):
        for s in range(S):
            logits = torch.stack([q[0, h, s] @ k[0, h, t] * 0.4 - slopes[h] * (s - t)
                                  for t in range(s + 1)])  # fmt: skip
            torch.testing.assert_close(found[0, s, h], logits.softmax(0) @ v[0, h, : s + 1])


def test_a_norm_is_rounded_before_the_rotation() -> None:
    """As where it is a call of its own, in the dtype of what it reads."""
    x, gain = randn(1, H, S, D).half(), randn(D).half()
    cos, sin = randn(1, 1, S, 4).float(), randn(1, 1, S, 4).float() + 1
    found = ready(x, gain, cos, sin, norm="head", eps=1e-5, rotate=True, interleaved=True)
    y = ready(x, gain, None, None, norm="head", eps=1e-5)
    assert y.dtype == found.dtype == torch.float16
    want = torch.cat([rope(y[..., :4], cos, sin, interleaved=True), y[..., 4:]], -1)
    assert torch.equal(found, want)


class Memory:
    """A state that keeps what it is given."""

    def __init__(self) -> None:
        self.parts: list[tuple[torch.Tensor, ...]] = []

    def append(self, k: torch.Tensor, v: torch.Tensor, pos: torch.Tensor, valid: Any) -> Any:
        self.parts.append((k, v, pos))
        k, v, pos = (torch.cat(p, d) for p, d in zip(zip(*self.parts, strict=True), (2, 2, 1),
                                                     strict=True))  # fmt: skip
        return k, v, pos, None


@pytest.mark.parametrize("rotate", [False, True])
@pytest.mark.parametrize("norm", ["head", "row"])
def test_cached_attention_keeps_what_it_reads(norm: str, rotate: bool) -> None:
    """Norm, rotation, cache: as three calls would do it, a token at a time."""
    q, k, v = randn(2, H, S, D), randn(2, KV, S, D), randn(2, KV, S, 3)
    cos, sin = (randn(2, 1, S, D), randn(2, 1, S, D) * 2) if rotate else (None, None)
    gains = [randn(n * D if norm == "row" else D) for n in (H, KV)]
    pos = torch.arange(S).expand(2, S)
    how: dict[str, Any] = {"norm": norm, "eps": 1e-5, "offset": 1.0, "rotate": rotate}
    changed = [ready(x, g, cos, sin, **how) for x, g in zip((q, k), gains, strict=True)]
    want = attention(*changed, v, pos, pos, scale=0.4)
    state, out = Memory(), []
    for s in range(S):
        at = slice(s, s + 1)
        turn = [None if t is None else t[:, :, at] for t in (cos, sin)]
        given = (q[:, :, at], k[:, :, at], v[:, :, at], pos[:, at], None, None, None, *turn)
        out.append(cached_attention(*given, None, None, *gains, scale=0.4, state=state, **how))
    torch.testing.assert_close(torch.cat(out, 1), want, rtol=1e-12, atol=1e-12)


def test_a_state_is_told_of_rotations_that_are_its_own() -> None:
    cos, sin = randn(1), randn(2)
    assert turn_of(cos, sin, {"interleaved": True}) == (cos, sin, True)
    assert turn_of(cos, sin, {"rotate": True}) is None
    assert turn_of(None, None, {}) is None


X, K, V = (TensorType((2, n, S, D), torch.float32) for n in (H, KV, KV))
POS = TensorType((2, S), torch.int64)
COS = TensorType((2, 1, S, D), torch.float32)


def vector(width: int) -> TensorType:
    return TensorType((width,), torch.float32)


@pytest.mark.parametrize(
    ("more", "attrs", "words"),
    [
        ((), {"norm": "token"}, "expected a norm of '', 'head', 'row', 'behind', found"),
        ((None,) * 4 + (vector(D), None), {}, "expected a norm beside gains of queries"),
        ((None,) * 4 + (vector(D), vector(5)), {"norm": "head"}, "expected gains \\[6\\] of keys"),
        ((None,) * 4 + (vector(D),), {"norm": "row"}, "expected gains \\[24\\] of queries"),
        ((COS, COS), {"norm": "head"}, "keys that are kept as they are read"),
        (
            (None, None, TensorType((KV * D, 3), torch.float32)),
            {"norm": "head"},
            "as they are read",
        ),
        ((None, COS), {"rotate": True}, "expected cosines and sines"),
        ((), {"norm": "behind"}, "expected a rotation that a norm is behind"),
        ((None,) * 6 + (vector(KV),), {}, "expected slopes of 4 heads"),
        ((None,) * 8 + (COS,), {}, "expected numbers \\[B, 1, S, 1\\] that scale queries"),
        ((), {"last": True}, "expected the last channels of keys where these are rotated"),
        ((COS, COS, *(None,) * 5, K), {"rotate": True}, "where these are rotated, not else"),
        ((COS, COS, *(None,) * 5, K), {"rotate": True, "last": True}, "last channels \\[B, 1"),
        ((*(None,) * 7, COS), {"last": True}, "expected last channels that are rotated, and no"),
        ((COS, COS), {"rotate": True, "woven": True}, "expected woven channels to be the last"),
        ((None,) * 6 + (COS,), {}, "expected slopes \\[H\\]"),
    ],
)
def test_what_does_not_fit_is_refused(
    more: tuple[Any, ...], attrs: dict[str, Any], words: str
) -> None:
    with pytest.raises(ModelError, match=words):
        row("llmc.cached_attention").infer(
            X, K, V, POS, None, None, None, *more, scale=1.0, state="kv0", **attrs
        )


def test_an_unknown_norm_is_refused_when_it_runs_too() -> None:
    with pytest.raises(ModelError, match="found 'token'"):
        ready(randn(1, H, S, D), None, None, None, norm="token")


@pytest.mark.parametrize(
    ("norm", "widths"), [("head", (D, D)), ("behind", (D, D)), ("row", (H * D, KV * D))]
)
def test_shapes_without_values_and_ties(norm: str, widths: tuple[int, int]) -> None:
    """The fake kernel takes gains; no channel of a normed head may be cut on its own."""
    gains = [vector(w) for w in widths]
    rest = (None, None, None, COS, COS, None, None)
    op, how = row("llmc.cached_attention"), {"scale": 1.0, "rotate": True, "norm": norm}
    out = op.infer(X, K, V, POS, *rest, *gains, state="kv0", **how)
    assert out.shape == (2, S, H, D)
    with FakeTensorMode():
        q, k, v = (torch.empty(*(int(d) for d in t.shape)) for t in (X, K, V))
        pos, cos = torch.zeros(2, S, dtype=torch.int64), torch.empty(2, 1, S, D)
        made = op.target(
            q, k, v, pos, None, None, None, cos, cos, None, None,
            *(torch.empty(w) for w in widths), eps=1e-5, state="kv0", **how,
        )  # fmt: skip
        assert made.shape == (2, S, H, D)
    assert op.ties is not None
    ties = op.ties(out, X, K, V, POS, *rest, *gains, state="kv0", **how)
    mixed = {axis for t in ties if t.kind == "mix" for axis in t.ins}
    assert {(0, 3), (1, 3), (GAINS[0], 0), (GAINS[1], 0)} <= mixed
    assert ((0, 1) in mixed) == (norm == "row")
    sloped = op.ties(out, X, K, V, POS, *rest, None, None, vector(H), state="kv0", scale=1.0)
    assert [t.outs for t in sloped if (13, 0) in t.ins] == [(2,)]
    plain = op.ties(out, X, K, V, POS, *rest, state="kv0", scale=1.0, rotate=True)
    assert not {axis for t in plain if t.kind == "mix" for axis in t.ins} & {(0, 3), (1, 3)}
