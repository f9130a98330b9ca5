"""Input grids in fp64: what is exact, what a token may lose, and what reaches which token."""

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from llmc.compiler.ir import packing
from llmc.compiler.ir.errors import ModelError, VerifierError
from llmc.compiler.ir.graph import Param
from llmc.compiler.ir.levels import levels
from llmc.compiler.ir.ops import row
from llmc.compiler.ir.ops.pairs import (
    broken_pairs,
    decode_pairs,
    pair_codes,
    round_pairs,
    wide_values,
)
from llmc.compiler.ir.ops.rounding import FLOATS, grid_top, round_float, round_input
from llmc.compiler.ir.types import TensorType
from llmc.compiler.ir.verifier import verify_tensors
from llmc.compiler.pipeline import zoo

KINDS = [("int", 8), ("int", 4), ("int", 2), ("e4m3", 8), ("e5m2", 8), ("e2m1", 4), ("pairs", 4)]
FORMS = [(k, b, p) for k, b in KINDS for p in ("token", "tensor")]


def values(*shape, seed=0, spread=1.0):
    g = torch.Generator().manual_seed(seed)
    x = torch.randn(*shape, generator=g, dtype=torch.float64)
    return x * torch.exp(spread * torch.randn(shape[-1], generator=g, dtype=torch.float64))


def rounded(x, kind="int", bits=8, per="token", **given):
    return round_input(x, kind=kind, bits=bits, per=per, **given)


# ** small floats **


@pytest.mark.parametrize("kind", FLOATS)
def test_small_floats_round_to_the_nearest_level_and_keep_every_level(kind):
    table = levels(kind, FLOATS[kind][0]).double()
    table = table[~table.isnan()].unique()
    assert torch.equal(round_float(table, kind), table)
    x = torch.linspace(-1.2, 1.2, 4001, dtype=torch.float64) * float(table[-1])
    found = round_float(x, kind)
    best = (x[:, None].clamp(table[0], table[-1]) - table).abs().amin(1)
    assert torch.equal((x.clamp(table[0], table[-1]) - found).abs(), best)


@pytest.mark.parametrize(
    ("kind", "dtype"), [("e4m3", torch.float8_e4m3fn), ("e5m2", torch.float8_e5m2)]
)
def test_small_floats_are_those_of_torch(kind, dtype):
    """All ties and subnormals of fp16 inside the range, where torch rounds once."""
    x = torch.arange(-(1 << 15), 1 << 15, dtype=torch.int32).to(torch.int16).view(torch.float16)
    x = x[x.isfinite() & (x.abs() <= grid_top(kind, 8))].float()
    assert torch.equal(round_float(x, kind), x.to(dtype).float())


# ** laws of every grid **


@pytest.mark.parametrize(("kind", "bits", "per"), FORMS)
def test_rounding_twice_is_rounding_once(kind, bits, per):
    x = values(3, 5, 16)
    once = rounded(x, kind, bits, per)
    again = rounded(once, kind, bits, per)
    if kind == "pairs":  # what is an outlier depends on the deviation, which rounding moves
        again = rounded(once, kind, bits, "static", scale=x.new_full((1,), 0.25))
        once = rounded(again, kind, bits, "static", scale=x.new_full((1,), 0.25))
    torch.testing.assert_close(again, once, rtol=1e-14, atol=0)


@pytest.mark.parametrize(("kind", "bits"), [k for k in KINDS if k[0] != "pairs"])
def test_the_largest_of_a_token_is_exact_and_the_rest_within_half_a_step(kind, bits):
    x = values(3, 5, 16)
    y = rounded(x, kind, bits)
    top = x.abs().amax(-1, keepdim=True)
    at = x.abs() == top
    torch.testing.assert_close(y[at], x[at], rtol=1e-15, atol=0)
    if kind == "int":
        step = top / grid_top("int", bits)
        assert bool(((x - y).abs() <= step / 2 * (1 + 1e-12)).all())
        assert bool((torch.round(y / step) - y / step).abs().max() < 1e-9)


