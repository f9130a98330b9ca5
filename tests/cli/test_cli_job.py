"""The main job on a tiny model: plan, compile, run, eval, inspect, diff, explain, verify."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

Call = Callable[..., Any]


def test_plan_says_order_sites_and_refusals(llmc: Call, tiny: Path) -> None:
    """The plan lists everything that compiling would do, and its JSON is the same plan."""
    done = llmc("plan", tiny, "--passes", "w4,smooth,prune24")
    assert done.code == 0
    order = done.out.split("Scale migrations")[0]
    assert order.index("smooth") < order.index("prune24") < order.index("w4")
    assert "folded before anything is measured" in done.out
    assert "joint" in done.out
    assert "last group of 96 of 96 inputs" not in done.out
    data = llmc("plan", tiny, "--passes", "w4,smooth,prune24", "--json").json["plan"]
    assert [o["pass"] for o in data["order"]] == ["smooth", "prune24", "w4"]
    assert len(data["sites"]) == 14
    assert data["refusals"][0]["predicate"]
    assert data["predicted"]["bytes_after"] < data["predicted"]["bytes_before"]


def test_plan_names_a_shorter_last_group(llmc: Call, tiny: Path) -> None:
    """The default group bends where it does not divide, and the plan says so."""
    done = llmc("plan", tiny, "--passes", "w4:solver=rtn", "-v", "--json")
    assert done.code == 0
    wide = [s for s in done.json["plan"]["sites"] if s["shape"][1] == 96]
    assert wide
    assert all("g128" not in s["scheme"] for s in wide)


def test_compile_prints_plan_before_and_result_after(
    llmc: Call, tiny: Path, small_run: list[object], tmp_path: Path
) -> None:
    """Messages go to stderr in order, the result to stdout; nothing else is written."""
    out = tmp_path / "o"
    done = llmc("compile", tiny, "-p", "w4:group=32", "-o", out, "-v", *small_run)
    assert done.code == 0, done.err
    assert done.err.index("Order") < done.err.index("block0/linear0") < done.err.index("writing")
    assert "loss" in done.out
    assert f"wrote {out}" in done.out
    assert sorted(p.name for p in tmp_path.iterdir()) == ["o"]


def test_quiet_says_nothing_on_stderr(
    llmc: Call, tiny: Path, small_run: list[object], tmp_path: Path
) -> None:
    """--quiet with --json leaves one object and silence; the report is in it."""
    out = tmp_path / "o"
    args = ["--passes", "prune24:solver=magnitude", "-o", out, "--quiet", "--json", *small_run]
    done = llmc("compile", tiny, *args)
    assert (done.code, done.err) == (0, "")
    told = done.json["report"]
    assert told["totals"]["sites"] == 14
    assert all(s["zeros"] == 0.5 for s in told["sites"])


def test_every_order_gives_the_same_content(
    llmc: Call, tiny: Path, artefact: Path, small_run: list[object], tmp_path: Path
) -> None:
    """Order inside one string is free: content hashes are equal, and seeds are not forgotten."""
    out = tmp_path / "o"
    done = llmc("compile", tiny, "-p", "prune24,w4:group=32,smooth", "-o", out, *small_run)
    assert done.code == 0, done.err
    hashes = [
        json.loads((f / "manifest.json").read_text())["content_hash"] for f in (artefact, out)
    ]
    assert hashes[0] == hashes[1]
    done = llmc("compile", tiny, "-p", "prune24,w4:group=32,smooth", "-o", out, "--force",
                "--seed", 1, *small_run)  # fmt: skip
    assert done.code == 0
    assert content_hash(out) != content_hash(artefact)


def content_hash(folder: Path) -> str:
    """The content hash that an artefact states."""
    return str(json.loads((folder / "manifest.json").read_text())["content_hash"])


def test_recipe_file(llmc: Call, tiny: Path, small_run: list[object], tmp_path: Path) -> None:
    """A recipe with a per-site override leaves that site alone, and explain says why."""
    recipe = tmp_path / "r.yaml"
    recipe.write_text(
        "version: 1\nstages:\n  - w4: {group: 32}\noverrides:\n  - where: {role: [down]}\n"
        "    skip: [w4]\n"
    )
    out = tmp_path / "o"
    done = llmc("compile", tiny, "--recipe", recipe, "-o", out, "--json", *small_run)
    assert done.code == 0, done.err
    assert {s["role"] for s in done.json["report"]["sites"]} == {"q", "k", "v", "o", "gate", "up"}
    told = llmc("explain", "w4", out, "--json").json
    assert len(told["taken"]) == 12
    assert told["knobs"]["group"] == 32
    assert [r["condition"] for r in told["refused"]].count("override") == 2


def test_force_replaces_and_only_then(
    llmc: Call, tiny: Path, artefact: Path, small_run: list[object], tmp_path: Path
) -> None:
    """An existing output stays as it is without --force; with it, it is replaced."""
    out = tmp_path / "o"
    shutil.copytree(artefact, out)
    before = (out / "manifest.json").read_bytes()
    args = ["compile", tiny, "--passes", "w8:solver=rtn,group=32", "-o", out, *small_run]
    done = llmc(*args)
    assert done.code == 2
    assert "--force" in done.error
    assert (out / "manifest.json").read_bytes() == before
    assert llmc(*args, "--force").code == 0
    assert (out / "manifest.json").read_bytes() != before
    assert llmc("verify", out).code == 0


def test_run_streams_and_equals_the_python_door(llmc: Call, artefact: Path) -> None:
    """The text of ``llmc run`` is what ``llmc.load().generate`` gives; greedy is repeatable."""
    import llmc as package

    done = llmc("run", artefact, "--prompt", "def main(", "--max-new-tokens", 8)
    assert done.code == 0, done.err
    model = package.load(artefact)
    text = model.generate("def main(", max_new_tokens=8)
    assert done.out == f"def main({text}\n"
    told = llmc("run", artefact, "--prompt", "def main(", "--max-new-tokens", 8, "--json").json
    assert told["cached"]
    assert told["texts"][0]["text"] == text


def test_run_several_prompts_and_sampling(llmc: Call, artefact: Path) -> None:
    """Prompts of different length run as one batch; a seed fixes the draws."""
    args = ["run", artefact, "--prompt", "x", "--prompt", "import os\n", "--max-new-tokens", 6,
            "--temperature", 1.0, "--top-k", 50, "--json"]  # fmt: skip
    one, two = llmc(*args, "--seed", 3).json, llmc(*args, "--seed", 3).json
    assert one["texts"] == two["texts"]
    assert len(one["texts"]) == 2
    assert llmc(*args, "--seed", 4).json["texts"] != one["texts"]


@pytest.mark.parametrize(
    ("more", "hint"),
    [
        (["--temperature", "-1"], "temperature"),
        (["--greedy", "--top-k", "5"], "--greedy"),
        (["--top-p", "1.5"], "top_p"),
        (["--max-new-tokens", "0"], "max_new_tokens"),
        (["--prompt", ""], "at least one token"),
    ],
)
def test_run_refuses_bad_settings(llmc: Call, artefact: Path, more: list[str], hint: str) -> None:
    """A setting out of range exits 2 and is named."""
    done = llmc("run", artefact, "--prompt", "x", *more)
    assert done.code == 2
    assert hint in done.error


def test_eval_with_baseline(llmc: Call, artefact: Path, tiny: Path, text: Path) -> None:
    """Perplexity with its protocol, KL, agreement, size, speed and memory, in text and JSON."""
    args = ["eval", artefact, "--data", text, "--baseline", tiny, "--window", 32,
            "--max-windows", 8, "--prompt-tokens", 16, "--new-tokens", 2]  # fmt: skip
    done = llmc(*args, "--json")
    assert done.code == 0, done.err
    told = done.json
    quality, base = told["quality"], told["baseline"]
    assert (quality["window"], quality["windows"], quality["data"]) == (32, 8, "text.txt")
    assert 0 < quality["kl_to_baseline"] < 5
    assert 0 <= quality["top1_agreement"] <= 1
    assert base["comparison"]["low"] <= base["comparison"]["difference"]
    assert base["recovery"] == pytest.approx(base["quality"]["perplexity"] / quality["perplexity"])
    assert told["size"]["bits_per_linear_weight"] < base["size"]["bits_per_linear_weight"]
    assert told["speed"]["decode_tokens_per_second"] > 0
    assert told["peak_rss_bytes"] > 1e6
    assert base["size"]["resident_above_stored"] == []  # fp32 as stored
    shown = llmc(*args, "--no-speed")
    assert "no overlap, tail dropped" in shown.out
    assert "paired bootstrap over 8 windows" in shown.out
    assert "prefill" not in shown.out


def test_eval_gate(llmc: Call, artefact: Path, tiny: Path, text: Path) -> None:
    """--min-recovery exits 4 when missed, after the numbers were printed."""
    args = ["eval", artefact, "--data", text, "--baseline", tiny, "--window", 32,
            "--max-windows", 2, "--no-speed", "--json"]  # fmt: skip
    assert llmc(*args, "--min-recovery", 0.01).code == 0
    done = llmc(*args, "--min-recovery", 100)
    assert done.code == 4
    assert "recovery of at least 100" in done.error
    assert done.json["baseline"]["recovery"] < 100
    done = llmc("eval", artefact, "--data", text, "--min-recovery", 1)
    assert done.code == 2
    assert "--baseline" in done.error


def test_inspect_reads_headers_alone(
    llmc: Call, artefact: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """No tensor is loaded by inspect, diff, explain."""
    from llmc.compiler.runtime.tensors import ArtefactWeights

    def refuse(self: object, name: str) -> None:
        raise AssertionError(f"tensor {name} was read")

    monkeypatch.setattr(ArtefactWeights, "load", refuse)
    done = llmc("inspect", artefact)
    assert done.code == 0, done.err
    assert "2:4 w4 g32" in done.out
    assert "block1" in done.out
    told = llmc("inspect", artefact, "--json").json
    assert told["record"]["calibration"]["samples"] == 4
    assert told["record"]["settings"]["propagate"] == "compressed"
    assert len(told["sites"]) == 14
    assert llmc("diff", artefact, "--pass", "w4").code == 0
    assert llmc("explain", "w4", artefact).code == 0


def test_inspect_a_model_folder(llmc: Call, tiny: Path) -> None:
    """A dense model is inspected like an artefact, without schemes."""
    told = llmc("inspect", tiny, "--json").json
    assert [s["name"] for s in told["segments"]] == ["prologue", "block0", "block1", "epilogue"]
    assert [s["linears"] for s in told["segments"]] == [0, 7, 7, 1]
    assert "sites" not in told
    assert "block1" in llmc("inspect", tiny).out


def test_inspect_narrows(llmc: Call, artefact: Path) -> None:
    """--block, --path, --where and --python show parts of the graph."""
    rows = llmc("inspect", artefact, "--block", 1, "--json").json["nodes"]
    assert {r["segment"] for r in rows} == {"block1"}
    rows = llmc("inspect", artefact, "--path", "model.layers.0.mlp", "--json").json["nodes"]
    assert rows
    assert all(r["path"].startswith("model.layers.0.mlp") for r in rows)
    rows = llmc("inspect", artefact, "--where", "op=linear,input.users>2", "--json").json["nodes"]
    assert len(rows) == 6
    rows = llmc("inspect", artefact, "--where", "made_by=w4,op=dequantize", "--json").json["nodes"]
    assert len(rows) == 14
    python = llmc("inspect", artefact, "--python").out
    compile(python, "program.py", "exec")


@pytest.mark.parametrize(
    "bad",
    [["--block", "9"], ["--path", "nope"], ["--where", "colour=red"], ["--where", "x"],
     ["--where", "users=many"], ["--where", "path>3"], ["--block", "0", "--python"]],
)  # fmt: skip
def test_inspect_refuses_bad_queries(llmc: Call, artefact: Path, bad: list[str]) -> None:
    """What cannot be read or found exits 2."""
    assert llmc("inspect", artefact, *bad).code == 2


def test_diff_of_a_pass_that_rewrites_nodes(llmc: Call, artefact: Path) -> None:
    """Added and changed nodes with types and bytes; alike blocks are told once."""
    done = llmc("diff", artefact, "--pass", "w4")
    assert done.code == 0
    assert done.out.count("@@ block") == 1
    assert "1 more alike: block1" in done.out
    assert "+ " in done.out
    assert "llmc.dequantize(" in done.out
    everything = llmc("diff", artefact, "--pass", "w4", "--all")
    assert everything.out.count("@@ block") == 2
    told = llmc("diff", artefact, "--pass", "w4", "--json").json
    made = [c["after"] for c in told["changes"] if c["kind"] == "added"]
    assert sum(r["op"] == "llmc.dequantize" for r in made) == 14
    assert told["totals"]["bytes_after"] < told["totals"]["bytes_before"]
    columns = llmc("diff", artefact, "--pass", "w4", "--side-by-side")
    assert "before" in columns.out
    assert llmc("diff", artefact, "--pass", "w7").code == 2


def test_diff_of_a_pass_that_rewrites_parameters(llmc: Call, artefact: Path) -> None:
    """smooth changes no node: its parameters and scale ranges are listed."""
    told = llmc("diff", artefact, "--pass", "smooth", "--json").json
    assert told["changes"] == []
    assert {f["kind"] for f in told["folds"]} == {"norm", "value", "product"}
    assert all(f["smallest"] <= f["largest"] for f in told["folds"])
    assert len(told["rescaled"]["block0/norm0"]) == 4
    done = llmc("diff", artefact, "--pass", "smooth")
    assert "Parameters rescaled" in done.out
    assert "model.layers.0.input_layernorm.weight" in done.out


def test_explain_names_sites_and_misses(llmc: Call, artefact: Path, tiny: Path) -> None:
    """Every site and near miss, for an artefact and for a model; --node narrows."""
    for source in (artefact, tiny):
        told = llmc("explain", "prune24", source, "--json").json
        assert len(told["taken"]) == 14
        assert [r["condition"] for r in told["refused"]] == ["not_head"]
        assert "modeling_llama.py" in told["taken"][0]["source"]
    one = llmc("explain", "prune24", artefact, "--node", told["taken"][3]["node"], "--json").json
    assert [t["site"] for t in one["taken"]] == [told["taken"][3]["site"]]
    done = llmc("explain", "prune24", artefact, "--node", "input_ids")
    assert "does not look there" in done.out
    done = llmc("explain", "prune24", artefact, "--node", "linea_3")
    assert done.code == 2
    assert "linear_3" in done.error


def test_verify_finds_a_flipped_bit(llmc: Call, artefact: Path, tmp_path: Path) -> None:
    """A sound artefact exits 0; one flipped bit in the weights exits 3 and names the file."""
    assert llmc("verify", artefact).code == 0
    broken = tmp_path / "broken"
    shutil.copytree(artefact, broken)
    victim = max(broken.glob("*.safetensors"), key=lambda p: p.stat().st_size)
    data = bytearray(victim.read_bytes())
    data[-1] ^= 1
    victim.write_bytes(data)
    done = llmc("verify", broken)
    assert done.code == 3
    assert victim.name in done.out
    told = llmc("verify", broken, "--json")
    assert not told.json["sound"]
    assert told.json["findings"]


def test_kernels_without_a_gpu(llmc: Call, artefact: Path, tiny: Path) -> None:
    """Fused nodes with kernel row, bytes and floor."""
    told = llmc("kernels", artefact, "--json").json
    # Of each of two blocks: queries, keys and values; output; gate and up; down. Then the head.
    assert [r["kernel"] for r in told["fused"]] == [*["w4a16_24"] * 8, "w16"]
    assert sum("llmc.rms_norm" in r["parts"] for r in told["fused"]) == 5
    assert told["not_fused"] == []
    assert all("modeling_llama.py:" in line for r in told["fused"] for line in r["source"])
    assert all(r["source"] and r["path"] for r in told["fused"])
    assert told["floor_us"] == pytest.approx(1e6 * told["bytes"] / told["bandwidth"])
    more = llmc("kernels", artefact, "--tokens", 64, "--json").json
    assert more["bytes"] > told["bytes"]
    done = llmc("kernels", artefact, "--target", "cpu")
    assert "_weight_int4pack_mm" in done.out
    assert "2:4 w4 g32" in done.out
    dense = llmc("kernels", tiny, "--json").json
    assert {r["kernel"] for r in dense["fused"]} == {"w16"}
    assert llmc("kernels", tiny, "--target", "cpu", "--json").json["fused"] == []
    for bad in (["--tokens", 0], ["--aot", "sm_70"], ["--aot", "sm_80", "--target", "cpu"]):
        assert llmc("kernels", artefact, *bad).code == 2


def test_kernels_ahead_of_time(llmc: Call, artefact: Path) -> None:
    """--aot compiles each distinct problem without a GPU: no stack, registers within bounds."""
    pytest.importorskip("triton")
    told = llmc("kernels", artefact, "--aot", "sm_90", "--dtype", "bf16", "--json").json
    assert told["aot"]
    assert all(0 < f["registers"] <= 255 and f["target"] == "sm_90" for f in told["aot"])


def test_cpu_target_writes_text(llmc: Call, artefact: Path) -> None:
    """``run --target cpu`` goes through torch's own kernels and still gives tokens."""
    done = llmc("run", artefact, "--prompt", "def", "--target", "cpu", "--max-new-tokens", 4,
                "--json")  # fmt: skip
    assert done.code == 0, done.err
    assert done.json["target"] == "cpu"
