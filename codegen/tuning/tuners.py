"""One tuner per target behind one interface: what it would measure, and measuring it."""

from __future__ import annotations

import importlib
from collections.abc import Callable, Sequence
from dataclasses import dataclass

from ...compiler.ir.errors import ResourceError, UsageError, nearest
from ..problem import Problem
from .cache import Entry, Machine

# Target -> (module beside this package, its `TUNER`).
TUNERS = {"cpu": "codegen.cpu.tune", "triton": "codegen.tuning.triton"}


@dataclass(frozen=True)
class Trial:
    """One decision: the fastest of ``candidates`` for a problem at a number of tokens."""

    key: str
    tokens: int
    candidates: tuple[str, ...]
    problem: Problem


@dataclass(frozen=True)
class Tuner:
    """How a target measures.

    Attributes:
        unavailable: why nothing can be measured here; None when it can.
        machine: what this machine's measurements hold for; needs no device where
            ``unavailable`` says why (then it names what it would be).
        typical: problems to measure when no model is given.
        trials: the decisions that problems need, at given numbers of tokens.
        tokens: the numbers of tokens measured when nobody names any.
        measure: a trial's seconds by candidate. ResourceError when none of them runs.
        bucket: the numbers of tokens that one number stands for, in words.
    """

    target: str
    unavailable: Callable[[], str | None]
    machine: Callable[[], Machine]
    typical: Callable[[], list[Problem]]
    trials: Callable[[Sequence[Problem], Sequence[int]], list[Trial]]
    tokens: tuple[int, ...]
    measure: Callable[[Trial], dict[str, float]]
    bucket: Callable[[int], str] = str

    def entry(self, trial: Trial) -> Entry:
        """A trial measured."""
        return Entry(trial.key, trial.tokens, self.measure(trial))


def tuner(target: str) -> Tuner:
    """The tuner of a target. UsageError for one that has none."""
    if target not in TUNERS:
        raise UsageError(
            f"expected a target of {', '.join(TUNERS)}, found {target!r}",
            hint=nearest(target, TUNERS),
        )
    root = __name__.partition(".codegen.")[0]
    found: Tuner = importlib.import_module(f"{root}.{TUNERS[target]}").TUNER
    return found


def check_available(found: Tuner) -> None:
    """ResourceError when a tuner cannot measure on this machine."""
    why = found.unavailable()
    if why is not None:
        raise ResourceError(
            f"cannot tune for {found.target}: {why}",
            hint="--dry-run shows what would be measured",
        )
