"""Small programs with compressed linears, built node by node; also run by a child process."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
from torch import fx

from llmc.codegen import meaning
from llmc.codegen.fuse import FusePlan
from llmc.codegen.problem import PARTS
from llmc.compiler.ir import packing
from llmc.compiler.ir.build import result_type
from llmc.compiler.ir.dims import BATCH, SEQ
from llmc.compiler.ir.graph import DictWeights, Info, Param, Program
from llmc.compiler.ir.ops import row
from llmc.compiler.ir.ops.base import infer
from llmc.compiler.ir.ops.fused import fused as body_value
from llmc.compiler.ir.ops.fused import recast
from llmc.compiler.ir.ops.sparse import csr
from llmc.compiler.ir.segments import make_segments
from llmc.compiler.ir.types import TensorType


@dataclass(frozen=True)
class Weight:
    """A compressed weight; group counts dense columns, 0 is one scale per row.

    side: share of the weights that a 2:4 mask drops and sparse rows bring back.
    """

    N: int
    K: int
    bits: int = 4
    group: int = 32
    asym: bool = False
    sparse: bool = False
    side: float = 0.0
    scale: torch.dtype = torch.float16


class Maker:
    """Adds inputs, parameters and calls to an empty program."""

    def __init__(self, dtype: torch.dtype = torch.float32) -> None:
        self.program = Program(fx.Graph(), {}, DictWeights(), dtype)
        self.generator = torch.Generator().manual_seed(0)

    def input(self, name: str, width: int) -> fx.Node:
        node = self.program.graph.placeholder(name)
        node.meta["llmc"] = Info(TensorType((BATCH, SEQ, width), self.program.dtype))
        return node

    def param(self, name: str, value: Any, *, keep: bool = False) -> fx.Node:
        """A parameter with a given tensor, or a random one of a given shape."""
        if not isinstance(value, torch.Tensor):
            value = torch.randn(*value, generator=self.generator) / 4
        param = Param(name, tuple(value.shape), value.dtype, keep=keep)
        self.program.params[name] = param
        self.program.set_tensor(name, value)
        node = self.program.graph.create_node("get_attr", name, name=name)
        node.meta["llmc"] = Info(self.program.param_type(param))
        return node

    def call(self, op: str, *args: Any, **kwargs: Any) -> fx.Node:
        node = self.program.graph.call_function(row(op).target, args, kwargs)
        node.meta["llmc"] = Info(infer(node), made_by="test")
        return node

    def weight(self, name: str, w: Weight) -> fx.Node:
        """The decode chain of a random weight in canonical storage."""
        g = self.generator
        columns = w.K // 2 if w.sparse else w.K
        group = (w.group // 2 if w.sparse else w.group) or columns
        groups = -(-columns // group)
        q = torch.randint(0, 1 << w.bits, (w.N, w.K), generator=g)
        meta = None
        if w.sparse:
            kept = (torch.rand(w.N, w.K // 4, 4, generator=g).argsort(dim=-1) < 2).flatten(-2)
            q, meta = packing.compress_nm(q, kept, 2, 4)
        scale = (torch.rand(w.N, groups, generator=g) * 0.02 + 0.005) * 2.0 ** (4 - w.bits)
        parts = [
            self.param(f"{name}.codes", packing.pack(q, w.bits), keep=True),
            self.param(f"{name}.scale", scale.to(w.scale), keep=True),
        ]
        if w.asym:
            zero = torch.randint(0, 1 << w.bits, (w.N, groups), generator=g).to(torch.uint8)
            parts.append(self.param(f"{name}.zero", zero, keep=True))
        attrs = {"bits": w.bits, "group": group, "columns": columns, "dtype": self.program.dtype}
        made = self.call("llmc.dequantize", *parts, **attrs)
        if meta is not None:
            where = self.param(f"{name}.meta", meta, keep=True)
            made = self.call("llmc.expand_nm", made, where, n=2, m=4, columns=w.K)
            if w.side:
                extra = ~kept & (torch.rand(w.N, w.K, generator=g) < 2 * w.side)
                values = self.param(f"{name}.extra", (int(extra.sum()),))
                rows = zip(("index", "starts"), csr(extra), strict=True)
                parts = [self.param(f"{name}.{part}", t, keep=True) for part, t in rows]
                made = self.call("llmc.add_csr", made, values, *parts)
        return made

    def linear(self, x: fx.Node, name: str, w: Weight, bias: bool = False) -> fx.Node:
        args = [x, self.weight(name, w)]
        if bias:
            args.append(self.param(f"{name}.bias", (w.N,)))
        return self.call("aten.linear.default", *args)

    def output(self, *values: Any) -> Program:
        result = values[0] if len(values) == 1 else tuple(values)
        node = self.program.graph.output(result)
        node.meta["llmc"] = Info(result_type(result))
        self.program.segments = make_segments(self.program.graph, [("prologue", 0)])
        return self.program


def mlp(dtype: torch.dtype = torch.float32, **scheme: Any) -> Program:
    """h + down(silu(gate(norm h)) * up(norm h)), 64 wide, 96 inside, all three compressed."""
    m = Maker(dtype)
    h = m.input("h", 64)
    n = m.call("llmc.rms_norm", h, m.param("gain", (64,)), eps=1e-5)
    gate = m.linear(n, "gate", Weight(96, 64, **scheme))
    up = m.linear(n, "up", Weight(96, 64, **scheme), bias=True)
    z = m.call("llmc.gated", gate, up, act="silu")
    down = m.linear(z, "down", Weight(64, 96, **scheme))
    return m.output(m.call("aten.add.Tensor", h, down))


def hidden(dtype: torch.dtype = torch.float32, width: int = 64) -> torch.Tensor:
    """An input [2, 3, width]."""
    g = torch.Generator().manual_seed(7)
    return torch.randn(2, 3, width, generator=g).to(dtype)


def law(program: Program, plan: FusePlan) -> None:
    """Every fused node's problem, with its parts, means in fp64 what its body means."""
    g = torch.Generator().manual_seed(3)

    def wide(t: torch.Tensor) -> torch.Tensor:
        return t.double() if t.is_floating_point() else t

    for one in plan.fused:
        parts = one.canonical(program, wide=torch.float64)
        assert set(parts) <= set(PARTS)
        x = torch.randn(2, 3, one.problem.K, generator=g, dtype=torch.float64)
        residual = torch.randn(2, 3, one.problem.outputs, generator=g, dtype=torch.float64)
        given = []
        for i, node in enumerate(program.node(one.node).args[0]):
            param = program.param_of(node)
            if param is not None:
                given.append(wide(program.fetch(param.name)))
            else:
                assert i == 0 or f"a{i}" == one.residual
                given.append(residual if i else x)
        if one.residual == "a0":
            residual = x
        want = body_value(given, body=recast(one.body, torch.float64))
        got = meaning.linear(one.problem, parts, x, residual if one.residual else None)
        torch.testing.assert_close(got, want, rtol=1e-9, atol=1e-9)
