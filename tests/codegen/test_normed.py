"""The norm of a linear's result, made by the linear's own kernel before the sum behind it."""

from __future__ import annotations

import json
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from interpreter import interpreted

sys.path.insert(0, str(Path(__file__).parent))  # as a script too

from lowering_programs import Maker, Weight, hidden
from numerics import Case, answered, inputs_of, judge, parts_of
from sides_cases import case

from llmc.codegen import normed, workspace
from llmc.codegen.aot import compile_variant
from llmc.codegen.counters import counters
from llmc.codegen.kernels import ROWS, choose
from llmc.codegen.problem import Problem
from llmc.codegen.render import arguments, render
from llmc.codegen.row import KernelRow, TileConfig
from llmc.codegen.rows.int4 import W4A16
from llmc.codegen.rows.rounded import NORM_INPUT
from llmc.codegen.tuning.grid import key_of
from llmc.codegen.variants import typical
from llmc.compiler.ir.errors import UsageError
from llmc.compiler.ir.graph import Program

NORMED: dict[str, Any] = {"out_norm": True, "out_eps": 1e-6}
W8A8: dict[str, Any] = {"bits": 8, "rounds": "int8 token"}
CASES = [
    # One tile and several, rows that are no multiple of one, blocks of tokens in flight.
    case(1, 70, 160, **NORMED, residual=True, tile=(8, 32, 4, 2), spoil="out_gain"),
    case(3, 33, 160, **NORMED, residual=True, bias=True, stride="padded", spoil="bias"),
    case(17, 70, 96, **NORMED, residual=True, tile=(8, 32, 4, 2), spoil="codes"),
    case(17, 70, 96, **NORMED, residual=True, x_dtype="bf16", tile=(16, 64, 4, 4)),
    case(5, 1, 64, **NORMED, residual=True),
    case(3, 96, 96, **NORMED, x_dtype="fp32", stride="halves", spoil="out_gain"),
    # Programs that share the columns, and each side beside.
    case(3, 70, 300, **NORMED, residual=True, tile=(8, 32, 4, 2, 2), spoil="codes"),
    case(9, 70, 300, **NORMED, norm=True, residual=True, tile=(8, 32, 4, 2, 2), spoil="gain"),
    case(3, 70, 160, **NORMED, rank=16, residual=True, tile=(8, 32, 4, 2), spoil="left"),
    case(9, 70, 300, **NORMED, rank=20, smooth=True, tile=(8, 32, 4, 2, 2), spoil="right"),
    case(3, 70, 160, **NORMED, sparse=True, residual=True, spoil="csr_values"),
    case(3, 70, 160, **NORMED, act="gelu", norm=True, residual=True, spoil="codes"),
    case(3, 36, 160, **NORMED, act="sigmoid", residual=True, asym=True, spoil="zero"),
    case(5, 130, 96, **NORMED, pairs="gate", act="silu", residual=True, tile=(8, 32, 4, 2)),
    case(3, 36, 160, "w4a16_24", **NORMED, residual=True, spoil="meta"),
    # Inputs on a grid: rounded by each program, or by a launch of its own before.
    case(3, 70, 200, "w8a8", **W8A8, **NORMED, norm=True, residual=True, spoil="out_gain"),
    case(17, 70, 200, "w8a8", **W8A8, **NORMED, bias=True, tile=(32, 64, 3, 4), spoil="codes"),
    case(3, 70, 200, "int8_split", **W8A8, **NORMED, outliers=8, residual=True, spoil="columns"),
    # More tokens than one program takes: the norm and the sum are calls of torch.
    case(17, 33, 96, **NORMED, residual=True, bias=True, stride="batched", spoil="out_gain"),
    case(33, 33, 96, **NORMED, spoil="codes"),
    case(17, 33, 96, **NORMED, residual=True, norm=True, rank=16),
    case(17, 33, 130, "w8a8", **W8A8, **NORMED, residual=True),
]
# Whoever comes last: shared columns, a product of low rank and blocks of tokens all at once.
ORDERED = case(17, 70, 300, **NORMED, rank=16, residual=True, tile=(8, 32, 4, 2, 2))
each_row = pytest.mark.parametrize("row", ROWS, ids=lambda r: r.name)


@pytest.fixture(scope="module")
def found(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Any]:
    """What one child process found (this file as a script)."""
    answers: dict[str, Any] = interpreted(__file__, tmp_path_factory.mktemp("kernels"))
    return answers


@pytest.mark.parametrize("case", CASES, ids=lambda c: c.label)
def test_the_kernel_makes_the_norm_that_the_problem_means(
    case: Case, found: dict[str, Any]
) -> None:
    """Within the bound, the same bits twice, and beyond the bound when a part is changed."""
    assert not judge(case, found[case.label])


def test_the_same_bits_whoever_comes_last(found: dict[str, Any]) -> None:
    """Programs run in their order and in the reverse of it, each twice on one weight's counters."""
    assert found["orders"] == {"same": True, "counters": 0}


def test_a_lowered_block_takes_norm_and_sum(found: dict[str, Any]) -> None:
    """Six tokens by the kernel, and more than one program takes by calls behind it."""
    for tokens in ("6", "24"):
        told = found["lowered"][tokens]
        assert told["placed"] == [["w4a16", False, False], ["w4a16", True, True]]
        assert told["error"] < 2e-3, tokens


