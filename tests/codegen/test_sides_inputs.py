"""What stands around a weight: smoothing and norm on the way in, activations and gates behind."""

from __future__ import annotations

from typing import Any

import pytest
import sides_cases
import torch
from numerics import judge
from sides_cases import case

from llmc.codegen import meaning
from llmc.codegen.by_row import order_rows
from llmc.codegen.kernels import row
from llmc.codegen.prepack import prepack
from llmc.codegen.problem import Problem
from llmc.codegen.rows.common import ACTS
from llmc.codegen.rows.int4 import W4A16
from llmc.compiler.ir import packing
from llmc.compiler.ir.errors import UsageError
from llmc.compiler.ir.ops.sparse import csr

GATE = {"pairs": "gate", "act": "silu"}
CASES = [
    case(1, 33, 96, smooth=True, spoil="smooth"),
    case(3, 70, 200, smooth=True, norm=True, x_dtype="fp32", spoil="smooth"),
    case(3, 40, 96, "w4a16_24", smooth=True, norm=True, asym=True),
    *[case(2, 33, 96, act=act, bias=True, x_dtype="fp32", spoil="bias") for act in ACTS[1:]],
    case(3, 70, 160, act="gelu", residual=True, stride="halves", spoil="codes"),
    # N/2 odd, one token, tails of K; halves that end inside a block of eight
    case(1, 66, 200, **GATE, spoil="codes"),
    case(3, 2, 130, **GATE, asym=True, group=128, bias=True, spoil="zero"),
    case(5, 130, 96, pairs="gate", act="gelu_tanh", bias=True, residual=True, spoil="bias"),
    case(3, 50, 200, **GATE, group=0, norm=True, smooth=True, x_dtype="fp32", spoil="gain"),
    case(3, 36, 160, "w4a16_24", **GATE, bias=True, residual=True, stride="padded", spoil="meta"),
    case(9, 128, 128, **GATE, scale_dtype="bf16", tile=(16, 128)),
    *[case(17, 128, 96, **GATE, tile=tile) for tile in [(8, 32), (8, 64), (16, 32), (32, 64)]],
]


@pytest.mark.parametrize("at", range(len(CASES)), ids=lambda i: CASES[i].label)
def test_sides_are_what_they_mean(at: int) -> None:
    """Against the oracle in fp64; the same bits twice; a spoiled part goes beyond the bound."""
    assert judge(CASES[at], sides_cases.answers(CASES)[at]) == ""


@pytest.mark.parametrize(
    ("change", "field"),
    [
        ({"act": "softplus"}, "act"),
        ({"pairs": "rope"}, "pairs"),
        ({"pairs": "gate"}, "act"),
        ({"pairs": "gate", "act": "silu", "N": 65}, "N"),
        ({"rounds": "int8 tensor"}, "rounds"),
    ],
)
def test_sides_just_missed_are_refused_by_field(change: dict[str, Any], field: str) -> None:
    """An unknown activation, another pairing, halves of unlike size."""
    problem = Problem(**{"N": 64, "K": 128, **change})
    for name in ("w4a16", "w4a16_24"):
        assert field in [m.field for m in row(name).misfits(problem)]


def test_pairs_lie_eight_rows_apart_in_every_part() -> None:
    """Ordered parts mean the ordered weight, whichever parts it has; fillers repeat a row."""
    g = torch.Generator().manual_seed(0)
    N, K = 22, 48
    mask = torch.rand(N, K, generator=g) < 0.3
    index, starts = csr(torch.rand(N, K, generator=g) < 0.2)
    problem = Problem(N, K, weights="dense", bitmap=True, sparse=True, pairs="gate", act="relu")
    parts = {
        "bitmap": packing.pack(mask.long(), 1), "values": torch.randn(int(mask.sum()), generator=g),
        "csr_index": index, "csr_starts": starts,
        "csr_values": torch.randn(len(index), generator=g),
    }  # fmt: skip
    ordered, moved = order_rows(problem, parts)
    order = [min(8 * b + i, 10) + 11 * half for b in range(2) for half in (0, 1) for i in range(8)]
    assert ordered.N == 32
    assert torch.equal(meaning.weight(ordered, moved), meaning.weight(problem, parts)[order])
    plain = {"sparse": True, "weights": "dense"}
    zeros = torch.zeros(32, K, dtype=torch.float64)
    eye = torch.eye(K, dtype=torch.float64)
    there = meaning.linear(Problem(32, K, **plain), {**moved, "values": zeros}, eye)
    here = meaning.linear(Problem(N, K, **plain), {**parts, "values": zeros[:N]}, eye)
    assert torch.equal(there, here[:, order])


def test_a_bias_of_pairs_must_be_packed() -> None:
    """At a call its rows would be in another order than the weight's."""
    from llmc.codegen.launch import problem_of_call

    codes = packing.pack(torch.zeros(32, 64, dtype=torch.int64), 4)
    problem = Problem(32, 64, group=32, pairs="gate", act="silu")
    packed = prepack(W4A16, problem, codes=codes, scale=torch.ones(32, 2).half())
    with pytest.raises(UsageError, match="found bias"):
        problem_of_call(packed, {"x": torch.zeros(1, 64), "bias": torch.zeros(32)})


def test_bytes_of_sides() -> None:
    """Half as many results under a gate; one vector of four bytes however x is multiplied."""
    base = {"N": 4096, "K": 1024}
    plain = W4A16.bytes_moved(Problem(**base), 3)
    assert W4A16.bytes_moved(Problem(**base, pairs="gate", act="silu"), 3) == plain - 2 * 3 * 2048
    for how in ({"smooth": True}, {"norm": True}, {"smooth": True, "norm": True}):
        assert W4A16.bytes_moved(Problem(**base, **how), 3) == plain + 4 * 1024
