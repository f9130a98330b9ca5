"""The norm of a linear's result, made by the linear's own kernel before the sum behind it."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
from numerics import Case, judge, run_cases
from sides_cases import case

NORMED: dict[str, Any] = {"out_norm": True, "out_eps": 1e-6}
CASES = [
    # One tile and several, rows that are no multiple of one, blocks of tokens in flight.
    case(1, 70, 160, **NORMED, residual=True, tile=(8, 32, 4, 2), spoil="out_gain"),
    case(3, 33, 160, **NORMED, residual=True, bias=True, stride="padded", spoil="bias"),
    case(17, 130, 96, **NORMED, residual=True, tile=(8, 32, 4, 2), spoil="codes"),
    case(17, 70, 96, **NORMED, residual=True, x_dtype="bf16", tile=(16, 64, 4, 4)),
    case(5, 1, 64, **NORMED, residual=True),
    case(3, 96, 96, **NORMED, x_dtype="fp32", stride="halves", spoil="out_gain"),
    # Programs that share the columns, and each side beside.
    case(3, 70, 1024, **NORMED, residual=True, tile=(8, 32, 4, 2, 2), spoil="codes"),
    case(9, 70, 1024, **NORMED, norm=True, residual=True, tile=(8, 32, 4, 2, 2), spoil="gain"),
    case(3, 70, 160, **NORMED, rank=16, residual=True, tile=(8, 32, 4, 2), spoil="left"),
    case(9, 70, 1024, **NORMED, rank=20, smooth=True, tile=(8, 32, 4, 2, 2), spoil="right"),
    case(3, 70, 160, **NORMED, sparse=True, residual=True, spoil="csr_values"),
    case(3, 70, 160, **NORMED, act="gelu", norm=True, residual=True, spoil="codes"),
    case(3, 36, 160, **NORMED, act="sigmoid", residual=True, asym=True, spoil="zero"),
    case(5, 130, 96, **NORMED, pairs="gate", act="silu", residual=True, tile=(8, 32, 4, 2)),
    case(3, 36, 160, "w4a16_24", **NORMED, residual=True, spoil="meta"),
    # More tokens than one program takes: the norm and the sum are calls of torch.
    case(17, 70, 160, **NORMED, residual=True, bias=True, stride="batched", spoil="out_gain"),
    case(33, 70, 160, **NORMED, spoil="codes"),
    case(17, 70, 160, **NORMED, residual=True, norm=True, rank=16),
]


@pytest.fixture(scope="module")
def found(tmp_path_factory: pytest.TempPathFactory) -> dict[str, dict[str, Any]]:
    """What one child process found, by case."""
    told = run_cases(CASES, Path(tmp_path_factory.mktemp("kernels")))
    return {c.label: answer for c, answer in zip(CASES, told, strict=True)}


@pytest.mark.parametrize("case", CASES, ids=lambda c: c.label)
def test_the_kernel_makes_the_norm_that_the_problem_means(
    case: Case, found: dict[str, dict[str, Any]]
) -> None:
    """Within the bound, the same bits twice, and beyond the bound when a part is changed."""
    assert not judge(case, found[case.label])
