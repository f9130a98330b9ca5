"""Fusing layers that are no llama: layer norms, and attention and MLP side by side."""

from __future__ import annotations

import pytest
import torch
from lowering_programs import Maker, Weight
from test_fuse import fused, told

from llmc.codegen.fuse import FEATURES

W = Weight(64, 64)


@pytest.mark.parametrize("gain", [True, False])
@pytest.mark.parametrize("bias", [True, False])
def test_a_layer_norm_joins_with_its_gain_and_bias_or_without(gain: bool, bias: bool) -> None:
    """What has unlike ends takes it in together: three rows joined, and one with an activation."""
    m = Maker()
    h = m.input("h", 64)
    given = [m.param(n, (64,)) if has else None for n, has in (("g", gain), ("s", bias))]
    n = m.call("llmc.layer_norm", h, *given, eps=1e-5)
    a, b, up = (m.linear(n, name, W, bias=name != "a") for name in ("a", "b", "up"))
    program = m.output(a, b, m.call("llmc.activation", up, act="gelu"))
    plan = fused(program)
    assert told(plan) == ["x2+norm", "norm+act"]
    assert not list(program.calls("llmc.layer_norm"))
    for one in plan.fused:
        assert one.problem.centred
        parts = one.canonical(program)
        want = program.weights.load("g") if gain else torch.ones(64)
        assert torch.equal(parts["gain"], want)
        assert ("shift" in parts) is bias
        assert not bias or torch.equal(parts["shift"], program.weights.load("s"))


def test_a_sum_of_three_is_turned_so_that_each_linear_takes_one() -> None:
    """(a + b) + h, in either order, is what is ready first with h, then the other."""
    for turned in (False, True):
        m = Maker()
        h = m.input("h", 64)
        a, b = m.linear(h, "a", W), m.linear(h, "b", W)
        both = m.call("aten.add.Tensor", *((b, a) if turned else (a, b)))
        program = m.output(m.call("aten.add.Tensor", *((h, both) if turned else (both, h))))
        plan = fused(program)
        assert told(plan) == ["add", "add"]
        assert [f.linears for f in plan.fused] == [(a.name,), (b.name,)]
        assert len(list(program.calls())) == 2


@pytest.mark.parametrize("case", ["read_again", "third", "late", "broadcast", "no_residual"])
def test_sums_of_three_that_stay_as_they_are(case: str) -> None:
    """The inner sum is read elsewhere, the third is a linear too or comes after both, or is of
    another shape, or the target takes no sums."""
    m = Maker()
    h = m.input("h", 64)
    a, b = m.linear(h, "a", W), m.linear(h, "b", W)
    both = m.call("aten.add.Tensor", a, b)
    third = {"third": lambda: m.linear(h, "c", W), "broadcast": lambda: m.param("row", (64,)),
             "late": lambda: m.call("llmc.activation", h, act="relu")}  # fmt: skip
    total = m.call("aten.add.Tensor", both, third.get(case, lambda: h)())
    program = m.output(total, both) if case == "read_again" else m.output(total)
    features = FEATURES - {"concat", *(["residual"] if case == "no_residual" else [])}
    plan = fused(program, features=features)
    wanted = {"third": ["", "add", "add"], "no_residual": ["", ""]}.get(case, ["", "add"])
    assert told(plan) == wanted
    left = {"third": 0, "no_residual": 2}.get(case, 1)
    assert len(list(program.calls("aten.add.Tensor"))) == left
