"""Every example runs as its docstring says, on a small calibration set."""

from __future__ import annotations

import re
import subprocess
import sys
from pathlib import Path

import pytest


def run(repo: Path, name: str, *args: object) -> str:
    """Run ``examples/<name>.py`` in a process of its own; its stdout."""
    done = subprocess.run(
        [sys.executable, str(repo / "examples" / f"{name}.py"), *map(str, args)],
        capture_output=True, text=True, timeout=300, check=False,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr[-3000:]
    return done.stdout


def test_every_example_is_run_here(repo: Path) -> None:
    """A script added to examples/ needs a test: the two that make the demo have their own."""
    own = {"make_text", "train_pylm"}
    here = {"torch_backend", "compile", "inspect_rewrite"}
    assert {p.stem for p in (repo / "examples").glob("*.py")} == own | here


def test_torch_backend(repo: Path) -> None:
    """Speed, size, error against eager, and codes that recompiles leave alone."""
    out = run(repo, "torch_backend", "--samples", 4, "--length", 64, "--repeats", 1)
    error = re.search(r"error\s+([\d.]+) of the logits' norm, top-1 agreement ([\d.]+)%", out)
    assert error is not None, out
    assert 0 < float(error[1]) < 0.6
    sizes = re.search(r"size\s+([\d,]+) -> ([\d,]+) bytes", out)
    assert sizes is not None
    before, after = (int(s.replace(",", "")) for s in sizes.groups())
    assert after < before / 4
    codes = re.search(r"codes\s+(\w{16}) before and (\w{16}) after", out)
    assert codes is not None
    assert codes[1] == codes[2]
    assert re.search(r"eager [\d,]+ tokens/s, llmc \(reference\) [\d,]+ tokens/s", out)


def test_compile(repo: Path, tmp_path: Path) -> None:
    """Saved and loaded logits are equal bit for bit, and text comes out."""
    out = run(repo, "compile", "--samples", 4, "--length", 64, "--out", tmp_path / "o")
    assert "42 weights at 3.125 bits" in out
    assert "logits equal: True" in out
    assert out.rstrip().splitlines()[-1] != "def main("
    assert (tmp_path / "o" / "manifest.json").exists()


@pytest.mark.parametrize(
    ("passes", "says"), [("w4,prune24", "llmc.expand_nm"), ("w8", "llmc.dequantize")]
)
def test_inspect_rewrite(repo: Path, passes: str, says: str) -> None:
    """The difference of one block, five more alike, the graph as Python, the refusals."""
    out = run(repo, "inspect_rewrite", "--passes", passes)
    assert out.count("@@ block") == 1
    assert "5 more alike" in out
    assert f"+ {says.split('.')[1]}" in out
    assert "def forward(p, input_ids, position_ids, attention_mask):" in out
    assert "refused embedding (model.embed_tokens)" in out
