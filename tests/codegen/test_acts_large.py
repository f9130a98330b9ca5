"""Many tokens: weights decoded once by their own kernels, under the interpreter and as code.

Triton reads TRITON_INTERPRET at import, so one child process runs all cases (this file as a script)
and the tests judge its answers.
"""

from __future__ import annotations

import dataclasses
import json
import os
import sys
from typing import Any

import pytest
from interpreter import interpreted

CASES: dict[str, dict[str, Any]] = {
    "w4": {"group": 64, "asym": True},
    "w4 per row": {"group": 132, "x_dtype": "bf16", "scale_dtype": "bf16"},
    "w4 fp32": {"group": 32, "x_dtype": "fp32", "norm": True, "smooth": True, "bias": True},
    "w4 sides": {"group": 128, "asym": True, "norm": True, "bias": True, "residual": True,
                 "act": "gelu"},
    "w4 centred": {"group": 32, "norm": True, "centred": True, "smooth": True, "bias": True},
    "w4 gate": {"group": 64, "N": 44, "act": "silu", "pairs": "gate", "bias": True},
    "w4 rank": {"group": 64, "rank": 20, "residual": True, "smooth": True},
    "w4 2:4": {"group": 32, "n": 2, "m": 4, "asym": True},
    "w8": {"bits": 8, "group": 132},
    "w6": {"bits": 6, "group": 64, "asym": True},
    "nf4": {"weights": "table", "levels": "nf", "group": 64},
    "signs": {"weights": "signs", "bits": 3, "group": 64, "N": 44, "act": "silu", "pairs": "gate"},
}  # fmt: skip
BARE: dict[str, Any] = {
    "levels": "", "n": 0, "m": 0, "bias": False, "rank": 0, "act": "", "pairs": "",
    "residual": False, "asym": False,
}  # fmt: skip
EPS = {"fp16": 2.0**-11, "bf16": 2.0**-7, "fp32": 2.0**-24}


def problem_of(name: str) -> Any:
    from llmc.codegen.problem import Problem

    given = {"N": 40, "K": 132, **CASES[name]}
    return Problem(**given, eps=1e-5 if given.get("norm") else 0.0)


@pytest.fixture(scope="session")
def answers(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Any]:
    """What the child process found, by case."""
    found: dict[str, Any] = interpreted(__file__, tmp_path_factory.mktemp("kernel_cache"))
    return found


@pytest.mark.parametrize("name", CASES)
def test_many_tokens_meet_a_weight_that_was_decoded_once(
    name: str, answers: dict[str, Any]
) -> None:
    """The weight is exact but for its rounding, and the product within the roundings of its path;
    one token less takes the fused kernel."""
    answer = answers[name]
    assert answer["weight"] <= 1.0, "a decoded weight is not the stored one"
    assert answer["ratio"] <= 1.0
    assert answer["same_twice"]
    assert answer["spoiled"] > 1.0, "the bound does not see a code that is off"
    assert answer["kernels"][0] == answer["row"]
    assert ("norm_input" in answer["kernels"]) == answer["gained"]
    assert answer["fewer"] == [answer["row"]]


def test_a_lowered_program_tells_of_it_and_takes_it(answers: dict[str, Any]) -> None:
    """Eighteen tokens through gate, up and down; the plan names the tokens and the workspace."""
    answer = answers["lowered"]
    assert answer["told"] == [[12, 24576], [12, 12288]]
    assert answer["workspace"] == 24576
    assert answer["error"] < 2e-3


def test_where_it_pays() -> None:
    """Three quarters of a dense product against 231/M of one; narrow tiles decode again."""
    from llmc.codegen import large
    from llmc.codegen.kernels import row

    w4, sparse = problem_of("w4"), problem_of("w4 2:4")
    assert large.least(row("w4a16"), w4) == 693
    assert large.least(row("w4a16_24"), sparse) > 693
    assert not large.better(row("w4a16"), w4, 692)
    assert large.better(row("w4a16"), w4, 693)


@pytest.mark.parametrize(
    ("row", "changes"),
    [
        ("w4a16", {"sparse": True}),
        ("w8a8", {"bits": 8, "rounds": "int8 token"}),
        ("int8_split", {"bits": 8, "rounds": "int8 token", "outliers": 3}),
        ("fp8", {"bits": 8, "rounds": "e4m3 token", "weights": "table", "levels": "e4m3"}),
    ],
)
def test_rows_with_products_of_their_own_stay(row: str, changes: dict[str, Any]) -> None:
    """Eight bits multiply faster than sixteen, and entries beside codes are few."""
    from llmc.codegen import large
    from llmc.codegen.kernels import row as by_name

    problem = dataclasses.replace(problem_of("w4"), asym=False, **changes)
    assert not large.better(by_name(row), problem, 1 << 20)


def test_the_workspace_counts() -> None:
    """The dense weight in x's dtype, rows up to a multiple of 8."""
    from llmc.codegen import large

    assert large.workspace_bytes(problem_of("w4")) == 132 * 40 * 2
    assert large.workspace_bytes(problem_of("w4 fp32")) == 132 * 40 * 4
    assert large.workspace_bytes(problem_of("w4 gate")) == 132 * 48 * 2


