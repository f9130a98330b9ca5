"""Run a script under Triton's interpreter in two thirds of its time.

    TRITON_INTERPRET=1 python tests/codegen/quickly.py SCRIPT [ARGUMENT ...]

The interpreter replaces the language's functions by its own around each kernel, and once more at
each call of a function inside one, where they are replaced already. And for each sum of integers
it works out whether it overflows, and tells nobody.
"""

from __future__ import annotations

import runpy
import sys
from pathlib import Path
from typing import Any

from triton.language import core
from triton.language.semantic import TritonSemantic
from triton.runtime import interpreter

replace = interpreter._patch_lang


def unless_replaced(function: Any) -> Any:
    """The language as this function sees it, replaced where it is not yet."""
    seen = [tl for name in ("tl", "core") if (tl := function.__globals__.get(name)) is not None]
    if not seen or any(core.is_builtin(tl.load) for tl in seen):
        return replace(function)
    return interpreter._LangPatchScope()


def unasked(*_: Any) -> None:
    """Whether integers overflow, which nobody is told without debugging."""


if __name__ == "__main__":
    TritonSemantic.binary_op_sanitize_overflow_impl = unasked
    interpreter._patch_lang = unless_replaced
    sys.argv = sys.argv[1:]
    sys.path[0] = str(Path(sys.argv[0]).resolve().parent)
    runpy.run_path(sys.argv[0], run_name="__main__")
