"""Every example runs as its docstring says, on a small calibration set."""

from __future__ import annotations

import ast
import os
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
    here = {"torch_backend", "compile", "inspect_rewrite", "own_pass", "own_kernel",
            "mixed_precision"}  # fmt: skip
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


def test_mixed_precision(repo: Path) -> None:
    """The average that was asked for, more than one width chosen, and less loss than even bits."""
    out = run(repo, "mixed_precision", "--samples", 4, "--length", 64)
    found = re.findall(r"^(.+?)\s+([\d.]+) bits per weight, mean loss .* ([\d.e+-]+)$", out, re.M)
    assert [name for name, _, _ in found] == ["even w3", "3.5 bits"]
    assert float(found[1][1]) <= 3.5
    assert float(found[1][2]) < float(found[0][2])
    chosen = out.split("chosen:")[1].strip().splitlines()
    assert len({line.split()[1:-2][-2] for line in chosen}) > 1


def test_own_pass(repo: Path) -> None:
    """At most 20 lines; listed, planned, compiled, traced and reported, nothing else changed."""
    tree = ast.parse((repo / "examples" / "own_pass.py").read_text())
    made = next(n for n in tree.body if isinstance(n, ast.ClassDef))
    imports = [n for n in tree.body if isinstance(n, ast.ImportFrom)]
    assert made.end_lineno is not None
    assert len(imports) + made.end_lineno - made.decorator_list[0].lineno + 1 <= 20
    out = run(repo, "own_pass")
    assert re.search(r"^wide +8 +4\.\.8 +bits of the weights around attention", out, re.M)
    assert re.search(r"^q +scaled w6 g64 .*\n(.*\n)*down +scaled w4 g64", out, re.M)
    assert re.search(r"wrote \S+report\.html", out)
    assert "002_w48_after.py" in out.splitlines()[-1]


def test_own_kernel(repo: Path) -> None:
    """Served by another row before, by the row's own kernel after, right, compiled for a GPU."""
    out = run(repo, "own_kernel")
    assert "before: w1_binary" in out
    assert "after:  w1a16 moves" in out
    error = re.search(r"error ([\d.e+-]+) of the largest", out)
    assert error is not None
    assert 0 < float(error[1]) < 2e-3
    assert re.search(r"sm_90: \d+ registers, 0 bytes of stack, [\d.]+ issue slots", out)


def test_generic_tests_take_an_own_pass(repo: Path) -> None:
    """The hits and misses that every pass must have are run for it too."""
    done = subprocess.run(
        [sys.executable, "-m", "pytest", "-q", "-p", "no:cacheprovider", "-k", "w48",
         "tests/passes/test_examples.py"],
        env=os.environ | {"LLMC_PASSES": str(repo / "examples" / "own_pass.py")},
        cwd=repo, capture_output=True, text=True, timeout=300, check=False,
    )  # fmt: skip
    assert done.returncode == 0, done.stdout[-3000:]
    assert re.search(r"[3-9] passed", done.stdout)


@pytest.mark.parametrize(
    ("text", "words"),
    [
        (None, "expected a Python file with a pass, found"),
        ("import nothing_of_this_name\n", "ModuleNotFoundError"),
        ("x = 1\n", "expected a pass in"),
    ],
)
def test_an_own_pass_file_that_is_none(tmp_path: Path, text: str | None, words: str) -> None:
    """One line that names the variable, exit 2."""
    path = tmp_path / "mine.py"
    if text is not None:
        path.write_text(text)
    done = subprocess.run(
        [sys.executable, "-m", "llmc.compiler.cli", "passes"],
        env=os.environ | {"LLMC_PASSES": str(path)},
        capture_output=True, text=True, timeout=100, check=False,
    )  # fmt: skip
    assert done.returncode == 2, done.stderr
    assert "LLMC_PASSES" in done.stderr
    assert words in done.stderr
    assert len(done.stderr.splitlines()) == 1
