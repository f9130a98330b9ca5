"""``llmc report`` and ``inspect --picture``: what is written, what is refused, in one line."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any
from xml.etree import ElementTree

import pytest


@pytest.fixture
def evaluation(llmc: Callable[..., Any], artefact: Path) -> dict[str, Any]:
    """What ``llmc eval --json`` would say of the artefact, its numbers made up."""
    size = llmc("inspect", artefact, "--json").json["size"]
    return {
        "format_version": 1, "command": "eval", "source": str(artefact),
        "size": {"total": size["total"], "bits_per_linear_weight": 3.5},
        "quality": {"data": "text.txt", "sha256": "0" * 64, "window": 32, "windows": 4,
                    "perplexity": 12.5},
    }  # fmt: skip


def test_report_is_written_beside_or_where_asked(
    llmc: Callable[..., Any], artefact: Path, tmp_path: Path, folder_digest: Callable[[Path], str]
) -> None:
    """The file appears whole, the artefact stays sound, and only --force replaces a file."""
    before = folder_digest(artefact)
    goal = tmp_path / "out.html"
    done = llmc("report", artefact, "-o", goal, "--json")
    assert done.code == 0, done.err
    assert done.json["bytes"] == goal.stat().st_size
    assert done.json["out"] == str(goal)
    source = goal.read_text(encoding="utf-8")
    assert source.startswith("<!DOCTYPE html>")
    assert "w4a16_24_" in source  # the kernel's source
    assert "import triton" in source
    again = llmc("report", artefact, "-o", goal)
    assert (again.code, again.error) == (
        2, f"llmc: -o: expected no file at {goal}, found one; --force replaces it",
    )  # fmt: skip
    assert llmc("report", artefact, "-o", goal, "--force").code == 0
    assert goal.read_text(encoding="utf-8") == source
    assert list(tmp_path.iterdir()) == [goal]
    assert folder_digest(artefact) == before
    beside = llmc("report", artefact)
    assert beside.code == 0
    assert artefact.with_name(f"{artefact.name}.html").read_text(encoding="utf-8") == source


def test_cpu_kernels_have_no_source(
    llmc: Callable[..., Any], artefact: Path, tmp_path: Path
) -> None:
    """Torch's own kernels are named, and what is not fused says why."""
    assert llmc("report", artefact, "-o", tmp_path / "a.html", "--target", "cpu").code == 0
    source = (tmp_path / "a.html").read_text(encoding="utf-8")
    assert "Lowered for cpu" in source
    assert "import triton" not in source


def test_evaluations_and_others_are_compared(
    llmc: Callable[..., Any], artefact: Path, tmp_path: Path, evaluation: dict[str, Any]
) -> None:
    """An evaluation fills the perplexity; one of another model is a result of its own."""
    mine, other = tmp_path / "mine.json", tmp_path / "other.json"
    more = {"speed": {"decode_tokens_per_second": 7.5}, "exits": {"blocks_per_token": None},
            "cache": "odd", "peak_rss_bytes": 2_000_000}  # fmt: skip
    mine.write_text(json.dumps(evaluation | more))
    evaluation |= {"source": "elsewhere"}
    evaluation["quality"]["perplexity"] = 10.25
    evaluation["size"]["bits_per_linear_weight"] = 16.0
    other.write_text(json.dumps(evaluation))
    done = llmc("report", artefact, "--eval", mine, "--eval", other, "-o", tmp_path / "a.html")
    assert done.code == 0, done.err
    source = (tmp_path / "a.html").read_text(encoding="utf-8")
    assert "<b>12.5</b>" in source
    assert "<dt>decode</dt><dd>7.5 tokens/s</dd>" in source
    assert "<dt>peak memory</dt><dd>2 MB</dd>" in source
    assert "layers per token" not in source
    section = source[source.index('<section id="comparison">') : source.index('id="passes"')]
    assert "elsewhere" in section
    assert section.count("<circle") == 2
    assert section.count("best of its size") == 2


