"""All passes: the files of ``llmc/passes``, and those that LLMC_PASSES names, found by presence.

A file that fails to import is a failure.
"""

from __future__ import annotations

import importlib
import importlib.util
import os
import pkgutil
import sys
from collections.abc import Iterator
from functools import cache
from pathlib import Path
from types import ModuleType

from ..ir.errors import LlmcError, UsageError, nearest
from .base import Pass

VARIABLE = "LLMC_PASSES"


@cache
def all_passes() -> dict[str, type[Pass]]:
    """Every pass by every name that it is called by.

    Raises:
        LlmcError: two files claim one name, or a pass states no source, law or example.
        UsageError: a file of LLMC_PASSES that is none, cannot be imported or holds no pass.
    """
    out: dict[str, type[Pass]] = {}
    for loaded in (*_shipped(), *_own()):
        for value in vars(loaded).values():
            if _is_pass(value, loaded.__name__):
                _add(out, value)
    return out


def _shipped() -> Iterator[ModuleType]:
    package = importlib.import_module("llmc.passes")
    for module in sorted(m.name for m in pkgutil.iter_modules(package.__path__)):
        yield importlib.import_module(f"llmc.passes.{module}")


def _own() -> Iterator[ModuleType]:
    """The user's own pass files, which run as the Python that they are."""
    for text in filter(None, os.environ.get(VARIABLE, "").split(os.pathsep)):
        path = Path(text).expanduser()
        name = f"llmc_own_{path.stem}"
        spec = importlib.util.spec_from_file_location(name, path)
        if not path.is_file() or spec is None or spec.loader is None:
            raise UsageError(f"{VARIABLE}: expected a Python file with a pass, found {text!r}")
        module = importlib.util.module_from_spec(spec)
        sys.modules[name] = module
        try:
            spec.loader.exec_module(module)
        except Exception as error:
            del sys.modules[name]
            raise UsageError(
                f"{VARIABLE}: expected a file that can be imported, found "
                f"{type(error).__name__}: {error}", where=str(path),
            ) from error  # fmt: skip
        if not any(_is_pass(v, name) for v in vars(module).values()):
            raise UsageError(f"{VARIABLE}: expected a pass in {path}, found none",
                             hint="see examples/own_pass.py")  # fmt: skip
        yield module


def _is_pass(value: object, home: str) -> bool:
    return isinstance(value, type) and issubclass(value, Pass) and value.__module__ == home


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
