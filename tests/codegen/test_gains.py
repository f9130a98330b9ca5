"""Gains that cannot leave fp16, and decoded scales in 16 bits: the meaning stays."""

from __future__ import annotations

from typing import Any

import pytest
import torch

from llmc.codegen import meaning
from llmc.codegen.gains import asked, in_range, round_scales
from llmc.codegen.problem import Problem
from llmc.compiler.ir import packing
from llmc.compiler.ir.errors import ModelError

KINDS: dict[str, dict[str, Any]] = {
    "int": {}, "table": {"weights": "table", "levels": "nf"}, "rank": {"rank": 3},
    "levels": {"weights": "table", "table": "matrix", "scale_dtype": "", "group": 0},
    "dense": {"weights": "dense", "bits": 16, "group": 0, "scale_dtype": ""},
    "factors": {"weights": "factors", "rank": 3, "bits": 16, "group": 0, "scale_dtype": ""},
    "sparse": {"sparse": True}, "outliers": {"outliers": 2}, "centred": {"centred": True},
}  # fmt: skip


def parts_of(p: Problem, top: float) -> dict[str, torch.Tensor]:
    """Random parts whose largest gain is ``top``."""
    g = torch.Generator().manual_seed(0)

    def some(*shape: int) -> torch.Tensor:
        return torch.randn(*shape, generator=g) / 8

    gain = some(p.K).clamp(-1, 1)
    gain[3] = top
    out = {"gain": gain} | ({"shift": some(p.K)} if p.centred else {})
    if p.weights in ("int", "table"):
        out["codes"] = packing.pack(torch.randint(0, 16, (p.N, p.K), generator=g), 4)
        if p.scale_dtype:
            out["scale"] = (some(p.N, p.groups).abs() + 0.01).half()
    out |= {"table": some(1, 16)} if p.table else {}
    out |= {"values": some(p.N, p.K)} if p.weights == "dense" else {}
    out |= {"left": some(p.N, 3), "right": some(3, p.K)} if p.rank else {}
    if p.sparse:
        out["csr_values"] = some(p.N)
        out["csr_index"] = torch.arange(p.N, dtype=torch.int16)
        out["csr_starts"] = torch.arange(p.N + 1, dtype=torch.int32)
    if p.outliers:
        out |= {"columns": torch.tensor([1, 5]), "column_weights": some(p.N, 2)}
    return out


@pytest.mark.parametrize("kind", KINDS)
def test_the_meaning_stays_and_no_gain_is_above_one(kind: str) -> None:
    """Powers of two go from the gain to every product of what it multiplies."""
    p = Problem(8, 32, **{"group": 32, "norm": True, "eps": 1e-6} | KINDS[kind])
    parts = parts_of(p, 37.0)
    made, note = in_range(p, parts)
    assert "gain over 64" in note
    assert float(made["gain"].abs().max()) <= 1
    x = torch.randn(5, 32, generator=torch.Generator().manual_seed(1), dtype=torch.float64)
    want = meaning.linear(p, parts, x)
    torch.testing.assert_close(meaning.linear(p, made, x), want, rtol=1e-12, atol=1e-12)


def test_gains_that_fit_and_other_dtypes_stay() -> None:
    for x_dtype, top in (("fp16", 1.0), ("bf16", 99.0), ("fp32", 99.0)):
        p = Problem(8, 32, group=32, norm=True, x_dtype=x_dtype)
        parts = parts_of(p, top)
        assert in_range(p, parts) == (parts, "")
    for p in (Problem(8, 32, group=32), Problem(8, 32, group=32, norm=True, rounds="int8 token")):
        parts = parts_of(p, 99.0)
        assert in_range(p, parts) == (parts, "")


def test_weights_that_would_leave_the_range_are_refused() -> None:
    p = Problem(8, 32, group=32, norm=True)
    parts = parts_of(p, 99.0) | {"scale": torch.full((8, 1), 6e4).half()}
    with pytest.raises(ModelError, match="scale that can be scaled by 128"):
        in_range(p, parts)


def test_decoded_scales_take_the_dtype_of_inputs_of_16_bits() -> None:
    wide = Problem(8, 32, group=32, scale_dtype="fp32")
    assert asked(wide).scale_dtype == "fp16"
    assert asked(Problem(8, 32, scale_dtype="fp32", x_dtype="bf16")).scale_dtype == "bf16"
    assert asked(Problem(8, 32, scale_dtype="fp32", x_dtype="fp32")).scale_dtype == "fp32"
    assert asked(Problem(8, 32, scale_dtype="bf16")).scale_dtype == "bf16"
    made, note = round_scales(asked(wide), {"scale": torch.full((8, 1), 0.3)})
    assert made["scale"].dtype == torch.float16
    assert note == "decoded scales in fp16"
    with pytest.raises(ModelError, match="scales that fp16 can hold"):
        round_scales(asked(wide), {"scale": torch.full((8, 1), 3e-8)})
