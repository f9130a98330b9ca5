"""Artefacts: what is saved is what is loaded, and one model has one content hash."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path

import pytest
import torch

from llmc.compiler.ir.errors import ModelError, ResourceError, UsageError
from llmc.compiler.ir.graph import Program
from llmc.compiler.ir.serial import same_program, to_json
from llmc.compiler.runtime import artefact, files
from llmc.compiler.runtime.artefact import Contents, is_artefact, load, save
from llmc.compiler.runtime.executor import Runner
from llmc.compiler.runtime.verify import verify

Make = Callable[..., Program]
IDS = torch.tensor([[3, 1, 4, 1, 5]])


def test_round_trip(make_tiny: Make, tmp_path: Path) -> None:
    program = make_tiny(dtype=torch.bfloat16)
    program.facts = {"vocab": 32, "eos": [1], "architecture": "Tiny", "tokenizer": "/home/me/x"}
    first = next(program.calls())
    contents = Contents(
        program, schemes={"p0": {"bits": 4}}, plan={"a": 1}, report={"b": 2}, run={"typed": "x"},
        passes=["w4"], graphs=[("captured", to_json(program)), ("w4", to_json(program))],
    )  # fmt: skip
    manifest = save(tmp_path / "out", contents)
    got = load(tmp_path / "out")
    assert got.manifest == manifest
    assert (got.schemes, got.plan, got.report) == ({"p0": {"bits": 4}}, {"a": 1}, {"b": 2})
    assert got.run == {"typed": "x"}
    assert got.tokenizer is None
    assert got.program.facts == {"vocab": 32, "eos": [1], "architecture": "Tiny"}
    got.program.facts = program.facts
    assert same_program(got.program, program)
    assert got.program.node(first.name).name == first.name
    assert torch.equal(Runner(got.program).forward(IDS), Runner(program).forward(IDS))
    assert got.graphs == ("00-captured", "01-w4")
    assert got.graph("01-w4").params == program.params
    with pytest.raises(UsageError, match="'02-x'"):
        got.graph("02-x")
    assert verify(tmp_path / "out") == []
    assert is_artefact(tmp_path / "out")
    assert not is_artefact(tmp_path)


def test_tensors_are_read_only_when_asked_for(make_tiny: Make, tmp_path: Path) -> None:
    program = make_tiny()
    save(tmp_path / "out", Contents(program))
    got = load(tmp_path / "out").program
    assert torch.equal(got.weights.load("p3"), program.weights.load("p3"))
    with pytest.raises(ModelError, match="'p99', found none"):
        got.weights.load("p99")


def test_nothing_of_the_source_enters_the_content(make_tiny: Make, tmp_path: Path) -> None:
    program = make_tiny()
    program.facts = {"vocab": 32, "tokenizer": "/home/somebody/llama", "architecture": "Llama"}
    save(tmp_path / "out", Contents(program, graphs=[("w4", to_json(program))]))
    for path in sorted((tmp_path / "out").rglob("*.json")):
        assert "somebody" not in path.read_text(), path.name
        if path.name != "provenance.json":
            assert "Llama" not in path.read_text(), path.name


def test_content_hash_sees_content_and_nothing_else(make_tiny: Make, tmp_path: Path) -> None:
    def hash_of(name: str, contents: Contents) -> str:
        return save(tmp_path / name, contents).content_hash

    one = hash_of("a", Contents(make_tiny(), run={"typed": "llmc compile x"}))
    named = make_tiny()
    named.facts["architecture"] = "Other"
    same = Contents(named, run={"typed": "llmc compile y"}, report={"r": 1}, plan={"p": 1})
    assert hash_of("b", same) == one
    assert hash_of("c", Contents(make_tiny(), schemes={"p0": 1})) != one
    assert hash_of("d", Contents(make_tiny(window=3))) != one
    changed = make_tiny()
    changed.set_tensor("p0", changed.weights.load("p0").clone().index_fill_(0, IDS[0, :1], 0.0))
    assert hash_of("e", Contents(changed)) != one


def test_bytes_are_the_same_in_every_process(tmp_path: Path) -> None:
    code = (
        "import sys; from pathlib import Path; sys.path.insert(0, sys.argv[2]); "
        "from conftest import tiny; from llmc.compiler.runtime.artefact import *; "
        "save(sys.argv[1], Contents(tiny(layers=1)))"
    )
    here = str(Path(__file__).parent)
    for seed in ("1", "2"):
        env = os.environ | {"PYTHONHASHSEED": seed}
        out = str(tmp_path / seed)
        subprocess.run([sys.executable, "-c", code, out, here], check=True, env=env)
    names = files.all_files(tmp_path / "1")
    assert names == files.all_files(tmp_path / "2")
    for name in names:
        assert (tmp_path / "1" / name).read_bytes() == (tmp_path / "2" / name).read_bytes(), name


def test_tokenizer_files_travel(pylm: Path, make_tiny: Make, tmp_path: Path) -> None:
    manifest = save(tmp_path / "out", Contents(make_tiny(), tokenizer=pylm))
    bare = save(tmp_path / "bare", Contents(make_tiny()))
    assert manifest.content_hash == bare.content_hash
    assert "tokenizer.json" in manifest.files
    assert "config.json" not in manifest.files
    got = load(tmp_path / "out")
    assert got.tokenizer == tmp_path / "out"
    assert got.program.facts["tokenizer"] == str(tmp_path / "out")


def test_segments_have_files_of_their_own(pylm_program: Program, tmp_path: Path) -> None:
    manifest = save(tmp_path / "out", Contents(pylm_program))
    spread = {t.file for t in manifest.tensors.values()}
    assert "weights-block0.safetensors" in spread
    assert len(spread) == len([n for n in manifest.files if n.startswith("weights-")]) > 6
    got = load(tmp_path / "out").program
    ids = torch.arange(20)[None]
    assert torch.equal(Runner(got).forward(ids), Runner(pylm_program).forward(ids))
    assert got.params == pylm_program.params


def test_existing_artefact_is_kept_unless_forced(make_tiny: Make, tmp_path: Path) -> None:
    out = tmp_path / "out"
    first = save(out, Contents(make_tiny()))
    with pytest.raises(UsageError, match="--force"):
        save(out, Contents(make_tiny(window=2)))
    assert load(out).manifest == first
    second = save(out, Contents(make_tiny(window=2)), force=True)
    assert load(out).manifest == second != first


def test_saving_over_the_artefact_that_is_being_read(make_tiny: Make, tmp_path: Path) -> None:
    out = tmp_path / "out"
    save(out, Contents(make_tiny()))
    before = load(out).program
    want = make_tiny().weights.load("p5")
    other = make_tiny()
    other.set_tensor("p5", torch.zeros_like(want))
    save(out, Contents(other), force=True)
    assert torch.equal(before.weights.load("p5"), want)
    save(out, Contents(before), force=True)
    assert torch.equal(load(out).program.weights.load("p5"), want)
    assert verify(out) == []


def test_killed_writers_leave_one_whole_artefact(make_tiny: Make, tmp_path: Path) -> None:
    """SIGKILL at any moment of replacing an artefact: what is there is old or new, never less."""
    out = tmp_path / "out"
    pair = [Contents(make_tiny(layers=1)), Contents(make_tiny(layers=1, window=2))]
    hashes = {save(out, c, force=True).content_hash for c in pair}
    assert len(hashes) == 2
    seen = set()
    for turn in range(30):
        child = os.fork()
        if child == 0:
            try:
                while True:
                    for contents in pair:
                        save(out, contents, force=True)
            finally:
                os._exit(1)
        time.sleep(0.001 + 0.0017 * turn)
        os.kill(child, signal.SIGKILL)
        os.waitpid(child, 0)
        assert verify(out) == []
        seen.add(load(out).manifest.content_hash)
    assert seen <= hashes
    save(out, pair[0], force=True)
    assert [p.name for p in tmp_path.iterdir()] == ["out"]


@pytest.mark.parametrize("at", [0, 1, 3, 7])
@pytest.mark.parametrize("error", [KeyboardInterrupt, OSError(28, "No space left on device")])
def test_interrupted_save_changes_nothing(
    make_tiny: Make, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, at: int, error: BaseException
) -> None:
    out = tmp_path / "out"
    first = save(out, Contents(make_tiny()))
    count, real = 0, os.fsync

    def failing(fd: int) -> None:
        nonlocal count
        count += 1
        if count == at + 1:
            raise error
        real(fd)

    monkeypatch.setattr(os, "fsync", failing)
    want = ResourceError if isinstance(error, OSError) else KeyboardInterrupt
    with pytest.raises(want):
        save(out, Contents(make_tiny(window=2)), force=True)
    monkeypatch.undo()
    assert load(out).manifest == first
    assert [p.name for p in tmp_path.iterdir()] == ["out"]


def test_disk_that_fills_inside_safetensors(
    make_tiny: Make, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    import safetensors.torch

    def full(*args: object, **kwargs: object) -> None:
        raise safetensors.SafetensorError(
            "Error while serializing: I/O error: No space left on device (os error 28)"
        )

    monkeypatch.setattr(safetensors.torch, "save_file", full)
    with pytest.raises(ResourceError, match=r"expected to write \d+ bytes .*No space left"):
        save(tmp_path / "out", Contents(make_tiny()))
    assert list(tmp_path.iterdir()) == []


def test_space_is_checked_first(
    make_tiny: Make, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    import shutil

    usage = shutil.disk_usage(tmp_path)._replace(free=1000)
    monkeypatch.setattr(shutil, "disk_usage", lambda path: usage)
    with pytest.raises(ResourceError, match=r"expected \d+ free bytes .*found 1000") as caught:
        save(tmp_path / "out", Contents(make_tiny()))
    assert caught.value.exit_code == 5
    assert list(tmp_path.iterdir()) == []


def test_estimate_is_close_to_what_is_written(
    pylm_program: Program, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    asked: list[int] = []
    real = artefact.new_folder
    monkeypatch.setattr(
        artefact, "new_folder", lambda p, *, needed, force: asked.append(needed) or real(
            p, needed=needed, force=force
        ),
    )  # fmt: skip
    save(tmp_path / "out", Contents(pylm_program))
    written = sum(p.stat().st_size for p in (tmp_path / "out").rglob("*") if p.is_file())
    assert written <= asked[0] <= 1.02 * written


def test_bad_tensors_are_never_written(make_tiny: Make, tmp_path: Path) -> None:
    program = make_tiny()
    program.weights.tensors["p2"] = program.weights.load("p2") * torch.nan  # type: ignore[attr-defined]
    with pytest.raises(ModelError, match="finite numbers in tensor p2"):
        save(tmp_path / "out", Contents(program))
    program = make_tiny()
    program.weights.tensors["p2"] = torch.zeros(3)  # type: ignore[attr-defined]
    with pytest.raises(ModelError, match=r"expected tensor p2 f32\[16\], found f32\[3\]"):
        save(tmp_path / "out", Contents(program))
    assert list(tmp_path.iterdir()) == []


def test_shared_storage_is_written_apart(make_tiny: Make, tmp_path: Path) -> None:
    program = make_tiny()
    weights = program.weights.tensors  # type: ignore[attr-defined]
    weights["p7"] = weights["p2"]
    save(tmp_path / "out", Contents(program))
    got = load(tmp_path / "out").program.weights
    assert torch.equal(got.load("p7"), got.load("p2"))


def test_manifest_says_what_each_tensor_is_for(make_tiny: Make, tmp_path: Path) -> None:
    save(tmp_path / "out", Contents(make_tiny()))
    read = json.loads((tmp_path / "out/manifest.json").read_text())
    assert read["tensors"]["p0"]["role"] == "embedding"
    assert read["tensors"]["p2"]["role"] == "gain"
    assert {"llmc", "torch", "python", "safetensors"} <= set(read["versions"])
    assert [n for n, f in read["files"].items() if f["content"]] == [
        "program.json", "schemes.json",
    ]  # fmt: skip
