"""Calls by handle: what is checked once, what is dispatched once, and what tells calls apart."""

from __future__ import annotations

import os
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import pytest
import torch

from llmc.codegen import launch, start
from llmc.codegen.calls import Call, kind
from llmc.codegen.prepack import Packed, prepack
from llmc.codegen.problem import Problem
from llmc.codegen.row import TileConfig
from llmc.codegen.rows.int4 import W4A16
from llmc.compiler.ir import packing
from llmc.compiler.ir.errors import UsageError


class Compiled:
    """As Triton's compiled kernel: indexed by a grid it gives what launches it."""

    def __init__(self, log: list[tuple[Any, ...]]) -> None:
        self.log = log

    def __getitem__(self, grid: tuple[int, ...]) -> Any:
        return lambda *args: self.log.append(("handle", grid, args))


class Function:
    """As Triton's jit function; the log tells dispatches from launches by handle."""

    def __init__(self, handles: bool) -> None:
        self.handles = handles
        self.log: list[tuple[Any, ...]] = []

    def __getitem__(self, grid: tuple[int, ...]) -> Any:
        def dispatch(*args: Any, **options: Any) -> Compiled | None:
            self.log.append(("dispatch", grid, args, options))
            return Compiled(self.log) if self.handles else None

        return dispatch


@pytest.fixture
def function(monkeypatch: pytest.MonkeyPatch) -> Function:
    """Launches go to a log instead of a GPU."""
    made = Function(handles=True)
    monkeypatch.setattr(start, "function", lambda rendered: made)
    monkeypatch.setattr(launch, "unavailable", lambda device=None: None)
    monkeypatch.setattr(start, "processor_count", lambda device: 132)
    start.row_call.cache_clear()
    yield made
    start.row_call.cache_clear()


