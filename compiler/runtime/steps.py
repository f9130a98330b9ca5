"""A program as a list of calls over slots, and running down that list."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

from ..ir.errors import ModelError


@dataclass
class Step:
    """One call: ``base`` with the values of ``fill`` put in, dead values dropped after."""

    call: Callable[..., Any]
    base: list[Any]
    fill: tuple[tuple[int, Any], ...]
    kwargs: dict[str, Any]
    kwfill: tuple[tuple[str, Any], ...]
    out: int
    dead: tuple[int, ...]
    name: str


def run_steps(steps: Sequence[Step], env: list[Any]) -> None:
    """Run steps in order over an environment of slots.

    Raises:
        ModelError: a token or a stored index that is outside of what it points into.
    """
    try:
        for step in steps:
            args = step.base.copy()
            for at, what in step.fill:
                args[at] = env[what] if type(what) is int else what.read(env)
            if step.kwfill:
                kwargs = step.kwargs.copy()
                for key, what in step.kwfill:
                    kwargs[key] = env[what] if type(what) is int else what.read(env)
                env[step.out] = step.call(*args, **kwargs)
            else:
                env[step.out] = step.call(*args, **step.kwargs)
            for slot in step.dead:
                env[slot] = None
    except IndexError as e:
        raise outside(step.name, e) from e


def outside(name: str, found: IndexError) -> ModelError:
    """What to raise where a call of the node of that name was given an index out of range."""
    return ModelError(
        f"expected tokens and stored indices in range, found others: {str(found).splitlines()[0]}",
        where=f"node {name}", hint="llmc verify names the tensor, if it is one",
    )  # fmt: skip
