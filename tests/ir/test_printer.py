"""The printed file: it runs as plain Python and reads back to the same program."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch

from llmc.compiler.ir.dims import BATCH
from llmc.compiler.ir.errors import ModelError
from llmc.compiler.ir.graph import Program, info
from llmc.compiler.ir.interpret import run
from llmc.compiler.ir.names import set_names
from llmc.compiler.ir.parser import parse_python
from llmc.compiler.ir.printer import print_python
from llmc.compiler.ir.segments import make_segments
from llmc.compiler.ir.serial import from_json, to_json
from llmc.compiler.ir.verifier import verify

IDS = {"input_ids": torch.tensor([[1, 5, 2, 10], [3, 3, 0, 7]]),
       "position_ids": torch.arange(4).expand(2, 4)}  # fmt: skip


def executed(text: str, program: Program, inputs: dict[str, torch.Tensor], *more: Any) -> Any:
    """What the printed file computes when Python runs it."""
    scope: dict[str, Any] = {}
    exec(compile(text, "printed", "exec"), scope)
    p = {name: program.fetch(name) for name in program.params}
    return scope["forward"](p, *inputs.values(), *more)


class Memory:
    """A state that keeps everything."""

    def __init__(self) -> None:
        self.kept: list[torch.Tensor] = []

    def append(self, k: Any, v: Any, pos: Any, valid: Any) -> Any:
        new = [k, v, pos]
        axes = (2, 2, 1)
        parts = zip(self.kept, new, axes, strict=True) if self.kept else ()
        self.kept = [torch.cat([a, b], d) for a, b, d in parts] or new
        return (*self.kept, None)


def test_printed_file_runs_and_gives_the_interpreters_result(toy: Callable[..., Program]) -> None:
    program = toy()
    text = print_python(program, "capture,w4")
    assert text.startswith("# llmc program made by capture,w4\n")
    want = run(program, IDS)
    assert torch.equal(executed(text, program, IDS), want)
    assert want.shape == (2, 4, 11)


def test_printed_file_with_state_runs(toy: Callable[..., Program]) -> None:
    program = toy(cached=True)
    text = print_python(program)
    want = run(program, IDS, states={"kv0": Memory()})
    assert torch.equal(executed(text, program, IDS, {"kv0": Memory()}), want)


def test_packed_program_runs_and_reads_back(packed: Callable[[], Program]) -> None:
    program = packed()
    text = print_python(program)
    x = {"x": torch.randn(3, 64)}
    assert torch.equal(executed(text, program, x), run(program, x))
    assert torch.equal(run(parse_python(text, program), x), run(program, x))


@pytest.mark.parametrize("cached", [False, True])
def test_text_reads_back_to_the_same_program(cached: bool, toy: Callable[..., Program]) -> None:
    program = toy(cached=cached)
    text = print_python(program, "t")
    again = parse_python(text, program)
    assert print_python(again, "t") == text
    assert to_json(again) | {"nodes": 0} == to_json(program) | {"nodes": 0}
    assert [n.name for n in again.graph.nodes] == [n.name for n in program.graph.nodes]
    verify(again)
    node = again.node("norm1").next
    assert info(node).path == "model.norm1"
    assert info(node).source == "toy.py:1"
    assert again.params["gate"].names == ("model.gate.weight",)


def test_program_without_weights_has_none(toy: Callable[..., Program]) -> None:
    with pytest.raises(ModelError, match="found none"):
        parse_python(print_python(toy())).weights.load("gate")


def test_each_line_says_type_maker_and_path(toy: Callable[..., Program]) -> None:
    lines = print_python(toy()).splitlines()
    line = next(x for x in lines if "torch.ops.aten.embedding.default(" in x)
    assert line.endswith("# f32[B, S, 8] | test | model.embed | toy.py:1")
    assert '    "gate": ("f32[6, 8]", "trained", "model.gate.weight"),' in lines
    assert "    # segment block0" in lines


def test_odd_arguments_survive(maker: Any) -> None:
    m = maker()
    x = m.input("p", BATCH, 4, dtype=torch.float32)
    y = m.call("aten.clamp.default", x, float("-inf"), 1e30)
    y = m.call("aten.mul.Tensor", y, -0.1)
    y = m.call("aten.to.dtype", y, torch.float64)
    y = m.call("aten.slice.Tensor", y, 1, 0, 9223372036854775807)
    parts = m.call("aten.split.Tensor", y, 2, 1)
    first = m.call("operator.getitem", parts, 0)
    program = m.output((first, m.call("aten.cat.default", [first, first], -1)))
    program.facts = {"quote": "a\"b'c\n\u2028é😀\\", "nan": float("inf"), "list": [[1], {}]}
    text = print_python(program)
    assert "def forward(p_, p):" in text
    again = parse_python(text)
    assert print_python(again) == text
    assert again.facts == program.facts
    x = {"p": torch.randn(2, 4)}
    for a, b in zip(executed(text, program, x), run(again, x), strict=True):
        assert torch.equal(a, b)


def test_segments_out_of_order_are_not_printed(toy: Callable[..., Program]) -> None:
    program = toy()
    program.segments = program.segments[::-1]
    with pytest.raises(ModelError, match="graph order"):
        print_python(program)


def test_names_that_are_python_builtins_survive(maker: Any) -> None:
    m = maker()
    x = m.input("x", BATCH, 4, dtype=torch.float32)
    y = m.call("aten.slice.Tensor", x, 1, 0, 2)
    z = m.call("aten.sum.dim_IntList", y, [1], True)
    program = m.output(m.call("aten.mul.Tensor", y, z))
    set_names(program.graph, {y: "slice", z: "sum"})
    program.segments = make_segments(program.graph, [("main", 0)])
    again = parse_python(print_python(program))
    for p in (program.clone(), again, from_json(to_json(program), program.weights)):
        assert [n.name for n in p.graph.nodes] == [n.name for n in program.graph.nodes]
        new = p.emit("aten.sum.default", p.node("slice"), before=p.output, made_by="test")
        assert sum(n.name == new.name for n in p.graph.nodes) == 1
        verify_names(p)


def verify_names(program: Program) -> None:
    names = [n.name for n in program.graph.nodes]
    assert len(set(names)) == len(names)


def test_names_can_swap(toy: Callable[..., Program]) -> None:
    program = toy()
    a, b = program.node("gate"), program.node("up")
    set_names(program.graph, {a: "up", b: "gate"})
    assert (a.name, b.name) == ("up", "gate")
    verify_names(program)


def test_names_that_the_file_needs_are_refused(toy: Callable[..., Program]) -> None:
    program = toy()
    set_names(program.graph, {program.node("gate"): "torch"})
    with pytest.raises(ModelError, match="torch"):
        print_python(program)
