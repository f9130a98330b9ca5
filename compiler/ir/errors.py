"""The one exception family of llmc. Each class carries the exit code that the CLI returns.

A message is one line: what was expected, what was found, where, what to do next.
"""

from __future__ import annotations

import difflib
from collections.abc import Iterable


class LlmcError(Exception):
    """A bug of ours, or the base of an expected failure (exit 1)."""

    exit_code = 1

    def __init__(self, message: str, *, where: str | None = None, hint: str | None = None) -> None:
        self.message, self.where, self.hint = message, where, hint
        parts = [message]
        if where:
            parts.append(f"at {where}")
        line = " ".join(parts)
        super().__init__(f"{line}; {hint}" if hint else line)


class UsageError(LlmcError):
    """A wrong flag, pass, knob, recipe or plan (exit 2)."""

    exit_code = 2


class ModelError(LlmcError):
    """A bad model, checkpoint or artefact (exit 3)."""

    exit_code = 3


class CaptureError(ModelError):
    """A model that cannot be captured without guessing (exit 3)."""


class GateError(LlmcError):
    """A verification or accuracy gate that failed (exit 4)."""

    exit_code = 4


class ResourceError(LlmcError):
    """Not enough disk, memory or device (exit 5)."""

    exit_code = 5


class VerifierError(LlmcError):
    """A graph that breaks a law of the IR (exit 1: the pass that made it is wrong).

    Attributes:
        rule: name of the broken law, e.g. ``"shape"`` or ``"tie"``.
        node: name of the culprit node.
    """

    def __init__(self, rule: str, message: str, *, node: str | None = None) -> None:
        self.rule, self.node = rule, node
        super().__init__(f"[{rule}] {message}", where=f"node {node}" if node else None)


def nearest(name: str, known: Iterable[str]) -> str | None:
    """A hint naming the closest known name, or None."""
    close = difflib.get_close_matches(name, list(known), n=1, cutoff=0.5)
    return f"did you mean {close[0]!r}?" if close else None
