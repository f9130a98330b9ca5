"""The facts of compiled kernels on the page: current, lawful, and what a compiler gives again."""

from __future__ import annotations

import json
import resource
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any

import pytest

from llmc.codegen import facts
from llmc.codegen.aot import AotFacts
from llmc.codegen.kernels import INNER, ROWS
from llmc.codegen.kernels import row as row_named
from llmc.codegen.row import KernelRow, TileConfig
from llmc.codegen.rows.int4 import W4A16
from llmc.codegen.variants import TARGETS, Variant, typical, unsupported, variants
from llmc.compiler.ir.errors import ResourceError

ALL = variants((*ROWS, *INNER))
SAMPLE = 4


@pytest.fixture(scope="module")
def page(repo: Path, update_golden: bool) -> dict[str, Any]:
    """`spec/kernels.json`; made anew under --update-golden."""
    path = repo / "spec" / "kernels.json"
    if update_golden:
        told = facts.page(ALL, facts.gather(ALL))
        path.write_text(json.dumps(told, indent=1) + "\n")
    found: dict[str, Any] = json.loads(path.read_text())
    return found


def key(told: dict[str, Any]) -> tuple[Any, ...]:
    return told["row"], told["what"], told["target"], TileConfig(**told["config"])


@pytest.fixture(scope="module")
def told(page: dict[str, Any]) -> dict[tuple[Any, ...], dict[str, Any]]:
    """The facts on the page by variant."""
    return {key(f): f for f in page["facts"]}


def known(variant: Variant, told: dict[tuple[Any, ...], dict[str, Any]]) -> dict[str, Any]:
    return told[variant.row, variant.what, variant.target, variant.config]


def test_the_page_is_of_these_sources(told: dict[tuple[Any, ...], dict[str, Any]]) -> None:
    """Every documented variant and no other, with the digest of its source as it is now."""
    stale = f"stale: {facts.COMMAND}"
    assert {(v.row, v.what, v.target, v.config) for v in ALL} == set(told), stale
    for variant in ALL:
        fact = known(variant, told)
        why = unsupported(row_named(variant.row), variant.target)
        assert fact.get("unsupported") == why
        if why is None:
            assert fact["digest"] == facts.digest(variant)[:16], f"{facts.label(variant)} {stale}"
        assert fact["problem"] == variant.fields


def test_every_variant_keeps_the_laws(told: dict[tuple[Any, ...], dict[str, Any]]) -> None:
    """No spills, no local memory, the matrix instruction that its row declares, room to run."""
    broken = []
    for variant in ALL:
        fact = known(variant, told)
        if "unsupported" not in fact:
            broken += [f"{facts.label(variant)}: {w}" for w in facts.faults(variant, read(fact))]
    assert not broken


def read(fact: dict[str, Any]) -> AotFacts:
    """Facts from their entry on the page."""
    drop = ("what", "problem", "digest")
    return facts.from_json({k: v for k, v in fact.items() if k not in drop})


def test_decoding_four_bits_is_cheap(told: dict[tuple[Any, ...], dict[str, Any]]) -> None:
    """W4 decode: at most 3 issue slots per weight and 2 stores to shared memory in the loop."""
    of = [f for f in told.values() if f["row"] == "w4a16" and f["what"] == "plain"]
    assert {f["target"] for f in of} == set(TARGETS)
    assert all(f["loop_stores"] <= 2 and f["conversions"] == 0 for f in of)
    assert all(1.0 < f["slots"] <= 3.0 for f in of if f["target"] == "sm_90"), of
    decode = [f for f in of if f["config"]["BM"] == 8]
    assert decode
    assert all(1.0 < f["slots"] <= 3.0 for f in decode), decode


def _sample() -> list[Variant]:
    """Other variants whenever sources change: those with the least digests."""
    return sorted(ALL, key=facts.digest)[:SAMPLE]


@pytest.mark.parametrize("variant", _sample(), ids=facts.label)
def test_the_compiler_gives_the_page_again(
    variant: Variant, told: dict[tuple[Any, ...], dict[str, Any]]
) -> None:
    """Compiled here and now, not read from a cache."""
    fact = known(variant, told)
    if "unsupported" in fact:
        assert unsupported(row_named(variant.row), variant.target) == fact["unsupported"]
    else:
        assert replace(facts.compiled(variant), row=variant.row) == replace(
            read(fact), row=variant.row
        )


