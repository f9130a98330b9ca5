"""Bit packing: every width and length, words as specified, N:M and back."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from llmc.compiler.ir import packing
from llmc.compiler.ir.errors import ModelError
from llmc.compiler.ir.packing import (
    compress_nm,
    expand_nm,
    nm_bits,
    pack,
    packed_words,
    unpack,
)  # fmt: skip


@settings(max_examples=80, deadline=None)
@given(st.integers(1, 8), st.integers(1, 70), st.integers(1, 3), st.integers(0, 1 << 30))
def test_unpack_inverts_pack(bits: int, columns: int, rows: int, seed: int) -> None:
    g = torch.Generator().manual_seed(seed)
    codes = torch.randint(0, 1 << bits, (2, rows, columns), generator=g)
    words = pack(codes, bits)
    assert words.shape == (2, rows, packed_words(columns, bits))
    assert words.dtype == torch.int32
    assert torch.equal(unpack(words, bits, columns).long(), codes)


@settings(max_examples=60, deadline=None)
@given(st.integers(1, 8), st.lists(st.integers(0, 255), min_size=1, max_size=40))
def test_words_are_one_little_endian_bit_stream(bits: int, values: list[int]) -> None:
    values = [v % (1 << bits) for v in values]
    stream = sum(v << (i * bits) for i, v in enumerate(values))
    words = pack(torch.tensor(values), bits).tolist()
    assert sum((w % (1 << 32)) << (32 * i) for i, w in enumerate(words)) == stream


@pytest.mark.parametrize("bits", range(1, 9))
def test_codes_out_of_range_are_refused(bits: int) -> None:
    for bad in (-1, 1 << bits):
        with pytest.raises(ModelError, match="expected codes"):
            pack(torch.tensor([0, bad]), bits)


def test_wrong_word_count_is_refused() -> None:
    with pytest.raises(ModelError, match="words"):
        unpack(torch.zeros(2, 3, dtype=torch.int32), 4, 8)


@settings(max_examples=60, deadline=None)
@given(
    st.sampled_from([(1, 2), (2, 4), (1, 4), (4, 8), (3, 8), (2, 16)]),
    st.integers(1, 6),
    st.integers(1, 4),
    st.integers(0, 1 << 30),
)
def test_expand_nm_inverts_compress_nm(
    pattern: tuple[int, int], blocks: int, rows: int, seed: int
) -> None:
    n, m = pattern
    g = torch.Generator().manual_seed(seed)
    values = torch.randn(rows, blocks * m, generator=g)
    order = torch.rand(rows, blocks, m, generator=g).argsort(-1).argsort(-1)
    mask = (order < n).flatten(-2)
    kept, meta = compress_nm(values, mask, n, m)
    assert kept.shape == (rows, blocks * n)
    assert meta.shape == (rows, packed_words(blocks * n, nm_bits(m)))
    where = unpack(meta, nm_bits(m), blocks * n).long().unflatten(-1, (-1, n))
    assert bool((where.diff(dim=-1) > 0).all())
    assert torch.equal(expand_nm(kept, meta, n, m, blocks * m), values * mask)


def test_a_block_with_another_count_is_refused() -> None:
    mask = torch.tensor([[True, True, True, False]])
    with pytest.raises(ModelError, match="exactly 2"):
        compress_nm(torch.ones(1, 4), mask, 2, 4)


@pytest.mark.parametrize("bits", [2, 3, 4, 8])
def test_pieces_pack_as_the_whole(monkeypatch: pytest.MonkeyPatch, bits: int) -> None:
    g = torch.Generator().manual_seed(bits)
    codes = torch.randint(0, 1 << bits, (2, 37, 24), generator=g).to(torch.uint8)
    mask = torch.rand(37, 6, 4, generator=g).argsort(-1).lt(2).flatten(1)
    whole = pack(codes, bits), *compress_nm(codes[0], mask, 2, 4)
    monkeypatch.setattr(packing, "_AT_ONCE", 100)
    pieces = pack(codes, bits), *compress_nm(codes[0], mask, 2, 4)
    assert all(torch.equal(a, b) for a, b in zip(whole, pieces, strict=True))
    with pytest.raises(ModelError, match="expected codes"):
        pack(codes.to(torch.int32) + (1 << bits), bits)
