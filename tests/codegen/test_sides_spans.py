"""Factors of joined linears in one launch: sections of rows with ranks of their own, no zeros."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import pytest
import sides_cases
import torch
from lowering_programs import Maker, hidden, law
from numerics import Case, judge
from torch import fx

from llmc.codegen.aot import compile_variant
from llmc.codegen.fuse import FEATURES, FusePlan, fuse
from llmc.codegen.kernels import choose, row
from llmc.codegen.prepack import prepack
from llmc.codegen.problem import Problem
from llmc.codegen.row import TileConfig
from llmc.codegen.rows.factors import FACTORS
from llmc.codegen.samples import random_parts
from llmc.codegen.survey import survey
from llmc.codegen.targets import BANDWIDTH, CPU_FEATURES, triton_accept
from llmc.compiler.ir.errors import ModelError
from llmc.compiler.ir.graph import DictWeights, Program, tensor_type
from llmc.compiler.ir.interpret import run
from llmc.compiler.ir.verifier import verify
from llmc.compiler.pipeline import recipe, zoo
from llmc.compiler.pipeline.plan import make_plan
from llmc.compiler.runtime.cache import add_cache

PLAIN: dict[str, Any] = {"bits": 16, "group": 0, "scale_dtype": "", "weights": "factors"}
GATE: dict[str, Any] = {"pairs": "gate", "act": "silu"}


def case(M: int, N: int, K: int, spans: str, **other: Any) -> Case:
    """A case of joined factors; "stride", "tile" and "spoil" go beside the problem's fields."""
    own = {k: other.pop(k) for k in ("stride", "tile", "spoil") if k in other}
    rank = sum(int(word.split("x")[1]) for word in spans.split())
    fields = {"N": N, "K": K, "rank": rank, "spans": spans, "eps": 1e-5, **PLAIN, **other}
    return Case("factors", fields, M, **own)


CODES: dict[str, Any] = {"K": 128, "eps": 1e-5, "group": 64, "x_dtype": "fp16"}
CASES = [
    case(1, 192, 96, "64x5 64x16 64x7", spoil="left"),
    case(3, 200, 136, "64x70 64x40 72x3", bias=True, residual=True, norm=True, x_dtype="bf16",
         stride="halves", spoil="right"),
    case(9, 97, 520, "64x33 33x17", norm=True, centred=True, sparse=True, act="gelu", spoil="left"),
    case(2, 50, 200, "25x20 25x37", **GATE, bias=True, norm=True, spoil="left"),
    case(3, 200, 96, "32x20 96x5 72x9", smooth=True, spoil="left"),
    case(9, 96, 96, "48x40 48x40", **GATE, residual=True, x_dtype="fp32", spoil="right"),
    case(2, 100, 136, "50x70 50x200", **GATE, smooth=True, tile=(8, 64, 3), spoil="left"),
    # many tokens: one product with all rights, then one for each section
    case(70, 50, 96, "25x20 25x37", **GATE, bias=True, spoil="right"),
    case(70, 96, 96, "64x20 32x37", bias=True, residual=True, spoil="left"),
    # beside codes
    Case("w4a16", {"N": 192, "rank": 21, "spans": "64x5 64x9 64x7", **CODES}, 2, spoil="left"),
    Case("w4a16", {"N": 100, "rank": 45, "spans": "50x5 50x40", "norm": True, **GATE, **CODES}, 3,
         spoil="left"),
    Case("w4a16", {"N": 160, "rank": 45, "spans": "128x5 32x40", **CODES | {"K": 1024}}, 1,
         tile=(8, 64, 4, 4, 2), spoil="right"),
    Case("w4a16", {"N": 50, "rank": 45, "spans": "25x5 25x40", "bias": True, **GATE, **CODES}, 800),
    Case("w16", {"N": 50, "rank": 12, "spans": "25x5 25x7", "bias": True, **GATE,
                 "K": 40, **PLAIN, "weights": "dense"}, 70, spoil="left"),
]  # fmt: skip


@pytest.mark.parametrize("at", range(len(CASES)), ids=lambda i: CASES[i].label)
def test_sections_are_what_they_mean(at: int) -> None:
    """Against the oracle in fp64; the same bits twice; a spoiled part goes beyond the bound."""
    assert judge(CASES[at], sides_cases.answers(CASES)[at]) == ""


# ** bytes **


