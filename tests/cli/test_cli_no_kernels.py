"""No Triton, a GPU that is too old, a weight that no row serves, another machine's measurements."""

from __future__ import annotations

import json
import subprocess
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch

from llmc.codegen.tuning import choices
from llmc.codegen.tuning.cache import Entry, Machine, Table, write
from llmc.compiler import backend

Call = Callable[..., Any]

# A process to which Triton is not installed, whatever is: commands in, exit codes and words out.
WITHOUT_TRITON = """
import contextlib, importlib.machinery, importlib.metadata, io, json, sys
found = importlib.machinery.PathFinder.find_spec
def find(name, path=None, target=None):
    return None if name.partition(".")[0] == "triton" else found(name, path, target)
importlib.machinery.PathFinder.find_spec = staticmethod(find)
known = importlib.metadata.version
def version(name):
    if name == "triton":
        raise importlib.metadata.PackageNotFoundError(name)
    return known(name)
importlib.metadata.version = version
from llmc.compiler.cli.app import main
def run(arguments):
    sys.argv = ["llmc", *arguments]
    out, err = io.StringIO(), io.StringIO()
    with contextlib.redirect_stdout(out), contextlib.redirect_stderr(err):
        try:
            code = main()
        except SystemExit as end:
            code = end.code
    return [code or 0, out.getvalue(), err.getvalue()]
print(json.dumps([run(c) for c in json.loads(sys.stdin.read())]))
assert "triton" not in sys.modules
"""


@pytest.fixture(autouse=True)
def own_cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """A cache of the test's own."""
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    choices.gpu.cache_clear()
    choices.forget()
    yield
    choices.gpu.cache_clear()
    choices.forget()


@pytest.fixture
def old_gpu(monkeypatch: pytest.MonkeyPatch) -> None:
    """What torch would tell of a GPU of 2018."""
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device=None: (7, 5))
    monkeypatch.setattr(torch.cuda, "get_device_name", lambda device=None: "Tesla T4")


def test_without_triton(tiny: Path, artefact: Path, tmp_path: Path) -> None:
    """Compressing, measuring, running on the CPU and all that only tells work; the rest is exit 5
    with what to install."""
    made, text = str(tmp_path / "out"), tmp_path / "text.txt"
    text.write_text("def f(x):\\n    return x\\n" * 200)
    commands = {
        ("compile", str(tiny), "-p", "w4:group=32,solver=rtn", "-o", made): (0, ""),
        ("eval", made, "--data", str(text), "--max-windows", "1", "--window", "16"): (0, ""),
        ("run", made, "--prompt", "def", "--max-new-tokens", "2"): (0, ""),
        ("kernels", made): (0, ""),
        ("kernels", "--row", "w4a16"): (0, ""),
        ("tune", "--target", "triton", "--dry-run", "--tokens", "1"): (0, ""),
        ("kernels", "--aot", "sm_90"): (
            5, "cannot compile ahead of time: triton is not installed; pip install 'triton>=3.6'"),
        ("run", made, "--prompt", "def", "--target", "triton"): (
            5, "cannot lower for triton: triton is not installed; use target cpu"),
        ("tune", "--target", "triton"): (5, "cannot tune for triton: no CUDA device"),
        ("doctor",): (5, "expected triton to be usable, found not installed"),
    }  # fmt: skip
    ran = subprocess.run(
        [sys.executable, "-c", WITHOUT_TRITON], input=json.dumps([*commands]), text=True,
        capture_output=True, check=False,
    )  # fmt: skip
    assert ran.returncode == 0, ran.stderr[-2000:]
    answers = json.loads(ran.stdout.splitlines()[-1])
    for (command, (code, words)), (found, out, err) in zip(commands.items(), answers, strict=True):
        assert found == code, (command, err)
        lines = [line for line in err.splitlines() if line.startswith("llmc: ")]
        assert len(lines) == (1 if code else 0), (command, err)
        assert words in "".join(lines), (command, err)
        if command == ("kernels", made):
            assert "cannot run here: triton is not installed" in out


@pytest.mark.usefixtures("old_gpu")
def test_a_gpu_that_is_too_old(llmc: Call, artefact: Path) -> None:
    """Its capability stands in the doctor's table, in the plan and in the refusal."""
    why = "expected a CUDA device of compute capability 8.0 or more, found 7.5"
    done = llmc("run", artefact, "--prompt", "def", "--target", "triton")
    assert done.code == 5
    assert f"cannot lower for triton: {why}; use target cpu or reference" in done.error
    done = llmc("tune", "--target", "triton")
    assert done.code == 5
    assert f"cannot tune for triton: {why}" in done.error
    told = llmc("kernels", artefact, "--json").json
    assert told["unavailable"] == why
    assert llmc("run", artefact, "--prompt", "def", "--max-new-tokens", "2").code == 0
    with pytest.warns(UserWarning, match="reference, not its kernels: expected a CUDA device"):
        assert backend._target(torch.device("cuda", 0)) == "reference"
    assert backend._target(torch.device("cpu")) == "reference"


def test_a_weight_that_no_row_serves(llmc: Call, tiny: Path, tmp_path: Path) -> None:
    """Its op's own definition runs, and the plan says why."""
    made = tmp_path / "out"
    done = llmc("compile", tiny, "-p", "olive:bits=8", "-o", made)
    assert done.code == 0, done.err
    told = llmc("kernels", made, "--json").json
    assert [r["kernel"] for r in told["fused"]] == ["w16"], "the head, which is no codes"
    assert any("w4_pairs: bits=8, expected 4" in r["reason"] for r in told["not_fused"])


@pytest.mark.usefixtures("old_gpu")
def test_measurements_of_another_version_or_gpu(
    llmc: Call, artefact: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Neither is used, and both are named."""
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device=None: (8, 0))
    entry = Entry("any", 1, {"8x32 stages 3 warps 2": 1e-6})
    write(Table(Machine("triton", "NVIDIA A100", compiler="triton 3.6.0"), (entry,)))
    told = llmc("kernels", artefact, "--json").json["tiles"]
    assert (
        told == "untuned: nothing was measured on this machine (1 of other machines are not used)"
    )
    write(Table(Machine("triton", "Tesla T4", torch="2.5.0", compiler="triton 3.1.0"), (entry,)))
    choices.forget()
    told = llmc("kernels", artefact, "--json").json["tiles"]
    assert told.startswith(f"untuned: expected torch {torch.__version__}, found 2.5.0")
    assert "expected torch" in llmc("doctor").out
