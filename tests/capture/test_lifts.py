"""Lifts are exact where they apply, and near misses stay, with a reason."""

from __future__ import annotations

import math
from collections import Counter
from typing import Any

import pytest
import torch
from torch import nn

from llmc.compiler.capture.module import capture_module
from llmc.compiler.ir.graph import Program
from llmc.compiler.ir.interpret import run
from llmc.compiler.ir.ops import row_of

F = nn.functional


class Of(nn.Module):
    """A module from a function of (module, *inputs) with a gain, a bias and a weight."""

    def __init__(self, function: Any, size: int = 8, out: int = 8) -> None:
        super().__init__()
        g = torch.Generator().manual_seed(0)
        self.gain = nn.Parameter(torch.randn(size, generator=g))
        self.bias = nn.Parameter(torch.randn(out, generator=g))
        self.weight = nn.Parameter(torch.randn(size, out, generator=g))
        self.register_buffer("triangle", torch.tril(torch.ones(32, 32)).view(1, 1, 32, 32))
        self.function = function

    def forward(self, x: torch.Tensor) -> Any:
        return self.function(self, x)


def captured(function: Any, *shape: int, **kwargs: Any) -> tuple[Program, Counter[str]]:
    """The program of a function of one fp32 input, checked against it at other sizes."""
    module = Of(function, **kwargs).eval()
    axes = {"x": ("B", "S", *(None for _ in shape))[: 2 + len(shape)]}
    g = torch.Generator().manual_seed(1)
    program = capture_module(module, {"x": torch.randn(2, 6, *shape, generator=g)}, axes)
    x = torch.randn(3, 11, *shape, generator=g)
    with torch.no_grad():
        want = module(x)
        # 1 + erf(x) cancels where x < 0, and machines round erf apart: a few ulps of 1, times |x|.
        torch.testing.assert_close(run(program, {"x": x}), want, rtol=1e-6, atol=4e-6)
    return program, Counter(row_of(n).name for n in program.calls())


def reasons(program: Program) -> str:
    return " | ".join(f"{r['by']} {r['node']}: {r['reason']}" for r in program.facts["refusals"])


def rms(x: torch.Tensor, eps: float = 1e-5) -> torch.Tensor:
    return x * torch.rsqrt(x.pow(2).mean(-1, keepdim=True) + eps)


def twice(x: torch.Tensor, r: torch.Tensor) -> torch.Tensor:
    return x * r + r


@pytest.mark.parametrize(
    ("function", "attrs"),
    [
        (lambda m, x: m.gain * rms(x), {"eps": 1e-5}),
        (lambda m, x: rms(x, 0.5) * m.gain, {"eps": 0.5}),
        (lambda m, x: rms(x) * (1.0 + m.gain), {"eps": 1e-5, "offset": 1.0}),
        (lambda m, x: rms(x), {"eps": 1e-5}),
        (lambda m, x: x / torch.sqrt((x * x).mean(-1, True) + 1e-3) * m.gain, {"eps": 1e-3}),
        (lambda m, x: F.rms_norm(x, (8,), m.gain, 1e-4), {"eps": 1e-4}),
        (lambda m, x: F.rms_norm(x, (8,)), {"eps": torch.finfo(torch.float32).eps}),
        (lambda m, x: m.gain * (x * (x.square().mean(2, True) + 1e-5).pow(-0.5)), {"eps": 1e-5}),
    ],
)
def test_rms_norm(function: Any, attrs: dict[str, float]) -> None:
    program, ops = captured(function, 8)
    assert ops == {"llmc.rms_norm": 1}
    assert dict(next(program.calls()).kwargs) == attrs


@pytest.mark.parametrize(
    ("function", "says"),
    [
        (lambda m, x: x * torch.rsqrt(x.pow(2).mean(1, keepdim=True) + 1e-5), "no known form"),
        (lambda m, x: x * torch.rsqrt(x.pow(3).mean(-1, True).abs() + 1e-5), "no known form"),
        (lambda m, x: x * torch.rsqrt(x.pow(2).sum(-1, True) + 1e-5), "no known form"),
        (lambda m, x: x * torch.rsqrt(x.pow(2).mean(-1, True) + m.gain.abs()), "no known form"),
        (
            lambda m, x: (lambda r: x * r + r)(torch.rsqrt(x.pow(2).mean(-1, True) + 1)),
            "read outside",
        ),
    ],
)
def test_near_rms_norm_stays(function: Any, says: str) -> None:
    program, ops = captured(function, 8)
    assert ops["llmc.rms_norm"] == 0
    assert says in reasons(program)


def test_gain_of_another_kind_is_left_outside() -> None:
    """A factor 2 + g is no gain of the op; the norm lifts without it."""
    _, ops = captured(lambda m, x: rms(x) * (2.0 + m.gain), 8)
    assert ops["llmc.rms_norm"] == 1
    assert ops["aten.mul.Tensor"] == 1


