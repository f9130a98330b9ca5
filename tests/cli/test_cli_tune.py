"""`llmc tune`, and the dtype that it decides: what is measured, kept, refused and said."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from llmc.codegen.cpu import tune as measuring
from llmc.codegen.cpu.table import machine, measured
from llmc.codegen.tuning.cache import Entry, Table, write

Llmc = Callable[..., Any]


@pytest.fixture(autouse=True)
def cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A cache of the test's own, and measurements that take no time."""
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    monkeypatch.setattr(measuring, "SHAPES", ((64, 128),))
    monkeypatch.setattr(measuring, "TURNS", 1)
    return tmp_path


def test_a_dry_run_measures_nothing(llmc: Llmc, cache: Path) -> None:
    done = llmc("tune", "--target", "cpu", "--dry-run", "--tokens", "1,8", "--json")
    assert done.code == 0
    assert done.json["cache"] == "nothing was measured on this machine"
    rows = done.json["trials"]
    assert {"key": "int4 g128 64x128", "tokens": 8, "candidates": ["int4pack", "decode"]} in rows
    assert {r["tokens"] for r in rows} == {1, 8}
    assert not list(cache.rglob("*.json"))
    shown = llmc("tune", "--target", "cpu", "--dry-run")
    assert "To measure for cpu" in shown.out
    assert "nothing was measured on this machine" in shown.out


def test_measurements_are_kept_and_used(llmc: Llmc) -> None:
    done = llmc("tune", "--target", "cpu", "--tokens", "1,4", "--json")
    assert done.code == 0
    found = measured()
    assert found.table is not None
    assert found.path == Path(done.json["path"])
    assert [e.tokens for e in found.table.of("int4 g128 64x128")] == [1, 4]
    assert all(r["best"] == min(r["seconds"], key=r["seconds"].get) for r in done.json["trials"])
    again = llmc("tune", "--target", "cpu", "--dry-run")
    assert f"{len(found.table.entries)} choices in use" in again.out


def test_a_models_own_shapes_are_measured(llmc: Llmc, artefact: Path) -> None:
    done = llmc("tune", artefact, "--target", "cpu", "--tokens", "1", "--dry-run", "--json")
    assert done.code == 0
    assert done.json["trials"]
    assert not any("4096" in r["key"] for r in done.json["trials"])
    dense = llmc("kernels", artefact, "--target", "cpu", "--json").json["fused"]
    assert len(done.json["trials"]) <= len(dense)


def test_a_foreign_cache_is_not_used_and_replaced_with_a_word(llmc: Llmc) -> None:
    path = write(Table(machine(), (Entry("int4 g128 64x128", 1, {"int4pack": 1.0}),)))
    raw = json.loads(path.read_text())
    raw["machine"]["torch"] = "1.0"
    path.write_text(json.dumps(raw))
    dry = llmc("tune", "--target", "cpu", "--dry-run", "--json")
    assert "expected torch" in dry.json["cache"]
    assert "found 1.0" in dry.json["cache"]
    done = llmc("tune", "--target", "cpu", "--tokens", "1")
    assert done.code == 0
    assert "is replaced: expected torch" in done.err
    assert llmc("tune", "--target", "cpu", "--dry-run", "--json").json["cache"] == "used"


@pytest.mark.parametrize(
    ("args", "code", "words"),
    [
        (["--tokens", "0"], 2, "--tokens: expected numbers such as 1,16,512, found '0'"),
        (["--tokens", "1,x"], 2, "--tokens: expected numbers"),
        (["--target", "cup"], 2, "'cup' is not one of 'cpu', 'triton'"),
        (["no-such-model", "--target", "cpu"], 3, "no-such-model"),
    ],
)
def test_bad_input_is_one_line(llmc: Llmc, args: list[str], code: int, words: str) -> None:
    done = llmc("tune", *args)
    assert done.code == code
    assert words in done.error


def test_a_model_without_codes_has_nothing_to_measure(llmc: Llmc, tiny: Path) -> None:
    done = llmc("tune", tiny, "--target", "cpu", "--tokens", "1")
    assert done.code == 2
    assert "expected a compressed linear that cpu has a choice for, found none" in done.error


@pytest.mark.parametrize(("fast", "found"), [("bf16", "bf16"), ("fp32", "f32")])
def test_run_computes_in_the_dtype_that_was_measured_to_be_faster(
    llmc: Llmc, artefact: Path, fast: str, found: str
) -> None:
    seconds = {"bf16": 2.0, "fp32": 2.0} | {fast: 1.0}
    write(Table(machine(), (Entry("dense 64x64", 1, seconds),)))
    done = llmc("run", artefact, "--prompt", "def", "--max-new-tokens", "2", "--json")
    assert done.code == 0
    assert done.json["dtype"] == found
    assert f"computes in {found}: linears in bf16 take 1/" in done.err
    own = llmc("run", artefact, "--prompt", "def", "--max-new-tokens", "2", "--json",
               "--dtype", "f32")  # fmt: skip
    assert own.json["dtype"] == "f32"
    assert "computes in" not in own.err


def test_compiling_is_refused_where_it_cannot_help(
    llmc: Llmc, artefact: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    given = ("run", artefact, "--prompt", "a", "--compiled")
    done = llmc(*given, "--target", "reference")
    assert done.code == 2
    assert "--compiled: expected --target cpu, found reference" in done.error
    monkeypatch.setenv("CXX", "no-such-compiler")
    done = llmc(*given)
    assert done.code == 5
    assert "expected a C++ compiler (g++ or clang++), found no-such-compiler" in done.error


def test_kernels_say_which_way_is_taken_and_where_it_was_measured(
    llmc: Llmc, artefact: Path
) -> None:
    done = llmc("kernels", artefact, "--target", "cpu", "--tokens", "512", "--json").json["fused"]
    ways = {r["way"] for r in done if "int4pack" in r["kernel"]}
    assert ways == {"decode"}
    assert all("measured on" in r["ways"] for r in done if r["kernel"].endswith("for_cpu"))
    shown = llmc("kernels", artefact, "--target", "cpu").out
    assert "Ways by tokens, and where they were measured" in shown
    assert "aten::_weight_int4pack_mm_for_cpu (int4pack)" in shown


def test_eval_says_the_ways_at_length(llmc: Llmc, artefact: Path, text: Path) -> None:
    given = ("eval", artefact, "--data", text, "--max-windows", "1", "--window", "32",
             "--no-speed", "--target", "cpu")  # fmt: skip
    done = llmc(*given, "-v")
    assert done.code == 0
    assert "Ways by tokens, and where they were measured" in done.out
    assert "f32" in done.out.split("target cpu, ")[1].splitlines()[0]
    dense = llmc(*given, "--resident", "dense", "--dtype", "auto", "--json")
    assert dense.json["dtype"] in ("bf16", "f32")
