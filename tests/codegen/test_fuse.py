"""The fusion planner: what joins, what stays out and why, and that the value stays the same."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from lowering_programs import Maker, Weight, hidden, mlp

from llmc.codegen.fuse import FusePlan, fuse
from llmc.codegen.targets import lower
from llmc.compiler.ir.graph import Program
from llmc.compiler.ir.interpret import run
from llmc.compiler.ir.verifier import verify
from llmc.compiler.pipeline import recipe, zoo
from llmc.compiler.pipeline.compile import compile_plan
from llmc.compiler.pipeline.measure import model_inputs
from llmc.compiler.pipeline.plan import make_plan
from llmc.compiler.runtime.executor import Runner

W = Weight(64, 64)


def fused(program: Program, **options: Any) -> FusePlan:
    """Fuse everything that can be, and hold that the program is legal and computes the same."""
    inputs = {n.name: hidden(program.dtype) for n in program.inputs}
    before = run(program, inputs)
    plan = fuse(program, lambda problem: None, **options)
    verify(program)
    after = run(program, inputs)
    torch.testing.assert_close(after, before, rtol=1e-5, atol=1e-5)
    return plan


def parts(plan: FusePlan) -> list[str]:
    """What each fused node joins, in short."""
    words = {"llmc.rms_norm": "norm", "llmc.expand_nm": "nm", "aten.add.Tensor": "add"}
    return ["+".join(words[p] for p in f.parts if p in words) for f in plan.fused]


@pytest.mark.parametrize("scheme", [{}, {"asym": True}, {"sparse": True}, {"group": 0, "bits": 8}])
def test_an_mlp_becomes_three_fused_ops(scheme: dict[str, Any]) -> None:
    """Both readers of the norm take it in, the last one the residual; nothing is decoded alone."""
    program = mlp(**scheme)
    plan = fused(program)
    nm = ["nm"] if scheme.get("sparse") else []
    assert parts(plan) == ["+".join(["norm", *nm])] * 2 + ["+".join([*nm, "add"])]
    assert not plan.refused
    ops = [n.target.name() for n in program.calls()]  # type: ignore[union-attr]
    assert ops == ["llmc::fused_linear"] * 2 + ["llmc::gated", "llmc::fused_linear"]
    assert [f.problem.bias for f in plan.fused] == [False, True, False]
    assert program.segments[0].nodes[-1] == program.output.name


def test_sides_can_be_kept_out() -> None:
    """A target without such kernels asks for the core alone."""
    assert parts(fused(mlp(), norm=False)) == ["", "", "add"]
    assert parts(fused(mlp(), residual=False)) == ["norm", "norm", ""]


def test_of_two_fused_addends_the_later_one_takes_the_sum() -> None:
    """The other is an operand of the sum and must be ready."""
    m = Maker()
    h = m.input("h", 64)
    first, second = m.linear(h, "first", W), m.linear(h, "second", W)
    program = m.output(m.call("aten.add.Tensor", second, first))
    plan = fused(program)
    assert parts(plan) == ["", "add"]
    assert plan.fused[1].linear == second.name


def test_a_chain_of_sums_is_taken_one_each() -> None:
    """(h + a) + b: parallel attention and MLP."""
    m = Maker()
    h = m.input("h", 64)
    a, b = m.linear(h, "a", W), m.linear(h, "b", W)
    program = m.output(m.call("aten.add.Tensor", m.call("aten.add.Tensor", h, a), b))
    assert parts(fused(program)) == ["add", "add"]


def test_a_gemma_gain_is_made_once_as_a_parameter() -> None:
    """1 + g cannot be read by the kernel, so the sum is stored."""
    m = Maker()
    h = m.input("h", 64)
    n = m.call("llmc.rms_norm", h, m.param("g", (64,)), eps=1e-6, offset=1.0)
    program = m.output(m.linear(n, "a", W), m.linear(n, "b", W))
    assert parts(fused(program)) == ["norm", "norm"]
    gains = [n for n in program.params if "effective" in n]
    assert len(gains) == 1
    assert "g" not in program.params


# ** near misses **


def _norm_read_elsewhere(m: Maker, h: Any) -> Any:
    n = m.call("llmc.rms_norm", h, m.param("g", (64,)), eps=1e-6)
    return m.linear(n, "a", W), n


def _norm_with_count(m: Maker, h: Any) -> Any:
    n = m.call("llmc.rms_norm", h, m.param("g", (64,)), eps=1e-6, count=80)
    return (m.linear(n, "a", W),)


def _norm_without_gain(m: Maker, h: Any) -> Any:
    return (m.linear(m.call("llmc.rms_norm", h, eps=1e-6), "a", W),)


@pytest.mark.parametrize(
    ("build", "predicate", "words"),
    [
        (_norm_read_elsewhere, "all_readers_fused", "the norm is also read by output"),
        (_norm_with_count, "count", "divides by 80, its input has 64 columns"),
        (_norm_without_gain, "stored_gain", "no stored gain"),
    ],
)
def test_norms_that_stay_out(build: Callable[..., Any], predicate: str, words: str) -> None:
    """The linear is fused, the norm is refused with its reason."""
    m = Maker()
    plan = fused(m.output(*build(m, m.input("h", 64))))
    assert parts(plan) == [""]
    assert [r.predicate for r in plan.refused] == [predicate]
    assert words in plan.refused[0].reason


def test_fp16_norms_stay_out_of_range_trouble() -> None:
    """x * gain without 1/rms may overflow in fp16; bf16 has the range."""
    plan = fuse(mlp(torch.float16), lambda problem: None)
    assert [r.predicate for r in plan.refused] == ["range"]
    assert not fuse(mlp(torch.bfloat16), lambda problem: None).refused


def _dense(m: Maker, h: Any) -> Any:
    return (m.call("aten.linear.default", h, m.param("w", (64, 64))),)


def _weight_read_twice(m: Maker, h: Any) -> Any:
    w = m.weight("a", W)
    return (m.call("aten.linear.default", h, w), w)


def _codes_read_twice(m: Maker, h: Any) -> Any:
    w = m.weight("a", W)
    again = m.call("llmc.dequantize", *w.args, **w.kwargs)
    return tuple(m.call("aten.linear.default", h, v) for v in (w, again))


def _bitmap(m: Maker, h: Any) -> Any:
    bitmap = torch.full((64, 2), -1, dtype=torch.int32)
    values = m.param("v", (64 * 64,))
    w = m.call("llmc.expand_bitmap", values, m.param("bitmap", bitmap, keep=True), columns=64)
    return (m.call("aten.linear.default", h, w),)


@pytest.mark.parametrize(
    ("build", "words"),
    [
        (_dense, "its weight is stored dense"),
        (_weight_read_twice, "the decoded weight dequantize_default is read 2 times"),
        (_codes_read_twice, "codes is read 2 times"),
        (_bitmap, "its weight is made by llmc.expand_bitmap"),
    ],
)
def test_linears_that_stay_as_they_are(build: Callable[..., Any], words: str) -> None:
    """Nothing is rewritten, and the reason names what is in the way."""
    m = Maker()
    program = m.output(*build(m, m.input("h", 64)))
    text = str(program.graph)
    plan = fused(program)
    assert not plan.fused
    assert words in plan.refused[0].reason
    assert str(program.graph) == text


def test_a_kernel_that_does_not_fit_is_the_reason() -> None:
    """What the target answers is kept beside the node."""
    plan = fuse(mlp(), lambda problem: f"K={problem.K}" if problem.K == 96 else None)
    assert [f.problem.K for f in plan.fused] == [64, 64]
    assert [(r.predicate, r.reason) for r in plan.refused] == [("kernel", "K=96")]


@pytest.mark.parametrize("case", ["alpha", "broadcast", "two_readers"])
def test_sums_that_are_not_residuals(case: str) -> None:
    """A scaled addend, another shape, or a linear that is read again."""
    m = Maker()
    h = m.input("h", 64)
    y = m.linear(h, "a", W)
    other = m.param("row", (64,)) if case == "broadcast" else h
    kwargs = {"alpha": 2} if case == "alpha" else {}
    total = m.call("aten.add.Tensor", y, other, **kwargs)
    program = m.output(total, y) if case == "two_readers" else m.output(total)
    assert parts(fused(program)) == [""]


def test_sparse_entries_become_a_path_of_their_own() -> None:
    """Behind the fused node, bias and residual included; the norm stays, for S reads its result."""
    program = mlp(sparse=True, side=0.1)
    plan = fused(program)
    assert parts(plan) == ["nm", "nm", "nm+add"]
    assert len(list(program.calls("llmc.csr_linear"))) == 3
    assert not list(program.calls("llmc.add_csr"))
    assert len(list(program.calls("llmc.rms_norm"))) == 1
    assert "which is not fused whole" in plan.refused[0].reason


def with_low_rank(text: str) -> Program:
    """A compiled decoder whose linears have low rank beside their codes."""
    program = zoo.decoder(hidden=64, inner=64, heads=4)
    tokens = torch.randint(0, 20, (4, 8), generator=torch.Generator().manual_seed(0))
    return compile_plan(make_plan(program, recipe.from_strings([text])), tokens).program


@pytest.mark.parametrize("text", ["w4:group=32,lorc:rank=4", "w8:group=row,lorc:rank=3",
                                  "prune24,w4:group=32,lowrank_residual:rank=2",
                                  "w4:group=32,lorc:rank=4,factor_bits=8"])  # fmt: skip
def test_low_rank_beside_codes_is_one_node(text: str) -> None:
    program = with_low_rank(text)
    ids = torch.randint(0, 20, (2, 6), generator=torch.Generator().manual_seed(1))
    before = run(program, model_inputs(ids))
    new = program.clone()
    plan = fuse(new, lambda problem: None)
    verify(new)
    torch.testing.assert_close(run(new, model_inputs(ids)), before, rtol=1e-4, atol=1e-4)
    low = [f for f in plan.fused if f.problem.rank]
    assert len(low) == len(plan.fused) > 0
    assert all(f.parts.count("aten.linear.default") == 3 for f in low)
    # On the CPU the same node runs on torch's kernel and the product in one call.
    cpu = lower(program, "cpu")
    calls = list(cpu.program.calls("llmc.fused_linear"))
    assert len(calls) == len(cpu.placed)
    whole = [p for p in cpu.placed if p.fused.problem.rank]
    assert len(whole) == sum(len(c.args) == 10 for c in calls) > 0
    made = Runner(cpu.program, implementations=cpu.implementations).forward(ids)
    assert float((made - before).norm()) < 0.02 * float(before.norm())


def test_low_rank_stays_beside_where_no_kernel_takes_it() -> None:
    program = with_low_rank("w4:group=32,lorc:rank=4")
    count = sum(1 for _ in program.calls("llmc.dequantize"))
    plan = fuse(program, lambda problem: "no low rank" if problem.rank else None)
    verify(program)
    assert len(plan.fused) == count
    assert not any(f.problem.rank for f in plan.fused)
    assert any(f.problem.residual for f in plan.fused), "the product is what is added"
