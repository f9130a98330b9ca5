"""Runners for targets: same answers within the dtype's error, the program untouched."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import fx

from llmc.compiler.ir import packing
from llmc.compiler.ir.errors import UsageError
from llmc.compiler.ir.graph import Program
from llmc.compiler.ir.verifier import verify
from llmc.compiler.runtime.cache import add_cache
from llmc.compiler.runtime.executor import Runner
from llmc.compiler.runtime.generate import generate
from llmc.compiler.runtime.lowering import recast, runner_for

Make = Callable[..., Program]
IDS = torch.tensor([[3, 1, 4, 1, 5, 9, 2, 6]])


def packed(b: Any, n: int, k: int) -> fx.Node:
    q = torch.randint(0, 16, (n, k), generator=b.generator)
    scale = (torch.rand(n, -(-k // 32), generator=b.generator) * 0.02).half()
    codes = b.tensor(packing.pack(q, 4), trained=False, keep=True)
    parts = (codes, b.tensor(scale, trained=False, keep=True))
    return b.emit("llmc.dequantize", *parts, bits=4, group=32, columns=k)


@pytest.fixture
def two_linears(make_builder: Any) -> Program:
    b = make_builder()
    ids = b.input("input_ids", torch.int64)
    x = b.emit("aten.embedding.default", b.param(16, 64), ids)
    x = b.emit("aten.linear.default", x, packed(b, 128, 64))
    x = b.emit("llmc.activation", x, act="silu")
    program: Program = b.done(b.emit("aten.linear.default", x, packed(b, 64, 128)))
    return program


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@pytest.mark.parametrize("cached", [False, True])
def test_recast_computes_the_same_in_fewer_bits(
    make_tiny: Make, dtype: torch.dtype, cached: bool
) -> None:
    program = make_tiny()
    source = add_cache(program) if cached else program
    small = recast(source, dtype)
    verify(small)
    assert program.dtype == torch.float32
    assert {t.dtype for s in small.states.values() for t in s.types} <= {dtype}
    runner = Runner(small)
    cache = runner.start(1) if cached else None
    got = runner.forward(IDS, cache=cache)
    assert got.dtype == dtype
    want = Runner(program).forward(IDS)
    assert (got.float() - want).norm() < 0.03 * want.norm()


def test_recast_of_the_demo_model(pylm_program: Program, pylm_runner: Runner) -> None:
    small = recast(pylm_program, torch.bfloat16)
    verify(small)
    # Far positions: their angles need 32 bits, which a cast of everything would lose.
    ids = torch.randint(0, 2048, (1, 700), generator=torch.Generator().manual_seed(0))
    got, want = Runner(small).forward(ids).float(), pylm_runner.forward(ids)
    assert (got - want).norm() < 0.03 * want.norm()
    assert Runner(small).memory_report().total < 0.51 * pylm_runner.memory_report().total


def test_recast_reaches_decoded_weights(two_linears: Program) -> None:
    small = recast(two_linears, torch.bfloat16)
    verify(small)
    assert all(n.kwargs["dtype"] == torch.bfloat16 for n in small.calls("llmc.dequantize"))
    got, want = Runner(small).forward(IDS), Runner(two_linears).forward(IDS)
    assert got.dtype == torch.bfloat16
    assert (got.float() - want).norm() < 0.03 * want.norm()


def test_recast_refuses_other_dtypes(make_tiny: Make) -> None:
    with pytest.raises(UsageError, match="compute dtype"):
        recast(make_tiny(), torch.int8)


def test_cpu_target_runs_its_kernels(two_linears: Program) -> None:
    before = str(two_linears.graph)
    fast = runner_for(two_linears, "cpu")
    assert len(list(fast.program.calls("llmc.fused"))) == 2
    want = Runner(two_linears).forward(IDS)
    assert (fast.forward(IDS) - want).norm() < 0.03 * want.norm()
    assert str(two_linears.graph) == before


def test_targets_agree_on_text(make_tiny: Make) -> None:
    program = make_tiny()
    prompts = [[3, 1, 4], [1, 5]]
    want = generate(runner_for(program), prompts, max_new_tokens=8)
    for target in ("reference", "cpu"):
        runner = runner_for(program, target, cached=True)
        assert runner.cached
        assert generate(runner, prompts, max_new_tokens=8) == want


def test_unknown_target(make_tiny: Make) -> None:
    with pytest.raises(UsageError, match="'tpu'"):
        runner_for(make_tiny(), "tpu")
