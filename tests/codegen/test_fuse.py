"""The fusion planner: what joins, what stays out and why, and that the value stays the same."""

from __future__ import annotations

from collections.abc import Callable, Collection
from typing import Any

import pytest
import torch
from lowering_programs import Maker, Weight, hidden, law, mlp

from llmc.codegen.fuse import FEATURES, FusePlan, fuse
from llmc.codegen.problem import Problem
from llmc.codegen.targets import lower
from llmc.compiler.ir import packing
from llmc.compiler.ir.graph import Program
from llmc.compiler.ir.interpret import run
from llmc.compiler.ir.verifier import verify
from llmc.compiler.pipeline import recipe, zoo
from llmc.compiler.pipeline.compile import compile_plan
from llmc.compiler.pipeline.measure import model_inputs
from llmc.compiler.pipeline.plan import make_plan
from llmc.compiler.runtime.executor import Runner

W = Weight(64, 64)
PLAIN = FEATURES - {"concat", "pairs"}


def fused(
    program: Program, accept: Callable[[Problem], str | None] = lambda problem: None,
    features: Collection[str] = FEATURES,
) -> FusePlan:  # fmt: skip
    """Fuse what can be; the program is legal and computes the same, and the problems are true."""
    inputs = {n.name: hidden(program.dtype) for n in program.inputs}
    before = run(program, inputs)
    plan = fuse(program, accept, features)
    verify(program)
    after = run(program, inputs)
    torch.testing.assert_close(after, before, rtol=1e-5, atol=1e-5)
    law(program, plan)
    return plan


def told(plan: FusePlan) -> list[str]:
    """What each fused node joins, in short."""
    out = []
    for f in plan.fused:
        p = f.problem
        words = [f"x{len(f.sections)}" if len(f.sections) > 1 else ""]
        words += ["norm" * p.norm, "smooth" * p.smooth, p.rounds, f"{p.n}:{p.m}" * bool(p.m)]
        words += [p.act and f"{p.pairs or 'act'}", "add" * p.residual]
        out.append("+".join(w for w in words if w))
    return out


# ** what joins **


@pytest.mark.parametrize("scheme", [{}, {"asym": True}, {"sparse": True}, {"group": 0, "bits": 8}])
def test_an_mlp_becomes_two_fused_ops(scheme: dict[str, Any]) -> None:
    """Gate and up are one call with norm and product, down takes the sum."""
    program = mlp(**scheme)
    plan = fused(program)
    nm = ["2:4"] if scheme.get("sparse") else []
    assert told(plan) == ["+".join(["x2", "norm", *nm, "gate"]), "+".join([*nm, "add"])]
    assert not plan.refused
    ops = [n.target.name() for n in program.calls()]  # type: ignore[union-attr]
    assert ops == ["llmc::fused"] * 2
    assert [f.problem.bias for f in plan.fused] == [True, False]
    assert plan.fused[0].sections == (96, 96)
    assert program.segments[0].nodes[-1] == program.output.name


def test_a_target_is_asked_for_what_it_names_alone() -> None:
    """What it does not name is left as it is, and is no refusal."""
    assert told(fused(mlp(), features=PLAIN)) == ["norm", "norm", "add"]
    assert told(fused(mlp(), features=PLAIN - {"norm"})) == ["", "", "add"]
    plan = fused(mlp(), features=())
    assert told(plan) == ["", "", ""]
    assert not plan.refused


def test_linears_of_one_input_are_joined_by_rows() -> None:
    """One call, and a view of it for each; a bias that one of them has is zero for the others."""
    m = Maker()
    h = m.input("h", 64)
    rows = {"q": 64, "k": 32, "v": 32}
    made = [m.linear(h, name, Weight(n, 64), bias=name == "k") for name, n in rows.items()]
    program = m.output(*made)
    plan = fused(program)
    assert told(plan) == ["x3"]
    assert plan.fused[0].sections == (64, 32, 32)
    assert plan.fused[0].problem.N == 128
    bias = plan.fused[0].canonical(program)["bias"]
    assert [bool(part.any()) for part in bias.split([64, 32, 32])] == [False, True, False]
    assert len(list(program.calls("aten.slice.Tensor"))) == len(list(program.calls())) - 1 == 3


