"""A weight of two factors that are codes, in one launch: both are decoded by the same loop."""

from __future__ import annotations

from dataclasses import asdict, replace
from typing import Any

import pytest
import sides_cases
import torch
from lowering_programs import Maker, hidden, law
from numerics import Case, judge
from torch import fx

from llmc.codegen import workspace
from llmc.codegen.aot import compile_variant
from llmc.codegen.fuse import FusePlan, fuse
from llmc.codegen.kernels import choose, row
from llmc.codegen.prepack import prepack
from llmc.codegen.problem import Problem
from llmc.codegen.row import TileConfig
from llmc.codegen.rows.coded_factors import W4_FACTORS
from llmc.codegen.samples import random_parts
from llmc.codegen.survey import survey
from llmc.codegen.targets import BANDWIDTH, CPU_FEATURES, cpu_accept, triton_accept
from llmc.compiler.cli.kernels import scheme_text
from llmc.compiler.ir import packing
from llmc.compiler.ir.errors import ModelError
from llmc.compiler.ir.graph import DictWeights, Program, tensor_type
from llmc.compiler.ir.interpret import run
from llmc.compiler.ir.verifier import verify
from llmc.compiler.pipeline import recipe, zoo
from llmc.compiler.pipeline.plan import make_plan
from llmc.compiler.runtime.cache import add_cache

GATE: dict[str, Any] = {"pairs": "gate", "act": "silu"}


def case(bits: int, M: int, N: int, K: int, rank: int | str, **other: Any) -> Case:
    """A case of factors; a rank that is text are sections. "stride", "tile" and "spoil" go beside
    the problem's fields."""
    own = {k: other.pop(k) for k in ("stride", "tile", "spoil") if k in other}
    if isinstance(rank, str):
        other["spans"] = rank
        rank = sum(int(word.split("x")[1]) for word in rank.split())
    fields = {"N": N, "K": K, "bits": bits, "rank": rank, "weights": "factors", "eps": 1e-5}
    return Case(f"w{bits}_factors", {**fields, **other}, M, **own)


CASES = [
    case(4, 1, 33, 96, 5, spoil="left_scale"),
    case(4, 5, 70, 300, 130, asym=True, norm=True, bias=True, residual=True, stride="halves",
         spoil="right_codes"),
    case(4, 3, 200, 264, "64x70 64x150 72x3", norm=True, bias=True, x_dtype="bf16",
         spoil="left_codes"),
    case(4, 2, 50, 200, "25x20 25x37", group=64, asym=True, norm=True, bias=True, **GATE,
         spoil="left_zero"),
    case(4, 9, 50, 200, "25x20 25x170", group=32, norm=True, centred=True, **GATE,
         tile=(16, 64, 3), spoil="left_codes"),
    case(4, 3, 64, 160, 40, group=0, x_dtype="fp32", smooth=True, spoil="right_scale"),
    case(4, 2, 48, 160, 40, group=16, norm=True, act="gelu", spoil="left_codes"),
    # a row of right in several runs of its columns, and a norm of the result
    case(4, 1, 64, 1300, "32x20 32x40", norm=True, spoil="right_scale"),
    case(4, 9, 70, 1100, 33, group=0, bias=True, out_norm=True, out_eps=1e-5, spoil="left_codes"),
    # many tokens: both are decoded once
    case(4, 300, 50, 96, "25x20 25x37", bias=True, **GATE, spoil="right_codes"),
    case(4, 260, 96, 160, "64x20 32x37", group=32, bias=True, residual=True, spoil="left_codes"),
    case(8, 3, 70, 300, 130, asym=True, norm=True, spoil="left_zero"),
    case(8, 2, 160, 200, "64x20 96x150", group=64, spoil="left_codes"),
    case(3, 3, 160, 300, "64x20 96x150", asym=True, norm=True, spoil="right_zero"),
    case(3, 2, 50, 200, "25x20 25x300", group=64, **GATE, spoil="left_codes"),
    case(2, 2, 50, 200, 30, group=64, asym=True, spoil="left_codes"),
]  # fmt: skip


@pytest.mark.parametrize("at", range(len(CASES)), ids=lambda i: CASES[i].label)
def test_factors_of_codes_are_what_they_mean(at: int) -> None:
    """Against the oracle in fp64; the same bits twice; a spoiled part goes beyond the bound."""
    assert judge(CASES[at], sides_cases.answers(CASES)[at]) == ""


# ** bytes **