@pytest.mark.parametrize("gate", [False, True])
def test_bytes_are_those_of_the_factors_alone(gate: bool) -> None:
    """What calls of their own move, with x read once; on a diagonal it is 1.4 to 1.8 times that."""
    sizes = [(14336, 2549)] * 2 if gate else [(4096, 1638), (1024, 655), (1024, 655)]
    spans = " ".join(f"{n}x{r}" for n, r in sizes)
    N, rank = (sum(column) for column in zip(*sizes, strict=True))
    joined = Problem(N, 4096, rank=rank, spans=spans, **PLAIN, **(GATE if gate else {}))
    assert choose(joined) == (FACTORS, [])
    alone = sum(FACTORS.bytes_moved(Problem(n, 4096, rank=r, **PLAIN), 1) for n, r in sizes)
    saved = 2 * (len(sizes) - 1) * 4096 + 2 * (N - joined.outputs)
    assert FACTORS.bytes_moved(joined, 1) == alone - saved
    diagonal = Problem(N, 4096, rank=rank, **PLAIN, **(GATE if gate else {}))
    assert FACTORS.bytes_moved(diagonal, 1) > 1.4 * alone


@pytest.mark.parametrize(("N", "spans", "more"), [(200, "64x5 64x33 72x7", {}),
                                                  (50, "25x20 25x37", GATE)])  # fmt: skip
