"""CPU kernels, every way of them, against what the problem means."""

from __future__ import annotations

from typing import Any

import pytest
import torch

from llmc.codegen import cpu
from llmc.codegen.cpu.nibbles import block_rows
from llmc.codegen.meaning import linear, weight
from llmc.codegen.problem import DTYPES, Problem
from llmc.compiler.ir import packing

Parts = dict[str, torch.Tensor]


def parts_of(p: Problem, seed: int = 0) -> Parts:
    """Random canonical parts."""
    g = torch.Generator().manual_seed(seed)

    def randn(*shape: int) -> torch.Tensor:
        return torch.randn(*shape, generator=g)

    parts: Parts = {}
    if p.weights in ("int", "table"):
        q = torch.randint(0, 1 << p.bits, (p.N, p.columns), generator=g)
        parts["codes"] = packing.pack(q, p.bits)
    if p.scale_dtype:
        scale = (torch.rand(p.N, p.groups, generator=g) + 0.5) * 2.0**-p.bits
        parts["scale"] = scale.to(DTYPES[p.scale_dtype])
    if p.asym:
        zero = torch.randint(0, 1 << p.bits, (p.N, p.groups), generator=g)
        parts["zero"] = zero.to(torch.uint8)
    if p.m:
        kept = torch.rand(p.N, p.K // p.m, p.m, generator=g).argsort(-1) < p.n
        values = randn(p.N, p.K)
        values, parts["meta"] = packing.compress_nm(values, kept.flatten(-2), p.n, p.m)
        if p.weights == "dense":
            parts["values"] = values
    elif p.weights == "dense" and p.bitmap:
        mask = torch.rand(p.N, p.K, generator=g) < 0.3
        parts["bitmap"] = packing.pack(mask.int(), 1)
        parts["values"] = randn(int(mask.sum()))
    elif p.weights == "dense":
        parts["values"] = randn(p.N, p.K)
    if p.table:
        parts["table"] = randn(p.N if p.table == "row" else 1, 1 << p.bits)
    if p.rank:
        parts["left"], parts["right"] = randn(p.N, p.rank) / 4, randn(p.rank, p.K) / 4
    if p.sparse:
        where = torch.rand(p.N, p.K, generator=g) < 0.05
        parts["csr_starts"] = torch.cat([torch.zeros(1), where.sum(1).cumsum(0)]).int()
        parts["csr_index"] = where.nonzero()[:, 1].to(torch.int16)
        parts["csr_values"] = randn(int(where.sum())) / 4
    if p.outliers:
        parts["columns"] = torch.randperm(p.K, generator=g)[: p.outliers].sort().values
        parts["column_weights"] = randn(p.N, p.outliers)
    for name, there in (("gain", p.norm), ("smooth", p.smooth)):
        if there:
            parts[name] = torch.rand(p.K, generator=g) + 0.5
    if "static" in p.rounds:
        parts["in_scale"] = torch.tensor([0.03])
    if p.bias:
        parts["bias"] = randn(p.N)
    return parts


def check(p: Problem, tokens: int = 3, seed: int = 0) -> cpu.CpuKernel:
    """Every way of the chosen kernel within bf16's (or x's) rounding of sums of magnitudes."""
    kernel, why = cpu.choose(p)
    assert kernel is not None, why
    parts, g = parts_of(p, seed), torch.Generator().manual_seed(seed + 1)
    x = torch.randn(tokens, p.K, generator=g).to(DTYPES[p.x_dtype])
    residual = torch.randn(tokens, p.outputs, generator=g).to(x.dtype) if p.residual else None
    wide = None if residual is None else residual.double()
    exact = linear(p, parts, x.double(), wide)
    packed = cpu.pack(kernel, p, parts)
    coarse = "bf16" in kernel.note or p.x_dtype == "bf16"
    eps = 2.0**-8 if coarse else 2.0**-10 if p.x_dtype == "fp16" else 2.0**-20
    spread = 1.0
    if p.weights != "factors" and not (p.norm or p.smooth or p.outliers or p.pairs):
        size = x.double().abs()
        spread = size @ weight(p, parts).abs().T
        if p.weights == "int" and (p.asym or p.bits < 4):
            # Offsets are rounded by themselves: as large as the range, whatever the weight.
            top = parts["scale"].double().amax() * 2**p.bits
            spread = spread + top * size.sum(-1, keepdim=True)
        spread = spread / exact.abs().max()
    bound = (3 * eps * (spread + 1) + 1e-6) * exact.abs().max()
    for way in kernel.ways:
        choice = cpu.Choice(((1, way),), "test")
        y = cpu.call(kernel, p, packed, x, residual, choice)
        assert y.dtype == x.dtype
        assert y.shape == exact.shape
        error = (y.double() - exact).abs()
        assert bool((error <= bound).all()), f"{way}: {float((error / bound).max()):.2f} of bound"
        # The sharper law on average: independent roundings of a long sum nearly cancel.
        share = float(error.norm() / exact.norm())
        assert share <= 4 * eps, f"{way}: {share / eps:.2f} eps"
    return kernel


INTS = [
    Problem(N, K, bits=bits, group=group, asym=asym, x_dtype=dtype)
    for i, (bits, group) in enumerate(
        [(4, 32), (4, 128), (4, 96), (4, 0), (3, 64), (2, 0), (1, 32), (8, 0), (8, 64), (6, 32),
         (5, 0), (4, 24), (8, 16), (3, 20)]
    )
    for asym in (False, True)
    for N, K, dtype in [(48, 256, "bf16"), (33, 200 - 8 * (i % 3), "fp32")]
]  # fmt: skip


@pytest.mark.parametrize("p", INTS, ids=lambda p: f"{p.bits}g{p.group}z{p.asym:d}-{p.x_dtype}")
def test_integers_in_every_way(p: Problem) -> None:
    kernel = check(p)
    assert (len(kernel.ways) == 2) is (p.dense_group % 32 == 0)


@pytest.mark.parametrize("shape", [(16, 2048), (200, 64), (130, 4096)])
@pytest.mark.parametrize("tokens", [1, 40])
def test_many_blocks_and_long_rows(shape: tuple[int, int], tokens: int) -> None:
    check(Problem(*shape, bits=4, group=128 if shape[1] > 64 else 64, x_dtype="bf16"), tokens)


def test_chunks_of_blocks_join(monkeypatch: pytest.MonkeyPatch) -> None:
    """Rows that take several chunks, the last one shorter."""
    from llmc.codegen.cpu import bytes8, decoded, nibbles

    for module in (bytes8, decoded, nibbles):
        monkeypatch.setattr(module, "_AT_ONCE", 128 * 128)
    for bits, group in ((4, 64), (8, 64), (8, 0), (4, 16)):
        check(Problem(330, 128, bits=bits, group=group, asym=True, x_dtype="bf16"), 5)


SPARSE = [
    Problem(48, 128, bits=4, group=32, n=2, m=4, asym=True, x_dtype="bf16"),
    Problem(48, 128, bits=8, group=0, n=2, m=4, x_dtype="fp32"),
    Problem(32, 64, bits=8, group=0, n=2, m=4, x_dtype="fp32", rounds="int8 token"),
    Problem(32, 64, weights="dense", n=2, m=4, bits=16, scale_dtype="", x_dtype="bf16"),
    Problem(32, 72, weights="dense", bitmap=True, bits=16, scale_dtype="", x_dtype="fp32"),
]


@pytest.mark.parametrize("p", SPARSE, ids=str)
def test_masks_save_nothing_here(p: Problem) -> None:
    check(p)


TABLES = [
    Problem(40, 128, bits=4, group=64, weights="table", levels="nf", x_dtype="bf16"),
    Problem(40, 100, bits=4, group=64, weights="table", levels="nf", x_dtype="fp32"),
    Problem(40, 96, bits=3, group=0, weights="table", table="row", scale_dtype="", x_dtype="bf16"),
    Problem(40, 96, bits=4, group=32, weights="table", table="matrix", x_dtype="fp16"),
    Problem(40, 96, bits=8, group=0, weights="table", table="matrix", scale_dtype="",
            x_dtype="fp32"),
]  # fmt: skip


@pytest.mark.parametrize("p", TABLES, ids=str)
def test_tables(p: Problem) -> None:
    assert check(p).name == "decode + aten::mm"


ONEDNN = "onednn::qlinear_pointwise"
INT8 = [
    Problem(40, K, bits=bits, group=0, asym=asym, x_dtype=dtype, rounds=rounds)
    for K, bits, asym, dtype, rounds in [
        (64, 8, False, "bf16", "int8 token"),
        (60, 8, True, "fp32", "int8 token"),
        (37, 4, True, "bf16", "int8 tensor"),
        (64, 8, False, "fp16", "int8 static"),
        (100, 8, False, "fp32", "int8 token limit=2.5"),
        (64, 8, True, "bf16", "int4 token power"),
    ]
]


@pytest.mark.parametrize("p", INT8, ids=str)
@pytest.mark.parametrize("name", [ONEDNN, "aten::_int_mm"])
def test_inputs_are_put_on_their_grid(
    p: Problem, name: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    from llmc.codegen.cpu import products

    if name != ONEDNN:
        monkeypatch.setattr(products, "exact_onednn", lambda: False)
    expected = name if products.exact_onednn() else "aten::_int_mm"
    assert check(p).name == expected


SIDES: list[dict[str, Any]] = [
    {"bias": True, "residual": True, "norm": True, "eps": 1e-5},
    {"rank": 4, "bias": True, "smooth": True},
    {"sparse": True, "act": "gelu_tanh"},
    {"bias": True, "act": "relu2"},
    {"outliers": 3, "rounds": "int8 token", "bits": 8, "group": 0},
    {"pairs": "gate", "act": "silu", "bias": True},
    {"rank": 4, "rounds": "int8 token", "bits": 8, "group": 0, "sparse": True},
    {"rounds": "e4m3 token"},
]


@pytest.mark.parametrize("sides", SIDES, ids=str)
@pytest.mark.parametrize("dtype", ["fp32", "bf16"])
def test_sides(sides: dict[str, Any], dtype: str) -> None:
    check(Problem(64, 96, **{"group": 32, "x_dtype": dtype} | sides))


def test_factors() -> None:
    p = Problem(48, 40, weights="factors", rank=6, bits=32, group=0, scale_dtype="", x_dtype="fp32")
    assert check(p).name == "aten::linear x2"


def test_no_tokens() -> None:
    p = Problem(48, 64, bits=4, group=32, x_dtype="bf16")
    kernel, _ = cpu.choose(p)
    assert kernel is not None
    x = torch.zeros(2, 0, 64, dtype=torch.bfloat16)
    assert cpu.call(kernel, p, cpu.pack(kernel, p, parts_of(p)), x).shape == (2, 0, 48)


def test_the_layout_of_torch_is_known_here() -> None:
    """Else decoding falls back to the kernel itself, at any number of tokens."""
    assert block_rows() in (32, 64)


def test_what_nothing_serves_says_why() -> None:
    kernel, why = cpu.choose(Problem(8, 8, weights="table", n=2, m=4, levels="nf"))
    assert kernel is None
    assert "2:4 sparse, expected dense codes of a table" in why
