"""The JSON form: canonical, closed, bounded."""

from __future__ import annotations

import copy
import json
from collections.abc import Callable
from typing import Any

import pytest
import torch

from llmc.compiler.ir.errors import ModelError
from llmc.compiler.ir.graph import DictWeights, Program
from llmc.compiler.ir.interpret import run
from llmc.compiler.ir.printer import print_python
from llmc.compiler.ir.serial import attach, from_json, provenance, same_program, to_json
from llmc.compiler.ir.verifier import verify

Data = dict[str, Any]


def through_text(value: Any) -> Any:
    return json.loads(json.dumps(value))


@pytest.mark.parametrize("cached", [False, True])
def test_json_and_back(cached: bool, toy: Callable[..., Program]) -> None:
    program = toy(cached=cached)
    data = through_text(to_json(program))
    again = from_json(data, program.weights)
    verify(again)
    assert to_json(again) == data
    assert same_program(again, program)
    assert again.states == program.states
    assert again.segments == program.segments
    attach(again, through_text(provenance(program)))
    assert print_python(again) == print_python(program)


def test_json_and_back_computes_the_same(packed: Callable[[], Program]) -> None:
    program = packed()
    again = from_json(through_text(to_json(program)), program.weights)
    x = {"x": torch.randn(3, 64)}
    assert torch.equal(run(again, x), run(program, x))


def test_content_knows_no_provenance(toy: Callable[..., Program]) -> None:
    program = toy()
    text = json.dumps(to_json(program))
    for word in ("model.gate", "model.norm1", "toy.py", "lm_head"):
        assert word not in text
        assert word in json.dumps(provenance(program))


def test_floats_are_exact(maker: Any) -> None:
    m = maker()
    x = m.input("x", 3, dtype=torch.float64)
    for value in (0.1, 1e-300, float("inf"), -0.0):
        x = m.call("aten.mul.Tensor", x, value)
    program = m.output(x)
    again = from_json(through_text(to_json(program)), DictWeights())
    for a, b in zip(program.calls(), again.calls(), strict=True):
        assert repr(a.args[1]) == repr(b.args[1])


def edit(*path: Any, value: Any) -> Callable[[Data], None]:
    def f(data: Data) -> None:
        at: Any = data
        for key in path[:-1]:
            at = at[key]
        at[path[-1]] = value

    return f


def node(of: str, /, **fields: Any) -> Callable[[Data], None]:
    def f(data: Data) -> None:
        found = next(n for n in data["nodes"] if n.get("target") == of)
        found.update(fields)

    return f


def drop(*path: Any) -> Callable[[Data], None]:
    def f(data: Data) -> None:
        at: Any = data
        for key in path[:-1]:
            at = at[key]
        del at[path[-1]]

    return f


def twice(table: str) -> Callable[[Data], None]:
    return lambda data: data[table].append(copy.deepcopy(data[table][-1]))


def deep(levels: int) -> Any:
    return [deep(levels - 1)] if levels else 1


GATED = "llmc.gated"
HOSTILE: dict[str, Callable[[Data], None]] = {
    "another format": edit("format", value="torch.export"),
    "another version": edit("version", value=2),
    "version that is a bool": edit("version", value=True),
    "extra field": edit("code", value="import os"),
    "missing field": drop("facts"),
    "nodes that are a table": edit("nodes", value={}),
    "dtype": edit("dtype", value="f31"),
    "dtype that is a list": edit("dtype", value=["f32"]),
    "facts too deep": edit("facts", value={"a": deep(20)}),
    "integer fact too long": edit("facts", value={"a": 1 << 80}),
    "unknown op": node(GATED, target="aten.from_file.default"),
    "op by its path": node(GATED, target="torch.ops.aten.add.Tensor"),
    "private op": node(GATED, target="__builtins__"),
    "unknown kind": node(GATED, op="call_module"),
    "field missing": node(GATED, args=None),
    "extra node field": node(GATED, code="x"),
    "later reference": node(GATED, args=[{"node": "down"}, {"node": "down"}]),
    "unknown reference": node(GATED, args=[{"node": "nobody"}]),
    "two encodings at once": node(GATED, args=[{"node": "gate", "float": "0x1p0"}]),
    "unknown encoding": node(GATED, args=[{"pickle": "gASV"}]),
    "unknown torch name": node(GATED, args=[{"torch": "torch.load"}]),
    "bad float": node(GATED, args=[{"float": "1.0e"}]),
    "bare float": node(GATED, args=[0.5]),
    "long integer": node(GATED, args=[1 << 64]),
    "long text": node(GATED, args=["x" * 10000]),
    "deep list": node(GATED, args=[deep(20)]),
    "long list": node(GATED, args=[[1] * 70000]),
    "name that is no identifier": node(GATED, name="a b"),
    "name that Python keeps": node(GATED, name="lambda"),
    "name of another node": node(GATED, name="input_ids"),
    "type that is code": node(GATED, type="f32[__import__('os')]"),
    "type that is a number": node(GATED, type=3),
    "parameter twice in the table": twice("params"),
    "node after the output": twice("nodes"),
    "unknown parameter": node("gate", target="nobody"),
    "one parameter in two nodes": node("gate", target="up"),
    "negative size": edit("params", 0, "shape", value=[-1, 8]),
    "huge size": edit("params", 0, "shape", value=[1 << 60]),
    "size that is a bool": edit("params", 0, "shape", value=[True]),
    "flag that is a number": edit("params", 0, "keep", value=1),
    "segment twice": twice("segments"),
    "segment of unknown nodes": edit("segments", 0, "nodes", value=["nobody"]),
    "segment of numbers": edit("segments", 0, "live_in", value=[3]),
    "state that is no tensor": edit(
        "states", value=[{"name": "a", "kind": "kv", "types": ["int(S)"]}]
    ),
}  # fmt: skip


@pytest.mark.parametrize("name", HOSTILE)
def test_other_json_is_refused(name: str, toy: Callable[..., Program]) -> None:
    data = through_text(to_json(toy()))
    HOSTILE[name](data)
    with pytest.raises(ModelError, match="expected"):
        from_json(data, DictWeights())


@pytest.mark.parametrize("data", [None, [], "x", 3, {}])
def test_other_values_are_refused(data: Any) -> None:
    with pytest.raises(ModelError, match="expected program"):
        from_json(data, DictWeights())


def test_the_field_is_named(toy: Callable[..., Program]) -> None:
    data = through_text(to_json(toy()))
    data["params"][2]["shape"] = [-1]
    with pytest.raises(ModelError, match=r"params\[2\]\.shape"):
        from_json(data, DictWeights())


@pytest.mark.parametrize(
    "origin",
    [
        {"nodes": {"nobody": ["a", "b"]}, "params": {}},
        {"nodes": {"gate": ["a"]}, "params": {}},
        {"nodes": {"gate": [1, 2]}, "params": {}},
        {"nodes": {}, "params": {"nobody": ["a"]}},
        {"nodes": {}, "params": {"gate": "a"}},
        {"nodes": {}},
        [],
    ],
)
def test_other_provenance_is_refused(origin: Any, toy: Callable[..., Program]) -> None:
    with pytest.raises(ModelError, match="expected"):
        attach(toy(), origin)
