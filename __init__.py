"""llmc: a declarative graph-rewrite compiler for LLM compression.

Nothing heavy is imported here: the names below load on first use.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

__version__ = "0.1.0"
__all__ = ["Program", "__version__", "capture", "compile", "load", "plan"]

if TYPE_CHECKING:
    from .compiler.api import capture, compile, load, plan
    from .compiler.ir.graph import Program

_HOMES = {
    "capture": "llmc.compiler.api",
    "compile": "llmc.compiler.api",
    "load": "llmc.compiler.api",
    "plan": "llmc.compiler.api",
    "Program": "llmc.compiler.ir.graph",
}


def __getattr__(name: str) -> Any:
    if name not in _HOMES:
        raise AttributeError(f"module 'llmc' has no attribute {name!r}")
    import importlib

    return getattr(importlib.import_module(_HOMES[name]), name)
