"""Mixed precision on the command line and in Python: the table, the recipe, refusals."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

Call = Callable[..., Any]
W4 = ("--passes", "w4:group=32")
FEW = ("--candidates", "w3,w4,w8", "--sensitivity", "fisher")


@pytest.fixture(scope="module")
def made(
    llmc: Call, tiny: Path, small_run: list[object], tmp_path_factory: pytest.TempPathFactory
) -> tuple[Any, Path, Path]:
    """A tiny model mixed at W4's stored bits: what was said, the artefact, the recipe."""
    folder = tmp_path_factory.mktemp("mixed")
    out, recipe = folder / "out", folder / "mixed.yaml"
    done = llmc("compile", tiny, *W4, "--bits", "4.5", *FEW, "--write-recipe", recipe, "-o", out,
                *small_run)  # fmt: skip
    assert done.code == 0, done.err
    return done, out, recipe


def test_compile_shows_what_was_tried_and_chosen(made: tuple[Any, Path, Path]) -> None:
    done, out, _ = made
    for text in ("mixing: w3:group=32 everywhere, 3.500 bits", "Mixed precision for --bits 4.5",
                 "Judged on", "as it is", "too large", "chosen"):  # fmt: skip
        assert text in done.err
    assert "--bits 4.5: " in done.out
    plan, report = (
        json.loads((out / f"{n}.json").read_text(encoding="utf-8")) for n in ("plan", "report")
    )
    mixed = plan["mixed"]
    assert mixed == report["record"]["mixed"]
    assert mixed["bits"] <= 4.5
    stored = {s["site"]: s["bytes_after"] for s in report["sites"]}
    assert sum(stored.values()) == mixed["bytes"]
    for row in mixed["table"]:
        assert sum(stored[s] for s in row["sites"]) == row["bytes"]
    assert report["totals"]["bytes_after"] == mixed["model_bytes"]


def test_inspect_shows_the_table(llmc: Call, made: tuple[Any, Path, Path]) -> None:
    done = llmc("inspect", made[1])
    assert done.code == 0
    assert "mixed    --bits 4.5: " in done.out
    assert "Mixed precision for --bits 4.5" in done.out


def test_the_written_recipe_gives_the_same_content(
    llmc: Call, tiny: Path, small_run: list[object], made: tuple[Any, Path, Path], tmp_path: Path
) -> None:
    _, out, recipe = made
    again = tmp_path / "again"
    done = llmc("compile", tiny, "--recipe", recipe, "-o", again, *small_run, "-q")
    assert done.code == 0, done.err
    one, two = (json.loads((f / "manifest.json").read_text(encoding="utf-8")) for f in (out, again))
    assert one["content_hash"] == two["content_hash"]


def test_plan_measures_and_shows_the_table(llmc: Call, tiny: Path, small_run: list[object]) -> None:
    done = llmc("plan", tiny, *W4, "--size", "84%", "--candidates", "w4,dense", "--json",
                *small_run)  # fmt: skip
    assert done.code == 0, done.err
    mixed = done.json["plan"]["mixed"]
    assert mixed["target"] == "--size 84%"
    assert mixed["model_share"] <= 0.84
    assert mixed["model_bytes"] == done.json["plan"]["predicted"]["bytes_after"]
    assert set(mixed["frontier"]) == {"fisher", "proxy"}


@pytest.mark.parametrize(
    ("args", "words"),
    [
        ((*W4, "--bits", "1.5"), "--bits: expected 2.5..32 bits per weight, found 1.5"),
        ((*W4, "--bits", "9", "--candidates", "w3,w8"), "expected 3.5..8.5 bits"),
        ((*W4, "--bits", "4", "--size", "60%"), "expected one of --bits, --size and --budget"),
        ((*W4, "--size", "2%"), "% of the model, found 2%"),
        ((*W4, "--size", "60"), "--size: expected a share such as 60%"),
        ((*W4, "--budget", "2%"), "--budget: expected ppl+2% or ppl+0.3, found '2%'"),
        ((*W4, "--candidates", "w3,w4"), "--candidates: expected --bits, --size or --budget"),
        ((*W4, "--bits", "4", "--sensitivity", "fischer"), "did you mean 'fisher'"),
        ((*W4, "--bits", "4", "--candidates", "w3,smooth"), "found 'smooth'"),
        (("--passes", "smooth", "--bits", "4"), "--bits: expected a pass that writes codes"),
        (("--passes", "fp4", "--bits", "4"), "several widths, found 'fp4'; --candidates"),
        (("--passes", "drop_layers,w4", "--bits", "4"), "expected passes that keep every shape"),
        ((*W4, "--bits", "4", "--write-recipe", "/nowhere/x.yaml"), "no folder to write into"),
        ((*W4, "--bits", "4", "--samples", "1", "--length", "128"), "windows"),
    ],
)
def test_bad_input_is_one_line(
    llmc: Call, tiny: Path, tmp_path: Path, args: tuple[str, ...], words: str
) -> None:
    text = tmp_path / "short.txt"
    text.write_text("x = 1\n" * 40, encoding="utf-8")
    run = ("--calibration", text) if "--samples" in args else ()
    done = llmc("compile", tiny, *args, *run, "-o", tmp_path / "out")
    assert (done.code, words in done.error) == (2, True), done.err
    assert not (tmp_path / "out").exists()


def test_python_takes_the_same_aims(tiny: Path, text: Path) -> None:
    import llmc
    from llmc.compiler.ir.errors import UsageError

    small = llmc.compile(tiny, "w4:group=32", calibration=text, samples=4, length=32, bits=4.0,
                         candidates="w3,w4", sensitivity="proxy")  # fmt: skip
    mixed = small.report["record"]["mixed"]
    assert mixed["target"] == "--bits 4"
    assert mixed["bits"] <= 4.0
    with pytest.raises(UsageError, match="one of --bits, --size and --budget"):
        llmc.compile(tiny, "w4", bits=4.0, budget="ppl+1%")
