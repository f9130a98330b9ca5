"""Time on a GPU: a budget that is kept, replays of graphs, and what the device can do at most."""

from __future__ import annotations

import os
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch

from llmc.codegen.device import interpreting
from llmc.codegen.tuning.triton import replayed, rotate_bytes

MOST_START = 120.0  # seconds that a start is believed to have taken


def started() -> float:
    """When this process began, on the monotonic clock: imports take seconds of the same budget."""
    try:
        ticks = int(Path("/proc/self/stat").read_text().rpartition(")")[2].split()[19])
        age = time.clock_gettime(time.CLOCK_BOOTTIME) - ticks / os.sysconf("SC_CLK_TCK")
    except (OSError, ValueError, IndexError, AttributeError):
        age = 0.0  # a system that does not tell
    return time.monotonic() - (age if 0 <= age <= MOST_START else 0.0)


@dataclass
class Budget:
    """Seconds that a run may take; what it leaves out for want of them is named."""

    seconds: float
    began: float = field(default_factory=time.monotonic)
    skipped: list[str] = field(default_factory=list)
    taken: dict[str, float] = field(default_factory=dict)

    @property
    def left(self) -> float:
        return self.seconds - (time.monotonic() - self.began)

    @contextmanager
    def section(self, name: str) -> Iterator[None]:
        """Seconds of a part of the run."""
        began = time.monotonic()
        yield
        self.taken[name] = round(time.monotonic() - began, 1)


def on_gpu() -> bool:
    """Whether there is a device to time; the interpreter is none."""
    return torch.cuda.is_available() and not interpreting()


def device() -> str:
    """Where tensors live."""
    return "cuda" if on_gpu() else "cpu"


def microseconds(call: Callable[[Any], object], over: Sequence[Any]) -> float | None:
    """Median microseconds of one call, by graph replays over all of ``over``; None without a GPU,
    where the call runs once and its time says nothing."""
    if not on_gpu():
        call(over[0])
        return None
    return 1e6 * replayed(call, over)


def copies(nbytes: int) -> int:
    """How many copies of a weight no cache holds; one where nothing is timed."""
    return max(2, rotate_bytes() // max(1, nbytes) + 1) if on_gpu() else 1


@dataclass(frozen=True)
class Limits:
    """What this device was measured to reach: bytes per second of a copy, bf16 operations."""

    copy: float | None
    flops: float | None


def limits() -> Limits:
    """Measured here and now: a copy of 512 MiB (read and written), a product of 8192 cubed."""
    if not on_gpu():
        return Limits(None, None)
    source = torch.empty(1 << 29, dtype=torch.uint8, device="cuda")
    target = torch.empty_like(source)
    copied = replayed(lambda _: target.copy_(source), [0, 1])
    a = torch.randn(8192, 8192, device="cuda", dtype=torch.bfloat16)
    multiplied = replayed(lambda _: a @ a, [0, 1])
    return Limits(2 * source.nbytes / copied, 2 * 8192**3 / multiplied)
