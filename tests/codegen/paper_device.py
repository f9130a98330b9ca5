"""A CUDA device of paper: the host's side of a GPU, and nothing behind it.

Triton compiles for sm_90 and launches through its own driver into `paper_driver.c`, which keeps a
list. Streams, events and graphs keep the rules that a GPU would: nothing recorded may wait for the
device, copy from or to the host or load code. `paper_tensors` has the tensors.
"""

from __future__ import annotations

import contextlib
import ctypes
import os
import subprocess
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import torch

GPU = torch.device("cuda", 0)
TAG = 1 << 60  # in addresses of the device, so that the host's are told apart
MOST = 4096  # launches that the driver remembers
# Its cache is small, so that few copies of a weight are beyond it.
PROPERTIES = SimpleNamespace(multi_processor_count=132, L2_cache_size=1 << 14, name="paper",
                             total_memory=80 << 30, major=9, minor=0)  # fmt: skip


class Refused(RuntimeError):
    """What a CUDA device would have refused."""


@dataclass
class Stream:
    """A queue; it knows which others it has waited for."""

    device: Any = None
    cuda_stream: int = field(default_factory=lambda: next(_NUMBERS))
    priority: int = 0

    def wait_stream(self, other: Stream) -> None:
        DEVICE.log.append(("wait", self.cuda_stream, other.cuda_stream))

    def synchronize(self) -> None:
        DEVICE.waits("stream.synchronize")


_NUMBERS = iter(range(1, 1 << 20))


@dataclass
class Event:
    """A mark; its time is what was recorded before it."""

    enable_timing: bool = False
    at: int | None = None

    def record(self, stream: Any = None) -> None:
        DEVICE.clock += 1
        self.at = DEVICE.clock

    def synchronize(self) -> None:
        DEVICE.waits("event.synchronize")

    def elapsed_time(self, end: Event) -> float:
        if not (self.enable_timing and end.enable_timing) or self.at is None or end.at is None:
            raise Refused("Both events must be recorded, with timing")
        return 1e-3 * (end.at - self.at)


class Graph:
    """A recording: how many launches it holds."""

    def __init__(self) -> None:
        self.launches: int | None = None

    def capture_begin(self, *pool: Any, capture_error_mode: str = "global") -> None:
        if DEVICE.recording is not None:
            raise Refused("a graph is being recorded already")
        if DEVICE.stream is DEVICE.default:
            raise Refused("CUDA graphs must be captured on a non-default stream")
        DEVICE.recording, DEVICE.began = self, DEVICE.launched
        DEVICE.driver_flag(1)

    def capture_end(self) -> None:
        DEVICE.recording = None
        DEVICE.driver_flag(0)
        self.launches = DEVICE.launched - DEVICE.began

    def replay(self) -> None:
        if self.launches is None:
            raise Refused("called replay without a preceding successful capture")
        if DEVICE.recording is not None:
            raise Refused("a graph is replayed while one is recorded")
        DEVICE.log.append(("replay", self.launches))
        DEVICE.clock += self.launches


@contextlib.contextmanager
def on_stream(stream: Stream | None) -> Iterator[None]:
    before = DEVICE.stream
    DEVICE.stream = stream or before
    try:
        yield
    finally:
        DEVICE.stream = before


class Recording:
    """As torch.cuda.graph: waits for the device, then records on a stream of its own."""

    def __init__(self, graph: Graph, pool: Any = None, stream: Any = None, **_: Any) -> None:
        self.graph, self.on = graph, on_stream(stream or Stream())

    def __enter__(self) -> None:
        DEVICE.waits("synchronize")
        self.on.__enter__()
        self.graph.capture_begin()

    def __exit__(self, *error: Any) -> None:
        self.graph.capture_end()
        self.on.__exit__(*error)


class Device:
    """The state of the one device."""

    def __init__(self) -> None:
        self.default = self.stream = Stream(cuda_stream=0)
        self.recording: Graph | None = None
        self.began = self.clock = 0
        self.log: list[tuple[Any, ...]] = []
        self.driver: Any = None
        self.recorded: list[str] = []  # torch's own ops in graphs

    @property
    def launched(self) -> int:
        return ctypes.c_int.in_dll(self.driver, "paper_count").value if self.driver else 0

    def driver_flag(self, value: int) -> None:
        if self.driver:
            ctypes.c_int.in_dll(self.driver, "paper_recording").value = value

    def waits(self, what: str) -> None:
        if self.recording is not None:
            raise Refused(f"{what}: operation not permitted when stream is capturing")


DEVICE = Device()


def driver(folder: Path) -> ctypes.CDLL:
    """The paper driver, built by the C compiler that Triton uses, found as ``libcuda.so.1``."""
    import triton.backends.nvidia.driver as own

    library = folder / "libcuda.so.1"
    if not library.exists():
        source = Path(__file__).with_name("paper_driver.c")
        command = [os.environ.get("CC", "gcc"), "-O1", "-shared", "-fPIC", "-w",
                   "-Wl,-soname,libcuda.so.1", f"-I{own.include_dirs[0]}", str(source),
                   "-o", str(library)]  # fmt: skip
        subprocess.run(command, check=True)
    loaded = ctypes.CDLL(str(library), mode=ctypes.RTLD_GLOBAL)
    ctypes.c_uint64.in_dll(loaded, "paper_tag").value = TAG
    return loaded


def launches() -> list[tuple[str, tuple[int, ...], int, int, int]]:
    """Name, grid, threads, shared bytes and stream of each launch."""

    class Launch(ctypes.Structure):
        _fields_ = [("name", ctypes.c_char_p), ("grid", ctypes.c_uint * 3),
                    ("block", ctypes.c_uint), ("shared", ctypes.c_uint),
                    ("attributes", ctypes.c_uint), ("stream", ctypes.c_uint64)]  # fmt: skip

    found = (Launch * MOST).in_dll(DEVICE.driver, "paper_launches")
    return [(f.name.decode(), tuple(f.grid), f.block, f.shared, f.stream)
            for f in found[: DEVICE.launched]]  # fmt: skip
