"""What happens while compiling, told to whoever listens: progress bars, the trace, the report."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any


@dataclass(frozen=True)
class Event:
    """One thing that happened.

    Kinds: ``start`` and ``end`` of the run, ``structure`` (before a structural pass measures),
    ``block`` (before a segment), ``site`` (a weight was solved: its record, and ``rows``, the
    relative loss of each of its outputs), ``fold`` (a scale was migrated), ``mix`` (mixed precision
    tries a choice: ``by`` what, stored ``bits`` per weight), ``tick`` (one calibration batch ran,
    or ``where``, a segment, is being measured).
    """

    kind: str
    data: dict[str, Any] = field(default_factory=dict)


Listener = Callable[[Event], None]


def silent(event: Event) -> None:
    """Listen to nothing."""
