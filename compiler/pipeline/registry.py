"""All passes, found by presence in ``llmc/passes``; a file that fails to import is a failure."""

from __future__ import annotations

import importlib
import pkgutil
from functools import cache

from ..ir.errors import LlmcError, UsageError, nearest
from .base import Pass


@cache
def all_passes() -> dict[str, type[Pass]]:
    """Every pass by every name that it is called by.

    Raises:
        LlmcError: two files claim one name, or a pass states no source, law or example.
    """
    package = importlib.import_module("llmc.passes")
    out: dict[str, type[Pass]] = {}
    for module in sorted(m.name for m in pkgutil.iter_modules(package.__path__)):
        loaded = importlib.import_module(f"llmc.passes.{module}")
        for value in vars(loaded).values():
            if not (isinstance(value, type) and issubclass(value, Pass)):
                continue
            if value.__module__ != loaded.__name__:
                continue
            _add(out, value)
    return out


def _add(out: dict[str, type[Pass]], made: type[Pass]) -> None:
    home = made.__module__
    for part in ("variants", "stage", "effect", "source", "pattern"):
        if not hasattr(made, part):
            raise LlmcError(
                f"expected pass {made.__name__} to state its {part}, found none in {home}"
            )
    if not (made.law() and made.hits and made.misses):
        raise LlmcError(f"expected {made.__name__} in {home} to have a law, a hit and a miss")
    for name in made.variants:
        if name in out:
            raise LlmcError(f"expected one pass named {name!r}: {home} and {out[name].__module__}")
        out[name] = made


def find(name: str) -> type[Pass]:
    """The pass called ``name``.

    Raises:
        UsageError: unknown; the nearest name is suggested.
    """
    known = all_passes()
    if name not in known:
        hint = nearest(name, known) or f"known passes: {', '.join(sorted(known))}"
        raise UsageError(f"expected the name of a pass, found {name!r}", hint=hint)
    return known[name]
