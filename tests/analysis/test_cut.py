"""Cutting a program equals masking its weights: sizes, divisors and lazily read tensors follow."""

from __future__ import annotations

from collections.abc import Mapping
from itertools import pairwise
from typing import Any

import pytest
import torch
from analysis_build import HEADS, INNER, KV, Stack, inputs, stack
from hypothesis import given, settings
from hypothesis import strategies as st

from llmc.compiler.analysis.blocks import apply_segments
from llmc.compiler.analysis.cut import cut
from llmc.compiler.analysis.groups import Group, dependency_groups
from llmc.compiler.ir.errors import ModelError, UsageError
from llmc.compiler.ir.graph import DictWeights, Program
from llmc.compiler.ir.interpret import run
from llmc.compiler.ir.serial import from_json, to_json
from llmc.compiler.ir.verifier import verify, verify_interface
from llmc.compiler.ir.weights import CutWeights

Keep = Mapping[Group, torch.Tensor]


def masked(program: Program, keep: Keep) -> Program:
    """The whole program with zeros in every weight that a cut would take away."""
    out = program.clone()
    for group, units in keep.items():
        stays = torch.zeros(group.units + 1, dtype=torch.bool)
        stays[units] = stays[-1] = True
        for m in group.members:
            t = out.weights.load(m.param)
            shape = [-1 if a == m.axis else 1 for a in range(t.dim())]
            out.set_tensor(m.param, t * stays[m.unit_of].reshape(shape).to(t.dtype))
    return out


def double(program: Program, values: dict[str, Any]) -> torch.Tensor:
    def fetch(name: str) -> torch.Tensor:
        t = program.weights.load(name)
        return t.double() if t.is_floating_point() else t

    return run(program, values, fetch=fetch)


def check(program: Program, keep: Keep) -> Program:
    small = program.clone()
    names = cut(small, keep)
    verify(small)
    verify_interface(program, small)
    values = inputs(program)
    torch.testing.assert_close(double(small, values), double(masked(program, keep), values))
    for name in names:
        assert small.params[name].bytes < program.params[name].bytes
        assert tuple(small.weights.load(name).shape) == small.params[name].shape
    return small


def free(program: Program) -> list[Group]:
    apply_segments(program)
    return [g for g in dependency_groups(program) if not g.blocked and not g.chosen]


@settings(deadline=None, max_examples=30)
@given(
    mlps=st.lists(st.sampled_from(["silu", "relu", "gelu", "moe"]), min_size=1, max_size=2),
    norm=st.sampled_from(["rms", "layer"]),
    kv=st.sampled_from([1, 2, 4]),
    bias=st.booleans(),
    tied=st.booleans(),
    seed=st.integers(0, 1 << 16),
)
def test_sliced_equals_masked(
    mlps: list[str], norm: str, kv: int, bias: bool, tied: bool, seed: int
) -> None:
    """Any units of any groups, all groups at once."""
    program = stack(mlps, norm=norm, kv=kv, bias=bias, tied=tied)
    random = torch.Generator().manual_seed(seed)
    keep = {}
    for g in free(program):
        some = torch.rand(g.units, generator=random) < 0.7
        some[int(torch.randint(g.units, (1,), generator=random))] = True
        keep[g] = some.nonzero().squeeze(1)
    check(program, keep)


def test_a_norm_keeps_the_divisor_of_the_whole_width() -> None:
    program = stack(["silu"])
    hidden = next(g for g in free(program) if g.kind == "hidden")
    small = check(program, {hidden: torch.arange(0, hidden.units, 2)})
    norms = list(small.calls("llmc.rms_norm"))
    assert norms
    assert {n.kwargs["count"] for n in norms} == {hidden.units}
    again = next(g for g in free(small) if g.kind == "hidden")
    smaller = small.clone()
    cut(smaller, {again: torch.arange(2)})
    assert {n.kwargs["count"] for n in smaller.calls("llmc.rms_norm")} == {hidden.units}