def test_bad_input_is_one_line(
    llmc: Callable[..., Any], artefact: Path, tmp_path: Path, tiny: Path,
    evaluation: dict[str, Any],
) -> None:  # fmt: skip
    """No artefact, no place to write, no evaluation, another protocol: said, with the exit code."""
    odd, stale, shifted = (tmp_path / f"{n}.json" for n in ("odd", "stale", "shifted"))
    good = tmp_path / "good.json"
    good.write_text(json.dumps(evaluation))
    odd.write_text('{"command": "inspect"}')
    stale.write_text(json.dumps(evaluation | {"size": {"total": 1}}))
    quality = evaluation["quality"] | {"windows": 5}
    shifted.write_text(json.dumps(evaluation | {"source": "b", "quality": quality}))
    blank = tmp_path / "blank.json"
    blank.write_text(json.dumps(evaluation | {"quality": quality | {"perplexity": None}}))
    goal = ["-o", tmp_path / "a.html"]
    cases: list[tuple[list[object], int, str]] = [
        ([tmp_path / "none"], 3, "expected an artefact, found no folder"),
        ([tiny, *goal], 3, "expected an artefact, found a folder without manifest.json"),
        ([artefact, tiny, *goal], 3, "expected an artefact, found a folder without manifest.json"),
        ([artefact, "-o", artefact / "a.html"], 2, "-o: expected a place outside artefacts"),
        ([artefact, "-o", tmp_path], 2, "-o: expected a file, found the folder"),
        ([artefact, "-o", tmp_path / "no" / "a.html"], 2, "-o: expected a folder for"),
        ([artefact, "-o", good / "a.html"], 2, "-o: expected a folder for"),
        ([artefact, *goal, "--eval", tmp_path / "no.json"], 2, f"found {tmp_path / 'no.json'} (No"),
        ([artefact, *goal, "--eval", odd], 3, "expected the JSON of llmc eval --json"),
        ([artefact, *goal, "--eval", artefact / "tokenizer.json"], 3, "expected the JSON of llmc"),
        ([artefact, *goal, "--eval", blank], 3, "expected a value at quality.perplexity"),
        ([artefact, *goal, "--eval", stale], 3, "llmc eval again"),
        ([artefact, *goal, "--eval", good, "--eval", shifted], 2, "on the same windows"),
        ([artefact, *goal, "--target", "tpu"], 2, "--target"),
    ]
    for arguments, code, said in cases:
        done = llmc("report", *arguments)
        assert (done.code, said in done.error) == (code, True), (arguments, done.err)
    assert not (tmp_path / "a.html").exists()


def test_inspect_draws_what_it_shows(
    llmc: Callable[..., Any], artefact: Path, tmp_path: Path
) -> None:
    """A block, a query or the whole graph as SVG or DOT."""
    done = llmc("inspect", artefact, "--block", 0, "--picture", tmp_path / "b.svg")
    assert done.code == 0, done.err
    root = ElementTree.parse(tmp_path / "b.svg").getroot()
    assert root.tag == "{http://www.w3.org/2000/svg}svg"
    ops = [t.text for t in root.iter("{http://www.w3.org/2000/svg}text") if t.get("class") == "op"]
    assert ops.count("aten.linear") == 7
    assert llmc("inspect", artefact, "--picture", tmp_path / "all.dot").code == 0
    assert (tmp_path / "all.dot").read_text(encoding="utf-8").count('[label="aten.linear') == 15
    done = llmc("inspect", artefact, "--picture", tmp_path / "a.png")
    assert (done.code, "a name ending in .svg, .dot or .json" in done.error) == (2, True)
    done = llmc("inspect", artefact, "--picture", tmp_path / "no" / "a.svg")
    assert (done.code, "expected a file that can be written" in done.error) == (2, True)


def test_inspect_writes_for_model_explorer(
    llmc: Callable[..., Any], artefact: Path, tmp_path: Path
) -> None:
    """A collection as its reader wants it: every pass's graph, or the nodes that were asked for."""
    assert llmc("inspect", artefact, "--picture", tmp_path / "all.json").code == 0
    told = json.loads((tmp_path / "all.json").read_text(encoding="utf-8"))
    assert set(told) == {"label", "graphs"}
    assert told["graphs"][1]["id"].endswith("captured")
    for graph in told["graphs"]:
        ids = [n["id"] for n in graph["nodes"]]
        assert len(set(ids)) == len(ids)
        read = {e["sourceNodeId"] for n in graph["nodes"] for e in n["incomingEdges"]}
        assert read < set(ids)
        values = [a["value"] for n in graph["nodes"] for a in n["attrs"]]
        assert all(isinstance(v, str) for v in values)
    places = {n["namespace"] for n in told["graphs"][0]["nodes"]}
    assert any(p.startswith("block0/model/layers/0/mlp") for p in places)
    assert llmc("inspect", artefact, "--block", 0, "--picture", tmp_path / "b.json").code == 0
    (one,) = json.loads((tmp_path / "b.json").read_text(encoding="utf-8"))["graphs"]
    assert {n["namespace"].partition("/")[0] for n in one["nodes"]} == {"block0"}
