"""Random small graphs: they print, parse, serialise and verify, and always compute the same."""

from __future__ import annotations

import json
from typing import Any

import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import fx

from llmc.compiler.ir.dims import BATCH, SEQ
from llmc.compiler.ir.graph import info, tensor_type
from llmc.compiler.ir.interpret import run
from llmc.compiler.ir.parser import parse_python
from llmc.compiler.ir.printer import print_python
from llmc.compiler.ir.serial import attach, from_json, provenance, to_json
from llmc.compiler.ir.types import TensorType
from llmc.compiler.ir.verifier import verify

UNARY = ("neg", "tanh", "silu", "abs", "sigmoid", "cos")
STEPS = (
    "unary", "scale", "binary", "linear", "norm", "split", "cat", "merge", "transpose", "softmax",
    "mean", "cast", "slice", "gated", "compare",
)  # fmt: skip


class Grower:
    """Grows a graph over values [B, S, width], plus odd-shaped results that nobody reads again."""

    def __init__(self, m: Any, data: st.DataObject) -> None:
        self.m, self.data = m, data
        self.values: list[fx.Node] = [m.input("x", BATCH, SEQ, 8, dtype=torch.float32)]
        self.sizes = [m.call("aten.sym_size.int", self.values[0], a) for a in (0, 1)]
        self.results: list[fx.Node] = []

    def draw(self, strategy: Any) -> Any:
        return self.data.draw(strategy)

    def pick(self) -> fx.Node:
        return self.draw(st.sampled_from(self.values))

    def width(self, node: fx.Node) -> int:
        size = tensor_type(node).shape[2]
        assert isinstance(size, int)
        return size

    def param(self, *shape: int) -> fx.Node:
        return self.m.param(f"w{len(self.m.program.params)}", shape)

    def step(self, kind: str) -> None:
        m, x = self.m, self.pick()
        n = self.width(x)
        path = self.draw(st.sampled_from(["", "model.a", "model.b.0"]))
        match kind:
            case "unary":
                op = self.draw(st.sampled_from(UNARY))
                self.values.append(m.call(f"aten.{op}.default", x, path=path))
            case "scale":
                factor = self.draw(st.floats(-2, 2) | st.integers(-3, 3))
                self.values.append(m.call("aten.mul.Tensor", x, factor, path=path))
            case "binary":
                same = [v for v in self.values if self.width(v) in (n, 1)]
                y = self.draw(st.sampled_from(same))
                self.values.append(m.call("aten.add.Tensor", x, y))
            case "linear":
                rows = self.draw(st.sampled_from([1, 2, 4, 6, 8]))
                bias = self.param(rows) if self.draw(st.booleans()) else None
                args = (x, self.param(rows, n), *([bias] if bias is not None else []))
                self.values.append(m.call("aten.linear.default", *args, path=path))
            case "norm":
                eps = self.draw(st.sampled_from([1e-5, 1e-6, 0.1]))
                self.values.append(m.call("llmc.rms_norm", x, self.param(n), eps=eps))
            case "split" if n > 1:
                parts = m.call("aten.split.Tensor", x, (n + 1) // 2, -1)
                for i in range(2):
                    self.values.append(m.call("operator.getitem", parts, i))
            case "cat":
                self.values.append(m.call("aten.cat.default", [x, self.pick()], -1))
            case "merge":
                flat = m.call("aten.reshape.default", x, [-1, n])
                self.values.append(m.call("aten.reshape.default", flat, [*self.sizes, -1]))
            case "transpose":
                y = m.call("aten.transpose.int", x, 1, 2)
                self.values.append(m.call("aten.permute.default", y, [0, 2, 1]))
            case "softmax":
                self.values.append(m.call("aten.softmax.int", x, -1, torch.float32))
            case "mean":
                self.values.append(m.call("aten.mean.dim", x, [-1], True))
            case "cast":
                y = m.call("aten.to.dtype", x, torch.float64)
                self.values.append(m.call("aten.to.dtype", y, torch.float32))
            case "slice":
                end = self.draw(st.sampled_from([n, 9223372036854775807, max(n - 1, 1)]))
                self.values.append(m.call("aten.slice.Tensor", x, 2, 0, end))
            case "gated":
                self.values.append(m.call("llmc.gated", x, x, act="silu"))
            case "compare":
                self.results.append(m.call("aten.ge.Scalar", x, 0))


@settings(max_examples=60, deadline=None)
@given(st.data())
def test_random_graph_through_every_form(maker: Any, data: st.DataObject) -> None:
    grower = Grower(maker(), data)
    for kind in data.draw(st.lists(st.sampled_from(STEPS), min_size=1, max_size=14)):
        grower.step(kind)
    results = [grower.values[-1], *grower.results]
    program = grower.m.output(results[0] if len(results) == 1 else tuple(results))
    verify(program)

    text = print_python(program, "fuzz")
    parsed = parse_python(text, program)
    assert print_python(parsed, "fuzz") == text
    verify(parsed)

    loaded = from_json(json.loads(json.dumps(to_json(program))), program.weights)
    attach(loaded, json.loads(json.dumps(provenance(program))))
    assert print_python(loaded, "fuzz") == text
    verify(loaded)

    cloned = program.clone()
    assert print_python(cloned, "fuzz") == text
    verify(cloned)

    x = {"x": torch.randn(2, 3, 8, generator=torch.Generator().manual_seed(0))}
    want = run(program, x)
    scope: dict[str, Any] = {}
    exec(compile(text, "printed", "exec"), scope)
    weights = {name: program.fetch(name) for name in program.params}
    for have in (run(parsed, x), run(loaded, x), scope["forward"](weights, x["x"])):
        pairs = zip(have, want, strict=True) if isinstance(want, tuple) else [(have, want)]
        assert all(torch.equal(a, b) for a, b in pairs)


@settings(max_examples=60, deadline=None)
@given(st.data())
def test_recorded_types_are_the_real_ones(maker: Any, data: st.DataObject) -> None:
    grower = Grower(maker(), data)
    for kind in data.draw(st.lists(st.sampled_from(STEPS), min_size=1, max_size=14)):
        grower.step(kind)
    program = grower.m.output(grower.values[-1])

    def check(node: fx.Node, value: Any) -> None:
        t = info(node).type
        if isinstance(t, TensorType):
            values = {BATCH: 2, SEQ: 3}
            shape = [d if isinstance(d, int) else int(d.subs(values)) for d in t.shape]
            assert (list(value.shape), value.dtype) == (shape, t.dtype)

    run(program, {"x": torch.randn(2, 3, 8)}, observe=check)
