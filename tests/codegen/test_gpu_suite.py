"""The GPU suite's own path, under the interpreter: everything runs once, and nothing is timed."""

from __future__ import annotations

import json
import math
import os
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import pytest

from llmc.codegen.kernels import ROWS


def suite(repo: Path, *arguments: str, interpret: bool = True) -> Any:
    """The suite as a command."""
    env = {k: v for k, v in os.environ.items() if k != "TRITON_INTERPRET"}
    if interpret:
        env["TRITON_INTERPRET"] = "1"
    command = [sys.executable, "benchmarks/gpu_suite.py", *arguments]
    return subprocess.run(command, cwd=repo, env=env, capture_output=True, text=True, timeout=600)


@pytest.fixture(scope="module")
def ran(repo: Path, tmp_path_factory: pytest.TempPathFactory) -> dict[str, Any]:
    """One small run of all sections."""
    out = tmp_path_factory.mktemp("suite") / "gpu.json"
    done = suite(repo, "--tiny", "--cases", "1", "--seconds", "3000", "--out", str(out))
    assert done.returncode == 0, done.stdout[-2000:] + done.stderr[-2000:]
    found: dict[str, Any] = json.loads(out.read_text())
    assert out.with_suffix(".md").is_file()
    return found


def test_every_row_is_within_its_bound(ran: dict[str, Any]) -> None:
    """In both halves where it serves both, and attention beside the linears."""
    found = ran["numerics"]
    assert set(found["rows"]) == {r.name for r in ROWS} | {"attention_kv", "generation"}
    assert all({"fp16", "bf16"} & set(found["rows"][r.name]) for r in ROWS)
    assert {"fp16", "bf16"} <= set(found["rows"]["w4a16"])
    assert found["wrong"] == []
    assert 0 < found["worst_over_bound"] <= 1


def test_every_row_runs_on_the_kernel_page(ran: dict[str, Any]) -> None:
    """With its bytes; nothing has a time, and no error."""
    assert {r["kernel"] for r in ran["kernels"]} >= {r.name for r in ROWS}
    assert all(r["us"] is None and r["bytes"] > 0 for r in ran["kernels"]), ran["kernels"]
    assert ran["installed"]["torch bf16"].startswith("torch ")
    assert ran["device"] == "interpreter, not timed"
    assert ran["limits"] == {"copy": None, "flops": None}


def test_peers_that_are_missing_are_named(ran: dict[str, Any]) -> None:
    """torch's own bf16 runs; what needs a GPU or a package says so."""
    assert {r["peer"] for r in ran["peers"]} == {"torch bf16"}
    assert ran["installed"]["gemlite int4"].startswith("left out: ")
    assert ran["installed"]["torch fp8"] == "left out: needs a GPU"


def test_a_decode_step_gives_torchs_logits(ran: dict[str, Any]) -> None:
    """Six kernels a layer over each scheme, against the same weights in torch."""
    assert {r["what"] for r in ran["decode"]} == {"w8", "w4", "w4 + 2:4", "w4 + rank 64"}
    assert all(0 < r["relative_error"] < 0.01 for r in ran["decode"]), ran["decode"]


def test_a_budget_is_kept_and_names_what_it_leaves_out(repo: Path) -> None:
    """With no time nothing runs, and everything that did not is listed."""
    done = suite(repo, "--tiny", "--seconds", "0", "--cases", "20")
    assert done.returncode == 0, done.stderr[-2000:]
    told = json.loads(done.stdout)
    assert told["kernels"] == told["peers"] == told["decode"] == []
    assert "drawing cases" in told["skipped"]
    assert "logits w4" in told["skipped"]
    assert "w4a16 70x136" in told["skipped"]


def test_a_task_that_fails_takes_no_other_down(repo: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """One that raises, one that ends its process, one that hangs: rows with what was wrong."""
    monkeypatch.syspath_prepend(str(repo / "benchmarks"))
    from gpu_clock import Budget
    from gpu_work import Task, Workers

    tasks = [
        Task("root", math.sqrt, (4.0,)),
        Task("raises", math.sqrt, (-1.0,), about=(("kernel", "k"),)),
        Task("root again", math.sqrt, (9.0,)),
        Task("hangs", time.sleep, (600.0,), limit=0.2),
        Task("dies", os._exit, (7,)),
        Task("last", math.sqrt, (16.0,)),
    ]
    budget, workers = Budget(120.0), Workers(1)
    found = {a.task.label: a for a in workers.run(tasks, budget)}
    workers.close()
    assert [found[t.label].result for t in tasks] == [2.0, None, 3.0, None, None, 4.0]
    assert found["raises"].row == {
        "kernel": "k", "what": "raises", "error": "ValueError: math domain error",
    }  # fmt: skip
    assert found["hangs"].error == "took more than 0 s"
    assert found["dies"].error == "its process ended with exit code 7"
    assert list(workers.run(tasks, budget, room=1000.0)) == []
    assert budget.skipped == [t.label for t in tasks]


def test_bad_input(repo: Path) -> None:
    """Exit 5 with neither a GPU nor the interpreter; exit 2 for a section that is none."""
    import torch

    if not torch.cuda.is_available():
        done = suite(repo, interpret=False)
        assert done.returncode == 5
        assert "found neither: no CUDA device" in done.stderr
    assert suite(repo, "--only", "speed").returncode == 2
