"""Int8 inputs times int8 weights on CPUs: exact integers, beside the reference."""

from __future__ import annotations

import io
from typing import Any

import pytest
import torch
from lowering_programs import Maker, Weight

from llmc.codegen.cpu import CpuKernel, choose
from llmc.codegen.cpu.products import INT_MM, ONEDNN, PRODUCTS, QLINEAR, exact_onednn, misfit
from llmc.codegen.modules import as_module
from llmc.codegen.problem import Problem
from llmc.codegen.targets import lower
from llmc.compiler.ir import packing
from llmc.compiler.ir.graph import Program
from llmc.compiler.ir.interpret import run

EIGHT = {"kind": "int", "bits": 8}
INT8X8 = QLINEAR if exact_onednn() else INT_MM


def rounded(
    weight: Weight, dtype: torch.dtype = torch.float32, columns: bool = False, **given: Any
) -> Program:
    """linear(round_input(x), W, b)."""
    m = Maker(dtype)
    x = m.input("h", weight.K)
    parts: list[Any] = [None, None]
    if given["per"] == "static":
        parts[0] = m.param("w.in_scale", torch.tensor([0.02]), keep=True)
    if columns:
        parts[1] = m.param("w.columns", torch.tensor([1, 5], dtype=torch.int32), keep=True)
    x = m.call("llmc.round_input", x, *parts, **(EIGHT | given))
    return m.output(m.linear(x, "w", weight, True))


def hidden(columns: int, dtype: torch.dtype = torch.float32) -> torch.Tensor:
    g = torch.Generator().manual_seed(3)
    x = torch.randn(2, 7, columns, generator=g)
    x[0, 1] = 0.0
    x[1, 2, 3] = 40.0
    return x.to(dtype)


FORMS: list[dict[str, Any]] = [
    {"per": "token"}, {"per": "tensor"}, {"per": "static"}, {"per": "token", "columns": True},
    {"per": "token", "limit": 6.0, "columns": True}, {"per": "static", "limit": 6.0},
]  # fmt: skip


@pytest.mark.parametrize("form", FORMS, ids=str)
@pytest.mark.parametrize(
    "weight", [Weight(17, 40, bits=8, group=0), Weight(8, 37, 4, group=0, asym=True)]
)
def test_products_are_those_of_the_reference(weight: Weight, form: dict[str, Any]) -> None:
    program, x = rounded(weight, **form), hidden(weight.K)
    lowered = lower(program, "cpu")
    assert [p.kernel for p in lowered.placed] == [INT8X8]
    assert lowered.placed[0].note == "sums of products are integers"
    exact = run(program, {"h": x})
    found = run(lowered.program, {"h": x}, implementations=lowered.implementations)
    assert (found - exact).abs().max() <= 3e-6 * exact.abs().max()


@pytest.mark.parametrize("kernel", [ONEDNN, PRODUCTS], ids=lambda k: k.name)
@pytest.mark.parametrize("columns", [4096, 37])
@pytest.mark.parametrize("own", [False, True])
def test_sums_are_exact_where_floats_are_not(kernel: CpuKernel, columns: int, own: bool) -> None:
    """4096 products of 127² pass 2**24; every step of an int32 sum is exact."""
    if kernel is ONEDNN and not exact_onednn():
        assert kernel.misfit(Problem(4, 32, bits=8, group=0, rounds="int8 token")) is not None
        return
    g = torch.Generator().manual_seed(0)
    q = torch.randint(100, 128, (3, columns), generator=g)
    q[:, 0] = 127
    w = torch.randint(228, 256, (5, columns), generator=g)
    grid = {"rounds" if own else "rounded": "int8 token"}
    problem = Problem(N=5, K=columns, bits=8, group=0, x_dtype="fp32", **grid)
    scale = torch.full((5, 1), 1 / 128)
    packed = kernel.pack(problem, {"codes": packing.pack(w, 8), "scale": scale})
    (way,) = kernel.ways.values()
    y = way(problem, q.float() / 128, packed)
    exact = (q @ (w - 128).T).double() / 128**2
    assert ((y.double() - exact).abs() <= exact * 2.0**-21).all()


@pytest.mark.parametrize(
    ("fields", "why"),
    [
        ({"group": 32}, "group=32, expected one scale per row"),
        ({"rounds": "int8 token group=8"}, "with one scale"),
        ({"rounds": "e4m3 token"}, "with one scale"),
        ({"rounds": ""}, "inputs on grid none"),
        ({"rounds": "", "rounded": "int4 token"}, "with one scale"),
        ({"rounds": "", "rounded": "int8 token", "x_dtype": "bf16"}, "that holds 8-bit codes"),
        ({"weights": "table", "levels": "nf"}, "weights=table, expected int codes"),
        ({"K": 1 << 18}, "K=262144, expected at most 131072"),
    ],
)
def test_what_is_no_integer_product_runs_otherwise(fields: dict[str, Any], why: str) -> None:
    given = {"N": 16, "K": 64, "bits": 8, "group": 0, "x_dtype": "fp32", "rounds": "int8 token"}
    problem = Problem(**given | fields)
    kernel, _ = choose(problem)
    assert kernel is None or kernel.name not in (QLINEAR, INT_MM)
    assert why in str(misfit(problem))


@pytest.mark.parametrize("weight", [Weight(33, 80, 8, 0), Weight(128, 256, 8, 0, asym=True)])
def test_an_exported_product_can_be_saved_and_gives_the_same(weight: Weight) -> None:
    """oneDNN's own layout cannot be written; the integers can, and their sums are the same."""
    lowered = lower(rounded(weight, per="token"), "cpu")
    module, x = as_module(lowered), hidden(weight.K)
    exported = torch.export.export(module, (x,))
    file = io.BytesIO()
    torch.export.save(exported, file)
    file.seek(0)
    y = torch.export.load(file).module()(x)
    want = run(lowered.program, {"h": x}, implementations=lowered.implementations)
    torch.testing.assert_close(y, want, rtol=1e-6, atol=1e-6)


def test_sixteen_bit_floats_are_rounded_by_the_kernel_itself() -> None:
    """Codes times a scale do not fit into bf16: the kernel keeps them as codes."""
    weight = Weight(16, 64, bits=8, group=0)
    for dtype in (torch.bfloat16, torch.float16):
        program, x = rounded(weight, dtype, per="token"), hidden(64, dtype)
        lowered = lower(program, "cpu")
        assert [p.kernel for p in lowered.placed] == [INT8X8]
        found = run(lowered.program, {"h": x}, implementations=lowered.implementations)
        wide = run(rounded(weight, per="token"), {"h": x.float()})
        assert (found.float() - wide).norm() <= torch.finfo(dtype).eps * wide.norm()
