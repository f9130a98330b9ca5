"""Int4 products that are compiled for this machine: their numbers, their cache, their choice."""

from __future__ import annotations

import stat
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from lowering_programs import Maker, Weight

from llmc.codegen import cpu
from llmc.codegen.cpu import compiled
from llmc.codegen.cpu.tune import random_parts
from llmc.codegen.meaning import linear
from llmc.codegen.problem import Problem
from llmc.codegen.targets import lower
from llmc.compiler.ir.errors import ResourceError
from llmc.compiler.ir.interpret import run

WHY = compiled.unavailable()
here = pytest.mark.skipif(WHY is not None, reason=WHY or "")


@pytest.fixture(scope="module")
def way(tmp_path_factory: pytest.TempPathFactory) -> compiled.CompiledWay:
    """The product, compiled into a cache of the tests' own (seconds)."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("XDG_CACHE_HOME", str(tmp_path_factory.mktemp("cache")))
        return compiled.CompiledWay(compiled._loaded(compiled.library()))


PROBLEMS = [
    Problem(N, K, bits=bits, group=group, asym=asym, x_dtype="bf16")
    for N, K, bits, group, asym in [
        (64, 64, 4, 64, False), (33, 200, 4, 0, True), (130, 1056, 4, 32, True),
        (200, 96, 3, 32, False), (64, 512, 4, 256, False), (100, 320, 8, 64, True),
        (48, 4128, 6, 32, False),
    ]
]  # fmt: skip


@here
@pytest.mark.parametrize("p", PROBLEMS, ids=lambda p: f"{p.N}x{p.K}-{p.bits}g{p.group}z{p.asym:d}")
def test_compiled_products_are_as_good_as_torchs(p: Problem, way: compiled.CompiledWay) -> None:
    """Rows and columns that fill no tile, slices of columns, and more tokens than one decoding."""
    g = torch.Generator().manual_seed(0)
    kernel, _ = cpu.choose(p)
    assert kernel is not None
    parts = random_parts(p, g)
    packed = cpu.pack(kernel, p, parts)
    for tokens in (1, 16, 17, 33, 48, compiled.BLOCKING["rows"] + 40):
        x = torch.randn(tokens, p.K, generator=g).bfloat16()
        want = linear(p, parts, x.double())
        old = kernel.ways["decode"](p, x, packed).double() - want
        error = way(p, x, packed).double() - want
        assert error.norm() <= max(1.2 * old.norm(), 2.0**-8 * want.norm())


GATED = Problem(256, 544, group=32, x_dtype="bf16", pairs="gate", act="silu")


@here
@pytest.mark.parametrize("bits", [4, 8])
def test_gate_and_up_are_joined_before_they_are_written(
    bits: int, way: compiled.CompiledWay
) -> None:
    p = replace(GATED, bits=bits, asym=bits == 8)
    g = torch.Generator().manual_seed(0)
    kernel, _ = cpu.choose(p)
    assert kernel is not None
    parts = random_parts(p, g)
    packed = cpu.pack(kernel, p, parts)
    kernel = replace(kernel, ways={**kernel.ways, "compiled": way})
    for tokens in (1, 16, 40):
        # Large and small: silu is near 0 or its argument.
        sizes = 4.0 ** torch.arange(-2, tokens - 2).clamp(max=3)
        x = (torch.randn(tokens, p.K, generator=g) * sizes[:, None]).bfloat16()
        want = linear(p, parts, x.double())
        now, old = (
            cpu.call(kernel, p, packed, x, None, cpu.Choice(((1, name),), "test")).double() - want
            for name in ("compiled", "decode")
        )
        assert now.shape == (tokens, 128)
        assert now.norm() <= max(1.3 * old.norm(), 2.0**-8 * want.norm())


@pytest.mark.parametrize(
    "other", [{"bias": True}, {"act": "gelu"}, {"N": 192}, {"pairs": "", "act": ""}, {"rank": 4}]
)
def test_pairs_with_addends_are_joined_behind_the_product(other: dict[str, Any]) -> None:
    assert compiled.joins(GATED)
    assert not compiled.joins(replace(GATED, **other))


@here
def test_inputs_lie_anywhere_and_rows_need_not_be_neighbours(way: compiled.CompiledWay) -> None:
    p = Problem(64, 96, group=32, x_dtype="bf16")
    g = torch.Generator().manual_seed(0)
    kernel, _ = cpu.choose(p)
    assert kernel is not None
    packed = cpu.pack(kernel, p, random_parts(p, g))
    wide = torch.randn(20, 101, generator=g).bfloat16()
    x = wide[:, 3:99]
    assert torch.equal(way(p, x, packed), way(p, x.contiguous(), packed))
    turned = torch.randn(96, 20, generator=g).bfloat16().t()
    assert torch.equal(way(p, turned, packed), way(p, turned.contiguous(), packed))
    assert torch.equal(way(p, x.float(), packed), way(p, x, packed))


@here
def test_threads_share_the_rows_of_the_weight(way: compiled.CompiledWay) -> None:
    p = Problem(320, 640, group=128, x_dtype="bf16")
    g = torch.Generator().manual_seed(0)
    kernel, _ = cpu.choose(p)
    assert kernel is not None
    packed = cpu.pack(kernel, p, random_parts(p, g))
    x = torch.randn(70, 640, generator=g).bfloat16()
    alone, threads = way(p, x, packed), torch.get_num_threads()
    torch.set_num_threads(3)
    try:
        assert torch.equal(way(p, x, packed), alone)
    finally:
        torch.set_num_threads(threads)


@here
def test_one_library_serves_every_shape_of_a_program(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Planes of four bits and pairs of them; no tensor is held twice; the plan names the way."""
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    monkeypatch.setattr(compiled, "_measured", lambda *_: cpu.Choice(((1, "compiled"),), "test"))
    m = Maker(torch.bfloat16)
    h = m.input("h", 64)
    weights = (Weight(64, 64, group=64), Weight(96, 64, group=32), Weight(64, 64, bits=8, group=32))
    program = m.output(*(m.linear(h, f"w{i}", w) for i, w in enumerate(weights)))
    plain, lowered = lower(program, "cpu"), lower(program, "cpu", compiled=True)
    (library,) = tmp_path.rglob("*.so")
    assert not library.parent.stat().st_mode & (stat.S_IRWXG | stat.S_IRWXO)
    assert all("compiled (test)" in p.note for p in lowered.placed)
    assert lowered.resident_bytes == plain.resident_bytes
    x = torch.randn(2, 70, 64, generator=torch.Generator().manual_seed(0)).bfloat16()
    exact = run(program, {"h": x})
    found = run(lowered.program, {"h": x}, implementations=lowered.implementations)
    for y, want in zip(found, exact, strict=True):
        assert (y.float() - want.float()).norm() <= 0.01 * want.float().norm()


