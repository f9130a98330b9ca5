"""Grids of cached keys and values against what their papers and the law |x - x̂| <= s/2 say."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from llmc.compiler.pipeline.caches import levels, normalised, ranges, token_ranges
from llmc.compiler.runtime.codecs import Asymmetric, Levels, Symmetric, above, below
from llmc.compiler.solvers.kmeans import assign


def numbers(*shape: int, seed: int = 0, scale: float = 1.0) -> torch.Tensor:
    made = torch.Generator().manual_seed(seed)
    return torch.randn(*shape, generator=made, dtype=torch.float64) * scale


def back(codec, x):
    return codec.decode(codec.encode(x, codec.apart(x)), x.shape[3], x.dtype)


@settings(max_examples=60, deadline=None)
@given(st.floats(-70000, 70000, allow_nan=False))
def test_half_precision_bounds_are_the_nearest_on_their_side(value: float) -> None:
    x = torch.tensor([value], dtype=torch.float64)
    low, high = below(x).double(), above(x).double()
    kept = x.clamp(-65504, 65504)
    assert low <= kept <= high
    near = kept.half().double()
    assert near in (low, high)
    if near == kept:
        assert low == high == kept


@pytest.mark.parametrize("bits", [2, 4, 8])
@pytest.mark.parametrize("scale", [1e-9, 1e-3, 1.0, 300.0])
@pytest.mark.parametrize("offset", [0.0, 50.0])
def test_asymmetric_error_is_at_most_half_a_step(bits: int, scale: float, offset: float) -> None:
    x = numbers(2, 3, 16, 8, scale=scale) + offset
    for codec, axis in ((Asymmetric(bits, tokens=8), 2), (Asymmetric(bits, channels=4), 3)):
        _, s, _ = codec.encode(x, None)
        size = 8 if axis == 2 else 4
        step = s.double().repeat_interleave(size, axis)
        assert ((x - back(codec, x)).abs() <= step / 2 * (1 + 1e-9)).all()
        # And the step is the papers': the group's range over 2^b - 1, up to f16's rounding.
        groups = x.unflatten(axis, (-1, size))
        plain = (groups.amax(axis + 1) - groups.amin(axis + 1)) / (2**bits - 1)
        slack = 2**-9 * (offset + 5 * scale) + 2**-23
        assert (s.double() >= plain).all()
        assert (s.double() <= plain * (1 + 2**-9) + slack).all()


@pytest.mark.parametrize("value", [0.0, 3.0, -1e-8, 1e30])
def test_constant_groups_stay_finite(value: float) -> None:
    x = torch.full((1, 1, 4, 4), value, dtype=torch.float64)
    for codec in (Asymmetric(2, tokens=4), Asymmetric(2, channels=4), Symmetric("int8"),
                  Symmetric("fp8")):  # fmt: skip
        found = back(codec, x)
        assert torch.isfinite(found).all()
        if abs(value) < 6e4:
            torch.testing.assert_close(found, x, rtol=2**-10, atol=2**-24)


@pytest.mark.parametrize("kind", ["int8", "fp8"])
def test_symmetric_codes(kind: str) -> None:
    x = numbers(2, 2, 5, 8)
    codec = Symmetric(kind)
    codes, s = codec.encode(x, None)
    assert codes.dtype.itemsize == 1
    error = (x - back(codec, x)).abs()
    if kind == "int8":
        assert (error <= s.double() / 2 * (1 + 1e-9)).all()
    else:  # three bits of mantissa, and steps of 2^-9 below the smallest normal number
        assert (error <= torch.maximum(x.abs() * 2**-4, s.double() * 2**-10) * (1 + 1e-9)).all()
    assert torch.equal(back(codec, torch.zeros_like(x)), torch.zeros_like(x))


def test_a_stored_scale_clips_what_lies_beyond() -> None:
    codec = Symmetric("int8", torch.full((1, 4), 0.5))
    x = torch.tensor([[[[1.0, -100.0, 0.2, 63.5]]]])
    assert back(codec, x).tolist() == [[[[1.0, -63.5, 0.0, 63.5]]]]


def test_keys_per_channel_beat_keys_per_token_where_a_channel_stands_out() -> None:
    x = numbers(1, 2, 64, 32)
    x[..., 5] *= 30
    keys, tokens = (
        (x - back(codec, x)).square().mean((0, 1, 2))
        for codec in (Asymmetric(4, tokens=32), Asymmetric(4, channels=32))
    )
    assert keys.sum() < tokens.sum()
    others = torch.arange(32) != 5
    assert keys[others].sum() * 50 < tokens[others].sum()


def test_codes_are_really_packed() -> None:
    x = numbers(1, 2, 64, 32)
    for bits in (2, 4, 8):
        packed, s, low = Asymmetric(bits, tokens=32).encode(x, None)
        assert packed.nbytes == x.numel() * bits // 8
        assert s.shape == low.shape == (1, 2, 2, 32)
        assert s.dtype == low.dtype == torch.float16


# ** tables **


def made(x: torch.Tensor, bits: int, count: int, norm: bool = False) -> tuple[Levels, Levels]:
    rows = x.transpose(1, 2).flatten(0, 1).float()
    span = ranges(rows, 0.02 if count else 0.0)
    keys = levels(normalised(rows, span[0], span[1]), None, bits, norm=norm)
    values = levels(normalised(rows, *token_ranges(rows, count)), None, bits, norm=norm)
    return Levels(bits, keys, span, count), Levels(bits, values, None, count)


@pytest.mark.parametrize("bits", [2, 3, 4])
def test_tables_choose_the_nearest_level(bits: int) -> None:
    x = numbers(1, 2, 40, 8).float().double()
    for codec in made(x, bits, 0):
        parts = codec.encode(x, None)
        if codec.span is None:
            low, high = parts[1].double().split(1, -1)
        else:
            low, high = codec.span.double()[:, :, None]
        all_levels = low[..., None] + (codec.levels[0].double() + 1) * ((high - low) / 2)[..., None]
        best = (all_levels - x[..., None]).abs().amin(-1)
        got = (x - back(codec, x)).abs()
        torch.testing.assert_close(got, best, rtol=1e-6, atol=1e-6)


def test_what_is_apart_is_what_the_paper_says() -> None:
    x = numbers(1, 2, 200, 16)
    x[0, 1, 7, 3] = 40.0
    keys, values = made(x, 3, 1)
    low, high = keys.span.double()[:, :, None]
    found = keys.apart(x)
    assert torch.equal(found, (x < low) | (x > high))
    assert 0.005 < float(found.double().mean()) < 0.03
    found = values.apart(x)
    # One number at each end of each token's vector, over all heads.
    assert (found.sum((1, 3)) == 2).all()
    rows = x.transpose(1, 2).flatten(2)
    marks = found.transpose(1, 2).flatten(2)
    assert torch.equal(rows[marks].view(-1, 2).amax(1), rows.amax(2).flatten())
    assert torch.equal(rows[marks].view(-1, 2).amin(1), rows.amin(2).flatten())
    # Without them the range is that of the others, so the others are finer.
    _, span = values.encode(x, found)
    kept = x.masked_fill(found, 0).abs().amax((1, 3))
    assert (span[:, 0].double().abs().amax(-1) <= kept * (1 + 2**-9)).all()


def test_q_norm_restores_mean_and_deviation() -> None:
    x = numbers(4096).pow(3).clamp(-1, 1)
    plain, normed = (levels(x, None, 2, norm=n) for n in (False, True))
    torch.testing.assert_close(plain[0], normed[0])
    at = assign(x[None], normed[:1].double())[0]
    read = normed[1].double()[at]
    torch.testing.assert_close(read.mean(), x.mean(), rtol=1e-5, atol=1e-6)
    torch.testing.assert_close(read.std(), x.std(), rtol=1e-5, atol=0.0)
    # Centres of k-means keep the mean, and lose deviation.
    assert plain[1].double()[at].std() < x.std()


def test_weights_pull_levels() -> None:
    x = torch.linspace(-1, 1, 400)
    heavy = torch.where(x > 0.5, 100.0, 1.0)
    plain, weighted = levels(x, None, 2, norm=False)[0], levels(x, heavy, 2, norm=False)[0]
    assert (weighted > 0.5).sum() > (plain > 0.5).sum()


def test_ranges_of_channels_that_never_change() -> None:
    keys = torch.full((10, 1, 2), 3.0)
    keys[:, :, 1] = torch.arange(10.0)[:, None]
    span = ranges(keys, 0.0)
    assert (span[1] > span[0]).all()
    assert span[:, 0, 1].tolist() == [0.0, 9.0]
