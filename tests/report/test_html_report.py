"""The report as one file: every section, whatever was compiled; safe, small and the same twice."""

from __future__ import annotations

import copy
import json
import math
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from click.testing import CliRunner

from llmc.compiler.cli.look import inspect_command
from llmc.compiler.ir.errors import ModelError
from llmc.compiler.ir.serial import to_json
from llmc.compiler.report.layers import with_seconds
from llmc.compiler.runtime import artefact

SECTIONS = {"summary", "passes", "weights", "graph", "refusals", "settings"}
MEGABYTES_3 = 3_000_000
JOINT = "smooth,w4:group=16,prune24"
HOSTILE = "<script>alert('x')</script><img src=x onerror=alert(1)>\"'&{{ 7*7 }}</style></title>"


def again(folder: Path, out: Path, change: Callable[[dict[str, Any]], None]) -> Path:
    """The artefact with its JSON changed and sealed anew, as somebody else could."""
    a = artefact.load(folder)
    parts = copy.deepcopy({
        "report": a.report, "run": a.run, "plan": a.plan, "passes": a.manifest.passes,
        "fallbacks": a.manifest.fallbacks,
        "graphs": [(n.partition("-")[2], to_json(a.graph(n))) for n in a.graphs],
    })  # fmt: skip
    change(parts)
    artefact.save(out, artefact.Contents(a.program, a.schemes, **parts))
    return out


@pytest.mark.parametrize(
    ("passes", "told"),
    [
        ("w4:group=16", ("w4 g16", "saturation", "llmc.dequantize")),
        (JOINT, ("2:4 w4 g16", "Migrated scales", "llmc.expand_nm", "folds, 0 nodes added")),
        ("drop_layers:protect_first=0,protect_last=0", ("Structure", "drop_layers: block")),
        ("share_heads:kv=1", ("share_heads: keys", "k_error")),
        ("early_exit:agreement=0.5", ("exits softmax >=", "No weight was rewritten.")),
        ("w8,kivi:bits=2,group=4,residual=8", ("2 x kivi 2 bits", "none → 2 x kivi 2 bits")),
        ("a8,w8", ("llmc.round_input",)),
    ],
)  # fmt: skip
def test_sections_whatever_was_compiled(
    made: Callable[[str], Path], report: Callable[..., str], lawful: Callable[[str], Any],
    passes: str, told: tuple[str, ...],
) -> None:  # fmt: skip
    """Each page is lawful HTML with every section, and says what these passes did."""
    page = lawful(report(made(passes)))
    assert set(page.ids) >= SECTIONS
    for words in told:
        assert words in page.text, words
    for name in (p.partition(":")[0] for p in passes.split(",")):
        if "=" not in name:
            assert f"→ {name}" in page.text, name
    assert "llmc compile model --passes" in page.text
    assert {"svg", "details", "table"} <= set(page.tags)
    assert "default-src 'none'; style-src 'unsafe-inline'" in page.policies


def test_nothing_but_a_program(
    made: Callable[[str], Path], report: Callable[..., str], lawful: Callable[[str], Any],
    tmp_path: Path,
) -> None:  # fmt: skip
    """An artefact without plan, report, run and graphs still has a page."""
    program = artefact.load(made("w4:group=16")).program
    artefact.save(tmp_path / "bare", artefact.Contents(program))
    page = lawful(report(tmp_path / "bare"))
    assert set(page.ids) >= SECTIONS
    assert "No weight was rewritten." in page.text
    assert "No pass refused a place." in page.text


def test_the_same_twice(made: Callable[[str], Path], report: Callable[..., str]) -> None:
    """One artefact, one page."""
    assert report(made(JOINT)) == report(made(JOINT))


def test_blocks_are_told_once(
    made: Callable[[str], Path], report: Callable[..., str], lawful: Callable[[str], Any]
) -> None:
    """Of the two alike blocks one is drawn; the other is named."""
    page = lawful(report(made(JOINT)))
    assert "block0 and 1 more alike: block1" in page.text
    assert (
        page.text.count("block0 and 1 more alike") == 3
    )  # two passes that add nodes, and the graph
    assert "block1 and" not in page.text


