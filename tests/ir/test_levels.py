"""Named levels against their definitions, and the rows that decode tables, signs and scales."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch

from llmc.compiler.ir import packing
from llmc.compiler.ir.dims import BATCH
from llmc.compiler.ir.errors import ModelError, UsageError, VerifierError
from llmc.compiler.ir.graph import Program
from llmc.compiler.ir.levels import WIDTHS, levels
from llmc.compiler.ir.ops import row
from llmc.compiler.ir.ops.lookup import decode_scales, lookup, sum_signs
from llmc.compiler.ir.types import TensorType
from llmc.compiler.ir.verifier import verify, verify_tensors

# The levels of appendix E of the QLoRA paper.
NF4 = [
    -1.0, -0.6961928009986877, -0.5250730514526367, -0.39491748809814453, -0.28444138169288635,
    -0.18477343022823334, -0.09105003625154495, 0.0, 0.07958029955625534, 0.16093020141124725,
    0.24611230194568634, 0.33791524171829224, 0.44070982933044434, 0.5626170039176941,
    0.7229568362236023, 1.0,
]  # fmt: skip


def test_nf4_is_the_published_table_and_follows_from_the_normal_distribution() -> None:
    found = levels("nf", 4).double()
    assert (found - torch.tensor(NF4, dtype=torch.float64)).abs().max() <= 2e-7

    def quantile(p: torch.Tensor) -> torch.Tensor:
        return 2**0.5 * torch.erfinv(2 * p - 1)

    upper = quantile(torch.linspace(0.9677083, 0.5, 9, dtype=torch.float64)[:-1])
    lower = quantile(torch.linspace(0.9677083, 0.5, 8, dtype=torch.float64)[:-1])
    again = torch.cat([-lower, torch.zeros(1, dtype=torch.float64), upper.flip(0)]) / upper.max()
    assert (found - again).abs().max() <= 2e-7


@pytest.mark.parametrize("bits", WIDTHS["nf"])
def test_normal_floats_ascend_from_minus_one_through_zero_to_one(bits: int) -> None:
    found = levels("nf", bits)
    assert len(found) == 2**bits
    assert bool((found.diff() > 0).all())
    assert found[0] == -1
    assert found[-1] == 1
    assert int((found == 0).sum()) == 1
    assert int((found > 0).sum()) == 2 ** (bits - 1)


@pytest.mark.parametrize(
    ("name", "dtype"), [("e4m3", torch.float8_e4m3fn), ("e5m2", torch.float8_e5m2)]
)
def test_codes_of_eight_bit_floats_are_their_bytes(name: str, dtype: torch.dtype) -> None:
    found = levels(name, 8)
    known = torch.arange(256, dtype=torch.uint8).view(dtype).float()
    finite = torch.isfinite(known)
    assert torch.equal(found[finite], known[finite])
    assert bool(torch.isnan(found[~finite]).all())


def test_small_levels() -> None:
    half = [0.0, 0.5, 1.0, 1.5, 2.0, 3.0, 4.0, 6.0]
    assert levels("e2m1", 4).tolist() == [*half, *(-v for v in half)]
    assert levels("ternary", 2)[:3].tolist() == [-1, 0, 1]
    assert levels("binary", 1).tolist() == [-1, 1]
    for name, bits in (("nf", 1), ("e2m1", 3), ("ternary", 1), ("none", 4)):
        with pytest.raises(UsageError, match="expected levels of"):
            levels(name, bits)


def test_decodes_by_hand() -> None:
    codes = packing.pack(torch.tensor([[0, 2, 1, 1, 0]]), 2)
    scale = torch.tensor([[2.0, 3.0, 5.0]])
    got = lookup(codes, scale, bits=2, group=2, columns=5, levels="ternary")
    assert got.tolist() == [[-2.0, 2.0, 0.0, 0.0, -5.0]]
    table = torch.tensor([[0.5, 1.5, 2.5, 3.5]]).half()
    got = lookup(codes, None, table, bits=2, group=5, columns=5)
    assert got.tolist() == [[0.5, 2.5, 1.5, 1.5, 0.5]]
    signs = packing.pack(torch.tensor([[[1, 0, 1]], [[1, 1, 0]]]), 1)
    factors = torch.tensor([[[2.0, 4.0]], [[0.5, 1.0]]])
    assert sum_signs(signs, factors, group=2, columns=3).tolist() == [[2.5, -1.5, 3.0]]
    q = torch.tensor([128, 130, 127, 129], dtype=torch.uint8)
    step, mean = torch.tensor([0.5, 2.0]), torch.tensor([10.0])
    got = decode_scales(q, step, mean, block=2, rows=2, columns=2)
    assert got.tolist() == [[10.0, 11.0], [8.0, 12.0]]


CODES, SCALE = TensorType((3, 1), torch.int32), TensorType((3, 2), torch.float32)
TABLE = TensorType((3, 16), torch.float16)
ATTRS = {"bits": 4, "group": 4, "columns": 8}


@pytest.mark.parametrize(
    ("args", "extra"),
    [
        ((CODES, SCALE, TABLE), {"levels": "nf"}),
        ((CODES, SCALE), {}),
        ((CODES, SCALE.with_shape(3, 3)), {"levels": "nf"}),
        ((CODES.with_dtype(torch.int64), SCALE), {"levels": "nf"}),
        ((CODES.with_shape(3, 2), SCALE), {"levels": "nf"}),
        ((CODES, SCALE, TABLE.with_shape(2, 16)), {}),
        ((CODES, SCALE, TABLE.with_shape(3, 8)), {}),
        ((CODES, SCALE), {"levels": "e4m3"}),
        ((CODES, SCALE), {"levels": "none"}),
        ((CODES, SCALE, TABLE), {"bits": 1 << 40}),
        ((CODES, SCALE, TABLE), {"group": 0}),
    ],
)
def test_parts_that_do_not_fit_are_refused(args: Any, extra: dict[str, Any]) -> None:
    with pytest.raises(ModelError, match="expected"):
        row("llmc.lookup").infer(*args, **(ATTRS | extra))


def test_other_rows_refuse_parts_that_do_not_fit() -> None:
    signs, factors = TensorType((2, 3, 1), torch.int32), TensorType((2, 3, 2), torch.float16)
    assert row("llmc.sum_signs").infer(signs, factors, group=4, columns=8).shape == (3, 8)
    for s, f in ((signs.with_shape(3, 1), factors), (signs, factors.with_shape(1, 3, 2))):
        with pytest.raises(ModelError, match="expected"):
            row("llmc.sum_signs").infer(s, f, group=4, columns=8)
    q, step = TensorType((6,), torch.uint8), TensorType((2,), torch.float32)
    one = step.with_shape(1)
    how = {"block": 4, "rows": 3, "columns": 2}
    assert row("llmc.decode_scales").infer(q, step, one, **how).shape == (3, 2)
    for parts in ((q.with_shape(5), step, one), (q, one, one), (q, step, step)):
        with pytest.raises(ModelError, match="expected"):
            row("llmc.decode_scales").infer(*parts, **how)


def tabled(maker: Any) -> Program:
    """y = x (A + B + C)ᵀ: floats with 8-bit scales, a table per row, and signed factors."""
    m = maker()
    g = m.generator

    def kept(name: str, tensor: torch.Tensor) -> Any:
        return m.param(name, tensor, trained=False, keep=True)

    x = m.input("x", BATCH, 12, dtype=torch.float32)
    q = torch.randint(0, 256, (6,), generator=g).to(torch.uint8)
    steps = [kept("scale_codes", q), kept("step", torch.rand(2)), kept("mean", torch.rand(1) + 9)]
    scale = m.call("llmc.decode_scales", *steps, block=4, rows=3, columns=2)
    ternary = kept("codes", packing.pack(torch.randint(0, 3, (3, 12), generator=g), 2))
    how = {"bits": 2, "group": 6, "columns": 12}
    a = m.call("llmc.lookup", ternary, scale, levels="ternary", **how)
    free = kept("lut_codes", packing.pack(torch.randint(0, 4, (3, 12), generator=g), 2))
    table = kept("table", torch.randn(3, 4, generator=g).half())
    b = m.call("llmc.lookup", free, None, table, **{**how, "group": 12})
    signs = kept("signs", packing.pack(torch.randint(0, 2, (2, 3, 12), generator=g), 1))
    factors = kept("factors", torch.rand(2, 3, 2, generator=g).half())
    c = m.call("llmc.sum_signs", signs, factors, group=6, columns=12)
    w = m.call("aten.add.Tensor", m.call("aten.add.Tensor", a, b), c)
    return m.output(m.call("aten.linear.default", x, w))


def empty(t: torch.Tensor) -> torch.Tensor:
    q = packing.unpack(t, 2, 12)
    q[1, 5] = 3
    return packing.pack(q, 2)


def endless(t: torch.Tensor) -> torch.Tensor:
    t.view(-1)[-1] = float("nan")
    return t


def spilled(t: torch.Tensor) -> torch.Tensor:
    t[0, 0, -1] |= 1 << 20
    return t


@pytest.mark.parametrize(
    ("rule", "name", "change"),
    [
        ("level", "codes", empty),
        ("scale", "table", endless),
        ("scale", "factors", endless),
        ("scale", "step", endless),
        ("scale", "mean", endless),
        ("words", "signs", spilled),
        ("stored", "scale_codes", lambda t: t[:-1]),
        ("stored", "table", lambda t: t.float()),
    ],
)
def test_broken_tables_are_refused(
    rule: str, name: str, change: Callable[[torch.Tensor], torch.Tensor], maker: Any
) -> None:
    program = tabled(maker)
    verify(program)
    verify_tensors(program)
    program.weights.tensors[name] = change(program.weights.load(name).clone())  # type: ignore[attr-defined]
    with pytest.raises(VerifierError) as e:
        verify_tensors(program)
    assert e.value.rule == rule
