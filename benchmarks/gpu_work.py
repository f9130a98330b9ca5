"""Tasks in processes of their own: what raises, hangs or takes the device down is a row, no end.

An error of the device, such as an access beyond a tensor, spoils every later call of its process;
a kernel that waits for ever cannot be stopped from within. So a task runs in another process, which
is ended after an error or when the task's time is over, and the next task finds a fresh one.
"""

from __future__ import annotations

import contextlib
import gc
import multiprocessing
import sys
import time
from collections import deque
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from multiprocessing import connection
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    import gpu_clock

START = 60.0  # seconds beside a task's own that a process may take to import and to begin
LEAVE = 3.0  # seconds that processes get to end by themselves


@dataclass(frozen=True)
class Task:
    """A call of a function that another process can import; ``about`` stands in a row that says
    that it failed, ``limit`` is in seconds."""

    label: str
    call: Callable[..., Any]
    args: tuple[Any, ...] = ()
    limit: float = 60.0
    about: tuple[tuple[str, Any], ...] = ()


@dataclass(frozen=True)
class Answer:
    """What a task gave, or why it did not."""

    task: Task
    result: Any = None
    error: str = ""

    @property
    def row(self) -> dict[str, Any]:
        """The row of a task that failed."""
        return {**dict(self.task.about), "what": self.task.label, "error": self.error}


def told(error: BaseException) -> str:
    """An error on one short line."""
    return " ".join(f"{type(error).__name__}: {error}".split())[:300]


def serve(pipe: Any) -> None:
    """A process's loop: tasks in, (result, error) out, until None or the first error."""
    import torch

    torch.set_num_threads(1)
    while (task := pipe.recv()) is not None:
        result = None
        try:
            with torch.no_grad():
                result = task.call(*task.args)
            if torch.cuda.is_initialized():
                torch.cuda.synchronize()  # an error of the device may show only now
                gc.collect()
                torch.cuda.empty_cache()
        except BaseException as error:  # whatever it is, the suite goes on
            print(f"{task.label}: {told(error)}", file=sys.stderr, flush=True)
            pipe.send((result, told(error)))
            return
        pipe.send((result, ""))


class Workers:
    """Up to ``count`` processes that take tasks in turn."""

    def __init__(self, count: int) -> None:
        self.count = count
        self._context = multiprocessing.get_context("spawn")
        self._idle: list[tuple[Any, Any]] = []

    def run(
        self, tasks: Sequence[Task], budget: gpu_clock.Budget, room: float = 0.0, most: int = 0
    ) -> Iterator[Answer]:
        """Answers as they come. None is begun with less than ``room`` seconds of the budget left,
        and those left out are named in it. most: processes at once; all when 0."""
        waiting = deque(tasks)
        busy: dict[Any, tuple[Any, Task, float]] = {}
        while waiting or busy:
            while waiting and len(busy) < (most or self.count) and budget.left > room:
                process, pipe = self._idle.pop() if self._idle else self._start()
                task = waiting.popleft()
                fresh = START * (process.name != "used")
                process.name = "used"
                busy[pipe] = process, task, time.monotonic() + task.limit + fresh
                with contextlib.suppress(OSError):  # it ended by itself: its pipe says so below
                    pipe.send(task)
            if not busy:
                break
            ends = min(end for _, _, end in busy.values())
            last = time.monotonic() + max(0.0, budget.left)
            ready = connection.wait(list(busy), max(0.0, min(ends, last) - time.monotonic()))
            for pipe in ready:
                process, task, _ = busy.pop(pipe)
                yield self._answer(process, pipe, task)
            for pipe, (process, task, end) in list(busy.items()):
                if time.monotonic() >= end or budget.left <= 0:
                    busy.pop(pipe)
                    process.kill()
                    over = budget.left <= 0
                    why = "no time left" if over else f"took more than {task.limit:.0f} s"
                    yield Answer(task, error=why)
        budget.skipped += [task.label for task in waiting]

    def close(self, keep: int = 0) -> None:
        """End all idle processes but ``keep``: told so, and killed where they do not, together."""
        ending, self._idle[keep:] = self._idle[keep:], []
        for _, pipe in ending:
            with contextlib.suppress(OSError):
                pipe.send(None)
        until = time.monotonic() + LEAVE
        for process, _ in ending:
            process.join(max(0.0, until - time.monotonic()))
            process.kill()
        if not keep:  # nor is one left that was busy when a run broke off
            for process in self._context.active_children():
                process.kill()

    def _start(self) -> tuple[Any, Any]:
        mine, theirs = self._context.Pipe()
        process = self._context.Process(target=serve, args=(theirs,))
        process.start()
        theirs.close()
        return process, mine

    def _answer(self, process: Any, pipe: Any, task: Task) -> Answer:
        try:
            result, error = pipe.recv()
        except (EOFError, OSError):
            process.join(LEAVE)
            return Answer(task, error=f"its process ended with exit code {process.exitcode}")
        if error:
            process.kill()  # what it holds of the device goes with it; nobody waits for that
        else:
            self._idle.append((process, pipe))
        return Answer(task, result, error)
