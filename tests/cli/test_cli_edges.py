"""Corners of the command line that a careful user meets."""

from __future__ import annotations

import json
import os
import re
import shutil
import stat
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

Call = Callable[..., Any]


def test_force_replaces_artefacts_only(
    llmc: Call, tiny: Path, tmp_path: Path, small_run: list[object],
    folder_digest: Callable[[Path], str],
) -> None:  # fmt: skip
    """--force never throws a model away, not even the one that is being compiled."""
    model = tmp_path / "model"
    shutil.copytree(tiny, model)
    before = folder_digest(model)
    done = llmc("compile", model, "-p", "w4:group=32", "-o", model, "--force", *small_run)
    assert done.code == 2
    assert "expected an artefact to replace" in done.error
    assert folder_digest(model) == before


def test_python_door_replaces_artefacts_only(artefact: Path, tmp_path: Path) -> None:
    """``save(force=True)`` keeps the same law; an empty folder is nobody's."""
    import llmc
    from llmc.compiler.ir.errors import UsageError

    (tmp_path / "mine").mkdir()
    small = llmc.load(artefact)
    small.save(tmp_path / "mine", force=True)
    (tmp_path / "notes").mkdir()
    (tmp_path / "notes" / "a.txt").write_text("keep")
    with pytest.raises(UsageError, match="something else"):
        small.save(tmp_path / "notes", force=True)
    assert (tmp_path / "notes" / "a.txt").read_text() == "keep"


def test_an_artefact_is_no_model(llmc: Call, artefact: Path, tmp_path: Path) -> None:
    """Compiling an artefact again is refused in those words."""
    done = llmc("compile", artefact, "-p", "w4", "-o", tmp_path / "again")
    assert done.code == 3
    assert "expected a model, found an artefact" in done.error
    assert llmc("plan", artefact, "-p", "w4").code == 3


def test_files_of_an_artefact_have_one_mode(artefact: Path) -> None:
    """The process's umask decides, for weights as for JSON."""
    bits = os.umask(0o022)
    os.umask(bits)
    found = {stat.S_IMODE(p.stat().st_mode) for p in artefact.rglob("*") if p.is_file()}
    assert found == {0o666 & ~bits}


