"""Tiny programs built op by op for the tests of the analyses."""

from __future__ import annotations

import random
import string
from collections.abc import Sequence
from dataclasses import replace
from typing import Any

import torch
from torch import fx

from llmc.compiler.ir.dims import BATCH, SEQ
from llmc.compiler.ir.graph import DictWeights, Program, info
from llmc.compiler.ir.interpret import run
from llmc.compiler.pipeline.zoo import Builder

H, HEADS, KV, D, INNER, VOCAB = 16, 4, 2, 4, 24, 20


class Stack(Builder):
    """A decoder of blocks that may differ from each other."""

    def __init__(self, seed: int = 0) -> None:
        super().__init__(seed)
        self.ids = self.input("input_ids", torch.int64, BATCH, SEQ)
        self.pos = self.input("position_ids", torch.int64, BATCH, SEQ)
        self.valid = self.input("attention_mask", torch.bool, BATCH, SEQ)
        self.table = self.param(VOCAB, H)
        self.x = self.call("aten.embedding.default", self.table, self.ids)
        self.length = [self.call("aten.sym_size.int", self.ids, d) for d in (0, 1)]

    def norm(self, x: fx.Node, kind: str = "rms", width: int = H, offset: float = 0.0) -> fx.Node:
        gain = self.param(width, near=1.0 - offset, width=0.1)
        if kind == "layer":
            return self.call("llmc.layer_norm", x, gain, self.param(width, width=0.1), eps=1e-5)
        return self.call("llmc.rms_norm", x, gain, eps=1e-5, offset=offset)

    def add(self, a: fx.Node, b: fx.Node) -> fx.Node:
        return self.call("aten.add.Tensor", a, b)

    def reshape(self, x: fx.Node, *sizes: int) -> fx.Node:
        return self.call("aten.reshape.default", x, [*self.length, *sizes])

    def heads(self, x: fx.Node, count: int, size: int = D) -> fx.Node:
        return self.call("aten.transpose.int", self.reshape(x, count, size), 1, 2)

    def attend(self, q: fx.Node, k: fx.Node, v: fx.Node, **attrs: Any) -> fx.Node:
        a = self.call(
            "llmc.attention", q, k, v, self.pos, self.pos, self.valid, scale=D**-0.5, **attrs
        )
        return self.reshape(a, HEADS * D)

    def attention(self, n: fx.Node, *, kv: int = KV, bias: bool = False, **attrs: Any) -> fx.Node:
        q = self.heads(self.linear(n, HEADS * D, H, bias=bias), HEADS)
        k = self.heads(self.linear(n, kv * D, H, bias=bias), kv)
        v = self.heads(self.linear(n, kv * D, H, bias=bias), kv)
        return self.linear(self.attend(q, k, v, **attrs), H, HEADS * D, bias=bias)

    def mlp(self, n: fx.Node, act: str = "silu", *, bias: bool = False) -> fx.Node:
        if act == "silu":
            gate, up = (self.linear(n, INNER, H, bias=bias) for _ in range(2))
            return self.linear(self.call("llmc.gated", gate, up, act=act), H, INNER, bias=bias)
        y = self.call("llmc.activation", self.linear(n, INNER, H, bias=bias), act=act)
        return self.linear(y, H, INNER, bias=bias)

    def moe(self, n: fx.Node, experts: int = 3) -> fx.Node:
        batch, length = self.length
        flat = self.call("aten.reshape.default", n, [-1, H])
        scores = self.call("aten.softmax.int", self.linear(flat, experts, H), -1)
        top = self.call("aten.topk.default", scores, 2)
        weight, index = (self.call("operator.getitem", top, i) for i in (0, 1))
        gate_up, down = self.param(experts, 2 * INNER, H), self.param(experts, H, INNER)
        y = self.call("llmc.experts", flat, index, weight, gate_up, down, act="silu")
        return self.call("aten.reshape.default", y, [batch, length, H])

    def block(self, mlp: str = "silu", *, norm: str = "rms", **attrs: Any) -> None:
        self.x = self.add(self.x, self.attention(self.norm(self.x, norm), **attrs))
        n = self.norm(self.x, norm)
        bias = bool(attrs.get("bias", False))
        y = self.moe(n) if mlp == "moe" else self.mlp(n, mlp, bias=bias)
        self.x = self.add(self.x, y)

    def done(self, *, tied: bool = False) -> Program:
        last = self.norm(self.x)
        head = self.table if tied else self.param(VOCAB, H, width=H**-0.5)
        return self.finish(self.call("aten.linear.default", last, head))


def stack(mlps: Sequence[str], *, tied: bool = False, norm: str = "rms", **attrs: Any) -> Program:
    """A decoder with one block per entry: silu, relu, gelu or moe."""
    s = Stack()
    for mlp in mlps:
        s.block(mlp, norm=norm, **attrs)
    return s.done(tied=tied)


def inputs(program: Program, vocab: int = VOCAB, batch: int = 2, length: int = 5) -> dict[str, Any]:
    """Random inputs that the program declares; the first row starts with padding."""
    ids = torch.randint(0, vocab, (batch, length), generator=torch.Generator().manual_seed(1))
    valid = torch.ones(batch, length, dtype=torch.bool)
    valid[0, 0] = False
    given = {
        "input_ids": ids,
        "position_ids": torch.arange(length).expand(batch, length),
        "attention_mask": valid,
    }
    return {n.name: given[n.name] for n in program.inputs}


def logits(program: Program, values: dict[str, Any], dtype: torch.dtype) -> torch.Tensor:
    """First output, computed in ``dtype``."""

    def fetch(name: str) -> torch.Tensor:
        t = program.weights.load(name)
        return t.to(dtype) if t.is_floating_point() else t

    out = run(program, values, fetch=fetch)
    return out if isinstance(out, torch.Tensor) else out[0]


def reordered(program: Program, seed: int = 0) -> Program:
    """The same program in another topological order."""
    r = random.Random(seed)
    new = program.clone()
    first, *_ = [n for n in new.graph.nodes if n.op != "placeholder"]
    rest = [n for n in new.graph.nodes if n.op not in ("placeholder", "output")]
    placed = set(new.inputs)
    cursor = first.prev
    while rest:
        ready = [n for n in rest if all(i in placed for i in n.all_input_nodes)]
        node = r.choice(ready)
        rest.remove(node)
        placed.add(node)
        if cursor.next is not node:
            cursor.append(node)
        cursor = node
    new.graph.lint()
    return new


def scrambled(program: Program, seed: int = 0) -> tuple[Program, dict[str, str]]:
    """The same program with random parameter names and module paths; and old name by new name."""
    r = random.Random(seed)
    new = program.clone()
    names = {p: "".join(r.choices(string.ascii_lowercase, k=12)) for p in program.params}
    tensors = {names[p]: program.weights.load(p) for p in program.params}
    new.params = {
        names[p]: replace(param, name=names[p], names=(names[p][::-1],))
        for p, param in program.params.items()
    }
    new.weights = DictWeights(tensors)
    for node in new.graph.nodes:
        node.meta["llmc"] = replace(info(node), path="".join(r.choices(string.ascii_letters, k=9)))
        if node.op == "get_attr":
            node.target = names[str(node.target)]
    return new, {v: k for k, v in names.items()}
