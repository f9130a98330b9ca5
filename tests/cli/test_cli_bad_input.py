"""Bad input: one line, the right exit code, nothing half-written, nothing old lost."""

from __future__ import annotations

import json
import os
import shutil
import signal
import struct
import subprocess
import sys
import time
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import pytest

Call = Callable[..., Any]


@pytest.fixture
def broken(tiny: Path, tmp_path: Path) -> Path:
    """A copy of the tiny model to break."""
    folder = tmp_path / "broken"
    shutil.copytree(tiny, folder)
    return folder


@pytest.fixture
def refused(llmc: Call, tmp_path: Path, small_run: list[object]) -> Callable[..., str]:
    """``refused(code, model, passes)``: compile fails so, writes nothing; gives the one line."""

    def check(code: int, model: object, passes: str = "w4:group=32", *more: object) -> str:
        out = tmp_path / "refused"
        done = llmc("compile", model, "--passes", passes, "-o", out, *small_run, *more)
        assert done.code == code, done.err
        assert done.out == ""
        assert not out.exists()
        assert not list(tmp_path.glob("*.tmp-*"))
        return str(done.error)

    return check


def test_no_such_folder(refused: Callable[..., str], tmp_path: Path) -> None:
    """A path that does not exist."""
    assert "expected a model folder" in refused(3, tmp_path / "nothing")


def test_a_file_is_no_model(refused: Callable[..., str], text: Path) -> None:
    """A file where a folder should be."""
    assert "found a file" in refused(3, text)


def test_not_a_model(refused: Callable[..., str], tmp_path: Path) -> None:
    """A folder without config.json."""
    folder = tmp_path / "empty"
    folder.mkdir()
    assert "config.json" in refused(3, folder)


def test_unknown_architecture(refused: Callable[..., str], broken: Path) -> None:
    """A config that transformers does not know."""
    config = json.loads((broken / "config.json").read_text())
    config["model_type"], config["architectures"] = "lamma", ["LammaForCausalLM"]
    (broken / "config.json").write_text(json.dumps(config))
    assert "config.json" in refused(3, broken)


def test_truncated_weights(refused: Callable[..., str], broken: Path) -> None:
    """A safetensors file cut short."""
    path = broken / "model.safetensors"
    path.write_bytes(path.read_bytes()[:-1000])
    line = refused(3, broken)
    assert "model.safetensors" in line
    assert "truncated" in line


def test_garbage_weights(refused: Callable[..., str], broken: Path) -> None:
    """A safetensors file that is none."""
    (broken / "model.safetensors").write_bytes(b"not a safetensors file at all")
    assert "model.safetensors" in refused(3, broken)


def _rewrite(folder: Path, change: Callable[[dict[str, Any]], None]) -> None:
    from safetensors.torch import load_file, save_file

    tensors = load_file(folder / "model.safetensors")
    change(tensors)
    save_file(tensors, folder / "model.safetensors", metadata={"format": "pt"})


def test_misshapen_tensor(refused: Callable[..., str], broken: Path) -> None:
    """A tensor of another shape than the config says."""

    def change(t: dict[str, Any]) -> None:
        name = "model.layers.0.mlp.up_proj.weight"
        t[name] = t[name][:-1].clone()

    _rewrite(broken, change)
    line = refused(3, broken)
    assert "model.layers.0.mlp.up_proj.weight" in line
    assert "96" in line
    assert "95" in line


def test_missing_tensor(refused: Callable[..., str], broken: Path) -> None:
    """A tensor that is not there."""
    _rewrite(broken, lambda t: t.pop("model.layers.1.mlp.down_proj.weight"))
    assert "model.layers.1.mlp.down_proj.weight" in refused(3, broken)


@pytest.mark.parametrize("value", [float("nan"), float("inf")])
def test_numbers_that_are_none(refused: Callable[..., str], broken: Path, value: float) -> None:
    """NaN or Inf in a weight that is to be solved."""

    def change(t: dict[str, Any]) -> None:
        t["model.layers.1.mlp.down_proj.weight"][3, 5] = value

    _rewrite(broken, change)
    assert "finite" in refused(3, broken)


def test_pickled_checkpoint(refused: Callable[..., str], broken: Path) -> None:
    """Only a .bin file: refused with how to convert it, never opened."""
    (broken / "model.safetensors").rename(broken / "pytorch_model.bin")
    line = refused(3, broken)
    assert "pytorch_model.bin" in line
    assert "safetensors" in line


def test_remote_code_is_not_run(refused: Callable[..., str], broken: Path) -> None:
    """A config with its own modelling code is refused, and the flag is named."""
    config = json.loads((broken / "config.json").read_text())
    config["auto_map"] = {"AutoModelForCausalLM": "evil.Model"}
    (broken / "config.json").write_text(json.dumps(config))
    (broken / "evil.py").write_text("raise SystemExit('ran')\n")
    assert "trust" in refused(3, broken)


