"""Which way of a kernel is fastest at how many tokens: from measurements, else from the defaults.

The user's own table (`llmc tune`) comes first, then the one that is shipped, measured on one
machine and named in it, then a kernel's usual numbers of tokens. Between two measured numbers of
tokens seconds are taken on the straight line, so the point where ways cross need not be measured.
"""

from __future__ import annotations

import bisect
import functools
import math
import re
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path

import torch

from ..problem import Problem
from ..tuning.cache import Entry, Found, Machine, Table, cpu_name, parse, path_of, read
from .kernel import CpuKernel

DEFAULT = Path(__file__).with_name("default.json")


def machine() -> Machine:
    """What measurements on this machine hold for."""
    return Machine("cpu", cpu_name())


def key_of(kernel: CpuKernel, problem: Problem) -> str:
    """Scheme, rows and columns: what measurements go by."""
    return f"{kernel.key(problem)} {problem.N}x{problem.K}"


@dataclass(frozen=True)
class Choice:
    """Ways by number of tokens, and where they come from.

    Attributes:
        steps: (tokens, way): from so many tokens on that way, rising from 1.
        source: "measured here", "shipped, measured on …" or "usual".
        key: the measured key that it follows; "" for none.
    """

    steps: tuple[tuple[int, str], ...]
    source: str
    key: str = ""
    _first: tuple[int, ...] = field(init=False, repr=False, compare=False)

    def __post_init__(self) -> None:
        object.__setattr__(self, "_first", tuple(t for t, _ in self.steps))

    def at(self, tokens: int) -> str:
        """The way for a call of so many tokens."""
        return self.steps[max(0, bisect.bisect_right(self._first, tokens) - 1)][1]

    def __str__(self) -> str:
        text = ", ".join(f"M>={t} {way}" if t > 1 else way for t, way in self.steps)
        return f"{text} ({self.source})"


@functools.lru_cache(maxsize=8)
def _read(path: str, changed: int) -> Found:
    return read(machine())


def measured() -> Found:
    """This machine's own table, read again when its file changes."""
    path = path_of(machine())
    return _read(str(path), path.stat().st_mtime_ns if path.is_file() else 0)


@functools.cache
def shipped() -> Table | None:
    """The table that comes with llmc; None where the package has none."""
    if not DEFAULT.is_file():
        return None
    return parse(DEFAULT.read_text(), str(DEFAULT), "shipped")


def ways_by_tokens(kernel: CpuKernel, problem: Problem) -> Choice:
    """The ways of a kernel for a problem, by tokens."""
    if len(kernel.ways) == 1:
        return Choice(kernel.usual, "its only way")
    own = measured().table
    for table, source in ((own, "measured here"), (shipped(), "shipped")):
        if table is None:
            continue
        entries = nearest(table, kernel, problem)
        steps = _steps(entries, tuple(kernel.ways))
        if steps:
            if source == "shipped":
                source = f"shipped, measured on {table.machine.name}"
            return Choice(steps, source, entries[0].key)
    return Choice(kernel.usual, "usual, nothing measured")


def nearest(table: Table, kernel: CpuKernel, problem: Problem) -> list[Entry]:
    """The entries of the problem's scheme at its shape, else at the shape nearest in size."""
    exact = table.of(key_of(kernel, problem))
    if exact:
        return exact
    scheme = kernel.key(problem)
    size = math.log(problem.N * problem.K)
    found: dict[str, float] = {}
    for entry in table.entries:
        head, _, shape = entry.key.rpartition(" ")
        sides = re.fullmatch(r"(\d+)x(\d+)", shape)
        if head == scheme and sides is not None:
            found[entry.key] = abs(math.log(int(sides[1]) * int(sides[2])) - size)
    return table.of(min(found, key=lambda k: found[k])) if found else []


def _steps(entries: Sequence[Entry], ways: tuple[str, ...]) -> tuple[tuple[int, str], ...]:
    """From which number of tokens on which way is fastest, from seconds at a few of them."""
    points = {
        way: [(e.tokens, e.seconds[way]) for e in entries if way in e.seconds] for way in ways
    }
    points = {way: p for way, p in points.items() if p}
    if not points:
        return ()
    steps: list[tuple[int, str]] = []
    top = max(e.tokens for e in entries)
    for tokens in _grid(2 * top):
        best = min(points, key=lambda way: _seconds(points[way], tokens))
        if not steps or steps[-1][1] != best:
            steps.append((tokens, best))
    return tuple(steps)


def _grid(top: int) -> list[int]:
    """Every number of tokens up to 64, then in steps of an eighth."""
    out = list(range(1, min(top, 64) + 1))
    while out[-1] < top:
        out.append(out[-1] + max(1, out[-1] // 8))
    return out


def _seconds(points: Sequence[tuple[int, float]], tokens: int) -> float:
    """On the straight line between measured points; in proportion beyond the last."""
    at = bisect.bisect_left(points, (tokens, 0.0))
    if at == len(points):
        last, seconds = points[-1]
        return seconds * tokens / last
    right, above = points[at]
    if at == 0 or right == tokens:
        return above
    left, below = points[at - 1]
    return below + (above - below) * (tokens - left) / (right - left)


def one_thread() -> bool:
    """Whether the thread's own time says how long a call takes."""
    return torch.get_num_threads() == 1
