"""The record of exits: read back to the bit, printed and parsed, and its confidences by hand."""

from __future__ import annotations

import json
from collections.abc import Callable

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from llmc.compiler.ir.errors import ModelError
from llmc.compiler.ir.exits import (
    RULES,
    Exits,
    check_exits,
    classified,
    features,
    from_json,
    similarity,
)
from llmc.compiler.ir.graph import Program, Segment
from llmc.compiler.ir.parser import parse_python
from llmc.compiler.ir.serial import from_json as program_from_json
from llmc.compiler.ir.serial import same_program, to_json

RECORDS = st.builds(
    Exits,
    st.sampled_from(RULES),
    st.lists(st.sampled_from("abcdef"), min_size=1, max_size=6, unique=True).map(tuple),
    st.floats(-1, 2),
    st.none() | st.integers(1, 2**31 - 1),
)


@given(RECORDS)
def test_json_gives_the_record_back(exits: Exits) -> None:
    assert from_json(json.loads(json.dumps(exits.to_json()))) == exits


@given(RECORDS, st.integers(0, 10**6))
def test_the_threshold_only_relaxes(exits: Exits, t: int) -> None:
    now, later = exits.at(torch.tensor([t, t + 1])).tolist()
    assert later <= now
    if exits.threshold > 1:
        assert later > 1
    elif exits.decay is not None:
        assert 0 <= later <= now <= 1


def test_program_with_exits_prints_and_serialises(toy: Callable[..., Program]) -> None:
    program = toy()
    names = [n.name for n in program.graph.nodes]
    program.segments = []
    program.exits = Exits("cosine", ("block0",), 0.1, 7)
    text = program.print_python()
    assert "EXITS = " in text
    assert parse_python(text, program).exits == program.exits
    data = json.loads(json.dumps(to_json(program)))
    assert program_from_json(data, program.weights).exits == program.exits
    assert same_program(program, program.clone())
    assert [n.name for n in program.clone().graph.nodes] == names
    with pytest.raises(ModelError, match=r"an exit rule .* found 'sine'"):
        parse_python(text.replace('"cosine"', '"sine"'), program)
    program.exits = None
    assert "EXITS" not in program.print_python()
    assert "exits" not in to_json(program)


def test_exits_lie_behind_segments_in_order(toy: Callable[..., Program]) -> None:
    program = toy()
    program.segments = [Segment(n, (), (), ()) for n in ("prologue", "a", "b", "epilogue")]
    program.exits = Exits("softmax", ("a", "b"), 0.5)
    check_exits(program)
    for blocks in (("b", "a"), ("prologue",), ("epilogue",), ("c",)):
        program.exits = Exits("softmax", blocks, 0.5)
        with pytest.raises(ModelError, match="after blocks in order"):
            check_exits(program)


def test_confidences_by_hand() -> None:
    g = torch.Generator().manual_seed(0)
    logits = torch.randn(3, 5, 11, generator=g) * 4
    p = logits.double().softmax(-1).sort(-1, descending=True).values
    want = torch.stack([p[..., 0] - p[..., 1], p[..., 0]], -1)
    torch.testing.assert_close(features(logits).double(), want, rtol=1e-5, atol=1e-6)
    row = torch.tensor([2.0, -1.0, 0.3])
    said = torch.sigmoid(2 * want[..., 0] - want[..., 1] + 0.3)
    torch.testing.assert_close(classified(logits, row).double(), said, rtol=1e-5, atol=1e-6)
    a, b = torch.randn(2, 4, 8, generator=g), torch.randn(2, 4, 8, generator=g)
    cos = (a * b).sum(-1) / a.norm(dim=-1) / b.norm(dim=-1)
    torch.testing.assert_close(similarity(a, b), cos)
    assert bool((similarity(a, a * 3) <= 1).all())
