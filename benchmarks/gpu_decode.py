"""A decode step of a random model in the shapes of Llama-3.1-8B: torch in bf16, and llmc's kernels.

One token at batch 1 after `context` others, from its row of the embedding to its logits. llmc runs
five kernels a layer: norm + QKV, rotate + write, attend, output + residual, and two for the gated
MLP, which makes six; all are captured in one CUDA graph, as torch's are where it says graph.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from typing import Any

import gpu_clock
import torch
from gpu_work import Task

from llmc.codegen import meaning
from llmc.codegen.attention.launch import attend
from llmc.codegen.attention.problem import AttentionProblem
from llmc.codegen.attention.rows import choose as choose_attention
from llmc.codegen.attention.write import write
from llmc.codegen.graphs import record
from llmc.codegen.kernels import choose
from llmc.codegen.launch import fused_linear
from llmc.codegen.prepack import Packed, prepack
from llmc.codegen.problem import DTYPES, Problem
from llmc.codegen.samples import random_parts
from llmc.compiler.ir.held import Held, HeldSide

W8 = {"bits": 8, "group": 0}
SCHEMES: dict[str, tuple[dict[str, Any], dict[str, Any]]] = {
    # what the layers hold, what the head holds
    "w8": (W8, W8),
    "w4": ({"bits": 4, "group": 128}, W8),
    "w4 + 2:4": ({"bits": 4, "group": 64, "n": 2, "m": 4}, W8),
    "w4 + rank 64": ({"bits": 4, "group": 128, "rank": 64}, W8),
}
EPS = 1e-5


@dataclass(frozen=True)
class Shapes:
    """Sizes of a decoder; the defaults are Llama-3.1-8B's."""

    hidden: int = 4096
    heads: int = 32
    kv_heads: int = 8
    width: int = 128
    inner: int = 14336
    vocab: int = 128256
    layers: int = 32
    context: int = 512
    dtype: str = "bf16"

    @property
    def qkv(self) -> int:
        return (self.heads + 2 * self.kv_heads) * self.width

    def linears(self) -> dict[str, Problem]:
        """The linears of a layer, as llmc fuses them."""
        return {
            "qkv": Problem(self.qkv, self.hidden, norm=True, eps=EPS, x_dtype=self.dtype),
            "out": Problem(
                self.hidden, self.heads * self.width, residual=True, x_dtype=self.dtype
            ),
            "gate_up": Problem(2 * self.inner, self.hidden, norm=True, eps=EPS, pairs="gate",
                               act="silu", x_dtype=self.dtype),
            "down": Problem(self.hidden, self.inner, residual=True, x_dtype=self.dtype),
        }  # fmt: skip

    def head(self) -> Problem:
        """The norm and the product that give logits."""
        return Problem(self.vocab, self.hidden, norm=True, eps=EPS, x_dtype=self.dtype)

    def rotation(self) -> tuple[torch.Tensor, torch.Tensor]:
        """Cosines and sines [1, 1, 1, width] of the token after the context."""
        half = torch.arange(0, self.width, 2) / self.width
        angles = (self.context / 500000.0**half).repeat(2)
        where = gpu_clock.device()
        return tuple(f[None, None, None].to(where) for f in (angles.cos(), angles.sin()))  # type: ignore[return-value]


@dataclass(frozen=True)
class Cache:
    """One layer's kept tokens, with room for the step's own."""

    keys: torch.Tensor
    values: torch.Tensor
    held: Held


def _cache(s: Shapes, seed: int) -> Cache:
    g = torch.Generator(gpu_clock.device()).manual_seed(seed)
    size = (1, s.kv_heads, s.context + 16, s.width)
    how: Any = {"generator": g, "device": g.device}
    keys, values = (torch.randn(size, **how).to(DTYPES[s.dtype]) for _ in "kv")
    pos = torch.arange(size[2], device=g.device)[None]
    real = torch.ones(1, size[2], dtype=torch.bool, device=g.device)
    sides = (HeldSide((t,), s.context + 1) for t in (keys, values))
    return Cache(keys, values, Held(*sides, pos, real, False, s.context, s.context + 1))


