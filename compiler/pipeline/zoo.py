"""Tiny programs on which every pass states where it applies and where it refuses.

Each is one decoder block with random weights, built op by op; no model code is involved.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import fx

from ..ir.dims import BATCH, SEQ, Dim
from ..ir.errors import UsageError, nearest
from ..ir.graph import DictWeights, Info, Param, Program
from ..ir.types import TensorType


class Builder:
    """Builds a program op by op, with canonical names."""

    def __init__(self, seed: int = 0, dtype: torch.dtype = torch.float32) -> None:
        self.program = Program(fx.Graph(), {}, DictWeights(), dtype)
        self.end = self.program.graph.create_node("output", "output", (None,))
        self.end.meta["llmc"] = Info(None)
        self.random = torch.Generator().manual_seed(seed)

    def input(self, name: str, dtype: torch.dtype, *shape: Dim) -> fx.Node:
        first = next(iter(n for n in self.program.graph.nodes if n.op != "placeholder"))
        with self.program.graph.inserting_before(first):
            node = self.program.graph.placeholder(name)
        node.meta["llmc"] = Info(TensorType(tuple(shape), dtype), made_by="input")
        return node

    def param(self, *shape: int, near: float = 0.0, width: float = 1.0) -> fx.Node:
        name = f"p{len(self.program.params)}"
        tensor = torch.randn(*shape, generator=self.random).mul_(width).add_(near)
        param = Param(name, tuple(shape), torch.float32, (f"layer.{name}",))
        return self.program.add_param(param, tensor, before=self.end)

    def call(self, op: str, *args: Any, **kwargs: Any) -> fx.Node:
        return self.program.emit(op, *args, before=self.end, made_by="zoo", **kwargs)

    def linear(self, x: fx.Node, out: int, inputs: int, *, bias: bool = False) -> fx.Node:
        w = self.param(out, inputs, width=inputs**-0.5)
        args = [x, w] + ([self.param(out, width=0.1)] if bias else [])
        return self.call("aten.linear.default", *args)

    def finish(self, value: fx.Node) -> Program:
        self.end.args = (value,)
        self.end.meta["llmc"] = Info(value.meta["llmc"].type)
        self.program.graph.lint()
        return self.program


def decoder(
    *, hidden: int = 16, inner: int = 24, heads: int = 4, kv: int = 2, size: int = 4,
    vocab: int = 20, norm: str = "rms", offset: float = 0.0, mlp: str = "gated",
    bias: bool = False, tied: bool = False, leak: bool = False, share: bool = False,
    blocks: int = 2, seed: int = 0, rope: float = 0.0, causal: bool = True,
    reads: dict[str, int] | None = None, parallel: bool = False,
) -> Program:  # fmt: skip
    """A small decoder: embedding, blocks of attention and MLP, final norm, head.

    norm: ``rms`` or ``layer``; offset 1 is the 1 + g form. mlp: ``gated``, ``relu``, ``gelu``,
    ``softmax`` (over the inner channels) or ``moe`` (four gated experts, two chosen).
    leak: the residual also reads the first norm of each block. share: every block reads the first
    block's keys and values. rope: queries and keys are rotated by their positions, then keys are
    multiplied by this unless it is 1. causal: attention reads no later token. reads: attributes of
    attention (window, dilation, first). parallel: attention and a dense MLP read one norm, and
    their sum is added to the residual.
    """
    b = Builder(seed)
    ids = b.input("input_ids", torch.int64, BATCH, SEQ)
    pos = b.input("position_ids", torch.int64, BATCH, SEQ)
    valid = b.input("attention_mask", torch.bool, BATCH, SEQ)
    table = b.param(vocab, hidden)
    x = b.call("aten.embedding.default", table, ids)
    length = [b.call("aten.sym_size.int", ids, d) for d in (0, 1)]

    def normed(value: fx.Node) -> fx.Node:
        gain = b.param(hidden, near=1.0 - offset, width=0.1)
        if norm == "layer":
            return b.call("llmc.layer_norm", value, gain, b.param(hidden, width=0.1), eps=1e-5)
        return b.call("llmc.rms_norm", value, gain, eps=1e-5, offset=offset)

    def split(value: fx.Node, count: int) -> fx.Node:
        y = b.call("aten.reshape.default", value, [*length, count, size])
        return b.call("aten.transpose.int", y, 1, 2)

    def routed(value: fx.Node, experts: int = 4) -> fx.Node:
        flat = b.call("aten.reshape.default", value, [-1, hidden])
        chances = b.call("aten.softmax.int", b.linear(flat, experts, hidden), -1)
        top = b.call("aten.topk.default", chances, 2)
        weight, index = (b.call("operator.getitem", top, i) for i in (0, 1))
        both = b.param(experts, 2 * inner, hidden, width=hidden**-0.5)
        down = b.param(experts, hidden, inner, width=inner**-0.5)
        y = b.call("llmc.experts", flat, index, weight, both, down, act="silu")
        return b.call("aten.reshape.default", y, [*length, hidden])

    def turned(value: fx.Node) -> fx.Node:
        return b.call("llmc.rope", value, *angles) if rope else value

    masks = (reads or {}) | ({} if causal else {"causal": False})
    angles: list[fx.Node] = []
    if rope:
        at = b.call("aten.unsqueeze.default", b.call("aten.unsqueeze.default", pos, 1), -1)
        angle = b.call("aten.mul.Tensor", at, b.param(size))
        angles = [b.call(f"aten.{name}.default", angle) for name in ("cos", "sin")]
    k = v = x
    for i in range(blocks):
        n = normed(x)
        q = turned(split(b.linear(n, heads * size, hidden, bias=bias), heads))
        if i == 0 or not share:
            k, v = (split(b.linear(n, kv * size, hidden, bias=bias), kv) for _ in range(2))
            k = turned(k)
            if rope not in (0.0, 1.0):
                k = b.call("aten.mul.Tensor", k, rope)
        a = b.call("llmc.attention", q, k, v, pos, pos, valid, scale=size**-0.5, **masks)
        a = b.call("aten.reshape.default", a, [*length, heads * size])
        a = b.linear(a, hidden, heads * size, bias=bias)
        if not parallel:
            x = b.call("aten.add.Tensor", x, a)
            if leak:
                x = b.call("aten.add.Tensor", x, n)
            n = normed(x)
        if mlp == "moe":
            x = b.call("aten.add.Tensor", x, routed(n))
            continue
        if mlp == "gated":
            gate, up = (b.linear(n, inner, hidden, bias=bias) for _ in range(2))
            m = b.call("llmc.gated", gate, up, act="silu")
        elif mlp == "softmax":
            m = b.call("aten.softmax.int", b.linear(n, inner, hidden, bias=bias), -1)
        else:
            m = b.call("llmc.activation", b.linear(n, inner, hidden, bias=bias), act=mlp)
        m = b.linear(m, hidden, inner, bias=bias)
        both = (b.call("aten.add.Tensor", a, m), x) if parallel else (x, m)
        x = b.call("aten.add.Tensor", *both)
    last = normed(x)
    head = table if tied else b.param(vocab, hidden, width=hidden**-0.5)
    return b.finish(b.call("aten.linear.default", last, head))


def with_keys(program: Program) -> Program:
    """The program that gives its first block's keys beside the logits."""
    keys = next(program.calls("llmc.attention")).args[1]
    logits = program.output.args[0]
    assert isinstance(keys, fx.Node)
    assert isinstance(logits, fx.Node)
    program.output.args = ((logits, keys),)
    types = tuple(n.meta["llmc"].type for n in (logits, keys))
    program.output.meta["llmc"] = Info(types)
    return program


