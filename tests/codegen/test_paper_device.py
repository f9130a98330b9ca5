"""The host's side of the GPU on a device of paper: Triton's own compiler, launcher and handles run,
and the rules of streams and graphs are kept; only the numbers say nothing."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest


@pytest.fixture(scope="module")
def runs(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Any]:
    """What `paper_runs` saw."""
    folder = tmp_path_factory.mktemp("paper")
    environment = {k: v for k, v in os.environ.items() if k != "TRITON_INTERPRET"}
    environment |= {"XDG_CACHE_HOME": str(folder), "TRITON_CACHE_DIR": str(folder / "triton")}
    command = [sys.executable, str(Path(__file__).with_name("paper_runs.py")), str(folder)]
    done = subprocess.run(command, env=environment, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr[-3000:]
    found: dict[str, Any] = json.loads(done.stdout)
    return found


def test_a_decode_step_is_recorded_by_handle_and_replayed(runs: dict[str, Any]) -> None:
    """Each launch twice, compiled in the first and recorded in the second: what is loaded, copied
    or waited for in a recording would have been refused."""
    found = runs["decode"]
    names = [name for name, _ in found["launches"]]
    assert len(names) % 2 == 0
    assert names[: len(names) // 2] == names[len(names) // 2 :]
    replays = [entry for entry in found["log"] if entry[0] == "replay"]
    assert replays == [["replay", len(names) // 2]] * 21
    assert found["result"]["tokens_per_s"] > 0
    assert "rank" in " ".join(names)


def test_warm_calls_and_recording_share_a_stream_that_waits_and_is_waited_for(
    runs: dict[str, Any],
) -> None:
    """So that counters made by the first calls are those that the graph points to."""
    found = runs["decode"]
    (stream,) = found["streams"]
    assert stream != 0
    waits = [entry for entry in found["log"] if entry[0] == "wait"]
    assert waits == [["wait", stream, 0], ["wait", 0, stream]]
    assert not {"zeros", "zero_", "zeros_like"} & set(found["recorded"])


def test_a_step_of_torch_is_recorded_too(runs: dict[str, Any]) -> None:
    """What llmc is timed beside: no kernel of Triton, 21 replays."""
    assert runs["dense"]["launches"] == []
    assert len([e for e in runs["dense"]["log"] if e[0] == "replay"]) == 21


def test_many_tokens_are_timed_over_copies_of_the_weight(runs: dict[str, Any]) -> None:
    """The weight decoded once a call, a product by torch, no error."""
    (row,) = runs["many"]["result"]
    assert row["us"] > 0
    assert row["share_of_floor"] > 0
    assert len(runs["many"]["launches"]) >= 2


def test_tiles_are_timed_and_one_that_is_none_is_left_out(runs: dict[str, Any]) -> None:
    """With split columns the counters lie outside of the graph."""
    assert set(runs["tuned"]["result"]) == {"32/1", "32/2"}
    grids = {tuple(grid) for _, grid in runs["tuned"]["launches"]}
    assert grids == {(3, 1, 1), (3, 1, 2)}
    assert "zeros" not in runs["tuned"]["recorded"]


def test_what_cuda_refuses_is_refused(runs: dict[str, Any]) -> None:
    """The paper device would tell: in a recording nothing waits, and no op is in two places."""
    refused = runs["refused"]
    inside = {n: t for n, t in refused.items() if n != "two places"}
    assert len(inside) == 7
    assert all("not permitted when stream is capturing" in t for t in inside.values()), inside
    assert "expected all tensors to be on the same device" in refused["two places"]
