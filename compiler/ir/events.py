"""What happens while a model is captured, planned and solved, told to whoever listens.

Progress bars are handed in as listeners; whoever traces a whole run, doors included, hears it by
:func:`hearing`, whichever layer speaks.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from contextvars import ContextVar
from dataclasses import dataclass, field
from typing import Any

from .refusal import Refusal


@dataclass(frozen=True)
class Event:
    """One thing that happened.

    Kinds of a compile: ``start`` and ``end`` of the run, ``structure`` (before a structural pass
    measures), ``block`` (before a segment), ``site`` (a weight was solved: its record, and
    ``rows``, the relative loss of each of its outputs), ``fold`` (a scale was migrated), ``mix``
    (mixed precision tries a choice: ``by`` what, stored ``bits`` per weight), ``tick`` (one
    calibration batch ran, or ``where``, a segment, is being measured).

    Kinds that are only told to those who hear: ``captured`` (nodes and parameters), ``rule`` (a
    rewrite rule or a pass has looked at a graph: ``name``, ``taken`` places, ``refused`` ones, each
    a refusal, ``nodes`` of the graph behind it, ``seconds``), ``laid`` (a plan is laid out:
    ``plan``, an object).
    """

    kind: str
    data: dict[str, Any] = field(default_factory=dict)


Listener = Callable[[Event], None]
_HEARING: ContextVar[tuple[Listener, ...]] = ContextVar("hearing", default=())


def silent(event: Event) -> None:
    """Listen to nothing."""


@contextmanager
def hearing(listener: Listener) -> Iterator[None]:
    """Let ``listener`` hear everything that is told inside, in this thread."""
    token = _HEARING.set((*_HEARING.get(), listener))
    try:
        yield
    finally:
        _HEARING.reset(token)


def tell(event: Event) -> None:
    """Tell those who hear."""
    for listener in _HEARING.get():
        listener(event)


def rule_event(
    name: str, taken: int, refused: Sequence[Refusal], nodes: int, began: float
) -> Event:
    """A ``rule`` event; ``began`` is by ``time.perf_counter``."""
    return Event("rule", {
        "name": name, "taken": taken, "refused": [r.to_json() for r in refused], "nodes": nodes,
        "seconds": time.perf_counter() - began,
    })  # fmt: skip


def heard_by(listener: Listener) -> Listener:
    """A listener that also tells those who hear."""

    def both(event: Event) -> None:
        listener(event)
        tell(event)

    return both