@each_row
def test_every_row_serves_it_and_without_it_is_as_it_was(row: KernelRow) -> None:
    """Its tensors are arguments of no other variant; the gain alone counts as bytes of memory."""
    plain = typical(row)
    assert plain is not None
    with_norm = typical_with(row, **NORMED)
    assert row.misfits(with_norm) == []
    more = {a.name for a in arguments(row, with_norm)} - {a.name for a in arguments(row, plain)}
    assert more == {"out_gain", "whole", "arrived"}
    source = render(row, with_norm).source
    assert "OUT_EPS" in source
    assert "arrived_ptr" not in render(row, plain).source
    moved = row.bytes_moved(with_norm, 1) - row.bytes_moved(plain, 1)
    assert moved == 4 * plain.outputs
    assert key_of(row, with_norm) == key_of(row, plain)


def typical_with(row: KernelRow, **more: Any) -> Problem:
    """The problem that a row is made for, and more."""
    plain = typical(row)
    assert plain is not None
    return Problem(**{**plain.__dict__, **more})


def test_what_programs_leave_each_other_is_in_the_cache() -> None:
    """Whole rows and a sum of squares per program, in lines of their own, written and read once."""
    config, problem = TileConfig(8, 128, split=4), Problem(4096, 4096, **NORMED)
    assert workspace.whole_sizes(problem, config, 1) == (32 * (8 * 128 + 32), 1)
    assert workspace.whole_sizes(problem, config, 17) == (3 * 32 * (8 * 128 + 32), 3)
    without = workspace.moved(normed.without(problem), config, 1)
    assert workspace.moved(problem, config, 1) - without == 8 * (4096 + 32)


def test_kernels_that_make_inputs_alone_refuse_it() -> None:
    """A norm of x has no result to norm; a row of one's own that does not name it has none."""
    (why,) = NORM_INPUT.misfits(Problem(64, 128, norm=True, scale_dtype="fp16", **NORMED))
    assert (why.field, str(why)) == ("out_norm", "norm_input: out_norm=True, expected False")
    with pytest.raises(UsageError, match="out_norm=True"):
        render(NORM_INPUT, Problem(64, 128, **NORMED))


@pytest.mark.parametrize("target", ["sm_80", "sm_90"])
@pytest.mark.parametrize("BM", [8, 16])
def test_it_compiles_without_spills(BM: int, target: str) -> None:
    """With a split, a norm before and every side; the main loop is that of the plain kernel, but
    for how the compiler arranges it."""
    fields: dict[str, Any] = {"norm": True, "bias": True, "residual": True, "eps": 1e-6}
    problem = Problem(4096, 4096, **fields, **NORMED)
    assert choose(problem, target) == (W4A16, [])
    config = TileConfig(BM, 64, split=2)
    facts = compile_variant(W4A16, problem, config, target)
    assert (facts.stack, facts.local_memory) == (0, 0)
    plain = compile_variant(W4A16, normed.without(problem), config, target)
    assert facts.slots == pytest.approx(plain.slots, abs=0.2)
    assert facts.registers <= plain.registers + 32


# ** the child process **


def _orders() -> dict[str, Any]:
    """One weight launched twice in the usual order of programs, then twice in the reverse."""
    from triton.runtime import interpreter

    from llmc.codegen.launch import fused_linear
    from llmc.codegen.prepack import prepack

    x, residual = inputs_of(ORDERED)
    assert residual is not None
    assert ORDERED.tile is not None
    packed = prepack(W4A16, ORDERED.problem, **parts_of(ORDERED))
    builder, config = interpreter.interpreter_builder, TileConfig(*ORDERED.tile)
    usual = builder.set_grid_idx

    def reverse(x: int, y: int, z: int) -> None:
        usual(*(n - 1 - i for i, n in zip((x, y, z), builder.grid_dim, strict=True)))

    results = []
    for order in (usual, usual, reverse, reverse):
        builder.set_grid_idx = order
        results.append(fused_linear(packed, x, config=config, residual=residual))
    builder.set_grid_idx = usual
    sets = [counters(name, 1, x.device) for name in ("counts", "arrived")]
    left = sum(int(t.abs().sum()) for t in sets)
    return {"same": all(torch.equal(r, results[0]) for r in results), "counters": left}


def _block(dtype: torch.dtype) -> Program:
    """h + norm(down(relu(up(h)))), with a gain of the 1 + g form."""
    m = Maker(dtype)
    h = m.input("h", 64)
    up = m.call("llmc.activation", m.linear(h, "up", Weight(96, 64)), act="relu")
    down = m.linear(up, "down", Weight(64, 96), bias=True)
    norm = m.call("llmc.rms_norm", down, m.param("gain", (64,)), eps=1e-6, offset=1.0)
    return m.output(m.call("aten.add.Tensor", h, norm))


def _lowered() -> dict[str, Any]:
    """The block in fp16 against its reference in fp32."""
    from llmc.codegen.targets import lower
    from llmc.compiler.ir.interpret import run

    made, answers = lower(_block(torch.float16), "triton"), {}
    for tokens in (6, 24):
        x = hidden(torch.float16).repeat(1, tokens // 6, 1)
        want = run(_block(torch.float32), {"h": x.float()})
        got = run(made.program, {"h": x}, implementations=made.implementations)
        assert got.dtype == torch.float16
        answers[str(tokens)] = {
            "error": float((got.float() - want).norm() / want.norm()),
            "placed": [[p.kernel, p.fused.problem.out_norm, p.fused.problem.residual]
                       for p in made.placed],
        }  # fmt: skip
    return answers


if __name__ == "__main__":
    torch.set_num_threads(1)
    told: dict[str, Any] = {c.label: answered(c) for c in CASES}
    print(json.dumps({**told, "orders": _orders(), "lowered": _lowered()}))
