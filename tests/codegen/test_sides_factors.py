"""A weight of two factors in one launch: programs that start first make what all others await."""

from __future__ import annotations

from typing import Any

import numerics
import pytest
import sides_cases
from numerics import Case, judge

from llmc.codegen import workspace
from llmc.codegen.aot import compile_variant
from llmc.codegen.kernels import choose
from llmc.codegen.prepack import prepack
from llmc.codegen.problem import Problem
from llmc.codegen.row import TileConfig
from llmc.codegen.rows.factors import FACTORS

PLAIN = {"bits": 16, "group": 0, "scale_dtype": "", "weights": "factors"}


def case(M: int, N: int, K: int, rank: int, **other: Any) -> Case:
    """A case of factors; "stride", "tile" and "spoil" go beside the problem's fields."""
    own = {k: other.pop(k) for k in ("stride", "tile", "spoil") if k in other}
    return Case("factors", {"N": N, "K": K, "rank": rank, "eps": 1e-5, **PLAIN, **other}, M, **own)


CASES = [
    case(1, 33, 96, 5, spoil="left"),
    case(3, 70, 520, 64, bias=True, residual=True, stride="halves", spoil="right"),
    case(9, 64, 200, 40, norm=True, smooth=True, x_dtype="fp32", spoil="gain"),
    case(2, 50, 200, 20, pairs="gate", act="silu", bias=True, spoil="left"),
    case(17, 70, 136, 17, tile=(16, 64, 3), spoil="right"),
    case(3, 40, 96, 16, sparse=True, act="gelu", tile=(8, 32, 3, 2), spoil="csr_values"),
    # many tokens: two products of torch, and the same epilogue
    case(70, 50, 96, 20, pairs="gate", act="silu", bias=True, spoil="right"),
]


@pytest.mark.parametrize("at", range(len(CASES)), ids=lambda i: CASES[i].label)
def test_factors_are_what_they_mean(at: int) -> None:
    """Against the oracle in fp64; the same bits twice; a spoiled part goes beyond the bound."""
    assert judge(CASES[at], sides_cases.answers(CASES)[at]) == ""


def test_bytes_are_both_factors_once() -> None:
    """Rank 1024 of 4096 x 4096 in 16 bits: 16 MiB, and what programs leave each other beside it."""
    problem = Problem(4096, 4096, rank=1024, **PLAIN)
    assert choose(problem) == (FACTORS, [])
    assert FACTORS.bytes_moved(problem, 1) == 2 * (2 * 4096 * 1024 + 2 * 4096)
    config = FACTORS.default_config(problem, 1)
    assert workspace.moved(problem, config, 1) == 8 * 2 * 1024
    assert workspace.constants(problem, config, 1, 132)["MAKERS"] == 128
    small = case(1, 70, 300, 20)
    packed = prepack(FACTORS, small.problem, **numerics.parts_of(small))
    assert packed.bytes + 2 * (300 + 70) == FACTORS.bytes_moved(small.problem, 1)


@pytest.mark.parametrize(
    ("change", "field"),
    [({"rank": 0}, "rank"), ({"rank": 16385}, "rank"), ({"scale_dtype": "fp16"}, "scale_dtype"),
     ({"n": 2, "m": 4}, "m"), ({"bits": 8}, "bits"), ({"rounds": "int8 tensor"}, "rounds"),
     ({"asym": True}, "asym")],
)  # fmt: skip
def test_what_is_just_missed_is_refused_by_field(change: dict[str, Any], field: str) -> None:
    """Factors that are codes, scaled, sparse, or read a grid of all tokens are another row's."""
    problem = Problem(64, 128, **{**PLAIN, "rank": 16, **change})
    assert field in [m.field for m in FACTORS.misfits(problem)]


@pytest.mark.parametrize("target", ["sm_80", "sm_90"])
def test_factors_compile_without_spills(target: str) -> None:
    """With every side at once, in the tile that needs most."""
    sides = {"norm": True, "bias": True, "residual": True, "pairs": "gate", "act": "silu"}
    problem = Problem(4096, 4096, rank=1024, x_dtype="bf16", **PLAIN, **sides)
    facts = compile_variant(FACTORS, problem, TileConfig(32, 64), target)
    assert (facts.stack, facts.local_memory) == (0, 0)
    assert facts.shared <= 163 * 1024