def test_a_pass_without_effect_is_greyed(
    made: Callable[[str], Path], report: Callable[..., str], tmp_path: Path
) -> None:
    """A pass that left the graph and every weight alone is marked, others are not."""

    def idle(parts: dict[str, Any]) -> None:
        row = dict(parts["passes"][0]) | {"pass": "idle", "sites": 0, "folds": {}}
        parts["passes"].insert(0, row)
        parts["graphs"].insert(1, ("idle", parts["graphs"][0][1]))

    page = report(again(made("w4:group=16"), tmp_path / "idle", idle))
    assert '<li class="unchanged" title="changed nothing">idle</li>' in page
    assert '<details class="unchanged">\n<summary><b>idle</b> changed nothing' in page
    assert "<li>w4</li>" in page


def test_strings_are_escaped(
    made: Callable[[str], Path], report: Callable[..., str], lawful: Callable[[str], Any],
    tmp_path: Path,
) -> None:  # fmt: skip
    """Whatever an artefact holds as text is text in the page: names, paths, reasons, knobs."""

    def poison(parts: dict[str, Any]) -> None:
        for row in parts["report"]["sites"]:
            row |= {"path": HOSTILE, "role": HOSTILE, "scheme": HOSTILE, "fallbacks": [HOSTILE],
                    "site": HOSTILE + row["site"], "loss": 0.5}  # fmt: skip
        parts["report"]["refusals"] = [
            dict.fromkeys(("by", "node", "reason", "predicate", "path"), HOSTILE)
        ]
        parts["report"]["fallbacks"] = [{"site": HOSTILE, "reasons": [HOSTILE]}]
        parts["report"]["record"] |= {"passes": HOSTILE, "calibration": {"data": HOSTILE}}
        for row in parts["passes"]:
            row |= {"knobs": {HOSTILE: HOSTILE}, "given": {HOSTILE: HOSTILE}, "effect": HOSTILE}
        parts["run"] |= {"command": ["compile", HOSTILE], "host": {HOSTILE: HOSTILE}}
        parts["plan"]["order"][0]["why"] = HOSTILE

    name = "<b onclick=x>&amp"
    source = report(again(made(JOINT), tmp_path / name, poison))
    page = lawful(source)
    assert "{{ 7*7 }}" in page.text
    assert "49</style>" not in page.text
    assert "<script" not in source
    assert "onerror=alert(1)>" not in source
    assert f"{name} · llmc report" in page.text
    assert page.text.count("<script>alert('x')</script>") > 20


@pytest.mark.parametrize(
    ("where", "value", "said"),
    [
        (("report", "sites"), {"a": 1}, "expected a list of objects"),
        (("report", "sites"), [{"site": 3}], "expected str for site, found 3"),
        (("report", "refusals"), ["text"], "expected a list of objects"),
        (("report", "folds"), [{"site": "a"}], "expected str for pass, found None"),
        (("report", "structure"), [7], "expected a list of objects"),
        (("report", "sites", 0, "fallbacks"), 3, "expected a list of texts, found 3"),
        (("report", "sites", 0, "loss"), 1e308, "expected a number for loss"),
        (("passes",), [{"pass": "w4"}], "expected int for stage, found None"),
        (("graphs",), [], "expected a graph before and after each of 1 passes, found 0"),
    ],
)
def test_records_of_another_form_are_refused(
    made: Callable[[str], Path], report: Callable[..., str], tmp_path: Path,
    where: tuple[str | int, ...], value: Any, said: str,
) -> None:  # fmt: skip
    """A record that llmc does not write is named, not met as a crash."""

    def put(parts: dict[str, Any]) -> None:
        into: Any = parts
        for key in where[:-1]:
            into = into[key]
        into[where[-1]] = value

    with pytest.raises(ModelError, match=said):
        report(again(made("w4:group=16"), tmp_path / "odd", put))