def with_table(program: Program) -> Program:
    """The program whose logits are shifted by the mean of its table of embeddings."""
    logits = program.output.args[0]
    assert isinstance(logits, fx.Node)
    table = program.param_node("p0")
    with_mean: dict[str, Any] = {"before": program.output, "made_by": "zoo"}
    mean = program.emit("aten.mean.dim", table, [0, 1], **with_mean)
    program.output.args = (program.emit("aten.add.Tensor", logits, mean, **with_mean),)
    return program


ZOO: dict[str, Callable[[], Program]] = {
    "llama_gqa": decoder,
    "layer_norm": lambda: decoder(norm="layer", mlp="relu", bias=True, kv=4),
    "one_plus_gain": lambda: decoder(offset=1.0),
    "norm_feeds_add": lambda: decoder(leak=True),
    "gelu_between": lambda: decoder(norm="layer", mlp="gelu", bias=True),
    "with_bias": lambda: decoder(bias=True),
    "tied_head": lambda: decoder(tied=True),
    "odd_inputs": lambda: decoder(inner=26),
    "softmax_between": lambda: decoder(mlp="softmax"),
    "moe": lambda: decoder(mlp="moe"),
    "four_blocks": lambda: decoder(blocks=4),
    "one_block": lambda: decoder(blocks=1),
    "shared_keys": lambda: decoder(blocks=4, share=True),
    "with_rope": lambda: decoder(rope=1.0),
    "scaled_after_rope": lambda: decoder(rope=2.0),
    "sees_all": lambda: decoder(causal=False),
    "has_window": lambda: decoder(reads={"window": 4}),
    "has_pattern": lambda: decoder(reads={"window": 4, "dilation": 2, "first": 1}),
    "reads_table": lambda: with_table(decoder()),
    "gives_keys": lambda: with_keys(decoder(blocks=4)),
}


def build(name: str) -> Program:
    """The tiny program of that name.

    Raises:
        UsageError: unknown name.
    """
    if name not in ZOO:
        raise UsageError(f"expected an example program, found {name!r}", hint=nearest(name, ZOO))
    return ZOO[name]()
