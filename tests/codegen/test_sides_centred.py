"""A layer norm in a kernel: the mean leaves behind the product, or before the input is rounded.

Means of tokens are drawn four times as wide as their spread. The file as a script runs rounding
kernels whose block is shorter than a row.
"""

from __future__ import annotations

import dataclasses
import json
from pathlib import Path
from typing import Any

import pytest
import sides_cases
import torch
from interpreter import interpreted
from numerics import Case, answered, exact_and_bound, inputs_of, judge, parts_of
from sides_cases import case

from llmc.codegen import centre, meaning
from llmc.codegen.by_row import order_rows
from llmc.codegen.kernels import ROWS, row
from llmc.codegen.launch import fused_linear, problem_of_call
from llmc.codegen.prepack import prepack
from llmc.codegen.problem import Problem
from llmc.codegen.row import TileConfig
from llmc.codegen.rows import rounded
from llmc.codegen.rows.int4 import W4A16
from llmc.codegen.samples import random_parts
from llmc.compiler.ir.errors import ModelError, UsageError

LAYER = {"norm": True, "centred": True}
EIGHT = {"bits": 8, **LAYER}
APART = {"rounds": "int8 token limit=5.0", "outliers": 3, **EIGHT}
E4M3 = {"bits": 8, "weights": "table", "levels": "e4m3", **LAYER}
ROUNDED = [
    case(1, 33, 96, "w8a8", rounds="int8 token", **EIGHT, spoil="shift"),
    case(3, 70, 200, "w8a8", rounds="int8 static", **EIGHT, bias=True, spoil="gain"),
    case(17, 64, 200, "w4a8", rounds="int8 token power", **LAYER, x_dtype="fp32", tile=(32, 64)),
    case(3, 70, 200, "int8_split", **APART, spoil="shift"),
    case(17, 70, 200, "int8_split", **APART, tile=(32, 64)),
    case(5, 40, 136, "fp8", rounds="e4m3 token", smooth=True, **E4M3, spoil="smooth"),
]
CASES = [
    case(1, 33, 96, **LAYER, spoil="shift"),
    case(3, 70, 200, **LAYER, smooth=True, x_dtype="fp32", bias=True, spoil="smooth"),
    case(3, 40, 96, "w4a16_24", **LAYER, asym=True, stride="halves", spoil="meta"),
    # programs that share a tile's columns leave two sums of a token beside their products
    case(3, 64, 300, **LAYER, group=0, x_dtype="fp32", tile=(16, 32, 3, 2, 2), spoil="gain"),
    case(9, 70, 400, **LAYER, rank=20, sparse=True, tile=(8, 32, 3, 2, 3), spoil="right"),
    case(3, 50, 200, **LAYER, pairs="gate", act="silu", bias=True, residual=True, spoil="shift"),
    Case("factors", {"N": 70, "K": 200, "rank": 40, "bits": 16, "group": 0, "scale_dtype": "",
                     "weights": "factors", "eps": 1e-5, **LAYER}, 3, spoil="gain"),
    *ROUNDED,
]  # fmt: skip


@pytest.mark.parametrize("at", range(len(CASES)), ids=lambda i: CASES[i].label)
def test_layer_norms_are_what_they_mean(at: int) -> None:
    """Against the oracle in fp64; the same bits twice; a spoiled part goes beyond the bound."""
    assert judge(CASES[at], sides_cases.answers(CASES)[at]) == ""


