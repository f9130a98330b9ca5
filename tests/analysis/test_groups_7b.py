"""The group analysis of a large graph: committed figures, and the script that makes them."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import pytest


def test_committed_figures_keep_the_limits(repo: Path) -> None:
    found = json.loads((repo / "benchmarks" / "results" / "groups_7b.json").read_text())
    assert found["layers"] == 32
    assert found["parameters"] > 6.5e9
    assert found["analysis_seconds"] <= 10
    assert found["peak_gib"] <= 2
    kinds = {"head": 32, "neuron": 32, "value_channel": 32, "hidden": 1, "rotary_pair": 1}
    assert found["groups"].items() >= kinds.items()
    assert found["bytes_after_cut"] < found["bytes"]


@pytest.mark.slow
def test_figures_can_be_measured_again(repo: Path, tmp_path: Path) -> None:
    """A shallower model through the same script, within the same limits; no tensor is read."""
    out = tmp_path / "found.json"
    command = [sys.executable, "benchmarks/groups_7b.py", "--layers", "8", "--out", str(out)]
    done = subprocess.run(command, cwd=repo, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    found = json.loads(out.read_text())
    assert found["groups"]["neuron"] == found["groups"]["head"] == found["layers"] == 8