def test_what_is_stored_in_another_way_is_not_joined() -> None:
    m = Maker()
    h = m.input("h", 64)
    a, b, c = m.linear(h, "a", W), m.linear(h, "b", Weight(64, 64, asym=True)), m.linear(h, "c", W)
    plan = fused(m.output(a, b, c))
    assert told(plan) == ["x2", ""]
    assert [(r.predicate, r.node) for r in plan.refused] == [("concat", a.name)]
    assert f"{b.name} of the same input is stored in another way" in plan.refused[0].reason


def test_of_two_fused_addends_the_later_one_takes_the_sum() -> None:
    """The other is an operand of the sum and must be ready."""
    m = Maker()
    h = m.input("h", 64)
    first, second = m.linear(h, "first", W), m.linear(h, "second", W)
    program = m.output(m.call("aten.add.Tensor", second, first))
    plan = fused(program)
    assert told(plan) == ["", "add"]
    assert plan.fused[1].linears == (second.name,)


def test_a_chain_of_sums_is_taken_one_each() -> None:
    """(h + a) + b: parallel attention and MLP."""
    m = Maker()
    h = m.input("h", 64)
    a, b = m.linear(h, "a", W), m.linear(h, "b", W)
    program = m.output(m.call("aten.add.Tensor", m.call("aten.add.Tensor", h, a), b))
    assert told(fused(program)) == ["add", "add"]


def test_an_activation_and_the_sum_behind_it_join() -> None:
    m = Maker()
    h = m.input("h", 64)
    y = m.call("llmc.activation", m.linear(h, "a", W, bias=True), act="gelu_tanh")
    assert told(fused(m.output(m.call("aten.add.Tensor", y, h)))) == ["act+add"]


def test_the_halves_of_one_linear_are_gate_and_up() -> None:
    m = Maker()
    h = m.input("h", 64)
    y = m.linear(h, "both", Weight(96, 64))
    cuts = [m.call("aten.slice.Tensor", y, 2, *ends) for ends in ((0, 48), (48, 96))]
    program = m.output(m.call("llmc.gated", *cuts, act="silu"))
    turned = m.program.clone()
    plan = fused(program)
    assert told(plan) == ["gate"]
    assert (plan.fused[0].problem.N, plan.fused[0].problem.outputs) == (96, 48)
    gate = next(turned.calls("llmc.gated"))
    gate.args = gate.args[::-1]
    assert told(fused(turned)) == [""], "the second half is no gate"


@pytest.mark.parametrize("gain", [True, False])
def test_a_gemma_gain_and_none_at_all(gain: bool) -> None:
    """The part is what is multiplied: 1 + g, or ones."""
    m = Maker()
    h = m.input("h", 64)
    given = (m.param("g", (64,)),) if gain else ()
    n = m.call("llmc.rms_norm", h, *given, eps=1e-6, offset=1.0 if gain else 0.0)
    program = m.output(m.linear(n, "a", W), m.linear(n, "b", W))
    plan = fused(program)
    assert told(plan) == ["x2+norm"]
    want = program.weights.load("g") + 1 if gain else torch.ones(64)
    assert torch.equal(plan.fused[0].canonical(program)["gain"], want)