class Fused:
    """llmc's step: prepacked linears, written and attended caches."""

    def __init__(self, s: Shapes, scheme: str) -> None:
        self.s = s
        body, head = SCHEMES[scheme]
        self.parts = {n: _parts(replace(p, **body)) for n, p in s.linears().items()}
        self.parts["head"] = _parts(replace(s.head(), **head))
        made = {n: _packed(p, parts) for n, (p, parts) in self.parts.items()}
        self.bytes = made["head"].bytes
        self.head = made.pop("head")
        self.layers = [{n: _copy(p) for n, p in made.items()} for _ in range(s.layers)]
        self.bytes += s.layers * sum(p.bytes for p in made.values())
        self.caches = [_cache(s, i) for i in range(s.layers)]
        self.turn = s.rotation()
        self.attention = AttentionProblem(
            s.heads, s.kv_heads, s.width, s.width, 1, s.dtype, turn="half", rotary=s.width
        )
        row, why = choose_attention(self.attention)
        if row is None:
            raise RuntimeError("; ".join(map(str, why)))
        self.row = row
        where = gpu_clock.device()
        self.q_pos = torch.full((1, 1), s.context, device=where)
        self.turned = torch.empty(1, s.heads, 1, s.width, device=where, dtype=DTYPES[s.dtype])

    def __call__(self, x: torch.Tensor) -> torch.Tensor:
        s = self.s
        for linears, cache in zip(self.layers, self.caches, strict=True):
            qkv = fused_linear(linears["qkv"], x).view(1, 1, -1, s.width).transpose(1, 2)
            q, k, v = qkv.split([s.heads, s.kv_heads, s.kv_heads], 1)
            held = cache.held
            write(self.attention, held, q, k, v, self.q_pos, None, self.turn, self.turned, k)
            seen = attend(self.row, self.attention, self.turned, held, self.q_pos,
                          scale=s.width**-0.5)  # fmt: skip
            x = fused_linear(linears["out"], seen.view(1, -1), residual=x)
            inner = fused_linear(linears["gate_up"], x)
            x = fused_linear(linears["down"], inner, residual=x)
        return fused_linear(self.head, x)

    def dense(self) -> Dense:
        """The same weights in torch: what this step must compute."""
        return Dense(self.s, {n: _spread(p, parts) for n, (p, parts) in self.parts.items()})


def _parts(problem: Problem) -> tuple[Problem, dict[str, torch.Tensor]]:
    parts = random_parts(problem, device=gpu_clock.device())
    # Of a size that keeps what flows through 32 layers about as large as it is.
    for name in ("scale", "left"):
        if name in parts:
            parts[name] = (parts[name] * (6.0 / problem.K**0.5)).to(parts[name].dtype)
    return problem, parts


def _packed(problem: Problem, parts: dict[str, torch.Tensor]) -> Packed:
    row, why = choose(problem)
    if row is None:
        raise RuntimeError("; ".join(map(str, why)))
    return prepack(row, problem, **parts)


def _copy(packed: Packed) -> Packed:
    return replace(packed, tensors={n: t.clone() for n, t in packed.tensors.items()})


def _spread(
    problem: Problem, parts: dict[str, torch.Tensor]
) -> tuple[torch.Tensor, torch.Tensor | None]:
    w = meaning.weight(problem, parts, torch.float32)
    if problem.rank:
        w = w + parts["left"].float() @ parts["right"].float()
    return w.to(DTYPES[problem.x_dtype]), parts.get("gain")


class Dense:
    """The step in torch, one weight for all layers or for each its own."""

    def __init__(
        self, s: Shapes, weights: dict[str, tuple[torch.Tensor, torch.Tensor | None]] | None = None
    ) -> None:
        self.s = s
        self.weights = weights or {
            n: _random_dense(p) for n, p in {**s.linears(), "head": s.head()}.items()
        }
        clone = weights is None
        self.layers = [
            {n: (w.clone() if clone else w, g) for n, (w, g) in self.weights.items() if n != "head"}
            for _ in range(s.layers)
        ]
        self.caches = [_cache(s, i) for i in range(s.layers)]
        self.turn = tuple(t.to(DTYPES[s.dtype]) for t in s.rotation())
        self.layer: Callable[..., torch.Tensor] = self._layer
        per_layer = sum(w.nbytes for n, (w, _) in self.weights.items() if n != "head")
        self.bytes = s.layers * per_layer + self.weights["head"][0].nbytes

    def __call__(self, x: torch.Tensor) -> torch.Tensor:
        for weights, cache in zip(self.layers, self.caches, strict=True):
            x = self.layer(x, weights, cache.keys, cache.values)
        return self._normed(x, *self.weights["head"])

    def _normed(self, x: torch.Tensor, w: torch.Tensor, gain: torch.Tensor | None) -> torch.Tensor:
        own = None if gain is None else gain.to(x.dtype)
        x = torch.nn.functional.rms_norm(x, (x.shape[-1],), own, EPS)
        return torch.nn.functional.linear(x, w)

    def _layer(
        self, x: torch.Tensor, weights: dict[str, Any], keys: torch.Tensor, values: torch.Tensor
    ) -> torch.Tensor:
        s, linear = self.s, torch.nn.functional.linear
        qkv = self._normed(x, *weights["qkv"]).view(1, 1, -1, s.width).transpose(1, 2)
        q, k, v = qkv.split([s.heads, s.kv_heads, s.kv_heads], 1)
        q, k = (self._turned(t) for t in (q, k))
        keys[:, :, s.context] = k[:, :, 0]
        values[:, :, s.context] = v[:, :, 0]
        kept = slice(0, s.context + 1)
        seen = torch.nn.functional.scaled_dot_product_attention(
            q, keys[:, :, kept], values[:, :, kept], enable_gqa=True
        )
        x = x + linear(seen.transpose(1, 2).reshape(1, -1), weights["out"][0])
        gate, up = self._normed(x, *weights["gate_up"]).chunk(2, -1)
        return x + linear(torch.nn.functional.silu(gate) * up, weights["down"][0])

    def _turned(self, t: torch.Tensor) -> torch.Tensor:
        cos, sin = self.turn
        low, high = t.chunk(2, -1)
        return t * cos + torch.cat((-high, low), -1) * sin


