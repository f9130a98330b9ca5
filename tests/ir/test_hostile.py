"""Random damage to files: a program loads and verifies, or a clean error says why not."""

from __future__ import annotations

import copy
import json
from collections.abc import Callable, Iterator
from typing import Any

from hypothesis import given, settings
from hypothesis import strategies as st

from llmc.compiler.ir.errors import LlmcError, ModelError
from llmc.compiler.ir.graph import DictWeights, Program
from llmc.compiler.ir.parser import parse_python
from llmc.compiler.ir.printer import print_python
from llmc.compiler.ir.serial import attach, from_json, provenance, to_json
from llmc.compiler.ir.verifier import verify

VALUES = st.one_of(
    st.none(), st.booleans(), st.integers(-(1 << 70), 1 << 70), st.floats(), st.text(max_size=8),
    st.sampled_from([
        [], {}, [[]], {"node": "gate"}, {"tuple": [1]}, {"float": "0x1p0"},
        {"torch": "torch.float16"}, "f32[B]", "f32[S, B, 8]", "int(B)",
        "aten.add.Tensor", "output", "gate", "call_function",
    ]),
)  # fmt: skip


PIECES = ["", "(", ")", "\n", "p", "0", '"', ", ", "=", ".", "*", "é", "#"]


def places(data: Any) -> Iterator[tuple[Any, Any]]:
    """Every (container, key) of a JSON value."""
    items = data.items() if isinstance(data, dict) else enumerate(data)
    for key, value in list(items):
        yield data, key
        if isinstance(value, (dict, list)):
            yield from places(value)


@settings(max_examples=150, deadline=None)
@given(st.data())
def test_damaged_json(toy: Callable[..., Program], data: st.DataObject) -> None:
    damaged = json.loads(json.dumps(to_json(toy())))
    for _ in range(data.draw(st.integers(1, 2))):
        spots = list(places(damaged))
        at, key = spots[data.draw(st.integers(0, len(spots) - 1))]
        if data.draw(st.booleans()):
            at[key] = copy.deepcopy(data.draw(VALUES))
        else:
            del at[key]
    try:
        program = from_json(damaged, DictWeights())
    except ModelError:
        return
    try:
        verify(program)
    except LlmcError:
        return
    # What passes every law is a program: it prints and reads back.
    assert to_json(from_json(to_json(program), DictWeights())) == to_json(program)
    parse_python(print_python(program))


@settings(max_examples=60, deadline=None)
@given(st.data())
def test_damaged_provenance(toy: Callable[..., Program], data: st.DataObject) -> None:
    program = toy()
    damaged = json.loads(json.dumps(provenance(program)))
    spots = list(places(damaged))
    at, key = spots[data.draw(st.integers(0, len(spots) - 1))]
    at[key] = copy.deepcopy(data.draw(VALUES))
    before = to_json(program)
    try:
        attach(program, damaged)
    except ModelError:
        return
    assert to_json(program) == before


@settings(max_examples=150, deadline=None)
@given(st.data())
def test_damaged_text(toy: Callable[..., Program], data: st.DataObject) -> None:
    text = print_python(toy())
    for _ in range(data.draw(st.integers(1, 2))):
        a = data.draw(st.integers(0, len(text) - 1))
        b = a + data.draw(st.integers(0, 12))
        new = data.draw(st.sampled_from(PIECES))
        text = text[:a] + new + text[b:]
    try:
        program = parse_python(text)
    except ModelError:
        return
    try:
        verify(program)
    except LlmcError:
        return
    again = print_python(program)
    assert print_python(parse_python(again)) == again
