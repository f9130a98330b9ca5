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
from interpreter import QUICKLY

from llmc.codegen.kernels import ROWS


def suite(repo: Path, *arguments: str, interpret: bool = True) -> Any:
    """The suite as a command."""
    env = {k: v for k, v in os.environ.items() if k != "TRITON_INTERPRET"}
    if interpret:
        env["TRITON_INTERPRET"] = "1"
    under = [QUICKLY] if interpret else []
    command = [sys.executable, *under, "benchmarks/gpu_suite.py", *arguments]
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
    beside = {name for name in found["rows"] if name.startswith("attention_")}
    assert beside
    assert set(found["rows"]) - beside == {r.name for r in ROWS} | {"generation"}
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
    assert "drawing cases of w4a16" in told["skipped"]
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


def test_a_run_ends_with_its_budget(repo: Path, tmp_path: Path) -> None:
    """Imports count, and so does whatever was begun; the files tell what there was no time for."""
    out, began = tmp_path / "gpu.json", time.monotonic()
    done = suite(repo, "--tiny", "--seconds", "6", "--out", str(out))
    assert time.monotonic() - began < 6 + 18 + 4
    told = json.loads(out.read_text())
    assert told["skipped"], done.stderr[-2000:]


def test_what_hangs_is_ended_when_the_budget_is(repo: Path, monkeypatch: Any) -> None:
    """No task outlives the budget, and the processes are ended together."""
    monkeypatch.syspath_prepend(str(repo / "benchmarks"))
    from gpu_clock import Budget
    from gpu_work import Task, Workers

    workers, budget = Workers(2), Budget(4.0)
    tasks = [Task(f"hangs {i}", time.sleep, (600.0,), limit=600.0) for i in range(3)]
    errors = [answer.error for answer in workers.run(tasks, budget)]
    workers.close()
    assert errors == ["no time left"] * 2
    assert budget.skipped == ["hangs 2"]
    assert -6.0 < budget.left <= 0


def test_what_is_no_number_is_wrong_and_a_screen_holds_all(repo: Path, monkeypatch: Any) -> None:
    """Logits that are NaN; a page of every kernel and peer at every shape, under 12,000."""
    monkeypatch.syspath_prepend(str(repo / "benchmarks"))
    import gpu_report

    kernels = [
        {"kernel": f"kernel {i} of many", "N": N, "K": K, "tokens": M, "us": 12345.6,
         "share_of_copy": 0.51, "share_of_floor": 0.52}
        for i in range(40) for N, K in ((4096, 4096), (28672, 4096), (4096, 14336), (14336, 4096))
        for M in (1, 16, 64, 256, 2048)
    ]  # fmt: skip
    steps = [{"what": "w4", "relative_error": math.nan, "replayed_alike": True},
             {"what": "w8", "us": 1500.0, "tokens_per_s": 667.0}]  # fmt: skip
    failed = [{"what": f"numerics {i}", "error": "e" * 300} for i in range(99)]
    data = {
        "device": "d", "command": "c", "torch": "t", "limits": {}, "kernels": kernels,
        "peers": failed, "decode": steps, "seconds": {}, "skipped": [], "numerics": {},
    }  # fmt: skip
    assert gpu_report.problems({**data, "peers": []}) == ["logits w4 are off by nan"]
    screen = gpu_report.brief(data)
    assert len(screen) <= 11_000
    assert "decode w8: 667 tokens/s, 1500 us" in screen
    assert "- logits w4 are off by nan" in screen
    assert screen.endswith("- and 80 more\n")
    assert "12345.6/.52" in screen
    assert "12345.6 (0.51, 0.52)" in gpu_report.markdown(data)


def test_a_package_that_is_missing_is_named(repo: Path) -> None:
    """On one line, with what to do."""
    start = "import runpy, sys; sys.modules['llmc'] = None; sys.path.insert(0, 'benchmarks'); "
    command = [sys.executable, "-c", start + "runpy.run_module('gpu_suite', run_name='__main__')"]
    done = subprocess.run(command, cwd=repo, capture_output=True, text=True, timeout=120)
    assert done.returncode == 1
    assert done.stderr.strip() == (
        "gpu_suite: expected the package llmc, found none; link it as this file's first lines say"
    )


def test_bad_input(repo: Path) -> None:
    """Exit 5 with neither a GPU nor the interpreter; exit 2 for a section that is none."""
    import torch

    if not torch.cuda.is_available():
        done = suite(repo, interpret=False)
        assert done.returncode == 5
        assert "found neither: no CUDA device" in done.stderr
    assert suite(repo, "--only", "speed").returncode == 2