def test_bytes_are_the_codes_and_scales_of_both_once() -> None:
    """Rank 1024 of 4096 x 4096 at 4 bits in groups of 128: 4 MiB of codes, an eighth of 32 MiB."""
    problem = Problem(4096, 4096, rank=1024, weights="factors")
    assert choose(problem) == (W4_FACTORS, [])
    scales = 4 * 2 * 4096 * 1024 // 128
    assert W4_FACTORS.bytes_moved(problem, 1) == 4096 * 1024 + scales + 2 * 2 * 4096
    config = W4_FACTORS.default_config(problem, 1)
    assert workspace.constants(problem, config, 1, 132) == {"SPLIT": 1, "RUNS": 4, "MAKERS": 128}
    # what four runs have left, and their sum
    assert workspace.moved(problem, config, 1) == 8 * 5 * 1024


@pytest.mark.parametrize(
    ("N", "rank", "more"),
    [(200, "64x5 64x33 72x130", {}), (50, "25x20 25x137", GATE), (70, 30, {"group": 32})],
)
@pytest.mark.parametrize("bits", [4, 8, 3])
def test_packed_tensors_hold_as_many(
    N: int, rank: int | str, more: dict[str, Any], bits: int
) -> None:
    found = case(bits, 1, N, 256, rank, **more)
    problem, kernel = found.problem, row(found.row)
    packed = prepack(kernel, problem, **random_parts(problem))
    assert packed.bytes + 2 * (256 + problem.outputs) == kernel.bytes_moved(problem, 1)


def test_parts_that_do_not_fit_are_told() -> None:
    problem = case(4, 1, 64, 128, "32x20 32x40").problem
    parts = random_parts(problem)
    for role, what in (("left_codes", "left_codes of shape"), ("right_scale", "right_scale of")):
        with pytest.raises(ModelError, match=what):
            prepack(W4_FACTORS, problem, **{**parts, role: parts[role][:-1]})
    with pytest.raises(ModelError, match="left_zero of shape none"):
        prepack(W4_FACTORS, problem, **parts, left_zero=parts["left_scale"].to(torch.uint8))


def test_people_are_told_what_the_factors_are() -> None:
    coded, plain = Problem(64, 256, rank=16, weights="factors"), {"bits": 16, "group": 0}
    assert scheme_text(asdict(coded)) == "factors w4 g128 r16"
    assert scheme_text(asdict(replace(coded, **plain))) == "factors r16"


# ** refusals **


@pytest.mark.parametrize(
    ("change", "field"),
    [({"rank": 0}, "rank"), ({"rank": 16385}, "rank"), ({"bits": 5}, "bits"),
     ({"group": 48}, "group"), ({"n": 2, "m": 4}, "m"), ({"sparse": True}, "sparse"),
     ({"rounds": "int8 token"}, "rounds"), ({"levels": "nf"}, "levels"), ({"K": 8}, "K"),
     ({"outliers": 2}, "outliers"), ({"weights": "int"}, "weights"),
     ({"rank": 24, "spans": "40x12 24x12"}, "spans")],
)  # fmt: skip
def test_what_is_just_missed_is_refused_by_field(change: dict[str, Any], field: str) -> None:
    plain = Problem(64, 256, rank=16, weights="factors")
    assert W4_FACTORS.misfits(plain) == []
    assert field in [m.field for m in W4_FACTORS.misfits(replace(plain, **change))]


@pytest.mark.parametrize("target", ["sm_80", "sm_90"])
@pytest.mark.parametrize("gate", [False, True])
def test_factors_of_codes_compile_without_spills(target: str, gate: bool) -> None:
    """With every side at once, in the tile that needs most."""
    sides = {"norm": True, "bias": True, "residual": True, "x_dtype": "bf16", "asym": True}
    more = {**GATE, "spans": "2048x800 2048x600"} if gate else {}
    problem = Problem(4096, 4096, rank=1400, weights="factors", **sides, **more)
    facts = compile_variant(W4_FACTORS, problem, TileConfig(32, 64, 3), target)
    assert (facts.stack, facts.local_memory) == (0, 0)
    assert facts.shared <= 163 * 1024


# ** planner **