@pytest.mark.parametrize(
    ("passes", "says"),
    [
        ("w7", "did you mean"),
        ("smoth,w4", "did you mean 'smooth'?"),
        ("w4:grup=32", "did you mean 'group'?"),
        ("w4:bits=3", "knob"),
        ("w4:damp=11", "0..10"),
        ("w4:group=3", "8..65536"),
        ("w4:group=lots", "a whole number"),
        ("w4:solver=gtpq", "did you mean 'gptq'?"),
        ("w4:symmetric=perhaps", "true or false"),
        ("prune:n=4,m=4", "0 < n < m"),
        ("w4,w8", "found 'w4' and 'w8'"),
        ("w4,,smooth", "separated by commas"),
        ("group=32,w4", "before the knob"),
        ("w4:group", "knob=value"),
        ("w4:group=32,group=64", "once"),
    ],
)
def test_wrong_passes(refused: Callable[..., str], tiny: Path, passes: str, says: str) -> None:
    """A wrong pass, knob or value is refused before the model is captured."""
    assert says in refused(2, tiny, passes)


@pytest.mark.parametrize(
    ("passes", "says"),
    [
        ("w4:group=48", "the nearest is group=32"),
        ("prune24,w4:group=10", "10"),
        ("prune:n=3,m=7", "7"),
    ],
)
def test_knobs_that_do_not_fit_the_model(
    refused: Callable[..., str], tiny: Path, passes: str, says: str
) -> None:
    """An explicit group that does not divide names the nearest; nothing is bent in silence."""
    code = 4 if passes.startswith("prune:") else 2
    assert says in refused(code, tiny, passes)


def test_order_without_meaning(refused: Callable[..., str], tiny: Path) -> None:
    """Codes before a mask across a barrier: the reason and the nearest legal order."""
    line = refused(2, tiny, "w4", "--passes", "prune24")
    assert "behind a barrier" in line
    assert "--passes prune24,w4" in line


def test_passes_and_recipe(refused: Callable[..., str], tiny: Path, tmp_path: Path) -> None:
    """One of the two, not both."""
    assert "found both" in refused(2, tiny, "w4", "--recipe", tmp_path / "r.yaml")


@pytest.mark.parametrize(
    ("body", "says"),
    [
        (None, "found none"),
        ("version: 2\nstages: [{w4: }]\n", "version"),
        ("version: 1\nstages: []\n", "stages"),
        ("version: 1\nstages: [{w4: {group: 32}}]\nextra: 1\n", "extra"),
        ("version: 1\nstages: [{w4: {grp: 32}}]\n", "group"),
        ("stages: [\n", "YAML"),
        ("- w4\n", "mapping"),
        ("version: 1\nstages: [{w4: }]\noverrides: [{where: {role: [dwn]}, skip: [w4]}]\n",
         "overrides.0.where"),
    ],
)  # fmt: skip
def test_wrong_recipe(llmc: Call, tiny: Path, tmp_path: Path, body: str | None, says: str) -> None:
    """A wrong recipe names the field or the file."""
    path = tmp_path / "r.yaml"
    if body is not None:
        path.write_text(body)
    done = llmc("plan", tiny, "--recipe", path)
    assert done.code == 2
    assert says in done.error


@pytest.mark.parametrize(
    ("more", "says"),
    [
        (["--samples", 0], "samples"),
        (["--length", 1], "length"),
        (["--length", 4096], "128, the model's context"),
        (["--batch", 0], "batch"),
        (["--seed", -1], "seed"),
    ],
)
def test_wrong_settings(
    refused: Callable[..., str], tiny: Path, more: list[object], says: str
) -> None:
    """Settings out of range are named."""
    assert says in refused(2, tiny, "w4:group=32", *more)


@pytest.mark.parametrize(
    ("name", "body", "says"),
    [
        ("short.txt", b"def f(): pass", "at least 32 tokens"),
        ("empty.txt", b"", "expected text"),
        ("none.txt", None, "none"),
        ("latin.txt", b"\xff\xfe caf\xe9" * 99, "UTF-8"),
        ("text.csv", b"a,b", ".jsonl"),
        ("bad.jsonl", b'{"txt": 1}\n', 'a "text" string'),
        ("bad.npy", b"nothing", "tokens"),
    ],
)
def test_wrong_calibration(
    refused: Callable[..., str], tiny: Path, tmp_path: Path, name: str, body: bytes | None,
    says: str,
) -> None:  # fmt: skip
    """Calibration data that is too short, empty or unreadable exits 2 before any solve."""
    path = tmp_path / name
    if body is not None:
        path.write_bytes(body)
    assert says in refused(2, tiny, "w4:group=32", "--calibration", path)


def test_tokens_of_another_vocabulary(
    refused: Callable[..., str], tiny: Path, tmp_path: Path
) -> None:
    """A token that the model does not have is refused before it crashes the embedding."""
    import numpy

    path = tmp_path / "tokens.npy"
    numpy.save(path, numpy.full(64, 5000))
    line = refused(2, tiny, "w4:group=32", "--calibration", path)
    assert "5000" in line
    assert "2048" in line