@pytest.mark.parametrize(
    ("name", "target"), [("w4", "sm_80"), ("w4", "sm_90"), ("w4 2:4", "sm_90")]
)
def test_decoding_compiles_without_spills(name: str, target: str) -> None:
    from llmc.codegen import large
    from llmc.codegen.aot import compile_variant
    from llmc.codegen.kernels import choose

    problem = dataclasses.replace(problem_of(name), N=4096, K=4096)
    row, _ = choose(problem)
    assert row is not None
    config = large.decode_config(row, problem)
    facts = compile_variant(row, large.weight_problem(problem), config, target)
    assert facts.stack == facts.local_memory == 0, facts
    assert facts.matrix == (row.matrix_instruction(target, "fp16", config),), facts


# ** the child process **


def _answer(name: str) -> dict[str, Any]:
    import torch

    from llmc.codegen import large, meaning, start
    from llmc.codegen.kernels import choose
    from llmc.codegen.launch import fused_linear
    from llmc.codegen.prepack import prepack
    from llmc.codegen.problem import DTYPES
    from llmc.codegen.samples import random_parts
    from llmc.compiler.ir import packing

    problem = problem_of(name)
    row, why = choose(problem)
    assert row is not None, why
    parts, dtype = random_parts(problem), DTYPES[problem.x_dtype]
    M = large.least(row, problem)
    g = torch.Generator().manual_seed(M)
    x = torch.randn(M, problem.K, generator=g).to(dtype)
    sides = {"gain": parts["gain"]} if problem.norm and not problem.centred else {}
    if problem.residual:
        sides["residual"] = torch.randn(M, problem.outputs, generator=g).to(dtype)
    packed = prepack(row, problem, **parts)
    counted: list[str] = []
    real = start.function

    def counting(rendered: Any) -> Any:
        counted.append(rendered.row)
        return real(rendered)

    start.function = counting  # type: ignore[assignment]
    y = fused_linear(packed, x, **sides)
    kernels = list(counted)
    counted.clear()
    few = {k: v[:1] if k == "residual" else v for k, v in sides.items()}
    fused_linear(packed, x[:1], **few)
    start.function = real

    w, half = meaning.weight(problem, parts), EPS[problem.x_dtype]
    decoded = large.decode(start.launch_row, packed, problem).T.double()
    if problem.pairs:
        decoded = decoded.reshape(-1, 2, 8, problem.K).transpose(0, 1).reshape(2, -1, problem.K)
        decoded = decoded[:, : problem.outputs].reshape(problem.N, problem.K)
    off = ((decoded - w).abs() / (2 * half * w.abs() + 1e-9)).max()
    residual = sides["residual"].double() if problem.residual else None
    exact = meaning.linear(problem, parts, x.double(), residual)
    plain = dataclasses.replace(problem, N=problem.K, weights="dense", **BARE)
    read = meaning.linear(plain, {**parts, "values": torch.eye(problem.K)}, x.double()).abs()
    size = read @ w.abs().T
    if problem.rank:
        size += read @ parts["right"].double().abs().T @ parts["left"].double().abs().T
    if problem.pairs:
        gate, up = size.split(problem.outputs, -1)
        size = gate * up + gate + up
    bound = half * (2 * size + 4 * exact.abs() + 4) + problem.K * 2.0**-24 * size

    def ratio(found: Any) -> float:
        return float(((found.double() - exact).abs() / bound).max())

    if problem.weights == "signs":
        other = {"signs": torch.cat([~parts["signs"][:1], parts["signs"][1:]])}
    else:
        q = packing.unpack(parts["codes"], problem.bits, problem.columns).to(torch.int64)
        q[0] = q[0] ^ (1 << (problem.bits - 1))
        other = {"codes": packing.pack(q, problem.bits)}
    spoiled = prepack(row, problem, **{**parts, **other})
    return {
        "row": row.name, "kernels": kernels, "fewer": counted, "gained": problem.gained,
        "weight": float(off), "ratio": ratio(y),
        "same_twice": bool(torch.equal(y, fused_linear(packed, x, **sides))),
        "spoiled": ratio(fused_linear(spoiled, x, **sides)),
    }  # fmt: skip


def _lowered() -> dict[str, Any]:
    import torch
    from lowering_programs import hidden, mlp

    from llmc.codegen.targets import describe, lower
    from llmc.compiler.ir.interpret import run

    program, x = mlp(torch.float16), hidden(torch.float16)
    lowered = lower(program, "triton")
    told, x = describe(lowered), torch.cat([x, x, x])
    y = run(lowered.program, {"h": x}, implementations=lowered.implementations).float()
    exact = run(program, {"h": x}).float()
    return {
        "told": [[r["dense_from"], r["workspace_bytes"]] for r in told["fused"]],
        "workspace": told["workspace_bytes"], "error": float((y - exact).norm() / exact.norm()),
    }  # fmt: skip


def main() -> None:
    """Answer all cases as JSON on stdout."""
    import torch

    from llmc.codegen import large

    torch.set_num_threads(1)
    large.DECODE = 4.0  # decoding is the same for few tokens as for many
    answers = {name: _answer(name) for name in CASES}
    sys.path.insert(0, os.path.dirname(__file__))
    print(json.dumps({**answers, "lowered": _lowered()}))


if __name__ == "__main__":
    main()
