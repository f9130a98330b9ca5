"""Counters of launches: one set for a stream, kept for graphs that point to it."""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any

import pytest
import torch

from llmc.codegen import counters as under_test
from llmc.codegen.calls import compiling
from llmc.codegen.counters import LEAST, counters, forget

CPU, GPU = torch.device("cpu"), torch.device("cuda", 0)


@pytest.fixture(autouse=True)
def empty(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(under_test, "_SETS", {})


def test_launches_share_a_set_that_grows_by_doubling_and_is_never_let_go() -> None:
    first = counters("counts", 3, CPU)
    assert first.numel() == LEAST
    assert first.dtype == torch.int32
    assert counters("counts", LEAST, CPU) is first
    grown = counters("counts", LEAST + 1, CPU)
    assert grown.numel() == 2 * LEAST
    assert counters("counts", 1, CPU) is grown
    assert under_test._SETS["counts", CPU, 0][0] is first
    assert counters("arrived", 1, CPU) is not grown


def test_each_stream_has_its_own_and_a_recorded_launch_leaves_none_behind(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    now: dict[str, Any] = {"stream": 7, "capturing": False}
    real = torch.zeros
    monkeypatch.setattr(
        torch.cuda, "current_stream", lambda device: SimpleNamespace(cuda_stream=now["stream"])
    )
    monkeypatch.setattr(torch.cuda, "is_current_stream_capturing", lambda: now["capturing"])
    monkeypatch.setattr(torch, "zeros", lambda n, dtype, device: real(n, dtype=dtype))
    warm = counters("counts", 1, GPU)
    now["capturing"] = True
    assert counters("counts", 1, GPU) is warm
    now["stream"] = 8
    recorded = counters("counts", 1, GPU)
    assert recorded is not warm
    assert counters("counts", 1, GPU) is not recorded
    now["capturing"] = False
    assert counters("counts", 1, GPU) is counters("counts", 1, GPU)


@pytest.mark.parametrize("error", [ValueError, KeyboardInterrupt])
def test_what_an_interpreted_launch_broke_off_is_not_found_by_the_next(
    error: type[BaseException],
) -> None:
    counters("counts", 1, CPU)[0] = 5
    with pytest.raises(error), compiling(None):
        raise error
    assert not counters("counts", 1, CPU).any()
    forget(GPU)
    assert under_test._SETS