def weight(N: int = 96, K: int = 256, **fields: Any) -> Packed:
    """Zeros in 4 bits."""
    codes = packing.pack(torch.zeros(N, K, dtype=torch.int64), 4)
    scale = torch.ones(N, K // 128).half()
    sides = {"gain": torch.ones(K), "smooth": torch.ones(K)}
    given = {n: sides[n] for n in sides if n in fields}
    flags = {"norm": "gain" in fields, "smooth": "smooth" in fields}
    return prepack(W4A16, Problem(N, K, **flags), codes=codes, scale=scale, **given)


def test_a_call_is_dispatched_once(function: Function) -> None:
    """The second of two like calls goes by handle, with the same arguments after the tensors."""
    packed, x = weight(), torch.zeros(3, 256).half()
    for _ in range(3):
        launch.fused_linear(packed, x)
    assert [entry[0] for entry in function.log] == ["dispatch", "handle", "handle"]
    names = ["x", "codes", "scale", "scratch", "counts", "y"]
    first, second = function.log[0][2], function.log[1][2]
    tail = (3, 96, 256, 96, 256, 8, 32, 4, 1)  # M, N, strides of x and y, K, BM, BN, STAGES, SPLIT
    assert first[len(names) :] == second[len(names) :] == tail
    assert [t.data_ptr() for t in second[:3]] == [
        t.data_ptr() for t in (x, packed["codes"], packed["scale"])
    ]
    assert second[3:5] == (None, None)
    assert function.log[0][3]["num_warps"] == 2


def test_what_the_code_depends_on_tells_calls_apart(function: Function) -> None:
    """Tokens, strides, alignment and side inputs are dispatched anew; addresses are not."""
    packed = weight()
    room = torch.zeros(8 * 1024).half()
    calls = [
        room[: 3 * 256].view(3, 256),
        room[256 : 4 * 256].view(3, 256),  # another address: by handle
        room[1 : 3 * 256 + 1].view(3, 256),  # no multiple of 16 bytes
        room[: 4 * 256].view(4, 256),
        room[: 3 * 512].view(3, 512)[:, :256],
        room[: 3 * 256].view(1, 3, 256),  # one more dimension: the same code
    ]
    for x in calls:
        launch.fused_linear(packed, x)
    launch.fused_linear(packed, calls[0], residual=torch.zeros(3, 96).half())
    launch.fused_linear(packed, calls[0], config=TileConfig(8, 64))
    told = [entry[0] for entry in function.log]
    assert told == ["dispatch", "handle", *["dispatch"] * 3, "handle", *["dispatch"] * 2]


def test_without_handles_each_call_is_dispatched(function: Function) -> None:
    """As under the interpreter, and in a Triton that returns no kernel."""
    function.handles = False
    packed, x = weight(), torch.zeros(1, 256).half()
    for _ in range(2):
        launch.fused_linear(packed, x)
    assert [entry[0] for entry in function.log] == ["dispatch"] * 2


def test_counters_stay_where_they_are_and_vectors_are_joined_once(function: Function) -> None:
    """A split finds the same zeros in every launch; gain times smooth is one tensor."""
    packed, x = weight(96, 1024, gain=1, smooth=1), torch.zeros(1, 1024).half()
    for _ in range(2):
        launch.fused_linear(packed, x, config=TileConfig(8, 32, split=2))
    first, second = (entry[2] for entry in function.log)
    names = ["x", "codes", "scale", "gain", "scratch", "counts", "y"]
    counts, gain = names.index("counts"), names.index("gain")
    assert first[counts].data_ptr() == second[counts].data_ptr()
    assert not second[counts].any()
    assert first[gain] is second[gain]
    assert first[gain].dtype == torch.float32


def test_what_the_problem_says_must_be_there(function: Function) -> None:
    """A norm without its gain is no other problem but an error."""
    codes = packing.pack(torch.zeros(32, 64, dtype=torch.int64), 4)
    problem = Problem(32, 64, group=64, norm=True)
    packed = prepack(W4A16, problem, codes=codes, scale=torch.ones(32, 1).half())
    with pytest.raises(UsageError, match="expected gain as the problem says, found none"):
        launch.fused_linear(packed, torch.zeros(1, 64).half())


def test_an_error_is_found_in_every_call(function: Function) -> None:
    """A misfit is not remembered as a call that fits."""
    packed = weight()
    for _ in range(2):
        with pytest.raises(UsageError, match=r"expected x \[3, 256\], found \[3, 255\]"):
            launch.fused_linear(packed, torch.zeros(3, 255).half())


def test_triton_still_gives_handles() -> None:
    """Its compiled kernel is indexed by a grid, and a dispatch returns it."""
    import inspect

    from triton.compiler import CompiledKernel
    from triton.runtime.jit import JITFunction

    assert "grid" in inspect.signature(CompiledKernel.__getitem__).parameters
    assert "return kernel" in inspect.getsource(JITFunction.run)


def test_python_costs_little_beside_a_dispatch(function: Function) -> None:
    """Thread time of a repeated call, allocation of y included: tens of microseconds at most."""
    packed, x = weight(), torch.zeros(1, 256).half()
    launch.fused_linear(packed, x)
    function.log.clear()
    best = float("inf")
    for _ in range(5):
        start = time.thread_time()
        for _ in range(200):
            launch.fused_linear(packed, x)
        best = min(best, (time.thread_time() - start) / 200)
    assert best < 60e-6


LEFT_AT_ZERO = """
import sys, torch
sys.path.insert(0, sys.argv[1])
from numerics import parts_of
from sides_cases import case
from llmc.codegen.counters import counters
from llmc.codegen.launch import fused_linear
from llmc.codegen.prepack import prepack
from llmc.codegen.row import TileConfig
from llmc.codegen.rows.int4 import W4A16
given = case(1, 70, 300, rank=20)
packed = prepack(W4A16, given.problem, **parts_of(given))
x = torch.randn(20, 300).half()
tiles = {1: TileConfig(8, 32, split=2), 20: TileConfig(8, 32), 9: TileConfig(8, 64, split=3)}
for M, config in tiles.items():
    y = fused_linear(packed, x[:M], config=config)
    assert not counters("counts", 1, x.device).any(), (M, config)
    assert torch.equal(y, fused_linear(packed, x[:M], config=config)), (M, config)
"""


def test_launches_leave_their_counters_at_zero(tmp_path: Path) -> None:
    """Under the interpreter: tickets, makers and splits of one weight, call after call."""
    environment = {**os.environ, "TRITON_INTERPRET": "1", "XDG_CACHE_HOME": str(tmp_path)}
    command = [sys.executable, "-c", LEFT_AT_ZERO, str(Path(__file__).parent)]
    run = subprocess.run(command, env=environment, capture_output=True, text=True, check=False)
    assert run.returncode == 0, run.stderr[-2000:]


def test_kinds_tell_dtype_and_alignment() -> None:
    """None for no tensor."""
    room = torch.zeros(64, dtype=torch.float16)
    assert kind(None) is None
    assert kind(room) == (torch.float16, True)
    assert kind(room[1:]) == (torch.float16, False)
    assert Call(None, (3,), (), {}, room.device).grid == (3, 1, 1)