def layers(parts: dict[str, Any], count: int = 32) -> None:
    """The records of a model of many layers, every field full."""
    first = [s for s in parts["report"]["sites"] if s["site"].startswith("block0/")]
    sites, rows = [], []
    for i in range(count):
        for s in first:
            more = {"outliers": 0.01 * (i % 3 + 1), "recovered": 0.02, "rank": i, "rows_rtn": i,
                    "zeros": 0.5 + 0.001 * i, "tokens": 1000 + i, "damp": 0.01 * (1 + i % 2),
                    "loss": 0.01 * math.exp(-i / 7), "bits": 3.5 + i % 2,
                    "fallbacks": ["the factor was not positive: damping was raised"]}  # fmt: skip
            site = s["site"].replace("block0", f"block{i}")
            path = s["path"].replace(".0.", f".{i}.")
            sites.append(s | more | {"site": site, "path": path})
        rows.append({
            "group": f"block{i}/qkv", "sites": [sites[-1]["site"]], "roles": ["q", "k", "v"],
            "option": "w4:group=16", "bytes": 1000, "bits": 4.5,
            "predicted": {"fisher": 0.001 * (i + 1), "proxy": None},
        })  # fmt: skip
    told = parts["report"]
    told["sites"] = sites
    told["fallbacks"] = [{"site": s["site"], "reasons": s["fallbacks"]} for s in sites]
    told["folds"] = [
        {"site": s["site"], "pass": "smooth", "kind": "norm", "scales": 64, "moved": 64,
         "smallest": 0.5, "largest": 2.0} for s in sites
    ]  # fmt: skip
    told["refusals"] = [
        {"by": "w4", "node": f"linear_{i}", "reason": f"reason {i}", "predicate": "p", "path": "m"}
        for i in range(len(sites))
    ]
    tries = [
        {"by": f"w{n} everywhere", "bytes": 1000 * n, "bits": n + 0.5, "loss": 3.0,
         "perplexity": 30.0 - n, "rise": 0.1, "predicted_rise": None, "fits": n < 5,
         "chosen": n == 4} for n in (2, 3, 4, 8)
    ]  # fmt: skip
    told["record"]["mixed"] = {
        "target": "--bits 4.25", "options": ["w3", "w4"], "weights": 64000, "bits": 4.25,
        "model_bytes": 40_000, "model_share": 0.3,
        "by": "fisher", "table": rows, "tries": tries, "measures": ["fisher", "proxy"],
        "held_out": {"from": "elsewhere", "windows": 4}, "dense": {"perplexity": 20.0},
        "frontier": {"fisher": {"bytes": [i * 1000 for i in range(1, 65)],
                                "predicted": [1 / i for i in range(1, 65)]}},
    }  # fmt: skip


def test_many_layers_stay_small(
    made: Callable[[str], Path], report: Callable[..., str], lawful: Callable[[str], Any],
    tmp_path: Path,
) -> None:  # fmt: skip
    """32 layers with every field full are far below 3 MB, and each layer is drawn."""
    source = report(again(made(JOINT), tmp_path / "deep", layers))
    page = lawful(source)
    assert len(source.encode()) < MEGABYTES_3 / 2
    for name in ("error", "bits", "tokens seen", "saturation", "zeros", "outliers", "rank",
                 "rows rounded", "damping", "sensitivity"):  # fmt: skip
        assert f"{name} by layer and role: " in source, name
    assert source.count("<title>block31 ") >= 60  # seven roles of nine or more heat maps
    assert "recovered: 2.00% everywhere" in page.text
    assert "mixed" in page.ids
    assert "Every weight (224)" in page.text


def test_seconds_of_rounds_are_summed() -> None:
    """Two solves of one weight took their sum; odd rows and a run without times say nothing."""
    sites = [{"site": "a"}, {"site": "b"}]
    solves = [{"site": "a", "seconds": 1.5}, {"site": "a", "seconds": 0.25}, {"site": "b"}, 3]
    assert with_seconds(sites, {"times": {"solves": solves}}) == [
        {"site": "a", "seconds": 1.75}, {"site": "b"},
    ]  # fmt: skip
    assert with_seconds(sites, {"times": []}) == sites


@pytest.mark.slow
def test_a_real_model_of_32_layers_stays_small(
    report: Callable[..., str], lawful: Callable[[str], Any], tmp_path: Path
) -> None:
    """A captured and coded Llama of 32 layers."""
    from tiny_models import make

    import llmc

    done = llmc.compile(make("llama", num_hidden_layers=32), passes="w4:group=16,solver=rtn")
    done.save(tmp_path / "deep")
    source = report(tmp_path / "deep")
    assert len(source.encode()) < MEGABYTES_3 / 2
    assert "block0 and 31 more alike: block1 … block31" in lawful(source).text


