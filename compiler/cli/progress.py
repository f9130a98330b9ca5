"""Progress of long work: a bar with the time left on a terminal, now and then a line elsewhere."""

from __future__ import annotations

import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any, Self

import click

from ..ir.events import Event
from .output import Out

HEARTBEAT = 30.0


class Progress:
    """One piece of long work with a known number of steps.

    On a terminal it is a rich bar with the time left; elsewhere, a line every ``heartbeat``
    seconds; with --quiet, nothing. Every line goes to stderr.
    """

    def __init__(self, title: str, out: Out, *, heartbeat: float = HEARTBEAT) -> None:
        self.title, self.out, self.heartbeat = title, out, heartbeat
        self.total, self.done, self.where = 0, 0, ""
        self._began = self._last = time.monotonic()
        self._bar: Any = None
        self._task: Any = None

    def __enter__(self) -> Self:
        self._began = self._last = time.monotonic()
        if not self.out.quiet and sys.stderr.isatty():
            self._bar = _rich_bar()
            self._task = self._bar.add_task(self.title, total=None, where="")
            self._bar.start()
        return self

    def __exit__(self, *exc: object) -> None:
        if self._bar is not None:
            self._bar.stop()

    def steps(self, total: int) -> None:
        """Say how many steps there are."""
        self.total = total
        if self._bar is not None:
            self._bar.update(self._task, total=total)

    def at(self, done: int, where: str = "") -> None:
        """Say how many steps are done and what is being worked on."""
        self.done, self.where = done, where
        if self._bar is not None:
            self._bar.update(self._task, completed=done, where=where)
        self.beat()

    def line(self, text: str) -> None:
        """A line of its own, above the bar."""
        if self._bar is not None:
            self._bar.console.print(text, markup=False, highlight=False)
        else:
            self.out.note(text)

    def beat(self) -> None:
        """Without a terminal: say that work goes on, at most every ``heartbeat`` seconds."""
        now = time.monotonic()
        if self._bar is not None or self.out.quiet or now - self._last < self.heartbeat:
            return
        self._last = now
        share = f" {self.done}/{self.total}" if self.total else ""
        click.echo(
            f"{self.title}{share} {self.where} ({now - self._began:.0f} s)".replace("  ", " "),
            err=True,
        )

    @property
    def elapsed(self) -> float:
        """Seconds since the work began."""
        return time.monotonic() - self._began


class Solving(Progress):
    """The bar of a compile: passes × segments, fed by the pipeline's events."""

    def __call__(self, event: Event) -> None:
        data = event.data
        if event.kind == "start":
            self.steps(data["steps"])
            self._started = 0
        elif event.kind == "block":
            self.at(self._started, data["segment"])
            self._started += 1
        elif event.kind == "mix":
            bits = f", {data['bits']:.3f} bits" if data["bits"] else ""
            self.line(f"{self.title}: {data['by']}{bits}")
        elif event.kind == "structure":
            self.at(self._started, data["pass"])
            self._started += 1
        elif event.kind == "tick" and "where" in data:
            self.at(self.done, f"{self.where.partition(' ')[0]} {data['where']}")
        elif event.kind == "end":
            self.at(self.total, "")
        elif event.kind == "site" and self.out.verbose:
            self.line(site_line(data))
        elif event.kind == "fold" and self.out.verbose:
            self.line(
                f"  {data['site']:<24} {data['pass']}: {data['moved']} of {data['scales']} scales, "
                f"{data['smallest']:.3g}..{data['largest']:.3g}"
            )
        else:
            self.beat()


def site_line(record: dict[str, Any]) -> str:
    """One solved weight: loss, damping, tokens, fallbacks."""
    text = (
        f"  {record['site']:<24} {record['role']:<8} {record['scheme']:<14} "
        f"loss {record['loss']:.3e} damp {record['damp']:g} tokens {record['tokens']}"
    )
    if record["fallbacks"]:
        text += f" fallback: {'; '.join(record['fallbacks'])}"
    return text


@contextmanager
def waiting(text: str, out: Out) -> Iterator[None]:
    """Work of unknown length: a spinner on a terminal, one line elsewhere."""
    if out.quiet or not sys.stderr.isatty():
        out.note(f"{text} ...")
        yield
        return
    from rich.console import Console

    with Console(stderr=True).status(text):
        yield


def _rich_bar() -> Any:
    from rich.console import Console
    from rich.progress import (
        BarColumn,
        MofNCompleteColumn,
        SpinnerColumn,
        TextColumn,
        TimeElapsedColumn,
        TimeRemainingColumn,
    )
    from rich.progress import Progress as Rich

    return Rich(
        SpinnerColumn(),
        TextColumn("{task.description}"),
        BarColumn(),
        MofNCompleteColumn(),
        TimeElapsedColumn(),
        TextColumn("left"),
        TimeRemainingColumn(),
        TextColumn("{task.fields[where]}"),
        console=Console(stderr=True),
        transient=True,
    )