@pytest.mark.parametrize("name", ["rms", "layer", ""])
def test_what_multiplies_and_rounds_the_input_joins(name: str) -> None:
    """A stored vector and a grid; behind a norm the vector becomes a part of its gain and bias."""
    m = Maker()
    h, norm = m.input("h", 64), bool(name)
    more = [m.param("b", (64,))] if name == "layer" else []
    x = m.call(f"llmc.{name}_norm", h, m.param("g", (64,)), *more, eps=1e-6) if norm else h
    x = m.call("aten.mul.Tensor", x, m.param("s", (64,)))
    x = m.call("llmc.round_input", x, kind="int", bits=8, per="token", limit=4.0)
    plan = fused(m.output(m.linear(x, "a", W), m.linear(x, "b", W)))
    assert told(plan) == [f"x2+{'norm' if norm else 'smooth'}+int8 token limit=4.0"]


# ** near misses **


def _norm_read_elsewhere(m: Maker, h: Any) -> Any:
    n = m.call("llmc.rms_norm", h, m.param("g", (64,)), eps=1e-6)
    return m.linear(n, "a", W), n


def _bias_of_a_norm_computed(m: Maker, h: Any) -> Any:
    bias = m.call("aten.mean.dim", h, [0, 1])
    n = m.call("llmc.layer_norm", h, m.param("g", (64,)), bias, eps=1e-6)
    return (m.linear(n, "a", W),)


def _norm_with_count(m: Maker, h: Any) -> Any:
    n = m.call("llmc.rms_norm", h, m.param("g", (64,)), eps=1e-6, count=80)
    return (m.linear(n, "a", W),)


def _columns_dropped(m: Maker, h: Any) -> Any:
    columns = m.param("columns", torch.tensor([3, 9]), keep=True)
    x = m.call("llmc.round_input", h, None, columns, kind="int", bits=8, per="token")
    return (m.linear(x, "a", W),)


@pytest.mark.parametrize(
    ("build", "predicate", "words"),
    [
        (_norm_read_elsewhere, "all_readers_fused", "the norm is also read by output"),
        (_bias_of_a_norm_computed, "stored_shift", "the norm's bias is not stored"),
        (_norm_with_count, "count", "divides by 80, its input has 64 columns"),
        (_columns_dropped, "columns", "drops columns that nothing brings back"),
    ],
)
def test_norms_that_stay_out(build: Callable[..., Any], predicate: str, words: str) -> None:
    """The linear is fused, the norm is refused with its reason."""
    m = Maker()
    plan = fused(m.output(*build(m, m.input("h", 64))))
    assert told(plan) == [""]
    assert [r.predicate for r in plan.refused] == [predicate]
    assert words in plan.refused[0].reason


def test_a_norm_whose_kernel_would_not_fit_stays_for_all_its_readers() -> None:
    """One of them has no kernel with a norm; the norm is made anyway, so all read it."""
    m = Maker()
    h = m.input("h", 64)
    n = m.call("llmc.rms_norm", h, m.param("g", (64,)), eps=1e-6)
    program = m.output(m.linear(n, "a", W), m.linear(n, "b", Weight(32, 64, bits=8)))
    plan = fused(program, lambda p: "no norm" if p.norm and p.bits == 8 else None)
    assert told(plan) == ["", ""]
    assert ("kernel", "no norm") in [(r.predicate, r.reason) for r in plan.refused]


@pytest.mark.parametrize(
    ("lacks", "left", "reasons"),
    [
        ("residual", ["x2+norm+gate", ""], ["residual"]),
        ("pairs", ["x2+norm", "add"], ["pairs"]),
        ("norm", ["x2+gate", "add"], ["kernel has no norm"]),
        ("many", ["norm", "norm", "add"], ["is not joined"]),
    ],
)
def test_neighbours_are_left_out_one_by_one(
    lacks: str, left: list[str], reasons: list[str]
) -> None:
    """A kernel that lacks one thing keeps the others, and each thing left out is told."""

    def accept(problem: Problem) -> str | None:
        many = problem.N > 100
        return (
            f"kernel has no {lacks}"
            if (many if lacks == "many" else getattr(problem, lacks))
            else None
        )

    plan = fused(mlp(), accept)
    assert told(plan) == left
    assert len(plan.refused) >= len(reasons)
    for word in reasons:
        assert any(word in r.reason for r in plan.refused), plan.refused


