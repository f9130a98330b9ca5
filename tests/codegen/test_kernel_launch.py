"""Prepacking and the cache of kernel sources, without launching anything."""

from __future__ import annotations

import stat
from pathlib import Path

import pytest
import torch

from llmc.codegen import device, source
from llmc.codegen.launch import fused_linear
from llmc.codegen.prepack import prepack
from llmc.codegen.problem import Problem
from llmc.codegen.render import render
from llmc.codegen.rows.int4 import W4A16, W4A16_24
from llmc.compiler.ir import packing
from llmc.compiler.ir.errors import ModelError, ResourceError, UsageError


@pytest.fixture
def cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """An empty user cache."""
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    return tmp_path / "llmc" / "kernels"


def test_dense_tiles_hold_each_code_where_the_kernel_reads_it() -> None:
    """Column 32 j + 2 w + e of a step is nibble j + 4 e of word w of its row."""
    g = torch.Generator().manual_seed(0)
    q = torch.randint(0, 16, (70, 200), generator=g)
    packed = prepack(
        W4A16, Problem(70, 200), codes=packing.pack(q, 4), scale=torch.ones(70, 2).half()
    )
    assert packed["codes"].shape == (2, 2, 64, 16)
    for n, k in [(0, 0), (0, 1), (63, 127), (64, 128), (69, 199), (5, 77)]:
        j, w, e = k % 128 // 32, k % 32 // 2, k % 2
        word = int(packed["codes"][n // 64, k // 128, n % 64, w])
        assert word >> (4 * (j + 4 * e)) & 15 == int(q[n, k])


def test_scale_words_hold_scale_and_zero_point() -> None:
    """Low half: the fp16 bits; high half: the zero point; groups padded to whole steps."""
    scale = torch.tensor([[0.5, 0.25, 2.0]]).half()
    zero = torch.tensor([[3, 15, 0]], dtype=torch.uint8)
    q = packing.pack(torch.zeros(1, 150, dtype=torch.int64), 4)
    packed = prepack(W4A16, Problem(1, 150, group=64, asym=True), codes=q, scale=scale, zero=zero)
    assert packed["scale"].shape == (1, 4, 64)
    words = packed["scale"][0, :, 0]
    assert (words >> 16).tolist() == [3, 15, 0, 0]
    assert words.to(torch.int16).view(torch.float16).tolist() == [0.5, 0.25, 2.0, 0.0]


def test_packed_bytes_are_what_the_row_says_it_moves() -> None:
    """Resident bytes equal the weight part of the row's byte count."""
    q = packing.pack(torch.zeros(130, 300, dtype=torch.int64), 4)
    problem = Problem(130, 300, group=64)
    packed = prepack(W4A16, problem, codes=q, scale=torch.ones(130, 5).half())
    assert packed.bytes == W4A16.bytes_moved(problem, 0)


def test_tensors_that_do_not_fit_are_refused() -> None:
    """Shape, missing zero points, wrong scale dtype, unordered positions, a refused problem."""
    q = packing.pack(torch.zeros(4, 64, dtype=torch.int64), 4)
    scale = torch.ones(4, 2).half()
    problem = Problem(4, 64, group=32)
    with pytest.raises(ModelError, match=r"expected scale of shape \[4, 2\], found \[4, 3\]"):
        prepack(W4A16, problem, codes=q, scale=torch.ones(4, 3).half())
    with pytest.raises(ModelError, match="expected zero of shape"):
        prepack(W4A16, Problem(4, 64, group=32, asym=True), codes=q, scale=scale)
    with pytest.raises(ModelError, match="expected no zero points"):
        prepack(W4A16, problem, codes=q, scale=scale, zero=torch.zeros(4, 2, dtype=torch.uint8))
    with pytest.raises(ModelError, match=r"expected torch.float16 scales, found torch.bfloat16"):
        prepack(W4A16, problem, codes=q, scale=scale.bfloat16())
    with pytest.raises(UsageError, match="group=48"):
        prepack(W4A16, Problem(4, 64, group=48), codes=q, scale=scale)
    sparse = Problem(4, 128, group=32, n=2, m=4)
    falling = packing.pack(torch.tensor([3, 1]).repeat(4, 32), 2)
    with pytest.raises(ModelError, match="ascending"):
        prepack(W4A16_24, sparse, codes=q, scale=scale, meta=falling)


def test_sources_are_cached_by_digest_in_a_private_folder(cache: Path) -> None:
    """One file per digest, mode 0700 folder, and a file that was changed is written anew."""
    rendered = render(W4A16, Problem(64, 128))
    path = source.source_file(rendered)
    assert path.parent == cache
    assert stat.S_IMODE(cache.stat().st_mode) == 0o700
    assert path.read_text() == rendered.source
    path.write_text("import os\n")
    assert source.source_file(rendered).read_text() == rendered.source
    assert [p.name for p in cache.iterdir()] == [path.name]


def test_a_cache_that_others_can_write_is_refused(cache: Path) -> None:
    """What lies in the cache is executed."""
    cache.mkdir(parents=True)
    cache.chmod(0o777)
    with pytest.raises(ResourceError, match="owned and writable by you alone"):
        source.source_file(render(W4A16, Problem(64, 128)))


@pytest.mark.skipif(torch.cuda.is_available(), reason="a CUDA device is present")
def test_without_device_and_interpreter_the_launch_says_so() -> None:
    """The reason is returned for plans and raised by a call."""
    q = packing.pack(torch.zeros(4, 64, dtype=torch.int64), 4)
    packed = prepack(W4A16, Problem(4, 64, group=32), codes=q, scale=torch.ones(4, 2).half())
    assert device.unavailable() == "no CUDA device, and TRITON_INTERPRET=1 is not set"
    with pytest.raises(ResourceError, match="cannot launch w4a16: no CUDA device"):
        fused_linear(packed, torch.zeros(1, 64).half())


def test_a_gpu_that_is_too_old_is_named(monkeypatch: pytest.MonkeyPatch) -> None:
    """Its capability stands in the reason, which a plan gives when it falls to the next target."""
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda *a: (7, 5))
    assert str(device.unavailable()).endswith("capability 8.0 or more, found 7.5")
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda *a: (9, 0))
    assert device.unavailable() is None
