"""``llmc export``: a checkpoint for plain transformers, whole and checked, or nothing."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

Call = Callable[..., Any]


def test_artefact_becomes_a_checkpoint(llmc: Call, artefact: Path, tmp_path: Path) -> None:
    """Packed and pruned weights are written dense, zeros kept; the tokenizer comes along."""
    from transformers import AutoModelForCausalLM, AutoTokenizer

    import llmc as package

    out = tmp_path / "hf"
    done = llmc("export", artefact, "--format", "hf", "-o", out)
    assert done.code == 0, done.err
    assert "loading it and comparing logits" in done.err
    assert f"wrote {out}" in done.out
    ids = torch.arange(3, 19).reshape(2, 8)
    model = AutoModelForCausalLM.from_pretrained(str(out)).eval()
    with torch.no_grad():
        have, want = model(ids).logits, package.load(artefact)(ids)
    assert float((have - want).abs().max()) <= 1e-4 * float(want.abs().max())
    weight = model.model.layers[0].mlp.down_proj.weight
    assert bool(((weight.reshape(-1, 4) != 0).sum(1) <= 2).all())
    assert AutoTokenizer.from_pretrained(str(out))("def main(")["input_ids"]
    assert not list(tmp_path.glob("*.tmp-*"))

    # A second one needs --force, and may have another dtype.
    again = ("export", artefact, "--format", "hf", "-o", out, "--dtype", "bf16")
    refused = llmc(*again)
    assert refused.code == 2
    assert "--force replaces it" in refused.error
    told = llmc(*again, "--force", "--quiet", "--json")
    assert (told.code, told.err) == (0, "")
    assert told.json["dtype"] == "bf16"
    assert told.json["difference"] <= 1e-4 < told.json["rounding"]
    assert json.loads((out / "config.json").read_text())["dtype"] == "bfloat16"


def test_codes_go_out_and_come_back(llmc: Call, artefact: Path, tmp_path: Path) -> None:
    """Packed weights are exported packed; the folder is inspected, run and reported as it is."""
    import llmc as package

    out, page = tmp_path / "gptq", tmp_path / "page.html"
    done = llmc("export", artefact, "--format", "gptq", "-o", out)
    assert done.code == 0, done.err
    assert "reading it back and comparing codes and logits" in done.err
    assert "14 linears w4 g32; 1 dense" in done.out
    assert "note: zeros of the n:m mask are kept as codes" in done.out
    assert json.loads((out / "config.json").read_text())["quantization_config"]["bits"] == 4
    seen = llmc("inspect", out)
    assert "codes    14 x w4 g32, read from gptq" in seen.out
    ran = llmc("run", out, "--prompt", "def main(", "--max-new-tokens", 3, "--quiet")
    assert ran.code == 0, ran.err
    assert llmc("report", out, "-o", page).code == 0
    assert "read from gptq" in page.read_text(encoding="utf-8")

    from llmc.compiler import api

    ids = torch.arange(3, 19).reshape(2, 8)
    model, want = api.open_any(out), package.load(artefact)(ids)
    assert float((model(ids) - want).abs().max()) <= 2e-3 * float(want.abs().max())
    model.save(tmp_path / "kept", command=["test"])
    assert torch.equal(package.load(tmp_path / "kept")(ids), model(ids))
    assert llmc("verify", tmp_path / "kept").code == 0

    refused = llmc("export", artefact, "--format", "awq", "-o", tmp_path / "x", "--dtype", "f99")
    assert refused.code == 2
    dense = llmc("export", page.parent / "nothing", "--format", "awq", "-o", tmp_path / "x")
    assert dense.code == 3


def test_every_format_is_in_the_help(llmc: Call) -> None:
    """One line each."""
    from llmc.compiler.runtime.exporting import FORMATS

    lines = [line.split() for line in llmc("export", "--help").out.splitlines()]
    for form in FORMATS.values():
        assert [form.name, *form.help.split()] in lines


def test_a_difference_is_a_failed_gate(
    llmc: Call, tiny: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Where the written files give other logits nothing is left, and the exit code is 4."""
    from safetensors.torch import load_file, save_file

    from llmc.compiler.capture import write_back

    real = write_back.write

    def damaged(fitted: Any, folder: Path, *rest: Any) -> None:
        real(fitted, folder, *rest)
        file = folder / "model.safetensors"
        tensors = load_file(file)
        tensors["model.norm.weight"] = tensors["model.norm.weight"] * 1.01
        save_file(tensors, file, metadata={"format": "pt"})

    monkeypatch.setattr(write_back, "write", damaged)
    done = llmc("export", tiny, "--format", "hf", "-o", tmp_path / "hf")
    assert done.code == 4
    assert "logits within 0.0001 of the largest, found" in done.error
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        (["--format", "hg"], "found 'hg'; did you mean 'hf'?"),
        (["--format", "tensorrt"], "expected one of hf, compressed-tensors, gptq"),
        ([], "Missing option '--format'"),
        (["--format", "hf", "--dtype", "f64"], "'f64' is not one of"),
    ],
)
def test_wrong_options_are_refused(
    llmc: Call, tiny: Path, tmp_path: Path, arguments: list[str], words: str
) -> None:
    """Before anything is loaded, in one line."""
    done = llmc("export", tiny, "-o", tmp_path / "hf", *arguments)
    assert done.code == 2
    assert words in done.error
    assert not list(tmp_path.iterdir())


def test_force_replaces_exports_only(
    llmc: Call, tiny: Path, folder_digest: Callable[[Path], str]
) -> None:
    """A model is never written over, not even by its own export."""
    before = folder_digest(tiny)
    done = llmc("export", tiny, "--format", "hf", "-o", tiny, "--force")
    assert done.code == 2
    assert "expected an export to replace, found a folder of something else" in done.error
    assert folder_digest(tiny) == before


def test_python_door_writes_what_it_can(tiny: Path, tmp_path: Path) -> None:
    """``Model.export`` in memory: a cut that fits, then one that does not, which leaves nothing."""
    from llmc.compiler import api
    from llmc.compiler.analysis.blocks import apply_segments
    from llmc.compiler.analysis.cut import cut
    from llmc.compiler.analysis.groups import dependency_groups
    from llmc.compiler.ir.errors import UsageError

    model = api.open_any(tiny)
    apply_segments(model.program)
    one, two = (g for g in dependency_groups(model.program) if g.kind == "neuron")
    cut(model.program, {one: torch.arange(64)})
    with pytest.raises(UsageError, match="one size in every block, found"):
        model.export(tmp_path / "uneven")
    cut(model.program, {two: torch.arange(32, 96)})
    heard: list[str] = []
    record = model.export(tmp_path / "even", progress=heard.append)
    assert record["changes"] == ["intermediate_size = 64"]
    assert any(line.startswith("capturing with") for line in heard)
    assert sorted(p.name for p in tmp_path.iterdir()) == ["even"]