def _dense(m: Maker, h: Any) -> Any:
    return (m.call("aten.linear.default", h, m.param("w", (64, 64))),)


def _weight_read_twice(m: Maker, h: Any) -> Any:
    w = m.weight("a", W)
    return (m.call("aten.linear.default", h, w), w)


def _codes_read_twice(m: Maker, h: Any) -> Any:
    w = m.weight("a", W)
    again = m.call("llmc.dequantize", *w.args, **w.kwargs)
    return tuple(m.call("aten.linear.default", h, v) for v in (w, again))


def _signs(m: Maker, h: Any) -> Any:
    signs = m.param("signs", torch.zeros(2, 64, 2, dtype=torch.int32), keep=True)
    factors = m.param("factors", torch.ones(2, 64, 1), keep=True)
    w = m.call("llmc.sum_signs", signs, factors, group=64, columns=64, dtype=torch.float32)
    return (m.call("aten.linear.default", h, w),)


@pytest.mark.parametrize(
    ("build", "words"),
    [
        (_dense, "its weight is stored dense"),
        (_weight_read_twice, "the decoded weight dequantize_default is read 2 times"),
        (_codes_read_twice, "codes is read 2 times"),
        (_signs, "the target has no kernel for signs weights"),
    ],
)
def test_linears_that_stay_as_they_are(build: Callable[..., Any], words: str) -> None:
    """Nothing is rewritten, and the reason names what is in the way."""
    m = Maker()
    program = m.output(*build(m, m.input("h", 64)))
    text = str(program.graph)
    plan = fused(program, features=FEATURES - {"dense", "signs"})
    assert not plan.fused
    assert words in plan.refused[0].reason
    assert str(program.graph) == text


def test_a_kernel_that_does_not_fit_is_the_reason() -> None:
    """What the target answers is kept beside the node."""
    plan = fused(mlp(), lambda problem: f"K={problem.K}" if problem.K == 96 else None)
    assert [f.problem.K for f in plan.fused] == [64]
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
    assert told(fused(program)) == [""]


# ** forms of weights **


def test_values_that_a_bitmap_keeps() -> None:
    m = Maker()
    mask = torch.rand(64, 64, generator=torch.Generator().manual_seed(1)) < 0.4
    bitmap = m.param("bitmap", packing.pack(mask.to(torch.int64), 1), keep=True)
    w = m.call("llmc.expand_bitmap", m.param("v", (int(mask.sum()),)), bitmap, columns=64)
    h = m.input("h", 64)
    plan = fused(m.output(m.call("aten.linear.default", h, w)))
    assert plan.fused[0].problem.bitmap
    assert plan.fused[0].problem.weights == "dense"


def test_sparse_entries_join_where_a_kernel_takes_them() -> None:
    plan = fused(mlp(sparse=True, side=0.1))
    assert told(plan) == ["x2+norm+2:4+gate", "2:4+add"]
    assert all(f.problem.sparse for f in plan.fused)


def test_sparse_entries_become_a_path_of_their_own() -> None:
    """Behind the fused node, bias and residual included; the norm stays, for S reads its result."""
    program = mlp(sparse=True, side=0.1)
    plan = fused(program, lambda problem: "no sparse rows" if problem.sparse else None)
    assert told(plan) == ["x2+2:4", "2:4+add"]
    assert len(list(program.calls("llmc.csr_linear"))) == 3
    assert not list(program.calls("llmc.add_csr"))
    assert len(list(program.calls("llmc.rms_norm"))) == 1
    assert any("which is not fused whole" in r.reason for r in plan.refused)


def compiled(text: str, **how: Any) -> Program:
    """A compiled decoder."""
    program = zoo.decoder(hidden=64, inner=64, heads=4, **how)
    tokens = torch.randint(0, 20, (4, 8), generator=torch.Generator().manual_seed(0))
    return compile_plan(make_plan(program, recipe.from_strings([text])), tokens).program


