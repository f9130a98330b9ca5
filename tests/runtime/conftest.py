"""A tiny decoder built by hand, so that the runtime's tests need no capture."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import fx

from llmc.compiler.ir.dims import BATCH, SEQ
from llmc.compiler.ir.graph import DictWeights, Info, Param, Program
from llmc.compiler.ir.types import TensorType
from llmc.compiler.pipeline.data import Tokenizer, read_stream
from llmc.compiler.runtime.executor import Runner

VOCAB, HIDDEN, HEADS, KV, SIZE, INNER = 32, 16, 4, 2, 4, 24


class Builder:
    """Writes nodes at the end of a program."""

    def __init__(self, seed: int = 0) -> None:
        self.program = Program(fx.Graph(), {}, DictWeights())
        self.generator = torch.Generator().manual_seed(seed)
        self.end = self.program.graph.output(None)
        self.end.meta["llmc"] = Info(None)

    def input(self, name: str, dtype: torch.dtype) -> fx.Node:
        first = next(n for n in self.program.graph.nodes if n.op != "placeholder")
        with self.program.graph.inserting_before(first):
            node = self.program.graph.placeholder(name)
        node.meta["llmc"] = Info(TensorType((BATCH, SEQ), dtype))
        return node

    def param(self, *shape: int, dtype: torch.dtype = torch.float32, scale: float = 0.3) -> fx.Node:
        value = torch.randn(*shape, generator=self.generator) * scale
        return self.tensor(value.to(dtype))

    def tensor(self, value: torch.Tensor, *, trained: bool = True, keep: bool = False) -> fx.Node:
        name = f"p{len(self.program.params)}"
        param = Param(name, tuple(value.shape), value.dtype, trained=trained, keep=keep)
        return self.program.add_param(param, value, before=self.end)

    def emit(self, op: str, *args: Any, **kwargs: Any) -> fx.Node:
        return self.program.emit(op, *args, before=self.end, made_by="test", **kwargs)

    def done(self, out: fx.Node) -> Program:
        self.end.args = (out,)
        self.end.meta["llmc"] = Info(out.meta["llmc"].type)
        self.program.graph.lint()
        return self.program


def tiny(
    *,
    layers: int = 2,
    masked: bool = True,
    positions: bool = True,
    dtype: torch.dtype = torch.float32,
    matrix: Callable[[Builder, int, int], fx.Node] | None = None,
    **attrs: Any,
) -> Program:
    """A GQA decoder with learned positions; ``attrs`` go to its attention nodes.

    ``matrix(builder, out, in)`` makes a weight matrix; default: a dense parameter.
    """
    b = Builder()
    make = matrix or (lambda b, n, k: b.param(n, k, dtype=dtype))
    ids = b.input("input_ids", torch.int64)
    pos = b.input("position_ids", torch.int64) if positions else None
    valid = b.input("attention_mask", torch.bool) if masked else None
    rows = b.emit("aten.sym_size.int", ids, 0)
    length = b.emit("aten.sym_size.int", ids, 1)
    x = b.emit("aten.embedding.default", b.param(VOCAB, HIDDEN, dtype=dtype), ids)
    if pos is not None:
        place = b.emit("aten.embedding.default", b.param(64, HIDDEN, dtype=dtype), pos)
        x = b.emit("aten.add.Tensor", x, place)

    def heads(value: fx.Node, count: int) -> fx.Node:
        shape = [rows, length, count, SIZE]
        return b.emit("aten.transpose.int", b.emit("aten.reshape.default", value, shape), 1, 2)

    for _ in range(layers):
        h = b.emit("llmc.rms_norm", x, b.param(HIDDEN, scale=1.0), eps=1e-6)
        q = heads(b.emit("aten.linear.default", h, make(b, HEADS * SIZE, HIDDEN)), HEADS)
        k = heads(b.emit("aten.linear.default", h, make(b, KV * SIZE, HIDDEN)), KV)
        v = heads(b.emit("aten.linear.default", h, make(b, KV * SIZE, HIDDEN)), KV)
        out = b.emit("llmc.attention", q, k, v, pos, pos, valid, scale=0.5, **attrs)
        out = b.emit("aten.reshape.default", out, [rows, length, HEADS * SIZE])
        x = b.emit(
            "aten.add.Tensor", x,
            b.emit("aten.linear.default", out, make(b, HIDDEN, HEADS * SIZE)),
        )  # fmt: skip
        h = b.emit("llmc.rms_norm", x, b.param(HIDDEN, scale=1.0), eps=1e-6)
        gate = b.emit("aten.linear.default", h, make(b, INNER, HIDDEN))
        up = b.emit("aten.linear.default", h, make(b, INNER, HIDDEN))
        h = b.emit("llmc.gated", gate, up, act="silu")
        x = b.emit("aten.add.Tensor", x, b.emit("aten.linear.default", h, make(b, HIDDEN, INNER)))
    head = b.param(VOCAB, HIDDEN, dtype=dtype, scale=2.0)
    return b.done(b.emit("aten.linear.default", x, head))


@pytest.fixture(scope="session")
def make_tiny() -> Callable[..., Program]:
    return tiny


@pytest.fixture(scope="session")
def make_builder() -> type[Builder]:
    return Builder


@pytest.fixture(scope="session")
def pylm_program(pylm: Path) -> Program:
    """The demo model, captured once; nobody may change it."""
    from llmc.compiler.analysis.blocks import apply_segments
    from llmc.compiler.capture import capture

    program = capture(pylm)
    apply_segments(program)
    return program


@pytest.fixture(scope="session")
def pylm_runner(pylm_program: Program) -> Runner:
    return Runner(pylm_program)


@pytest.fixture(scope="session")
def pylm_cached(pylm_program: Program) -> Runner:
    from llmc.compiler.runtime.cache import add_cache

    return Runner(add_cache(pylm_program))


@pytest.fixture(scope="session")
def pylm_tokenizer(pylm: Path) -> Tokenizer:
    return Tokenizer(pylm)


@pytest.fixture(scope="session")
def heldout(pylm_text: Path, pylm_tokenizer: Tokenizer) -> Any:
    return read_stream(pylm_text / "heldout.txt", pylm_tokenizer)
