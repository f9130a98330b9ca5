"""Lowering: each target's kernels against the reference, what is refused, and what is resident."""

from __future__ import annotations

import json
from typing import Any

import pytest
import torch
from lowering_programs import Maker, Weight, hidden, mlp

from llmc.codegen.fuse import fuse
from llmc.codegen.sparse import csr_linear
from llmc.codegen.targets import Lowered, describe, lower
from llmc.compiler.ir.errors import ResourceError, UsageError
from llmc.compiler.ir.graph import Program
from llmc.compiler.ir.interpret import run


def output(lowered: Lowered, x: torch.Tensor) -> torch.Tensor:
    """The lowered program's value."""
    return run(lowered.program, {"h": x}, implementations=lowered.implementations)


def one(weight: Weight, dtype: torch.dtype = torch.bfloat16, bias: bool = True) -> Program:
    """A single linear."""
    m = Maker(dtype)
    return m.output(m.linear(m.input("h", weight.K), "w", weight, bias))


def test_reference_is_the_program_itself() -> None:
    """Nothing is rewritten or packed."""
    program = mlp()
    lowered = lower(program, "reference")
    assert lowered.program is program
    assert not lowered.implementations
    assert describe(lowered)["fused"] == []


@pytest.mark.parametrize(
    ("weight", "kernel"),
    [
        (Weight(48, 64, group=32), "aten::_weight_int4pack_mm_for_cpu"),
        (Weight(48, 64, group=0), "aten::_weight_int4pack_mm_for_cpu"),
        (Weight(48, 128, group=64, asym=True), "aten::_weight_int4pack_mm_for_cpu"),
        (Weight(48, 128, group=32, sparse=True), "aten::_weight_int4pack_mm_for_cpu"),
        (Weight(48, 128, group=64, sparse=True, asym=True), "aten::_weight_int4pack_mm_for_cpu"),
        (Weight(49, 48, bits=8, group=0), "aten::_weight_int8pack_mm"),
        # Padded: rows to whole blocks, columns to whole groups of the kernel.
        (Weight(50, 60, group=0), "aten::_weight_int4pack_mm_for_cpu"),
        (Weight(48, 80, group=32), "aten::_weight_int4pack_mm_for_cpu"),
        (Weight(48, 40, bits=8, group=0, asym=True), "aten::_weight_int8pack_mm"),
        # Fewer bits are a part of the kernel's range, more are two planes.
        (Weight(48, 64, bits=3), "aten::_weight_int4pack_mm_for_cpu"),
        (Weight(48, 96, bits=8, group=32), "aten::_weight_int4pack_mm_for_cpu x2"),
    ],
)
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32])
def test_cpu_kernels_realise_the_scheme(weight: Weight, kernel: str, dtype: torch.dtype) -> None:
    """Within bf16 rounding of x, scale and offset, scaled by the sum of |x||w| plus |x||scale|."""
    program, x = one(weight, dtype), hidden(dtype, weight.K)
    lowered = lower(program, "cpu")
    assert [p.kernel for p in lowered.placed] == [kernel]
    exact = run(program, {"h": x}).double()
    w = next(program.calls("aten.linear.default")).args[1]
    values: dict[str, Any] = {}
    run(program, {"h": x}, observe=lambda node, value: values.update({node.name: value}))
    magnitude = x.double().abs() @ values[w.name].double().abs().T  # type: ignore[union-attr]
    # (8 - zero) * scale is rounded by itself: up to eight scales, whatever the weight.
    scale = float(program.weights.load("w.scale").float().max())
    magnitude = magnitude + 8 * scale * x.double().abs().sum(-1, keepdim=True) * weight.asym
    bound = 3 * 2.0**-8 * magnitude + 2.0**-8 * exact.abs() + 1e-6
    got = output(lowered, x)
    assert got.dtype == dtype
    error = (got.double() - exact).abs()
    assert bool((error <= bound).all()), f"{float((error / bound).max()):.2f} of the bound"
    assert float(exact.abs().max()) > 4 * float(bound.median()), "the bound would pass anything"


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32])
def test_cpu_runs_the_mask_on_its_kernel_and_the_rest_on_sparse_rows(dtype: torch.dtype) -> None:
    """One node: what the sparse entries add is there, and is large enough to be missed."""
    weight = Weight(48, 128, sparse=True, side=0.1)
    program, x = one(weight, dtype), hidden(dtype, weight.K)
    lowered = lower(program, "cpu")
    (placed,) = lowered.placed
    assert placed.kernel == "aten::_weight_int4pack_mm_for_cpu"
    assert placed.fused.problem.sparse
    exact = run(program, {"h": x}).double()
    got = output(lowered, x).double()
    assert float((got - exact).norm() / exact.norm()) < 0.01
    without = one(Weight(48, 128, sparse=True), dtype)
    for name in ("w.codes", "w.scale", "w.meta", "w.bias"):
        without.set_tensor(name, program.weights.load(name))
    part = (run(without, {"h": x}).double() - exact).norm() / exact.norm()
    assert float(part) > 0.05, "the sparse part is too small to tell whether it was added"