@pytest.mark.parametrize(("kind", "bits", "per"), FORMS)
def test_zeros_stay_zeros_and_nothing_is_changed_in_place(kind, bits, per):
    x = values(2, 4, 8)
    x[0, 1] = 0.0
    before = x.clone()
    y = rounded(x, kind, bits, per)
    assert torch.equal(x, before)
    assert y.data_ptr() != x.data_ptr()
    assert bool((y[0, 1] == 0).all())
    assert bool((rounded(torch.zeros_like(x), kind, bits, per) == 0).all())
    assert rounded(x[:0], kind, bits, per).shape == (0, 4, 8)


@pytest.mark.parametrize(("kind", "bits"), KINDS)
def test_a_token_is_rounded_alone_whatever_pads_the_batch(kind, bits):
    x = values(2, 4, 8)
    y = rounded(x, kind, bits)
    x[1, 2:] = 1e4
    assert torch.equal(rounded(x, kind, bits)[0], y[0])
    assert torch.equal(rounded(x[:1, :1], kind, bits), y[:1, :1])


@pytest.mark.parametrize(("kind", "bits"), [k for k in KINDS if k[0] != "pairs"])
@given(power=st.integers(-20, 20), seed=st.integers(0, 9))
@settings(max_examples=10, deadline=None)
def test_a_power_of_two_passes_through(kind, bits, power, seed):
    x = values(3, 8, seed=seed)
    y = rounded(x * 2.0**power, kind, bits)
    assert torch.equal(y, rounded(x, kind, bits) * 2.0**power)


def test_powers_of_two_are_the_next_scales_above():
    x = values(64, 8)
    plain = x.abs().amax(-1) / 6
    y = rounded(x, "e2m1", 4, power=True)
    unit = torch.exp2(torch.ceil(torch.log2(plain)))[:, None]
    assert torch.equal(y, round_float(x / unit, "e2m1") * unit)


def test_groups_of_channels_are_rounded_by_themselves():
    x = values(5, 10)
    y = rounded(x, group=4)
    parts = [rounded(p) for p in x.split(4, -1)]
    assert torch.equal(y, torch.cat(parts, -1))
    assert (x - y).norm() <= (x - rounded(x)).norm()


def test_static_scales_clip_what_lies_beyond():
    x = values(6, 8).clamp(-2, 2)
    scale = x.new_tensor([1.0 / 127])
    y = rounded(x, per="static", scale=scale)
    expected = torch.round(x * 127).clamp(-127, 127) / 127
    torch.testing.assert_close(y, expected, rtol=1e-15, atol=0)


# ** outlier columns and the guard **


def test_columns_are_left_out_before_scales_are_taken():
    x = values(4, 8)
    x[:, 3] *= 100
    columns = torch.tensor([3], dtype=torch.int32)
    without = x.clone()
    without[:, 3] = 0
    assert torch.equal(rounded(x, columns=columns), rounded(without))


def test_a_token_beyond_the_limit_is_not_rounded():
    x = values(4, 8, spread=0.0).clamp(-2, 2)
    x[2, 5] = 7.0
    y = rounded(x, limit=6.0, columns=torch.tensor([0]))
    kept = x.clone()
    kept[:, 0] = 0
    assert torch.equal(y[2], kept[2])
    others = [0, 1, 3]
    assert torch.equal(y[others], rounded(x, columns=torch.tensor([0]))[others])
    x[2, 0], x[2, 5] = 1e3, 1.0
    assert not torch.equal(rounded(x, limit=6.0, columns=torch.tensor([0]))[2], kept[2])


# ** pairs **


def test_outlier_magnitudes_are_those_of_the_paper():
    assert wide_values(4)[1:].tolist() == [12, 16, 24, 32, 48, 64, 96]
    assert float(wide_values(8)[1]) == 144.0


def test_pairs_are_the_best_of_both_answers():
    x = 6 * values(50, 20, seed=3)
    y = round_pairs(x, 4)
    pairs, found = x.unflatten(-1, (-1, 2)), y.unflatten(-1, (-1, 2))
    usual = pairs.round().clamp(-7, 7)
    cost, plain = (pairs - found).square().sum(-1), (pairs - usual).square().sum(-1)
    assert bool((cost <= plain).all())
    wide = (found.abs() > 7).any(-1)
    assert bool(wide.any())
    assert bool((found[wide].abs().amin(-1) == 0).all())
    assert torch.equal(found[~wide], usual[~wide])