def test_mixed_precision_shows_frontier_and_table(
    made: Callable[[str], Path], report: Callable[..., str], lawful: Callable[[str], Any],
    tmp_path: Path,
) -> None:  # fmt: skip
    """The frontier with the chosen point, what was tried, and a row per group."""
    source = report(again(made("w4:group=16"), tmp_path / "mixed", layers))
    section = source[source.index('<section id="mixed">') : source.index('<section id="weights">')]
    page = lawful(source)
    assert section.count('class="chosen"') == 2  # on the frontier and among the tries
    assert "frontier of fisher: the least predicted loss at each size" in section
    assert "w4 everywhere 4.500 4 kB 26.0000 0.1 - chosen" in page.text
    assert "The table that was chosen (32 groups)" in page.text
    assert "asked --bits 4.25" in page.text


@pytest.mark.parametrize(
    ("key", "value", "said"),
    [
        ("table", None, "expected a list of objects"),
        ("tries", [{"by": "w4"}], "expected int for bytes, found None"),
        ("frontier", {"fisher": {"bytes": [1], "predicted": []}}, "as many bytes as losses"),
        ("frontier", {"fisher": {"bytes": "text"}}, "expected a list of numbers for bytes"),
        ("measures", ["other"], "expected a predicted loss by each of"),
        ("measures", [[]], "expected a list of texts"),
        ("bits", 1e308, "expected float for bits"),
        ("weights", 10**400, "expected int for weights"),
        ("frontier", {"fisher": {"bytes": [1e308, 1], "predicted": [1, 2]}}, "list of numbers"),
        ("measures", [], "expected a predicted loss by each of"),
        ("dense", {}, "expected float for perplexity"),
    ],
)
def test_a_mixture_of_another_form_is_refused(
    made: Callable[[str], Path], report: Callable[..., str], tmp_path: Path, key: str, value: Any,
    said: str,
) -> None:  # fmt: skip
    """The record of mixed precision is checked as the others are."""

    def put(parts: dict[str, Any]) -> None:
        layers(parts, 2)
        parts["report"]["record"]["mixed"][key] = value

    with pytest.raises(ModelError, match=said):
        report(again(made("w4:group=16"), tmp_path / "odd", put))


def test_evaluations_give_a_front(
    made: Callable[[str], Path], report: Callable[..., str], lawful: Callable[[str], Any]
) -> None:
    """Results with perplexities are drawn; what another beats on both axes is off the front."""
    folders = [made(p) for p in (JOINT, "w4:group=16", "a8,w8")]
    found = []
    for folder, perplexity in zip(folders, (31.0, 24.0, 25.0), strict=True):
        total = json.loads((folder / "report.json").read_text())["totals"]["bytes_after"]
        found.append({
            "source": str(folder), "size": {"total": total, "bits_per_linear_weight": 4.0},
            "quality": {"data": "text.txt", "sha256": "ab" * 32, "window": 24, "windows": 4,
                        "perplexity": perplexity},
        })  # fmt: skip
    base = copy.deepcopy(found[0])
    base |= {"source": "dense"}
    base["size"] = {"total": 1_000_000, "bits_per_linear_weight": 32.0}
    base["quality"]["perplexity"] = 20.0
    found[0]["baseline"] = base
    page = lawful(report(folders[0], [str(f) for f in folders[1:]], found))
    text = page.text[page.text.index("Comparison") : page.text.index("Passes")]
    assert "perplexity 31 20 before; text.txt, windows of 24" in page.text
    assert "Measured on text.txt (abababababab), 4 windows of 24." in text
    assert "dense 1 MB 32 20 best of its size" in text
    assert text.count("best of its size") == 3  # all but a8,w8, which w4 beats on both axes
    assert "comparison" in page.ids


@pytest.mark.parametrize("mixed", [{}, 3, {"measures": []}, "bits"])
def test_inspect_refuses_a_mixture_of_another_form(
    made: Callable[[str], Path], tmp_path: Path, mixed: Any
) -> None:
    """What a terminal shows of it is checked as the page's is: exit code 3."""

    def put(parts: dict[str, Any]) -> None:
        layers(parts, 2)
        parts["report"]["structure"] = []
        if mixed == "bits":
            parts["report"]["record"]["mixed"]["table"][0]["bits"] = 0
        else:
            parts["report"]["record"]["mixed"] = mixed

    found = CliRunner().invoke(
        inspect_command, [str(again(made("w4:group=16"), tmp_path / "odd", put))]
    )
    assert isinstance(found.exception, ModelError)
    assert found.exception.exit_code == 3