def test_sparse_entries_that_no_kernel_takes_run_on_torchs_sparse_rows() -> None:
    """A target that does not take them leaves them to a call of their own."""
    program, x = one(Weight(48, 128, sparse=True, side=0.1)), hidden(torch.bfloat16, 128)
    want = run(program, {"h": x}).double()
    plan = fuse(program, lambda p: "no sparse rows" if p.sparse else None)
    assert [f.problem.sparse for f in plan.fused] == [False]
    (side,) = program.calls("llmc.csr_linear")
    got = run(program, {"h": x}, implementations={side.name: csr_linear}).double()
    assert float((got - want).norm() / want.norm()) < 0.01


def test_sparse_rows_take_no_tokens_and_no_entries() -> None:
    x = torch.zeros(2, 0, 128, dtype=torch.bfloat16)
    lowered = lower(one(Weight(48, 128, sparse=True, side=0.1)), "cpu")
    assert output(lowered, x).shape == (2, 0, 48)
    y, x = torch.ones(2, 3), torch.ones(2, 4)
    none, starts = torch.zeros(0), torch.zeros(4, dtype=torch.int32)
    assert torch.equal(csr_linear(y, x, none, none.to(torch.int16), starts), y)


def test_what_no_cpu_kernel_serves_keeps_its_reference() -> None:
    """The chain stays, the reason is recorded, the value is the reference's to the bit."""
    m = Maker(torch.bfloat16)
    h = m.input("h", 64)
    codes = m.param("codes", torch.zeros(48, 4, dtype=torch.int32), keep=True)
    scale = m.param("scale", torch.ones(48, 1, dtype=torch.float16), keep=True)
    meta = m.param("meta", torch.full((48, 2), 0x44444444, dtype=torch.int32), keep=True)
    how = {"bits": 4, "levels": "nf", "group": 32, "columns": 32, "dtype": torch.bfloat16}
    kept = m.call("llmc.lookup", codes, scale, **how)
    w = m.call("llmc.expand_nm", kept, meta, n=2, m=4, columns=64)
    program, x = m.output(m.call("aten.linear.default", h, w)), hidden(torch.bfloat16)
    lowered = lower(program, "cpu")
    assert not lowered.placed
    assert "weights=table, expected int codes" in lowered.refused[0].reason
    assert torch.equal(output(lowered, x), run(program, {"h": x}))


def test_cpu_lowering_counts_packed_bytes_and_leaves_the_source_alone() -> None:
    """Four bits and two bf16 numbers per group; a 2:4 mask saves nothing on this target."""
    for sparse in (False, True):
        program = one(Weight(64, 128, group=32, sparse=sparse), bias=False)
        names, stored = dict(program.params), program.weight_bytes()
        codes = program.weights.load("w.codes").clone()
        lowered = lower(program, "cpu")
        resident = 64 * 128 // 2 + 64 * 4 * 4
        assert lowered.resident_bytes == {lowered.placed[0].fused.node: resident}
        assert lowered.program.weight_bytes() == resident
        assert lowered.placed[0].stored == stored
        assert ("spread to dense codes" in lowered.placed[0].note) is sparse
        assert program.params == names
        assert torch.equal(program.weights.load("w.codes"), codes)


def test_description_is_json_with_bytes_and_floor() -> None:
    """One row per fused node, one per node that is not, floors from bytes over bandwidth."""
    m = Maker(torch.bfloat16)
    h = m.input("h", 64)
    y = m.linear(h, "w", Weight(64, 64))
    program = m.output(m.call("aten.linear.default", y, m.param("head", (16, 64))))
    page = describe(lower(program, "cpu"), bandwidth=1e6)
    assert json.loads(json.dumps(page)) == page
    (row,) = page["fused"]
    assert row["floor_us"] == row["bytes"] == 64 * 32 + 64 * 2 * 4 + 2 * 128
    assert row["parts"] == ["llmc.dequantize", "aten.linear.default"]
    assert [r["reason"] for r in page["not_fused"]] == [
        "its weight is stored dense, not decoded from codes"
    ]


def test_an_empty_batch_goes_through() -> None:
    """No tokens, no crash."""
    x = torch.zeros(2, 0, 64, dtype=torch.bfloat16)
    assert output(lower(one(Weight(48, 64)), "cpu"), x).shape == (2, 0, 48)


def test_unknown_targets_and_machines_that_cannot_are_refused() -> None:
    """A near name is suggested; triton says what is missing."""
    with pytest.raises(UsageError, match=r"found 'tritn'; did you mean 'triton'"):
        lower(mlp(), "tritn")
    if torch.cuda.is_available():
        with pytest.raises(UsageError, match="expected a CUDA device"):
            lower(mlp(), "triton")
    else:
        with pytest.raises(ResourceError, match="no CUDA device"):
            lower(mlp(), "triton")