def coded(m: Maker, name: str, N: int, K: int, bits: int = 4, group: int = 32) -> fx.Node:
    """A weight [N, K] decoded from codes."""
    codes = torch.randint(0, 1 << bits, (N, K), generator=torch.Generator().manual_seed(N + K))
    parts = [m.param(f"{name}.codes", packing.pack(codes, bits), keep=True)]
    scale = (torch.rand(N, -(-K // group)) * 0.02 + 0.01).half()
    parts.append(m.param(f"{name}.scale", scale, keep=True))
    attrs = {"bits": bits, "group": group, "columns": K, "dtype": torch.float32}
    return m.call("llmc.dequantize", *parts, **attrs)


def factored(m: Maker, x: fx.Node, name: str, N: int, rank: int, **left: int) -> fx.Node:
    """A linear of two factors of codes; left: bits or group where they are others than right's."""
    K = int(tensor_type(x).shape[-1])
    few = m.call("aten.linear.default", x, coded(m, f"{name}.right", rank, K))
    other = {"group": min(32, rank), **left}
    return m.call("aten.linear.default", few, coded(m, f"{name}.left", N, rank, **other))


def attention(**left: int) -> Program:
    """q, k and v of one norm."""
    m = Maker()
    n = m.call("llmc.rms_norm", m.input("h", 64), m.param("gain", (64,)), eps=1e-5)
    shapes = (("q", 128, 20), ("k", 64, 32), ("v", 64, 24))
    return m.output(*[factored(m, n, w, N, rank, **left) for w, N, rank in shapes])


def feed() -> Program:
    m = Maker()
    h = m.input("h", 64)
    n = m.call("llmc.layer_norm", h, m.param("gain", (64,)), m.param("shift", (64,)), eps=1e-5)
    gate, up = factored(m, n, "gate", 40, 16), factored(m, n, "up", 40, 32)
    few = factored(m, m.call("llmc.gated", gate, up, act="silu"), "down", 64, 9)
    return m.output(m.call("aten.add.Tensor", h, few))


def fused(program: Program) -> FusePlan:
    """As the kernel rows serve it; the program is legal and computes the same."""
    inputs = {n.name: hidden(program.dtype) for n in program.inputs}
    before = run(program, inputs)
    plan = fuse(program, triton_accept)
    verify(program)
    torch.testing.assert_close(run(program, inputs), before, rtol=1e-5, atol=1e-5)
    law(program, plan)
    return plan


def test_factors_of_one_input_are_one_call() -> None:
    plan = fused(attention())
    (one,) = plan.fused
    assert (one.problem.spans, one.problem.bits) == ("128x20 64x32 64x24", 4)
    assert (one.problem.N, one.problem.rank, one.problem.norm) == (256, 76, True)
    assert (one.problem.group, one.problem.scale_dtype, plan.refused) == (32, "fp16", ())


def test_gate_and_up_are_one_call_whatever_their_ranks() -> None:
    plan = fused(feed())
    assert [f.problem.spans for f in plan.fused] == ["40x16 40x32", ""]
    assert (plan.fused[0].problem.pairs, plan.fused[0].problem.centred) == ("gate", True)
    assert plan.fused[1].problem.residual
    assert not plan.refused


@pytest.mark.parametrize(
    ("left", "told"), [({"bits": 8}, "left has 8 bits"), ({"group": 16}, "in groups of 16")]
)
def test_factors_of_two_schemes_stay_two_calls(left: dict[str, int], told: str) -> None:
    """The rights of one input are joined, the lefts are not, and the reason names both schemes."""
    plan = fused(attention(**left))
    assert [len(f.sections) for f in plan.fused] == [3, 1, 1, 1]
    assert {f.problem.weights for f in plan.fused} == {"int"}
    found = [r for r in plan.refused if r.predicate == "one_scheme"]
    assert len(found) == 3
    assert all(told in r.reason and "right has 4 bits" in r.reason for r in found)


def test_factors_that_no_row_takes_stay_two_calls() -> None:
    def accept(problem: Problem) -> str | None:
        return "no such kernel" if problem.weights == "factors" else triton_accept(problem)

    plan = fuse(attention(), accept)
    assert [len(f.sections) for f in plan.fused] == [3, 1, 1, 1]
    assert sum("no such kernel" in r.reason for r in plan.refused) == 3


def test_a_product_that_others_read_too_is_not_taken_in() -> None:
    m = Maker()
    x = m.input("h", 64)
    few = m.call("aten.linear.default", x, coded(m, "right", 32, 64))
    y = m.call("aten.linear.default", few, coded(m, "left", 64, 32))
    plan = fused(m.output(few, y))
    assert [f.problem.weights for f in plan.fused] == ["int", "int"]


def test_the_cpu_multiplies_them_one_by_one() -> None:
    plan = fuse(attention(), cpu_accept, CPU_FEATURES)
    assert {f.problem.weights for f in plan.fused} == {"int"}
    assert not [r for r in plan.refused if r.predicate == "one_scheme"]


@pytest.mark.parametrize(
    "text",
    ["svd:rank=128,w4:group=128", "svdllm:remove=0.2,w4:group=row", "svd:rank=128,w8:group=128",
     "asvd:remove=0.2,w3:group=row"],
)  # fmt: skip
def test_a_decoder_layer_of_coded_factors_starts_six_kernels(text: str) -> None:
    program = zoo.decoder(hidden=256, inner=512, size=64, rope=1.0)
    plan = make_plan(program, recipe.from_strings([text]))
    plan.program.weights = DictWeights()
    page = survey(add_cache(plan.program), "triton", 1, "bf16", BANDWIDTH)
    assert page["launches_per_block"] == 6
    assert [r["kernel"] for r in page["fused"]].count(f"{text.split(',')[1][:2]}_factors") >= 4
