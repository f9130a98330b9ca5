"""The attention ops against a definition written out, and the cached form against the plain one."""

from __future__ import annotations

from typing import Any

import pytest
import torch

from llmc.compiler.ir.errors import ModelError
from llmc.compiler.ir.ops.attention import attention, cached_attention


def slow(
    q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, q_pos: torch.Tensor, k_pos: torch.Tensor,
    valid: torch.Tensor | None = None, bias: torch.Tensor | None = None,
    sinks: torch.Tensor | None = None, *, scale: float, causal: bool = True,
    window: int | None = None, softcap: float | None = None, dilation: int = 1, first: int = 0,
) -> torch.Tensor:  # fmt: skip
    """The op's definition, one score at a time."""
    batch, heads, length, _ = q.shape
    out = torch.zeros(batch, length, heads, v.shape[-1], dtype=q.dtype)
    for b in range(batch):
        for h in range(heads):
            kv = h // (heads // k.shape[1])
            for s in range(length):
                scores, values = [], []
                for t in range(k.shape[2]):
                    ahead = int(k_pos[b, t] - q_pos[b, s])
                    if causal and ahead > 0:
                        continue
                    near = window is None or abs(ahead) in range(0, window * dilation, dilation)
                    if not near and k_pos[b, t] >= first and q_pos[b, s] >= first:
                        continue
                    if valid is not None and not valid[b, t]:
                        continue
                    score = (q[b, h, s] @ k[b, kv, t]) * scale
                    if softcap is not None:
                        score = softcap * torch.tanh(score / softcap)
                    if bias is not None:
                        score = score + bias.expand(batch, heads, length, k.shape[2])[b, h, s, t]
                    scores.append(score)
                    values.append(v[b, kv, t])
                if not values:
                    continue
                if sinks is not None:
                    scores.append(sinks[h])
                    values.append(torch.zeros_like(values[0]))
                w = torch.softmax(torch.stack(scores), 0)
                out[b, s, h] = (w.unsqueeze(-1) * torch.stack(values)).sum(0)
    return out


def tensors(length: int = 5) -> tuple[torch.Tensor, ...]:
    g = torch.Generator().manual_seed(1)

    def make(*shape: int) -> torch.Tensor:
        return torch.randn(*shape, generator=g, dtype=torch.float64)

    return make(2, 4, length, 4), make(2, 2, length, 4), make(2, 2, length, 3)


POS = torch.tensor([[0, 1, 2, 3, 4], [0, 0, 0, 1, 2]])
VALID = torch.tensor([[True] * 5, [False, False, True, True, True]])
BIAS = torch.linspace(-1, 1, 4 * 25, dtype=torch.float64).view(1, 4, 5, 5)
SINKS = torch.tensor([0.5, -1.0, 2.0, 0.0], dtype=torch.float64)


@pytest.mark.parametrize(
    ("more", "attrs"),
    [
        ((), {}),
        ((), {"causal": False}),
        ((), {"window": 2}),
        ((), {"window": 2, "causal": False}),
        ((VALID,), {}),
        ((), {"window": 2, "dilation": 2}),
        ((), {"window": 1, "first": 2, "causal": False}),
        ((VALID,), {"window": 2, "dilation": 3, "first": 1}),
        ((VALID, BIAS, SINKS), {"window": 2, "dilation": 2, "causal": False}),
        ((VALID,), {"softcap": 1.5}),
        ((VALID, BIAS), {}),
        ((None, BIAS), {"causal": False}),
        ((VALID, BIAS), {"softcap": 1.5, "window": 3}),
        ((VALID, None, SINKS), {}),
        ((VALID, BIAS, SINKS), {"softcap": 2.0, "causal": False}),
    ],
)
def test_attention_is_its_definition(more: Any, attrs: Any) -> None:
    q, k, v = tensors()
    have = attention(q, k, v, POS, POS, *more, scale=0.4, **attrs)
    want = slow(q, k, v, POS, POS, *more, scale=0.4, **attrs)
    torch.testing.assert_close(have, want, rtol=1e-12, atol=1e-12)


def test_positions_default_to_the_order() -> None:
    q, k, v = tensors()
    plain = torch.arange(5).expand(2, 5)
    torch.testing.assert_close(
        attention(q, k, v, scale=0.4, window=2),
        attention(q, k, v, plain, plain, scale=0.4, window=2),
    )


@pytest.mark.parametrize("softcap", [None, 1.5])
def test_query_without_a_key_gets_zeros(softcap: float | None) -> None:
    q, k, v = tensors()
    none = torch.zeros(2, 5, dtype=torch.bool)
    out = attention(q, k, v, POS, POS, none, scale=0.4, softcap=softcap)
    assert torch.equal(out, torch.zeros_like(out))


class Memory:
    def __init__(self) -> None:
        self.parts: list[tuple[torch.Tensor, ...]] = []

    def append(self, *new: torch.Tensor) -> list[torch.Tensor]:
        self.parts.append(new)
        return [
            torch.cat(p, d)
            for p, d in zip(zip(*self.parts, strict=True), (2, 2, 1, 1), strict=True)
        ]


@pytest.mark.parametrize("attrs", [
    {}, {"window": 2}, {"softcap": 1.5, "window": 3}, {"window": 2, "dilation": 2, "first": 1},
])  # fmt: skip
@pytest.mark.parametrize("cuts", [(1, 2, 3, 4), (3,), ()])
def test_cached_attention_token_by_token(attrs: Any, cuts: tuple[int, ...]) -> None:
    q, k, v = tensors()
    want = attention(q, k, v, POS, POS, VALID, scale=0.4, **attrs)
    state, out = Memory(), []
    for a, b in zip((0, *cuts), (*cuts, 5), strict=True):
        piece = (q[:, :, a:b], k[:, :, a:b], v[:, :, a:b], POS[:, a:b], VALID[:, a:b])
        out.append(cached_attention(*piece, scale=0.4, state=state, **attrs))
    # Padding shares position 0 with the first token: what a padded query reads depends on when.
    have = torch.cat(out, 1)[VALID]
    torch.testing.assert_close(have, want[VALID], rtol=1e-12, atol=1e-12)


def test_state_by_name_is_the_executors_business() -> None:
    q, k, v = tensors()
    with pytest.raises(ModelError, match="executor"):
        cached_attention(q, k, v, POS, scale=0.4, state="kv0")
