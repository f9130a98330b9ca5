"""The GPU suite's own path, under the interpreter: every row is checked and within its bound."""

import json
import os
import subprocess
import sys


def test_every_row_is_within_its_bound(repo):
    env = {**os.environ, "TRITON_INTERPRET": "1"}
    command = [sys.executable, "benchmarks/gpu_suite.py", "--shapes", "130x256", "--tokens", "1,3"]
    done = subprocess.run(command, cwd=repo, env=env, capture_output=True, text=True, timeout=300)
    assert done.returncode == 0, done.stderr
    rows = json.loads(done.stdout)["rows"]
    assert {(r["row"], r["asym"]) for r in rows} >= {("w4a16", False), ("w4a16_24", True)}
    assert all(0 < r["worst_over_bound"] <= 1 for r in rows)