def test_home_is_expanded(
    llmc: Call, artefact: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """``~`` that a shell left alone means home for artefacts too."""
    shutil.copytree(artefact, tmp_path / "a")
    monkeypatch.setenv("HOME", str(tmp_path))
    assert "content" in llmc("inspect", "~/a").out


def test_rescaled_parameters_have_the_models_names(llmc: Call, artefact: Path) -> None:
    """``diff --pass smooth`` names weights, not the pieces that later passes left of them."""
    table = llmc("diff", artefact, "--pass", "smooth").out.partition("Parameters rescaled")[2]
    assert "model.layers.0.self_attn.q_proj.weight\n" in table
    assert ".meta" not in table
    assert ".codes" not in table


def test_nothing_is_printed_before_a_refusal(llmc: Call, artefact: Path) -> None:
    """A run that is refused leaves stdout empty."""
    for more in (["--max-new-tokens", 0], ["--max-new-tokens", 5000], ["--prompt", ""]):
        done = llmc("run", artefact, "--prompt", "def", *more)
        assert done.code == 2
        assert done.out == ""


def test_run_takes_the_fast_target_and_says_so(llmc: Call, artefact: Path) -> None:
    """By default torch's kernels generate, and what ran is said."""
    done = llmc("run", artefact, "--prompt", "def", "--max-new-tokens", 3)
    assert "target cpu" in done.err
    plain = llmc("run", artefact, "--prompt", "def", "--max-new-tokens", 3, "--target", "reference")
    assert "target reference" in plain.err
    assert done.out.startswith("def")
    assert plain.out.startswith("def")


def test_eval_says_what_it_measured_and_how_sure_it_is(
    llmc: Call, artefact: Path, tiny: Path, text: Path
) -> None:
    """The target is printed; a bootstrap over three windows has no p."""
    args = ["eval", artefact, "--baseline", tiny, "--data", text, "--window", 16, "--no-speed"]
    few = llmc(*args, "--max-windows", 3)
    assert "target reference, f32" in few.out
    assert "too few to rank by" in few.out
    told = llmc(*args, "--max-windows", 3, "--json").json["baseline"]["comparison"]
    assert (told["p"], told["low"], told["windows_needed"]) == (None, None, 8)
    many = llmc(*args, "--max-windows", 8)
    assert "too few" not in many.out
    assert re.search(r"over 8 windows, p [0-9.]+\)", many.out)


def test_a_window_of_nothing_is_refused(llmc: Call, artefact: Path, text: Path) -> None:
    """0 is not the default in disguise."""
    done = llmc("eval", artefact, "--data", text, "--window", 0)
    assert done.code == 2
    assert "found 0" in done.error


def test_a_folder_is_no_data_file(llmc: Call, artefact: Path, tmp_path: Path) -> None:
    """What was found is named."""
    assert "found a folder" in llmc("eval", artefact, "--data", tmp_path).error


def test_kernels_without_a_model(llmc: Call) -> None:
    """A row's machine code, for its documented variants."""
    alone = llmc("kernels", "model", "--aot", "sm_80", "--row", "w4a16")
    assert (alone.code, "found it with model" in alone.error) == (2, True)
    done = llmc("kernels", "--aot", "sm_80", "--row", "w4a16_24", "--json")
    assert done.code == 0, done.err
    facts = done.json["aot"]
    assert {f["row"] for f in facts} == {"w4a16_24"}
    assert all(f["registers"] > 0 and f["stack"] == 0 and f["matrix"] for f in facts)
    assert any(f["problem"]["norm"] and f["problem"]["bias"] for f in facts)
    assert all(f["faults"] == [] for f in facts)
    assert "did you mean 'w4a16_24'" in llmc("kernels", "--aot", "sm_80", "--row", "w4a16_2").error


def test_the_list_of_kernels(llmc: Call) -> None:
    """Every row of a target, and one with what it requires and reads."""
    done = llmc("kernels", "--json")
    assert done.code == 0, done.err
    names = [k["name"] for k in done.json["kernels"]]
    assert len(names) == len(set(names)) > 25
    assert {"w4a16", "round_int8", "attention_kivi"} <= set(names)
    assert {k["name"] for k in done.json["kernels"] if k["inner"]} >= {"round_int8", "norm_input"}
    text = llmc("kernels").out
    assert all(name in text for name in names)
    cpu = llmc("kernels", "--target", "cpu", "--json").json["kernels"]
    assert cpu[0]["name"].startswith("onednn")
    one = llmc("kernels", "--row", "w4a16", "--json").json["kernels"]
    assert [k["name"] for k in one] == ["w4a16"]
    assert {"field": "K", "expected": "at least 16"} in one[0]["requires"]
    told = llmc("kernels", "--row", "attention_fp8")
    assert "e4m3" in told.out
    assert "llmc.cached_attention" in told.out
    assert "did you mean 'w4a16'" in llmc("kernels", "--row", "w4a1").error
    assert "found it with --target cpu" in llmc("kernels", "--row", "w4", "--target", "cpu").error


def test_shipped_recipes_have_names(llmc: Call, tiny: Path, tmp_path: Path) -> None:
    """``--recipe default`` is the file in spec/recipes; a wrong name lists what there is."""
    done = llmc("plan", tiny, "--recipe", "default", "--json")
    assert done.code == 0, done.err
    wrong = llmc("plan", tiny, "--recipe", "defalt")
    assert wrong.code == 2
    assert "careful, default" in wrong.error
    assert "did you mean 'default'?" in wrong.error
    own = tmp_path / "r.yaml"
    own.write_text("pases: w4\n")
    assert (
        "expected a field of version, stages, overrides"
        in llmc("plan", tiny, "--recipe", own).error
    )
    own.write_text("stages: [{w4: {}}]\n")
    assert "version: expected this field, found none" in llmc("plan", tiny, "--recipe", own).error


def test_tables_count_in_words(llmc: Call, artefact: Path) -> None:
    """One is not many."""
    from llmc.compiler.report.text import counted

    assert [counted(n, "site") for n in (0, 1, 2)] == ["0 sites", "1 site", "2 sites"]
    assert counted(3, "near miss") == "3 near misses"
    assert "w4 takes 14 sites" in llmc("explain", "w4", artefact).out


def test_a_number_is_no_model() -> None:
    """The Python door says what it takes."""
    import llmc
    from llmc.compiler.ir.errors import UsageError

    with pytest.raises(UsageError, match=r"expected a model: .* found int"):
        llmc.compile(3, "w4")


def test_without_a_command_the_help_is_shown(llmc: Call) -> None:
    """As it is written, not squeezed into one line."""
    done = llmc()
    assert done.code == 2
    assert "\n  compile  compress a model" in done.err
    assert done.out == ""


def test_segments_are_short_unless_asked(llmc: Call, artefact: Path) -> None:
    """What flows between segments is shown with -v and in JSON."""
    assert "position_ids attention_mask" not in llmc("inspect", artefact).out
    assert "position_ids attention_mask" in llmc("inspect", artefact, "-v").out
    assert llmc("inspect", artefact, "--json").json["segments"][1]["reads"]


def test_stored_pieces_remember_their_maker_and_place(llmc: Call, artefact: Path) -> None:
    """Codes, scales and positions carry the pass that made them and the module they belong to."""
    assert llmc("inspect", artefact, "--where", "made_by=param", "--json").json["nodes"] == []
    shown = llmc("inspect", artefact, "--where", "name=p3_codes")
    assert re.search(r" w4 +model.layers.0.self_attn.q_proj\n", shown.out)
    assert "1 node\n" in shown.out
    under = llmc("inspect", artefact, "--path", "model.layers.0.mlp.up_proj", "--json").json
    assert {"p9_codes", "p9_scale", "p9_meta"} <= {n["name"] for n in under["nodes"]}


@pytest.mark.parametrize(
    ("text", "words"),
    [
        ("version: 1\nstages: [{w4: {group: 32, group: 16}}]\n", "line 2: expected 'group' once"),
        (
            "version: 1\nstages: [{w4: {group: 32}}]\n"
            "overrides: [{where: {block: [9]}, skip: [w4]}]\n",
            "overrides.0.where: expected at least one site",
        ),
    ],
)
def test_recipes_that_say_two_things_or_nothing(
    llmc: Call, tiny: Path, tmp_path: Path, text: str, words: str
) -> None:
    """Equal keys and overrides of blocks that do not exist are refused."""
    path = tmp_path / "r.yaml"
    path.write_text(text)
    done = llmc("plan", tiny, "--recipe", path)
    assert done.code == 2
    assert words in done.error


def test_plan_names_tensors_without_a_place(llmc: Call, tiny: Path, tmp_path: Path) -> None:
    """Layers beyond the config compile, and the plan says what is left behind."""
    model = tmp_path / "model"
    shutil.copytree(tiny, model)
    config = json.loads((model / "config.json").read_text())
    config["num_hidden_layers"] -= 1
    config.pop("layer_types", None)
    (model / "config.json").write_text(json.dumps(config))
    done = llmc("plan", model, "-p", "w4:solver=rtn")
    assert done.code == 0
    assert "9 tensors of the checkpoint without a place in the model" in done.err