@pytest.mark.parametrize("pairs", ["", "gate"])
def test_a_row_knows_what_it_makes_of_gain_and_shift(
    pairs: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Of weight, low rank and entries, in the order of packed rows, in parts or at once."""
    more = {"pairs": pairs, "act": "silu" if pairs else ""}
    problem = Problem(44, 96, group=32, rank=5, sparse=True, smooth=True, **LAYER, **more)
    parts = random_parts(problem)
    ordered, moved = order_rows(problem, parts)
    made = centre.centre(ordered, moved)
    monkeypatch.setattr(centre, "BLOCK", 5 * 96)
    assert all(torch.equal(made[n], t) for n, t in centre.centre(ordered, moved).items())
    x = torch.randn(3, 96, generator=torch.Generator().manual_seed(5), dtype=torch.float64)
    bare = {"norm": False, "centred": False, "smooth": False, "pairs": "", "act": ""}
    plain = dataclasses.replace(ordered, **bare)
    spread = x.var(-1, correction=0, keepdim=True) + problem.eps
    gained = x * parts["gain"].double() * parts["smooth"].double()
    y = meaning.linear(plain, moved, gained)
    taken, added = made["centre"][: ordered.N].double().T
    found = (y - x.mean(-1, keepdim=True) * taken) / spread.sqrt() + added
    want = meaning.linear(dataclasses.replace(ordered, pairs="", act=""), moved, x)
    torch.testing.assert_close(found, want, rtol=1e-5, atol=1e-5)
    assert len(made["centre"]) % 64 == 0
    assert torch.equal(made["shift"], parts["shift"] * parts["smooth"])


@pytest.mark.parametrize("name", [r.name for r in ROWS])
def test_a_norm_that_is_none_is_refused_by_field(name: str) -> None:
    """A mean is taken away by a norm; a row that does not name it does not serve it."""
    wrong = row(name).misfits(Problem(64, 128, centred=True))
    assert "norm" in [m.field for m in wrong]
    own = {k: v for k, v in row(name).choices.items() if k != "centred"}
    without = dataclasses.replace(row(name), choices=own)
    assert "centred" in [m.field for m in without.misfits(Problem(64, 128, eps=1e-5, **LAYER))]


def test_what_makes_the_sums_of_a_row_must_be_packed() -> None:
    """A shift of another width; a gain that comes with a call, when its sums are made already."""
    problem = Problem(32, 64, group=64, **LAYER)
    parts = random_parts(problem)
    with pytest.raises(ModelError, match=r"expected shift of shape \[64\], found \[63\]"):
        prepack(W4A16, problem, **{**parts, "shift": torch.zeros(63)})
    with pytest.raises(ModelError, match=r"expected gain of shape \[64\], found none"):
        prepack(W4A16, problem, **{k: v for k, v in parts.items() if k != "gain"})
    packed = prepack(W4A16, problem, **{k: v for k, v in parts.items() if k != "shift"})
    assert not packed["shift"].any()
    assert not packed["centre"][:, 1].any()
    given = {"x": torch.zeros(1, 64), **packed.sides}
    assert problem_of_call(packed, given).centred
    with pytest.raises(UsageError, match="expected gain packed with the weight"):
        problem_of_call(packed, {**given, "gain": torch.ones(64)})


def test_rows_longer_than_a_block(tmp_path: Path) -> None:
    """Rounding kernels that hold 64 columns at a time read a row of 200 three times; x * gain may
    be what fp16 cannot hold, as long as it can hold the normed value."""
    assert interpreted(__file__, tmp_path) == {c.label: "" for c in _wide()} | {"loud": True}


def _wide() -> list[Case]:
    """Cases that round in a kernel of its own, behind either norm."""
    given = [c for c in ROUNDED if c.tile]
    without = [{**c.fields, "centred": False} for c in given]
    return given + [dataclasses.replace(c, fields=f) for c, f in zip(given, without, strict=True)]


def _loud(at: Case) -> bool:
    """Whether a case holds its bound with inputs of thousands and gains up to 96."""
    parts = parts_of(at)
    parts["gain"] *= 64
    x = inputs_of(at)[0] * 2000
    exact, bound = exact_and_bound(at, parts, x, None)
    y = fused_linear(prepack(row(at.row), at.problem, **parts), x, config=TileConfig(*at.tile))
    assert float((x.float() * parts["gain"]).abs().max()) > 65504
    return bool(((y.double() - exact).abs() <= bound).all())


def main() -> None:
    """What is wrong with each wide case, as JSON on stdout."""
    torch.set_num_threads(1)
    rounded.round_config = lambda K: TileConfig(1, 64, 1, 4)
    found: dict[str, Any] = {c.label: judge(c, answered(c)) for c in _wide()}
    apart = APART | {"rounds": "int8 token limit=250.0"}
    given = [{**apart, "centred": c} for c in (False, True)]
    loud = [case(3, 70, 200, "int8_split", **g, tile=t) for g in given for t in ((8, 64), (32, 64))]
    print(json.dumps(found | {"loud": all(map(_loud, loud))}))


if __name__ == "__main__":
    main()