def test_output_exists(
    llmc: Call, tmp_path: Path, small_run: list[object], monkeypatch: pytest.MonkeyPatch
) -> None:
    """Refused before anything is captured; a file is refused even with --force."""
    from llmc.compiler import api

    def capture(*args: object, **kwargs: object) -> None:
        raise AssertionError("captured")

    monkeypatch.setattr(api, "capture", capture)
    out = tmp_path / "o"
    out.mkdir()
    (out / "mine.txt").write_text("keep")
    done = llmc("compile", "m", "--passes", "w4", "-o", out, *small_run)
    assert done.code == 2
    assert "--force" in done.error
    file = tmp_path / "f"
    file.write_text("keep")
    done = llmc("compile", "m", "--passes", "w4", "-o", file, "--force")
    assert done.code == 2
    done = llmc("compile", "m", "--passes", "w4", "-o", file / "below")
    assert done.code == 2
    assert (out / "mine.txt").read_text() == file.read_text() == "keep"


def test_disk_too_small(
    refused: Callable[..., str], tiny: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Too little room is found before the work; the bytes are named."""
    usage = shutil._ntuple_diskusage(10**9, 10**9 - 5, 5)  # type: ignore[attr-defined]
    monkeypatch.setattr(shutil, "disk_usage", lambda path: usage)
    assert "found 5" in refused(5, tiny)


def test_disk_full_while_writing(
    llmc: Call, tiny: Path, artefact: Path, small_run: list[object], tmp_path: Path,
    folder_digest: Callable[[Path], str], monkeypatch: pytest.MonkeyPatch,
) -> None:  # fmt: skip
    """A write that fails leaves the old artefact as it was and nothing new beside it."""
    out = tmp_path / "o"
    shutil.copytree(artefact, out)
    before = folder_digest(out)
    real, calls = os.fsync, []

    def full(fd: int) -> None:
        calls.append(fd)
        if len(calls) == 5:
            raise OSError(28, "No space left on device")
        real(fd)

    monkeypatch.setattr(os, "fsync", full)
    done = llmc("compile", tiny, "-p", "w4:group=32", "-o", out, "--force", *small_run)
    assert done.code == 5
    assert "No space left" in done.error
    assert folder_digest(out) == before
    assert [p.name for p in tmp_path.iterdir()] == ["o"]


@pytest.mark.parametrize(("number", "code"), [(signal.SIGINT, 130), (signal.SIGTERM, 143)])
def test_interrupted_in_mid_compile(
    tiny: Path, artefact: Path, text: Path, tmp_path: Path, folder_digest: Callable[[Path], str],
    number: int, code: int,
) -> None:  # fmt: skip
    """Ctrl-C after the first solved weight: one line, the code, the old artefact intact."""
    out = tmp_path / "o"
    shutil.copytree(artefact, out)
    before = folder_digest(out)
    command = [sys.executable, "-m", "llmc.compiler.cli", "compile", str(tiny), "--passes",
               "w4:group=32", "-o", str(out), "--force", "-v", "--calibration", str(text),
               "--samples", "300", "--length", "32", "--batch", "1"]  # fmt: skip
    # A shell's background job ignores Ctrl-C and hands that on; here it must be heard.
    with subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True,
                          cwd=tmp_path, preexec_fn=partial(signal.signal, number, signal.SIG_DFL),
                          ) as process:  # fmt: skip
        assert process.stderr is not None
        assert process.stdout is not None
        for line in process.stderr:
            if "block0/linear0" in line and "loss" in line:
                break
        time.sleep(0.05)
        process.send_signal(number)
        rest, data = process.stderr.read(), process.stdout.read()
        assert process.wait(60) == code, rest
    said = [line for line in rest.splitlines() if line.startswith("llmc: ")]
    assert said == [f"llmc: {'interrupted' if code == 130 else 'terminated'}; nothing was written"]
    assert "Traceback" not in rest
    assert data == ""
    assert folder_digest(out) == before
    assert [p.name for p in tmp_path.iterdir()] == ["o"]


@pytest.mark.parametrize("command", ["diff", "verify"])
def test_commands_that_want_an_artefact(llmc: Call, tiny: Path, command: str) -> None:
    """A model folder is not an artefact."""
    done = llmc(command, tiny)
    assert done.code == 3
    assert "manifest.json" in done.error


def test_damaged_artefact_is_refused_at_load(llmc: Call, artefact: Path, tmp_path: Path) -> None:
    """run and inspect name the damaged file."""
    folder = tmp_path / "o"
    shutil.copytree(artefact, folder)
    data = (folder / "program.json").read_bytes()
    (folder / "program.json").write_bytes(data.replace(b"linear", b"linaer", 1))
    for args in (["run", folder, "--prompt", "x"], ["inspect", folder]):
        done = llmc(*args)
        assert done.code == 3
        assert "program.json" in done.error


def test_header_that_claims_too_much(refused: Callable[..., str], broken: Path) -> None:
    """A safetensors header of 2^60 bytes is refused without allocating it."""
    path = broken / "model.safetensors"
    path.write_bytes(struct.pack("<Q", 1 << 60) + path.read_bytes()[8:])
    assert "header" in refused(3, broken)