def test_layer_norm() -> None:
    _, ops = captured(lambda m, x: F.layer_norm(x, (8,), m.gain, m.bias, 1e-3), 8)
    assert ops == {"llmc.layer_norm": 1}
    _, ops = captured(lambda m, x: m.gain * rms(x - x.mean(-1, keepdim=True)), 8)
    assert ops == {"llmc.layer_norm": 1}
    program, ops = captured(lambda m, x: F.layer_norm(x, x.shape[2:]), 8, 4)
    assert ops["llmc.layer_norm"] == 0
    assert "norm over" in reasons(program)


def turn(x: torch.Tensor, half: int) -> torch.Tensor:
    return torch.cat((-x[..., half:], x[..., :half]), -1)


def angles(x: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    a = torch.arange(8.0) / 8
    return a.cos(), a.sin()


def test_rope_whole_and_partial() -> None:
    def whole(m: Any, x: torch.Tensor) -> torch.Tensor:
        cos, sin = angles(x)
        return x * cos + turn(x, 4) * sin

    _, ops = captured(whole, 8)
    assert ops["llmc.rope"] == 1

    def partial(m: Any, x: torch.Tensor) -> torch.Tensor:
        return torch.cat((whole(m, x[..., :8]), x[..., 8:]), -1)

    _, ops = captured(partial, 12)
    assert ops["llmc.rope"] == 1


@pytest.mark.parametrize("half", [3, 5])
def test_near_rope_stays(half: int) -> None:
    def off(m: Any, x: torch.Tensor) -> torch.Tensor:
        cos, sin = angles(x)
        return x * cos + turn(x, half) * sin

    program, ops = captured(off, 8)
    assert ops["llmc.rope"] == 0
    assert "expected halves of 8" in reasons(program)


def new_gelu(x: torch.Tensor, c: float = 0.044715) -> torch.Tensor:
    return 0.5 * x * (1.0 + torch.tanh(math.sqrt(2.0 / math.pi) * (x + c * torch.pow(x, 3.0))))


@pytest.mark.parametrize(
    ("function", "act"),
    [
        (lambda m, x: F.silu(x), "silu"),
        (lambda m, x: x * torch.sigmoid(x), "silu"),
        (lambda m, x: F.relu(x), "relu"),
        (lambda m, x: F.relu(x).square(), "relu2"),
        (lambda m, x: torch.pow(F.relu(x), 2), "relu2"),
        (lambda m, x: F.relu(x) * F.relu(x), "relu2"),
        (lambda m, x: F.gelu(x), "gelu"),
        (lambda m, x: F.gelu(x, approximate="tanh"), "gelu_tanh"),
        (lambda m, x: x * 0.5 * (1.0 + torch.erf(x / math.sqrt(2.0))), "gelu"),
        (lambda m, x: new_gelu(x), "gelu_tanh"),
    ],
)
def test_activation(function: Any, act: str) -> None:
    program, ops = captured(function, 8)
    assert ops == {"llmc.activation": 1}
    assert next(program.calls()).kwargs["act"] == act
    _, ops = captured(lambda m, x: function(m, x) * (x + 1), 8)
    assert ops["llmc.gated"] == 1


@pytest.mark.parametrize(
    "function",
    [
        lambda m, x: new_gelu(x, 0.05),
        lambda m, x: x * torch.sigmoid(2 * x),
        lambda m, x: 0.5 * x * (1.0 + torch.erf(x / 1.5)),
    ],
)
def test_near_activation_stays(function: Any) -> None:
    _, ops = captured(function, 8)
    assert ops["llmc.activation"] == 0


@pytest.mark.parametrize(
    "function",
    [
        lambda m, x: F.relu(x).pow(3),
        lambda m, x: F.relu(x).pow(0.5),
        lambda m, x: F.relu(x) * F.relu(-x),
    ],
)
def test_other_powers_of_a_relu_stay(function: Any) -> None:
    program, _ = captured(function, 8)
    assert "relu2" not in [n.kwargs.get("act") for n in program.calls()]


def test_square_of_a_relu_that_others_read_stays() -> None:
    program, ops = captured(lambda m, x: (r := F.relu(x)).square() + r, 8)
    assert ops["llmc.activation"] == 1
    assert "relu2" not in [n.kwargs.get("act") for n in program.calls()]
    assert "activation.relu2" in reasons(program)
    assert "read outside the cluster too" in reasons(program)


@pytest.mark.parametrize(
    "function",
    [
        lambda m, x: x @ m.weight,
        lambda m, x: x @ m.weight + m.bias,
        lambda m, x: torch.addmm(m.bias, x.view(-1, 8), m.weight).view(*x.shape[:2], 12),
        lambda m, x: torch.mm(x.reshape(-1, 8), m.weight).reshape(*x.shape[:2], 12),
    ],
)
def test_product_with_a_stored_matrix(function: Any) -> None:
    """The weight is read as [out, in]; its bytes stay."""
    program, ops = captured(function, 8, out=12)
    assert ops["aten.linear.default"] == 1
    assert not {"aten.matmul.default", "aten.addmm.default", "aten.mm.default"} & set(ops)
    node = next(program.calls("aten.linear.default"))
    param = program.param_of(node.args[1])
    assert param is not None
    assert param.shape == (12, 8)
    assert program.weights.load(param.name).stride() == (1, 12)


def test_stored_matrix_that_is_read_both_ways_stays() -> None:
    program, ops = captured(lambda m, x: (x @ m.weight) * m.weight.sum(), 8)
    assert ops["aten.linear.default"] == 0
    assert ops["aten.matmul.default"] == 1
    assert "read in another way too" in reasons(program)


def test_flattened_tokens_come_back() -> None:
    """A block that flattens batch and sequence is rebuilt on [B, S, H]."""

    def flat(m: Any, x: torch.Tensor) -> torch.Tensor:
        y = x.reshape(-1, 8)
        return (y + F.relu(F.linear(y, m.weight, m.bias))).view(x.shape)

    _, ops = captured(flat, 8)
    assert ops == {"aten.linear.default": 1, "llmc.activation": 1, "aten.add.Tensor": 1}


def heads(m: Any, x: torch.Tensor) -> torch.Tensor:
    return x.view(*x.shape[:2], 2, 4).transpose(1, 2)


def written(x: torch.Tensor, mask: Any) -> torch.Tensor:
    q = heads(None, x)
    scores = q @ q.transpose(-1, -2) / 2.0
    return (mask(scores).softmax(-1) @ q).transpose(1, 2)


def larger(x: torch.Tensor) -> torch.Tensor:
    total = x.sum(-1)[0]
    return total[:, None] > total[None]


def above(m: Any, s: torch.Tensor) -> torch.Tensor:
    n = s.shape[-1]
    masked: torch.Tensor = m.triangle[:, :, :n, :n] == 0
    return masked


def low(m: Any, s: torch.Tensor) -> torch.Tensor:
    n = s.shape[-1]
    return torch.triu(torch.full((n, n), float("-inf")), 1)


@pytest.mark.parametrize(
    ("function", "attrs"),
    [
        (lambda m, x: sdpa(x, is_causal=True), {"scale": 0.5}),
        (lambda m, x: sdpa(x), {"scale": 0.5, "causal": False}),
        (lambda m, x: sdpa(x, scale=0.3), {"scale": 0.3, "causal": False}),
        (lambda m, x: written(x, lambda s: s), {"scale": 0.5, "causal": False}),
        (
            lambda m, x: written(
                x,
                lambda s: s.masked_fill(
                    m.triangle[:, :, : x.shape[1], : x.shape[1]] == 0, -math.inf
                ),
            ),
            {"scale": 0.5},
        ),
        (lambda m, x: written(x, lambda s: s + band(s, 4)), {"scale": 0.5, "window": 4}),
    ],
)
def test_attention(function: Any, attrs: dict[str, Any]) -> None:
    program, ops = captured(function, 8)
    assert ops["llmc.attention"] == 1
    assert ops["aten.softmax.int"] == 0
    assert dict(next(program.calls("llmc.attention")).kwargs) == attrs


def sdpa(x: torch.Tensor, **kwargs: Any) -> torch.Tensor:
    q = heads(None, x)
    return F.scaled_dot_product_attention(q, q, q, **kwargs).transpose(1, 2)


def band(s: torch.Tensor, width: int) -> torch.Tensor:
    i = torch.arange(s.shape[-1])
    back = i[:, None] - i[None]
    return torch.where((back >= 0) & (back < width), 0.0, -1e9)


def test_repeated_heads_are_read_once() -> None:
    """Keys repeated for query groups reach the op un-repeated."""

    def grouped(m: Any, x: torch.Tensor) -> torch.Tensor:
        b, s = x.shape[:2]
        q = x.view(b, s, 4, 2).transpose(1, 2)
        k = x[..., :4].reshape(b, s, 2, 2).transpose(1, 2)
        wide = k[:, :, None].expand(b, 2, 2, s, 2).reshape(b, 4, s, 2)
        return F.scaled_dot_product_attention(q, wide, wide, is_causal=True).transpose(1, 2)

    program, ops = captured(grouped, 8)
    assert ops["llmc.attention"] == 1
    assert ops["aten.expand.default"] == 0
    node = next(program.calls("llmc.attention"))
    assert node.args[1].meta["llmc"].type.shape[1] == 2


@pytest.mark.parametrize(
    ("function", "says"),
    [
        (lambda m, x: sdpa(x, attn_mask=torch.ones(1, 1, 1, 1).bool()), "expected one mask [S, S]"),
        (
            lambda m, x: written(
                x, lambda s: s.masked_fill(band(s, 4).view(1, 1, *s.shape[-2:]) == 0, -math.inf)
            ),
            "causal band",
        ),
        (
            lambda m, x: written(x, lambda s: s.masked_fill(larger(x), -math.inf)),
            "index arithmetic",
        ),
        (
            lambda m, x: written(
                x, lambda s: s.masked_fill(x.sum(-1)[:, None, None] > 0, -math.inf)
            ),
            "expected one mask [S, S]",
        ),
        (lambda m, x: written(x, lambda s: s.masked_fill(low(m, s) < 0, -5.0)), "very low fill"),
    ],
)
def test_near_attention_stays(function: Any, says: str) -> None:
    program, ops = captured(function, 8)
    assert ops["llmc.attention"] == 0
    assert says in reasons(program)
