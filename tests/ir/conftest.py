"""Small programs, built node by node."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import fx

from llmc.compiler.ir import packing
from llmc.compiler.ir.build import result_type
from llmc.compiler.ir.dims import BATCH, SEQ, symbol
from llmc.compiler.ir.graph import DictWeights, Info, Param, Program, State
from llmc.compiler.ir.ops import row
from llmc.compiler.ir.ops.base import infer
from llmc.compiler.ir.segments import make_segments
from llmc.compiler.ir.types import TensorType


class Maker:
    """Adds inputs, parameters and calls to an empty program."""

    def __init__(self, dtype: torch.dtype = torch.float32) -> None:
        self.program = Program(fx.Graph(), {}, DictWeights(), dtype)
        self.generator = torch.Generator().manual_seed(0)

    def input(self, name: str, *shape: Any, dtype: torch.dtype = torch.int64) -> fx.Node:
        node = self.program.graph.placeholder(name)
        node.meta["llmc"] = Info(TensorType(shape, dtype), source="input")
        return node

    def param(self, name: str, value: Any, **fields: Any) -> fx.Node:
        """A parameter with a given tensor, or a random one of a given shape."""
        if not isinstance(value, torch.Tensor):
            value = torch.randn(*value, generator=self.generator) / 2
        param = Param(name, tuple(value.shape), value.dtype, (f"model.{name}.weight",), **fields)
        self.program.params[name] = param
        self.program.set_tensor(name, value)
        node = self.program.graph.create_node("get_attr", name, name=name)
        node.meta["llmc"] = Info(self.program.param_type(param))
        return node

    def call(self, op: str, *args: Any, path: str = "", **kwargs: Any) -> fx.Node:
        node = self.program.graph.call_function(row(op).target, args, kwargs)
        node.meta["llmc"] = Info(infer(node), path, "test", "toy.py:1" if path else "")
        return node

    def output(self, value: Any) -> Program:
        node = self.program.graph.output(value)
        node.meta["llmc"] = Info(result_type(value))
        return self.program


def toy_program(cached: bool = False) -> Program:
    """One decoder block over 11 tokens: attention (2 heads, 1 KV head), gated MLP, tied head."""
    m = Maker()
    ids, pos = m.input("input_ids", BATCH, SEQ), m.input("position_ids", BATCH, SEQ)
    embed = m.param("embed", (11, 8))
    h = m.call("aten.embedding.default", embed, ids, path="model.embed")
    b = m.call("aten.sym_size.int", ids, 0)
    s = m.call("aten.sym_size.int", ids, 1)
    n = m.call("llmc.rms_norm", h, m.param("norm1", (8,)), eps=1e-5, path="model.norm1")
    heads = []
    for name, count in (("q", 2), ("k", 1), ("v", 1)):
        y = m.call("aten.linear.default", n, m.param(name, (4 * count, 8)), path=f"model.{name}")
        y = m.call("aten.reshape.default", y, [b, s, count, 4])
        heads.append(m.call("aten.transpose.int", y, 1, 2))
    if cached:
        a = m.call("llmc.cached_attention", *heads, pos, scale=0.5, state="kv0")
        kept = TensorType((BATCH, 1, symbol("P"), 4), torch.float32)
        m.program.states["kv0"] = State("kv0", "kv", (kept, kept))
    else:
        a = m.call("llmc.attention", *heads, pos, pos, scale=0.5, window=3)
    a = m.call("aten.reshape.default", a, [b, s, -1])
    h = m.call("aten.add.Tensor", h, m.call("aten.linear.default", a, m.param("o", (8, 8))))
    n = m.call("llmc.rms_norm", h, m.param("norm2", (8,)), eps=1e-5)
    gate = m.call("aten.linear.default", n, m.param("gate", (6, 8)))
    up = m.call("aten.linear.default", n, m.param("up", (6, 8)))
    z = m.call("llmc.gated", gate, up, act="silu")
    h = m.call("aten.add.Tensor", h, m.call("aten.linear.default", z, m.param("down", (8, 6))))
    program = m.output(m.call("aten.linear.default", h, embed, path="lm_head"))
    program.facts = {"vocabulary": 11, "rope": {"base": 1e4}, "eos": [1, 2], "none": None}
    order = [x.name for x in program.graph.nodes]
    program.segments = make_segments(
        program.graph,
        [("prologue", 0), ("block0", order.index("norm1")), ("epilogue", len(order) - 2)],
    )
    return program


def packed_program() -> Program:
    """y = x Wᵀ, W [4, 64] of 4-bit codes in groups of 16 kept columns, 2 of 4 kept."""
    m = Maker()
    x = m.input("x", BATCH, 64, dtype=torch.float32)
    g = m.generator
    codes = packing.pack(torch.randint(0, 16, (4, 32), generator=g), 4)
    scale = (torch.rand(4, 2, generator=g) + 0.1).half()
    zero = torch.randint(0, 16, (4, 2), generator=g).to(torch.uint8)
    where = torch.stack([torch.randperm(4, generator=g)[:2].sort().values for _ in range(64)])
    meta = packing.pack(where.reshape(4, 32), 2)
    nodes = [
        m.param(name, t, trained=False, keep=True)
        for name, t in (("codes", codes), ("scale", scale), ("zero", zero))
    ]
    w = m.call("llmc.dequantize", *nodes, bits=4, group=16, columns=32)
    where_node = m.param("meta", meta, trained=False, keep=True)
    w = m.call("llmc.expand_nm", w, where_node, n=2, m=4, columns=64)
    return m.output(m.call("aten.linear.default", x, w))


def bitmap_program() -> Program:
    """y = x Wᵀ, W [3, 40] kept where a bitmap says so."""
    m = Maker()
    x = m.input("x", BATCH, 40, dtype=torch.float32)
    mask = torch.rand(3, 40, generator=m.generator) < 0.5
    values = torch.randn(int(mask.sum()), generator=m.generator)
    bitmap = m.param("bitmap", packing.pack(mask.int(), 1), trained=False, keep=True)
    w = m.call("llmc.expand_bitmap", m.param("values", values), bitmap, columns=40)
    return m.output(m.call("aten.linear.default", x, w))


def sparse_program() -> Program:
    """y = x (W + S)ᵀ, W [3, 8] with 2 of 4 kept, S beside it: columns 0, 3 | none | 7."""
    m = Maker()
    x = m.input("x", BATCH, 8, dtype=torch.float32)
    where = packing.pack(torch.tensor([[1, 2, 0, 3], [0, 1, 2, 3], [1, 3, 0, 2]]), 2)
    meta = m.param("meta", where, trained=False, keep=True)
    values = m.param("values", torch.randn(3, 4, generator=m.generator))
    w = m.call("llmc.expand_nm", values, meta, n=2, m=4, columns=8)
    extra = m.param("extra", torch.randn(3, generator=m.generator))
    index = m.param("index", torch.tensor([0, 3, 7], dtype=torch.int16), keep=True)
    starts = m.param("starts", torch.tensor([0, 2, 2, 3], dtype=torch.int32), keep=True)
    w = m.call("llmc.add_csr", w, extra, index, starts)
    return m.output(m.call("aten.linear.default", x, w))


@pytest.fixture(scope="session")
def sparse() -> Callable[[], Program]:
    return sparse_program


@pytest.fixture(scope="session")
def maker() -> type[Maker]:
    return Maker


@pytest.fixture(scope="session")
def toy() -> Callable[..., Program]:
    """``toy()`` or ``toy(cached=True)``: a fresh small decoder."""
    return toy_program


@pytest.fixture(scope="session")
def packed() -> Callable[[], Program]:
    return packed_program


@pytest.fixture(scope="session")
def bitmap() -> Callable[[], Program]:
    return bitmap_program
