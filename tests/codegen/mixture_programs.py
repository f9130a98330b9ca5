"""Small layers of experts, built node by node; also run by a child process."""

from __future__ import annotations

import math
from typing import Any

import torch
from lowering_programs import Maker, Weight
from torch import fx

from llmc.codegen import meaning
from llmc.codegen.mixture.choice import Choice, read_choice
from llmc.codegen.mixture.plan import FusedMixture
from llmc.codegen.problem import Parts
from llmc.compiler.ir.graph import Program
from llmc.compiler.ir.ops.semantic import experts

HIDDEN, INNER, COUNT, CHOSEN = 64, 32, 4, 2


class Layers(Maker):
    """Adds layers of experts to a program."""

    def flat(self, x: fx.Node) -> fx.Node:
        return self.call("aten.reshape.default", x, [-1, HIDDEN])

    def stacked(self, name: str, rows: int, columns: int, dense: bool, **scheme: Any) -> fx.Node:
        """Weights [COUNT, rows, columns], stored as one matrix or as they are."""
        if dense:
            return self.param(name, (COUNT, rows, columns))
        matrix = self.weight(name, Weight(COUNT * rows, columns, **scheme))
        return self.call("aten.reshape.default", matrix, [COUNT, rows, columns])

    def route(self, h: fx.Node, kind: str = "softmax") -> tuple[fx.Node, fx.Node]:
        """Index and weight: "softmax", "softmax sum" or, the same written otherwise, "chosen"; what
        the words of a `Choice` say; or "tanh", which no kernel makes itself."""
        found = self.call("aten.linear.default", h, self.param("router", (COUNT, HIDDEN)))
        choice = read_choice(kind)
        if choice is not None and not choice.plain:
            return self.worded(found, choice)
        if kind == "tanh":
            found = self.call("aten.tanh.default", found)
        elif kind != "chosen":
            found = self.call("aten.softmax.int", found, -1)
        top = self.call("aten.topk.default", found, CHOSEN)
        weight, index = (self.call("operator.getitem", top, i) for i in (0, 1))
        if kind == "softmax sum":
            total = self.call("aten.sum.dim_IntList", weight, [-1], True)
            weight = self.call("aten.div.Tensor", weight, total)
        if kind == "chosen":
            weight = self.call("aten.softmax.int", weight, -1)
        return index, weight

    def worded(self, products: fx.Node, how: Choice) -> tuple[fx.Node, fx.Node]:
        """Index and weight as models spell them that add to scores, or keep the best groups."""
        soft = () if how.score == "sigmoid" else (-1,)
        name = "aten.softmax.int" if soft else "aten.sigmoid.default"
        wanted = scores = self.call(name, products, *soft)
        if how.added:
            stored = torch.rand(COUNT, generator=self.generator) - 0.5
            wanted = self.call("aten.add.Tensor", wanted, self.param("correction", stored))
        if how.groups:
            wanted = self.grouped(wanted, how)
        top = self.call("aten.topk.default", wanted, CHOSEN, -1, True, False)
        index = self.call("operator.getitem", top, 1)
        weight = self.call("aten.gather.default", scores, 1, index)
        if how.sum:
            total = self.call("aten.sum.dim_IntList", weight, [-1], True)
            if how.eps:
                total = self.call("aten.add.Tensor", total, how.eps)
            if how.least:
                total = self.call("aten.clamp.default", total, how.least)
            weight = self.call("aten.div.Tensor", weight, total)
        return index, weight if how.times == 1 else self.call("aten.mul.Tensor", weight, how.times)

    def grouped(self, wanted: fx.Node, how: Choice, fill: float = -math.inf) -> fx.Node:
        size = COUNT // how.groups
        parts = self.call("aten.reshape.default", wanted, [-1, how.groups, size])
        if how.by == "two":
            two = self.call("aten.topk.default", parts, 2)
            values = self.call("operator.getitem", two, 0)
            best = self.call("aten.sum.dim_IntList", values, [-1])
        else:
            best = self.call("operator.getitem", self.call("aten.max.dim", parts, -1), 0)
        top = self.call("aten.topk.default", best, how.kept, -1, True, False)
        index = self.call("operator.getitem", top, 1)
        mask = self.call("aten.zeros_like.default", best)
        mask = self.call("aten.scatter.value", mask, 1, index, 1)
        mask = self.call("aten.unsqueeze.default", mask, -1)
        mask = self.call("aten.expand.default", mask, [-1, how.groups, size])
        mask = self.call("aten.reshape.default", mask, [-1, COUNT])
        mask = self.call("aten.to.dtype", mask, torch.bool)
        mask = self.call("aten.bitwise_not.default", mask)
        return self.call("aten.masked_fill.Scalar", wanted, mask, fill)

    def experts(
        self, h: fx.Node, index: fx.Node, weight: fx.Node, *, dense: bool = False, **scheme: Any
    ) -> fx.Node:
        up = self.stacked("up", 2 * INNER, HIDDEN, dense, **scheme)
        down = self.stacked("down", HIDDEN, INNER, dense, **scheme)
        return self.call("llmc.experts", h, index, weight, up, down, act="silu")

    def back(self, y: fx.Node, like: fx.Node, width: int = HIDDEN) -> fx.Node:
        """y [T, width] with the first axes of another value."""
        sizes = [self.call("aten.sym_size.int", like, i) for i in (0, 1)]
        return self.call("aten.reshape.default", y, [*sizes, width])

    def normed(self, x: fx.Node) -> fx.Node:
        gain = torch.rand(HIDDEN, generator=self.generator) + 0.5
        return self.call("llmc.rms_norm", x, self.param("gain", gain), eps=1e-5)


def layer(
    dtype: torch.dtype = torch.float32, *, kind: str = "softmax sum", dense: bool = False,
    **scheme: Any,
) -> Program:  # fmt: skip
    """h + experts(norm h), routed by the normed input."""
    m = Layers(dtype)
    h = m.input("h", HIDDEN)
    flat = m.flat(m.normed(h))
    y = m.experts(flat, *m.route(flat, kind), dense=dense, **scheme)
    return m.output(m.call("aten.add.Tensor", h, m.back(y, h)))


def oracle(
    fused: FusedMixture, up: Parts, down: Parts, x: torch.Tensor, residual: torch.Tensor | None
) -> torch.Tensor:
    """What two problems mean together with their canonical parts, of x [..., H] in its dtype."""
    shape, problem = x.shape, fused.up
    h = x.reshape(-1, problem.K)
    if problem.norm:
        h = meaning.normed(problem, up, h)
    index, weight = meaning.chosen(problem, up, h)
    stacks = [
        meaning.weight(p, parts, h.dtype).reshape(p.experts, p.N // p.experts, p.K)
        for p, parts in ((fused.up, up), (fused.down, down))
    ]
    y = experts(h, index, weight, stacks[0], stacks[1], act=problem.act)
    return y.reshape(shape) if residual is None else y.reshape(shape) + residual