def test_a_fused_projection_and_its_slices_shrink_together() -> None:
    s = Stack()
    n = s.norm(s.x)
    fused = s.linear(n, (HEADS + 2 * KV) * 4, 16, bias=True)
    ends = [0, HEADS * 4, (HEADS + KV) * 4, (HEADS + 2 * KV) * 4]
    q, k, v = (
        s.heads(s.call("aten.slice.Tensor", fused, 2, a, b), (b - a) // 4)
        for a, b in pairwise(ends)
    )
    s.x = s.add(s.x, s.linear(s.attend(q, k, v), 16, HEADS * 4))
    program = s.done()
    group = next(g for g in free(program) if g.kind == "kv_group")
    small = check(program, {group: torch.tensor([1])})
    cuts = [tuple(c.args[2:4]) for c in small.calls("aten.slice.Tensor")]
    assert cuts == [(0, 8), (8, 12), (12, 16)]


@pytest.mark.parametrize("op", ["split_with_sizes", "split", "chunk"])
def test_pieces_shrink(op: str) -> None:
    s = Stack()
    both = s.linear(s.norm(s.x), 2 * INNER, 16)
    how: Any = {"split_with_sizes": [INNER, INNER], "split": INNER, "chunk": 2}[op]
    name = {"split": "aten.split.Tensor"}.get(op, f"aten.{op}.default")
    parts = s.call(name, both, how, -1)
    gate, up = (s.call("operator.getitem", parts, i) for i in (0, 1))
    s.x = s.add(s.x, s.linear(s.call("llmc.gated", gate, up, act="silu"), 16, INNER))
    program = s.done()
    group = next(g for g in free(program) if g.units == INNER)
    check(program, {group: torch.arange(3, 20)})


def test_as_many_chunks_as_a_chunk_has_channels_stay_as_many() -> None:
    s = Stack()
    parts = s.call("aten.chunk.default", s.linear(s.norm(s.x), 16, 16), 4, -1)
    a, b, c, d = (s.call("operator.getitem", parts, i) for i in range(4))
    y = s.call("aten.mul.Tensor", s.call("aten.mul.Tensor", a, b), s.call("aten.mul.Tensor", c, d))
    s.x = s.add(s.x, s.linear(y, 16, 4))
    program = s.done()
    group = next(g for g in free(program) if g.units == 4 and g.kind == "neuron")
    small = check(program, {group: torch.tensor([0, 2])})
    assert next(small.calls("aten.chunk.default")).args[1] == 4


def test_a_counted_range_is_selected_from() -> None:
    """Slopes made from head numbers, as ALiBi makes them, follow their heads."""
    s = Stack()
    n = s.norm(s.x)
    q, k, v = (s.heads(s.linear(n, HEADS * 4, 16), HEADS) for _ in range(3))
    slope = s.call("aten.arange.start", 1, HEADS + 1, dtype=torch.float32)
    q = s.call("aten.mul.Tensor", q, s.call("aten.reshape.default", slope, [1, HEADS, 1, 1]))
    s.x = s.add(s.x, s.linear(s.attend(q, k, v), 16, HEADS * 4))
    program = s.done()
    group = next(g for g in free(program) if g.kind == "head")
    small = check(program, {group: torch.tensor([0, 3])})
    assert len(list(small.calls("aten.index_select.default"))) == 1
    assert to_json(from_json(to_json(small), small.weights)) == to_json(small)


def test_nothing_is_read() -> None:
    program = stack(["silu"])

    class Closed:
        def load(self, name: str) -> torch.Tensor:
            raise AssertionError(name)

    program.weights = Closed()
    cut(program, {g: torch.arange(1) for g in free(program) if g.kind == "neuron"})
    verify(program)


def test_cuts_of_cuts_are_read_in_order() -> None:
    base = DictWeights({"w": torch.arange(24).reshape(4, 6)})
    once = CutWeights(base, {"w": {1: torch.tensor([1, 3, 5])}})
    twice = CutWeights(once, {"w": {0: torch.tensor([2]), 1: torch.tensor([0, 2])}})
    assert twice.load("w").tolist() == [[13, 17]]


def test_what_may_not_be_cut_is_refused_and_nothing_changes() -> None:
    program = stack(["moe"])
    apply_segments(program)
    found = dependency_groups(program)
    before = to_json(program)
    blocked = next(g for g in found if g.blocked)
    neuron = next(g for g in found if g.kind == "neuron")
    experts = next(g for g in found if g.kind == "expert")
    for group, units in (
        (blocked, [0]), (neuron, []), (neuron, [1, 1]), (neuron, [0, INNER]), (experts, [0]),
    ):  # fmt: skip
        with pytest.raises(UsageError, match=group.id):
            cut(program, {group: torch.tensor(units, dtype=torch.int64)})
    assert to_json(program) == before


def test_a_call_that_does_not_fit_is_named_and_nothing_changes() -> None:
    s = Stack()
    n = s.linear(s.norm(s.x), INNER, 16)
    parts = s.call("aten.split.Tensor", n, INNER // 2, -1)
    a, b = (s.call("operator.getitem", parts, i) for i in (0, 1))
    left, right = (s.linear(x, 16, INNER // 2) for x in (a, b))
    s.x = s.add(s.x, s.add(left, right))
    program = s.done()
    group = next(g for g in free(program) if g.units == INNER // 2)
    before = to_json(program)
    with pytest.raises(ModelError, match="split"):
        cut(program, {group: torch.arange(2)})
    assert to_json(program) == before