def test_packed_tensors_hold_as_many(N: int, spans: str, more: dict[str, Any]) -> None:
    rank = sum(int(word.split("x")[1]) for word in spans.split())
    problem = Problem(N, 128, rank=rank, spans=spans, **PLAIN, **more)
    parts = random_parts(problem)
    packed = prepack(FACTORS, problem, **parts)
    assert packed.bytes + 2 * (128 + problem.outputs) == FACTORS.bytes_moved(problem, 1)
    assert packed["right"].shape == (sum(-(-int(r) // 16) * 16 for _, r in problem.sections), 128)
    parts["left"][0, -1] = 1.0
    with pytest.raises(ModelError, match="beside one"):
        prepack(FACTORS, problem, **parts)


# ** refusals **


@pytest.mark.parametrize(
    ("spans", "more", "expected"),
    [
        ("64x8 65x8 64x8", {}, "whole 32 rows"), ("64x8 64x8", {}, "all of them N x rank"),
        ("64x8 129x8", {}, "all of them N x rank"), ("64x8, 129x16", {}, "none or rows x rank"),
        ("193x24", {}, "none or rows x rank"), ("64x8 64x8 66x8", GATE, "two halves"),
        ("64x12 130x12", GATE, "two halves"),
    ],
)  # fmt: skip
def test_other_sections_are_refused(spans: str, more: dict[str, Any], expected: str) -> None:
    problem = Problem(194 if more else 193, 128, rank=24, spans=spans, **PLAIN, **more)
    found = [m for m in FACTORS.misfits(problem) if m.field == "spans"]
    assert len(found) == 1
    assert expected in str(found[0])


def test_sections_are_of_products_of_low_rank_alone() -> None:
    problem = Problem(128, 128, rank=24, spans="64x12 64x12", bits=8, rounds="int8 token")
    assert "spans" in [m.field for m in row("w8a8").misfits(problem)]


def test_tiles_lie_in_one_section() -> None:
    """A row without a tile of 32 refuses sections of 32 rows."""
    short = Problem(160, 256, rank=24, spans="96x12 64x12", bitmap=True)
    assert [m.field for m in row("w4_bitmap").misfits(short)] == ["spans"]
    assert row("w4_bitmap").misfits(replace(short, N=192, spans="128x12 64x12")) == []
    codes = Problem(320, 256, rank=24, spans="192x12 128x12")
    assert {c.BN for c in row("w4a16").configs(codes)} == {32, 64}
    assert 128 in {c.BN for c in row("w4a16").configs(Problem(384, 256, rank=24))}


@pytest.mark.parametrize("target", ["sm_80", "sm_90"])
@pytest.mark.parametrize("gate", [False, True])
def test_sections_compile_without_spills(target: str, gate: bool) -> None:
    """In the tile that needs most."""
    sides: dict[str, Any] = {"norm": True, "bias": True, "residual": True, "x_dtype": "bf16"}
    spans = "2048x800 2048x600" if gate else "2048x800 1024x300 1024x300"
    more = {**PLAIN, **sides, **(GATE if gate else {})}
    problem = Problem(4096, 4096, rank=1400, spans=spans, **more)
    facts = compile_variant(FACTORS, problem, TileConfig(32, 64), target)
    assert (facts.stack, facts.local_memory) == (0, 0)
    assert facts.shared <= 163 * 1024


# ** planner **


def factored(m: Maker, x: fx.Node, name: str, N: int, rank: int, bias: bool = False) -> fx.Node:
    """A linear of two factors."""
    width = int(tensor_type(x).shape[-1])
    few = m.call("aten.linear.default", x, m.param(f"{name}.right", (rank, width), keep=True))
    args = [few, m.param(f"{name}.left", (N, rank), keep=True)]
    return m.call("aten.linear.default", *args, *([m.param(f"{name}.b", (N,))] if bias else []))


def attention(rows: int = 64) -> Program:
    """q, k and v of one norm, k alone with a bias, and a gated product of the same ranks or not."""
    m = Maker()
    h = m.input("h", 64)
    n = m.call("llmc.rms_norm", h, m.param("gain", (64,)), eps=1e-5)
    qkv = [
        factored(m, n, w, N, r, w == "k")
        for w, N, r in (("q", 128, 20), ("k", rows, 7), ("v", rows, 9))
    ]
    return m.output(*qkv)


def feed() -> Program:
    m = Maker()
    h = m.input("h", 64)
    n = m.call("llmc.layer_norm", h, m.param("gain", (64,)), m.param("shift", (64,)), eps=1e-5)
    gate, up = factored(m, n, "gate", 40, 5), factored(m, n, "up", 40, 21, bias=True)
    few = factored(m, m.call("llmc.gated", gate, up, act="silu"), "down", 64, 9)
    return m.output(m.call("aten.add.Tensor", h, few))


def fused(program: Program, features: frozenset[str] = FEATURES) -> FusePlan:
    """As the kernel rows serve it; the program is legal and computes the same."""
    inputs = {n.name: hidden(program.dtype) for n in program.inputs}
    before = run(program, inputs)
    plan = fuse(program, triton_accept, features)
    verify(program)
    torch.testing.assert_close(run(program, inputs), before, rtol=1e-5, atol=1e-5)
    law(program, plan)
    return plan


def test_factors_of_one_input_are_one_call() -> None:
    plan = fused(attention())
    (one,) = plan.fused
    assert one.problem.spans == "128x20 64x7 64x9"
    assert (one.problem.N, one.problem.rank, one.problem.norm) == (256, 36, True)
    assert not plan.refused


def test_gate_and_up_are_one_call_whatever_their_ranks() -> None:
    plan = fused(feed())
    assert [f.problem.spans for f in plan.fused] == ["40x5 40x21", ""]
    assert plan.fused[0].problem.pairs == "gate"
    assert plan.fused[1].problem.residual
    assert not plan.refused


def test_sections_that_are_no_whole_tiles_stay_calls_of_their_own() -> None:
    """And the refusal names the field."""
    plan = fused(attention(rows=40))
    assert [f.problem.spans for f in plan.fused] == [""] * 3
    assert all(f.problem.norm for f in plan.fused)
    (refusal,) = plan.refused
    assert refusal.predicate == "concat"
    assert "spans=128x20 40x7 40x9, expected whole 32 rows" in refusal.reason


def test_a_target_that_cannot_keep_them_apart_is_not_asked() -> None:
    plan = fuse(attention(), lambda problem: None, CPU_FEATURES)
    assert [(f.problem.spans, len(f.sections)) for f in plan.fused] == [("", 1)] * 3


@pytest.mark.parametrize("text", ["svd:remove=0.2", "svdllm:remove=0.2", "fwsvd:remove=0.2",
                                  "asvd:remove=0.2", "w4:group=128,lorc"])  # fmt: skip
def test_a_factored_decoder_layer_starts_six_kernels(text: str) -> None:
    program = zoo.decoder(hidden=256, inner=512, size=64, rope=1.0)
    plan = make_plan(program, recipe.from_strings([text]))
    plan.program.weights = DictWeights()
    page = survey(add_cache(plan.program), "triton", 1, "bf16", BANDWIDTH)
    assert page["launches_per_block"] == 6
    spans = [r["problem"]["spans"] for r in page["fused"] if len(r["sections"]) > 1]
    assert spans
    assert all(spans)
