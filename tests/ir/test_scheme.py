"""Scheme records: they merge, round-trip, and refuse what is not built."""

import json

import pytest

from llmc.compiler.ir.errors import ModelError, UsageError
from llmc.compiler.ir.scheme import (
    Codes,
    LowRank,
    Mask,
    Scheme,
    Sparse,
    Transform,
    View,
)

FULL = Scheme(View("p1"), Codes(4, 128), Mask(2, 4, 0.5), Transform("diagonal", True))


def test_json_round_trip():
    assert Scheme.from_json(json.loads(json.dumps(FULL.to_json()))) == FULL
    row = Scheme(View("p1", rows=(0, 4)))
    assert Scheme.from_json(json.loads(json.dumps(row.to_json()))) == row


def test_merging_adds_and_refuses_a_second_opinion():
    scheme = Scheme(View("p1")).merge(codes=Codes(4, 128)).merge(mask=Mask(2, 4))
    assert scheme.short == "2:4 w4 g128"
    assert scheme.merge(codes=Codes(4, 128)) == scheme
    with pytest.raises(UsageError, match="one codes per weight"):
        scheme.merge(codes=Codes(8, 128))


@pytest.mark.parametrize(
    ("part", "word"),
    [
        ({"low_rank": LowRank(8)}, "codes or zeros beside low_rank"),
        ({"low_rank": LowRank(8, "a"), "codes": Codes(4, 64)}, "shared factors"),
        ({"sparse": Sparse("blocks", 0.01)}, "sparse"),
        ({"sparse": Sparse("columns", 0.01)}, "input grid"),
        ({"bias_delta": True}, "bias_delta"),
        ({"t_in": Transform("orthogonal", True)}, "orthogonal"),
        ({"t_out": Transform("diagonal", False)}, "folded"),
        ({"view": View("p1", rows=(0, 2))}, "slice"),
        ({"view": View("p1", expert=1)}, "expert"),
        ({"codes": Codes(4, 64, grid="table")}, "'table'"),
        ({"codes": Codes(3, 64, grid="e2m1")}, "e2m1:bits: expected 4"),
        ({"codes": Codes(1, 64, grid="binary"), "mask": Mask(sparsity=0.5)}, "holds 0"),
        ({"codes": Codes(3, None, grid="signs"), "mask": Mask(sparsity=0.5)}, "holds 0"),
        ({"sparse": Sparse("outliers", 0.01), "mask": Mask(2, 4)}, "codes that outliers"),
        ({"codes": Codes(4, None), "low_rank": LowRank(8, bits=4)}, "8 or 16 bits"),
    ],
)
def test_what_is_not_built_refuses(part, word):
    FULL.require_built()
    parts = {"view": View("p1")} | part
    with pytest.raises(UsageError, match=word):
        Scheme(**parts).require_built()


@pytest.mark.parametrize(
    "data", [{}, {"view": {"param": "p"}, "colour": 1}, {"view": {"nmae": "p"}}]
)
def test_bad_records_name_the_field(data):
    with pytest.raises(ModelError, match="expected"):
        Scheme.from_json(data)