@pytest.mark.slow
@pytest.mark.parametrize("row", [*ROWS, *INNER], ids=lambda r: r.name)
def test_the_compiler_gives_the_whole_page_again(
    row: KernelRow,
    told: dict[tuple[Any, ...], dict[str, Any]],
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """Every variant, from an empty cache."""
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    monkeypatch.setenv("TRITON_CACHE_DIR", str(tmp_path / "triton"))
    wanted = [v for v in ALL if v.row == row.name]
    for variant, found in zip(wanted, facts.gather(wanted), strict=True):
        fact = known(variant, told)
        if isinstance(found, str):
            assert fact["unsupported"] == found
        else:
            assert asdict(read(fact)) | {"row": row.name} == asdict(found) | {"row": row.name}


@pytest.mark.slow
def test_48_variants_compile_in_a_minute_on_two_cores(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """By the processor time of all processes, which others on the machine do not change."""
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    monkeypatch.setenv("TRITON_CACHE_DIR", str(tmp_path / "triton"))
    began = resource.getrusage(resource.RUSAGE_CHILDREN)
    wanted = ALL[:: max(1, len(ALL) // 48)][:48]
    assert len(facts.gather(wanted)) == 48
    done = resource.getrusage(resource.RUSAGE_CHILDREN)
    seconds = done.ru_utime + done.ru_stime - began.ru_utime - began.ru_stime
    print(f"48 variants: {seconds:.0f} processor seconds")
    assert seconds / facts.PROCESSES < 60


def test_facts_are_kept_by_what_they_are_of(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A second call compiles nothing; another tile is other facts; a broken file is no fact."""
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    problem = typical(W4A16)
    assert problem is not None
    one = Variant("w4a16", "plain", problem, TileConfig(8, 32, warps=2), "sm_80")
    calls: list[Variant] = []

    def counted(variant: Variant) -> AotFacts:
        calls.append(variant)
        return original(variant)

    original = facts.compiled
    monkeypatch.setattr(facts, "compiled", counted)
    first = facts.gather([one, one])
    assert facts.gather([one]) == first[:1]
    assert calls == [one]
    (kept,) = (tmp_path / "llmc" / "facts").iterdir()
    kept.write_text("{")
    assert facts.gather([one]) == first[:1]
    assert calls == [one, one]
    other = replace(one, config=TileConfig(16, 64))
    assert facts.digest(other) != facts.digest(one)


def test_a_machine_without_a_row_is_told_not_compiled(monkeypatch: pytest.MonkeyPatch) -> None:
    """What exists elsewhere only is no error, and is never compiled."""
    problem = typical(W4A16)
    assert problem is not None
    ours = replace(W4A16, targets=("sm_90",))
    monkeypatch.setattr(facts, "row_named", lambda name: ours)
    one = Variant("w4a16", "plain", problem, TileConfig(8, 32, warps=2), "sm_80")
    assert facts.gather([one]) == ["w4a16 is for sm_90"]
    assert unsupported(ours, "sm_90") is None


def test_faults_are_seen() -> None:
    """A spill, too much shared memory and a lost tensor core each are one fault."""
    problem = typical(W4A16)
    assert problem is not None
    one = Variant("w4a16", "plain", problem, TileConfig(16, 128), "sm_90")
    good = AotFacts("w4a16", "n", "sm_90", one.config, 90, 0, 4096, ("HGMMA.64x16x16.F32",), 0, 0,
                    2.5, 0.0)  # fmt: skip
    assert facts.faults(one, good) == []
    assert len(facts.faults(one, replace(good, stack=8, local_memory=2))) == 1
    assert len(facts.faults(one, replace(good, shared=1 << 20))) == 1
    found = facts.faults(one, replace(good, matrix=("HMMA.16816.F32",)))
    assert found == ["expected HGMMA.64x16x16.F32, found HMMA.16816.F32"]


def test_a_kernel_that_does_not_compile_is_named(monkeypatch: pytest.MonkeyPatch) -> None:
    """One line with the kernel, not a compiler's trace."""

    def broken(*args: object) -> AotFacts:
        raise ValueError("first line\nptxas gave up")

    problem = typical(W4A16)
    assert problem is not None
    one = Variant("w4a16", "plain", problem, TileConfig(16, 128), "sm_90")
    monkeypatch.setattr(facts, "compile_variant", broken)
    with pytest.raises(ResourceError, match=r"w4a16 plain 16x128 sm_90: ptxas gave up"):
        facts.compiled(one)


def test_every_row_has_documented_variants() -> None:
    """Each is for one of its typical problems, and one of its features is on in some."""
    assert {v.row for v in ALL} == {r.name for r in (*ROWS, *INNER)}
    assert len({(v.row, v.problem, v.config, v.target) for v in ALL}) == len(ALL)
    assert any(v.problem.rank for v in ALL)
    assert any(v.problem.pairs for v in ALL)