@pytest.mark.parametrize("bits", [4, 8])
@given(seed=st.integers(0, 99), size=st.floats(0.1, 1e4))
@settings(max_examples=20, deadline=None)
def test_codes_of_pairs_decode_to_what_was_rounded(bits, seed, size):
    x = size * values(6, 12, seed=seed)
    y = round_pairs(x, bits)
    codes = packing.pack(pair_codes(y, bits), bits)
    scale = torch.ones(6, 3, dtype=torch.float64)
    decoded = decode_pairs(codes, scale, bits=bits, group=4, columns=12, dtype=torch.float64)
    assert torch.equal(decoded, y)
    assert broken_pairs(codes, bits, 12) == 0


def test_pairs_never_lose_to_integers_and_win_on_an_outlier():
    x = values(40, 128, spread=0.0)
    x[:, 7] *= 20
    lost = [(x - rounded(x, kind, 4)).square().sum(-1) for kind in ("int", "pairs")]
    assert bool((lost[1] <= lost[0]).all())
    assert float(lost[1].sum()) < 0.4 * float(lost[0].sum())


# ** types and stored tensors **

X = TensorType((2, 8), torch.float32)


@pytest.mark.parametrize(
    "given",
    [
        {"kind": "int", "bits": 9, "per": "token"},
        {"kind": "e4m3", "bits": 4, "per": "token"},
        {"kind": "float", "bits": 8, "per": "token"},
        {"kind": "int", "bits": 8, "per": "row"},
        {"kind": "int", "bits": 8, "per": "static"},
        {"kind": "int", "bits": 8, "per": "token", "group": 9},
        {"kind": "int", "bits": 8, "per": "token", "group": -1},
        {"kind": "pairs", "bits": 4, "per": "token", "group": 3},
        {"kind": "int", "bits": 8, "per": "token", "limit": float("nan")},
        {"kind": "int", "bits": 8, "per": "token", "limit": -1.0},
    ],
)
def test_a_call_without_meaning_is_refused(given):
    with pytest.raises(ModelError):
        row("llmc.round_input").infer(X, **given)


def program(scale=(0.1,), columns=(1, 4)):
    b = zoo.Builder()
    x = b.call("aten.mul.Tensor", b.param(3, 8), b.param(3, 8))
    parts = []
    for name, tensor in (("p.in_scale", torch.tensor(scale)), ("p.columns", torch.tensor(columns))):
        tensor = tensor.to(torch.int32) if name == "p.columns" else tensor
        param = Param(name, tuple(tensor.shape), tensor.dtype, keep=True)
        parts.append(b.program.add_param(param, tensor, before=b.end))
    return b.finish(b.call("llmc.round_input", x, *parts, kind="int", bits=8, per="static"))


def test_stored_scales_and_columns_are_checked():
    verify_tensors(program())
    verify_tensors(program(columns=()))
    for broken in ({"scale": (0.0,)}, {"scale": (-1.0,)}, {"scale": (float("inf"),)}):
        with pytest.raises(VerifierError, match="scale"):
            verify_tensors(program(**broken))
    for columns in ((4, 1), (1, 1), (-1, 3), (1, 8)):
        with pytest.raises(VerifierError, match="columns"):
            verify_tensors(program(columns=columns))


def test_a_pair_of_two_victims_is_refused():
    b = zoo.Builder()
    codes = packing.pack(torch.tensor([[8, 8, 1, 2]]), 4)
    parts = []
    for name, tensor in (("p.codes", codes), ("p.scale", torch.ones(1, 1).half())):
        param = Param(name, tuple(tensor.shape), tensor.dtype, keep=True)
        parts.append(b.program.add_param(param, tensor, before=b.end))
    made = b.finish(b.call("llmc.decode_pairs", *parts, bits=4, group=4, columns=4))
    with pytest.raises(VerifierError, match="broken"):
        verify_tensors(made)
    made.weights.tensors["p.codes"] = packing.pack(torch.tensor([[8, 3, 1, 2]]), 4)
    verify_tensors(made)