FORMS = {
    "w4:group=32": ("int", ""), "smooth,w4:group=32,symmetric=false": ("int", ""),
    "prune24,w4:group=32": ("int", ""), "prune24": ("dense", ""),
    "prune:sparsity=0.5": ("dense", ""),
    "nf4": ("table", ""), "squeezellm": ("table", ""), "gobo": ("table", ""), "spqr": ("int", ""),
    "fp8w": ("table", ""), "w4:double=true,group=16": ("int", ""), "svd:rank=4": ("factors", ""),
    "a8,w8": ("int", "int8 token"), "int8_split:threshold=1.0": ("int", "int8 token limit=1.0"),
    "fp8": ("table", "e4m3 token"), "rotate,w4:group=32": ("int", ""),
    "w4:group=32,lorc:rank=4,factor_bits=8": ("int", ""),
}  # fmt: skip


@pytest.mark.parametrize("text", FORMS)
def test_problems_of_compiled_models_are_true(text: str) -> None:
    """Each problem with its parts means what the body means, and the model computes the same."""
    program = compiled(text)
    ids = torch.randint(0, 20, (2, 6), generator=torch.Generator().manual_seed(1))
    before = run(program, model_inputs(ids))
    plan = fuse(program, lambda problem: None, FEATURES - {"dense"})
    verify(program)
    torch.testing.assert_close(run(program, model_inputs(ids)), before, rtol=1e-4, atol=1e-4)
    law(program, plan)
    weights, rounds = FORMS[text]
    assert {(f.problem.weights, f.problem.rounds) for f in plan.fused} == {(weights, rounds)}
    # q, k and v; what follows attention; gate and up; down: in both blocks.
    assert len(plan.fused) == 8
    assert all(f.problem.norm for f in plan.fused if len(f.sections) > 1)
    assert [r.predicate for r in plan.refused] == ["decoded"], "the head, which is stored dense"


@pytest.mark.parametrize("text", ["w4:group=32,lorc:rank=4", "w8:group=row,lorc:rank=3",
                                  "prune24,w4:group=32,lowrank_residual:rank=2",
                                  "w4:group=32,lorc:rank=4,factor_bits=8"])  # fmt: skip
def test_low_rank_beside_codes_is_one_node(text: str) -> None:
    """Joined linears keep their products apart: the left factors lie on a diagonal."""
    program = compiled(text)
    ids = torch.randint(0, 20, (2, 6), generator=torch.Generator().manual_seed(1))
    before = run(program, model_inputs(ids))
    new = program.clone()
    plan = fuse(new, lambda problem: None, FEATURES - {"dense"})
    verify(new)
    torch.testing.assert_close(run(new, model_inputs(ids)), before, rtol=1e-4, atol=1e-4)
    law(new, plan)
    assert len(plan.fused) == 8
    rank = min(f.problem.rank for f in plan.fused)
    assert [f.problem.rank for f in plan.fused] == [rank * len(f.sections) for f in plan.fused]
    # On the CPU the same node runs on torch's kernel and the product in one call.
    cpu = lower(program, "cpu")
    calls = list(cpu.program.calls("llmc.fused"))
    assert len(calls) == len(cpu.placed)
    assert all(p.fused.problem.rank for p in cpu.placed)
    made = Runner(cpu.program, implementations=cpu.implementations).forward(ids)
    assert float((made - before).norm()) < 0.02 * float(before.norm())


def test_low_rank_stays_beside_where_no_kernel_takes_it() -> None:
    program = compiled("w4:group=32,lorc:rank=4")
    count = sum(1 for _ in program.calls("llmc.dequantize"))
    plan = fuse(program, lambda problem: "no low rank" if problem.rank else None, PLAIN - {"dense"})
    verify(program)
    assert len(plan.fused) == count
    assert not any(f.problem.rank for f in plan.fused)
    assert any(f.problem.residual for f in plan.fused), "the product is what is added"
