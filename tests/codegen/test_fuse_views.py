"""A norm whose result a linear reads in another shape: taken in where only axes of 1 differ."""

from __future__ import annotations

import pytest
import torch
from lowering_programs import Maker, Weight, hidden, law
from torch import fx

from llmc.codegen.fuse import FusePlan, fuse
from llmc.compiler.ir.graph import Program
from llmc.compiler.ir.interpret import run
from llmc.compiler.ir.verifier import verify

W = Weight(N=48, K=64)


def made(*between: list[int], shared: bool = False, bias: bool = False) -> tuple[Program, FusePlan]:
    """A norm, views in between, a linear and one view back."""
    m = Maker()
    x = m.input("x", 64)
    batch, length = (m.call("aten.sym_size.int", x, d) for d in (0, 1))
    sizes: dict[int, fx.Node] = {0: batch, 1: length}
    y = m.call("llmc.rms_norm", x, m.param("g", (64,)), eps=1e-6)
    for shape in between:
        # Sizes of 0 and -1 stand for the batch and the length.
        y = m.call("aten.reshape.default", y, [sizes.get(-n, n) if n <= 0 else n for n in shape])
    z = m.linear(y, "w", W, bias=bias)
    out = m.call("aten.reshape.default", z, [batch, length, -1])
    if shared:  # with what reads the view itself
        rest = m.call("aten.reshape.default", m.call("aten.relu.default", y), [batch, length, -1])
        out = m.call("aten.cat.default", [out, rest], 2)
    program = m.output(out)
    inputs = {n.name: hidden(program.dtype) for n in program.inputs}
    before = run(program, inputs)
    plan = fuse(program, lambda problem: None)
    verify(program)
    torch.testing.assert_close(run(program, inputs), before, rtol=1e-5, atol=1e-5)
    law(program, plan)
    return program, plan


@pytest.mark.parametrize("bias", [False, True])
@pytest.mark.parametrize("shape", [[0, 1, -1, 64], [0, -1, 1, 64]], ids=str)
def test_axes_of_one_are_put_behind(shape: list[int], bias: bool) -> None:
    program, plan = made(shape, bias=bias)
    assert [f.problem.norm for f in plan.fused] == [True]
    assert not list(program.calls("llmc.rms_norm"))


def test_a_view_that_something_else_reads_stays() -> None:
    program, plan = made([0, 1, -1, 64], shared=True)
    assert not any(f.problem.norm for f in plan.fused)
    assert len(list(program.calls("llmc.rms_norm"))) == 1