@here
def test_the_fastest_way_is_taken_by_number_of_tokens(monkeypatch: pytest.MonkeyPatch) -> None:
    def timed(calls: dict[str, object], **_: object) -> dict[str, float]:
        tokens = next(iter(calls.values())).args[3].shape[0]  # type: ignore[attr-defined]
        return {n: 1.0 if (n == "compiled") is (8 <= tokens < 512) else 2.0 for n in calls}

    monkeypatch.setattr("llmc.codegen.cpu.tune.timed", timed)
    p = Problem(64, 64, group=64, x_dtype="bf16")
    old = cpu.Choice(((1, "int4pack"), (100, "decode")), "test")
    kernel, _ = cpu.choose(p)
    assert kernel is not None
    packed = cpu.pack(kernel, p, random_parts(p, torch.Generator().manual_seed(0)))
    monkeypatch.setattr(compiled, "_TIMED", {})
    _, same, choice = compiled.attach(kernel, p, packed, old)
    assert choice.steps == ((1, "int4pack"), (8, "compiled"), (512, "decode"))
    assert same is packed


@here
def test_a_broken_library_says_what_to_do(tmp_path: Path) -> None:
    path = tmp_path / "int4.so"
    path.write_text("not a library")
    with pytest.raises(ResourceError, match="cannot load a compiled kernel") as e:
        compiled._loaded(path)
    assert "\n" not in str(e.value)
    assert str(path) in str(e.value)


@here
def test_a_compiler_that_fails_is_named(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    monkeypatch.setenv("CXX", "false")
    with pytest.raises(ResourceError, match="cannot compile int4 products: false: exit 1"):
        compiled.library()
    assert not list(tmp_path.rglob("*.so"))


@here
def test_a_cache_that_others_may_write_is_refused(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    folder = tmp_path / "llmc" / "compiled"
    folder.mkdir(parents=True)
    folder.chmod(0o777)
    with pytest.raises(ResourceError, match="owned and writable by you alone"):
        compiled.library()