def _random_dense(p: Problem) -> tuple[torch.Tensor, torch.Tensor | None]:
    g = torch.Generator(gpu_clock.device()).manual_seed(p.N)
    w = torch.randn(p.N, p.K, generator=g, device=g.device, dtype=DTYPES[p.x_dtype]) / p.K**0.5
    return w, torch.ones(p.K, device=g.device) if p.norm else None


def first(s: Shapes) -> torch.Tensor:
    """One token's row of an embedding, [1, hidden]."""
    g = torch.Generator(gpu_clock.device()).manual_seed(7)
    return torch.randn(1, s.hidden, generator=g, device=g.device).to(DTYPES[s.dtype])


def agreement(s: Shapes, scheme: str) -> dict[str, Any]:
    """Relative distance of llmc's logits from those of torch over the same weights; on a GPU also
    whether a recorded step gives the same bits as its launches."""
    step = Fused(s, scheme)
    x = first(s)
    y = step(x)
    want = step.dense()(x).float()
    found: dict[str, Any] = {"what": scheme, "relative_error": _apart(y, want)}
    if gpu_clock.on_gpu():
        replay = record(lambda: step(x), device=x.device)
        found["replayed_alike"] = all(torch.equal(replay(), y) for _ in range(2))
    return found


def _apart(y: torch.Tensor, want: torch.Tensor) -> float:
    return float((y.float() - want).norm() / want.norm())


def agreements(s: Shapes) -> list[Task]:
    """The logits of each scheme over few layers."""
    small = replace(s, layers=min(2, s.layers), vocab=min(4096, s.vocab))
    return [Task(f"logits {scheme}", agreement, (small, scheme), 120.0) for scheme in SCHEMES]


COMPILED = "bf16 compiled + graph"  # by torch's own compiler, which takes its time
FIRST = ("w4", "bf16 graph")
WAYS = (*FIRST, *(n for n in SCHEMES if n not in FIRST), "bf16 eager")


def steps(s: Shapes, limits: gpu_clock.Limits, names: Sequence[str] = WAYS) -> list[Task]:
    """Tokens per second of every way at batch 1; none without a GPU."""
    return [Task(f"decode {name}", timed, (name, s, limits), 150.0 if name == COMPILED else 90.0,
                 (("decode", name),)) for name in names if gpu_clock.on_gpu()]  # fmt: skip


def timed(name: str, s: Shapes, limits: gpu_clock.Limits) -> dict[str, Any]:
    """Microseconds of a step, tokens per second, and the share of the copy bandwidth."""
    x = first(s)
    step: Fused | Dense = Fused(s, name) if name in SCHEMES else Dense(s)
    if name == COMPILED and isinstance(step, Dense):
        step.layer = torch.compile(step._layer, dynamic=False)
    with torch.no_grad():
        if name == "bf16 eager":
            us = _eager(step, x)
        else:
            us = gpu_clock.microseconds(lambda _: step(x), [0])
    assert us is not None
    found = {"what": name, "us": us, "tokens_per_s": 1e6 / us, "weight_bytes": step.bytes}
    if limits.copy:
        found["share_of_copy"] = step.bytes / us * 1e6 / limits.copy
    return found


def _eager(step: Callable[[torch.Tensor], object], x: torch.Tensor) -> float:
    """Microseconds of a step that the host launches kernel by kernel."""
    for _ in range(3):
        step(x)
    start, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
    start.record()
    for _ in range(20):
        step(x)
    end.record()
    end.synchronize()
    return start.elapsed_time(end) * 1e3 / 20
