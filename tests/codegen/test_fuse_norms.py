"""Norms behind linears: which join with the sum behind them, which stay, and that values stay."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from lowering_programs import Maker, Weight, hidden, law
from torch import fx

from llmc.codegen.fuse import FEATURES, FusePlan, fuse
from llmc.codegen.problem import Problem
from llmc.codegen.targets import CPU_FEATURES, lower
from llmc.compiler.ir.graph import Program
from llmc.compiler.ir.interpret import run
from llmc.compiler.ir.verifier import verify

W = Weight(64, 64)


def fused(
    program: Program, accept: Callable[[Problem], str | None] = lambda problem: None,
    features: Any = FEATURES,
) -> FusePlan:  # fmt: skip
    """Fuse what can be; the program is legal and computes the same, and the problems are true."""
    inputs = {n.name: hidden(program.dtype) for n in program.inputs}
    before = run(program, inputs)
    plan = fuse(program, accept, features)
    verify(program)
    torch.testing.assert_close(run(program, inputs), before, rtol=1e-5, atol=1e-5)
    law(program, plan)
    return plan


def told(plan: FusePlan) -> list[str]:
    """What each fused node has around it, in short."""
    out = []
    for f in plan.fused:
        p = f.problem
        words = ["in" * p.norm, p.act and (p.pairs or "act"), "norm" * p.out_norm]
        out.append("+".join(w for w in [*words, "add" * p.residual] if w))
    return out


def norm(m: Maker, x: fx.Node, **how: Any) -> fx.Node:
    return m.call("llmc.rms_norm", x, m.param("g", (64,)), eps=1e-6, **how)


def plus(m: Maker, *addends: fx.Node) -> fx.Node:
    return m.call("aten.add.Tensor", *addends)


# ** what joins **


@pytest.mark.parametrize("turned", [False, True])
@pytest.mark.parametrize("offset", [0.0, 1.0, None])
def test_a_linear_takes_the_norm_and_the_sum_behind_it(turned: bool, offset: float | None) -> None:
    """With a plain gain, one of the 1 + g form and none; whichever way the sum is written."""
    m = Maker()
    h = m.input("h", 64)
    y = m.linear(h, "w", W, bias=True)
    how: dict[str, Any] = {"offset": offset} if offset else {}
    n = m.call("llmc.rms_norm", y, eps=1e-5) if offset is None else norm(m, y, **how)
    program = m.output(plus(m, *((n, h) if turned else (h, n))))
    plan = fused(program)
    assert told(plan) == ["norm+add"]
    assert len(list(program.calls())) == 1
    assert plan.refused == ()
    (one,) = plan.fused
    assert one.problem.out_eps == (1e-5 if offset is None else 1e-6)
    gain = torch.ones(64) if offset is None else program.weights.load("g") + offset
    assert torch.equal(one.canonical(program)["out_gain"], gain)


def test_what_comes_before_the_norm_joins_too() -> None:
    """A norm of the input, the product of gate and up, and an activation."""
    m = Maker()
    h = m.input("h", 64)
    n = m.call("llmc.rms_norm", h, m.param("before", (64,)), eps=1e-5)
    z = m.call("llmc.gated", m.linear(n, "gate", W), m.linear(n, "up", W), act="silu")
    r = plus(m, h, norm(m, z))
    act = m.call("llmc.activation", m.linear(r, "a", W), act="gelu")
    last = m.call("llmc.rms_norm", act, m.param("behind", (64,)), eps=1e-6)
    assert told(fused(m.output(plus(m, last, r)))) == ["in+gate+norm+add", "act+norm+add"]


def test_a_sum_of_two_norms_and_a_third_is_turned() -> None:
    """Attention and MLP side by side, each with a norm behind: either takes a sum."""
    m = Maker()
    h = m.input("h", 64)
    a, b = (
        m.call("llmc.rms_norm", m.linear(h, n, W), m.param(f"{n}.gain", (64,)), eps=1e-6)
        for n in ("a", "b")
    )
    program = m.output(plus(m, plus(m, a, b), h))
    assert told(fused(program)) == ["norm+add"] * 2
    assert len(list(program.calls())) == 2


# ** what stays **


@pytest.mark.parametrize("case", ["read_again", "norm_read_again", "product", "feature", "cpu"])
def test_norms_that_stay_calls_of_their_own(case: str) -> None:
    """The linear or its norm is read elsewhere, no sum is behind, or the target takes none."""
    m = Maker()
    h = m.input("h", 64)
    y = m.linear(h, "w", W)
    n = norm(m, y)
    last = m.call("aten.mul.Tensor", h, n) if case == "product" else plus(m, h, n)
    more = {"read_again": [y], "norm_read_again": [n]}.get(case, [])
    program = m.output(last, *more)
    features = {"feature": FEATURES - {"out_norm"}, "cpu": CPU_FEATURES}.get(case, FEATURES)
    plan = fused(program, features=features)
    assert told(plan) == [""]
    assert plan.refused == ()
    assert len(list(program.calls("llmc.rms_norm"))) == 1


def test_a_norm_that_linears_read_is_made_by_them() -> None:
    """Theirs read it for nothing; the sum behind one of them is its own."""
    m = Maker()
    h = m.input("h", 64)
    n = norm(m, m.linear(h, "low", W))
    program = m.output(plus(m, m.linear(n, "high", W), h))
    assert told(fused(program)) == ["", "in+add"]


def test_a_sum_of_unlike_shapes_leaves_the_norm_alone() -> None:
    """The norm joins; what is added is a row for all tokens."""
    m = Maker()
    n = norm(m, m.linear(m.input("h", 64), "w", W))
    program = m.output(plus(m, n, m.param("row", (64,))))
    assert told(fused(program)) == ["norm"]
    assert len(list(program.calls("aten.add.Tensor"))) == 1


@pytest.mark.parametrize(
    ("predicate", "words"),
    [("stored_gain", "the norm's gain is not stored"),
     ("count", "divides by 80, its input has 64 columns")],
)  # fmt: skip
def test_a_norm_that_no_kernel_can_make_is_refused(predicate: str, words: str) -> None:
    """The linear is fused without it, and the norm is told of."""
    m = Maker()
    h = m.input("h", 64)
    y = m.linear(h, "w", W)
    gain = m.call("aten.mean.dim", h, [0, 1]) if predicate == "stored_gain" else m.param("g", (64,))
    how = {"count": 80} if predicate == "count" else {}
    n = m.call("llmc.rms_norm", y, gain, eps=1e-6, **how)
    plan = fused(m.output(plus(m, h, n)))
    assert told(plan) == [""]
    assert [(r.predicate, r.node) for r in plan.refused] == [(predicate, n.name)]
    assert words in plan.refused[0].reason


def test_a_target_without_a_kernel_leaves_first_the_sum_then_the_norm() -> None:
    """One by one, each with the reason of its own."""

    def program() -> Program:
        m = Maker()
        h = m.input("h", 64)
        return m.output(plus(m, h, norm(m, m.linear(h, "w", W))))

    plan = fused(program(), lambda p: "no sums" if p.out_norm and p.residual else None)
    assert told(plan) == ["norm"]
    assert [r.reason for r in plan.refused] == ["the residual is not fused: no sums"]
    plan = fused(program(), lambda p: "no norms" if p.out_norm else None)
    assert told(plan) == [""]
    assert [r.reason for r in plan.refused] == [
        "the residual is not fused: no norms", "the out_norm is not fused: no norms",
    ]  # fmt: skip
    assert [r.node for r in plan.refused] == ["add_tensor", "rms_norm_default"]


def test_the_cpu_runs_the_norm_as_it_was() -> None:
    """Norm and sum stay nodes of the lowered program."""
    m = Maker(torch.bfloat16)
    h = m.input("h", 64)
    made = lower(m.output(plus(m, h, norm(m, m.linear(h, "w", W)))), "cpu")
    assert [p.fused.problem.out_norm for p in made.placed] == [False]
    assert len(list(made.program.calls("llmc.rms_norm"))) == 1
