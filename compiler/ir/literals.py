"""What may stand in a call beside values: named torch constants, bounded numbers, and type texts.

Printer, parser and JSON share these tables, so that all three accept one and the same language.
"""

from __future__ import annotations

import ast
import functools
import math
from typing import Any

import torch

from .dims import Dim, parse
from .errors import ModelError
from .types import DTYPES, SymType, TensorType, ValueType, short

MAX_INT = 1 << 63
MAX_TEXT = 4096
MAX_LIST = 1 << 16
MAX_DEPTH = 8
MAX_RANK = 32
MAX_NODES = 1 << 20

_CONSTANTS: tuple[Any, ...] = (
    *DTYPES.values(), torch.strided, torch.contiguous_format, torch.preserve_format,
    torch.channels_last,
)  # fmt: skip
NAMED: dict[str, Any] = {str(c): c for c in _CONSTANTS}
"""torch constants by their spelling, e.g. ``torch.float32``."""


def is_named(value: object) -> bool:
    """Whether a value is one of the torch constants that llmc knows."""
    return (
        isinstance(value, (torch.dtype, torch.layout, torch.memory_format)) and str(value) in NAMED
    )


def check_number(value: Any) -> Any:
    """An int, bool or float in bounds.

    Raises:
        ModelError: an int beyond 64 bits.
    """
    if isinstance(value, int) and not -MAX_INT <= value < MAX_INT:
        raise ModelError(
            f"expected an integer of at most 64 bits, found one of {value.bit_length()}"
        )
    return value


def check_text(value: Any, what: str, *, limit: int = MAX_TEXT) -> str:
    """A short string.

    Raises:
        ModelError: not a string, or longer than ``limit`` characters.
    """
    if not isinstance(value, str) or len(value) > limit:
        raise ModelError(f"expected {what} of at most {limit} characters, found {_brief(value)}")
    return value


def _brief(value: object) -> str:
    text = repr(value)
    return text if len(text) <= 60 else text[:57] + "…"


def show_float(value: float) -> str:
    """Python source of a float, infinities and nan included."""
    return repr(value) if math.isfinite(value) else f'float("{value!r}")'


def parse_dtype(text: Any) -> torch.dtype:
    """Inverse of :func:`.types.short`.

    Raises:
        ModelError: an unknown name.
    """
    found = DTYPES.get(text) if isinstance(text, str) else None
    if found is None:
        raise ModelError(f"expected a dtype of {sorted(DTYPES)}, found {_brief(text)}")
    return found


def parse_dim(text: str) -> Dim:
    """A dim from its text, bounded.

    Raises:
        ModelError: not a dim, or a negative one.
    """
    try:
        found = parse(check_text(text, "a dim"))
    except (ValueError, SyntaxError, ZeroDivisionError, RecursionError, MemoryError):
        raise ModelError(f"expected a dim such as B*S, found {_brief(text)}") from None
    if isinstance(found, int) and not 0 <= found < MAX_INT:
        raise ModelError(f"expected a dim of at least 0, found {found}")
    return found


def parse_type(text: Any) -> ValueType:
    """Inverse of :func:`.types.show_type`: ``f32[B, S, 256]``, ``int(S)``, ``(…, …)`` or ``None``.

    Raises:
        ModelError: another text.
    """
    source = check_text(text, "a type", limit=1 << 16)
    # Layers are alike, so a big model has few types; what a stranger makes long is not kept.
    return _kept_type(source) if len(source) <= _KEPT else _parse_type(source)


_KEPT = 256


@functools.lru_cache(1 << 12)
def _kept_type(source: str) -> ValueType:
    return _parse_type(source)


def _parse_type(source: str) -> ValueType:
    try:
        tree = ast.parse(source, mode="eval").body
    except (SyntaxError, ValueError, RecursionError, MemoryError):
        raise ModelError(f"expected a type such as f32[B, S], found {_brief(source)}") from None
    return _type(tree)


def _type(tree: ast.expr) -> ValueType:
    match tree:
        case ast.Constant(value=None):
            return None
        case ast.Subscript(value=ast.Name(id=name), slice=inner):
            parts = inner.elts if isinstance(inner, ast.Tuple) else [inner]
            if len(parts) > MAX_RANK:
                raise ModelError(f"expected at most {MAX_RANK} axes, found {len(parts)}")
            return TensorType(tuple(parse_dim(ast.unparse(p)) for p in parts), parse_dtype(name))
        case ast.Call(func=ast.Name(id="int"), args=[inner], keywords=[]):
            return SymType(parse_dim(ast.unparse(inner)))
        case ast.Tuple(elts=parts):
            return tuple(_type(p) for p in parts)
        case ast.Name(id=name):
            # A tensor of rank 0 prints as f32[], which Python cannot parse; see show_value_type.
            return TensorType((), parse_dtype(name))
    raise ModelError(f"expected a type such as f32[B, S], found {_brief(ast.unparse(tree))}")


def show_value_type(value: ValueType) -> str:
    """Text of a type that :func:`parse_type` reads back; rank 0 is the bare dtype."""
    if isinstance(value, TensorType):
        return str(value) if value.shape else short(value.dtype)
    if isinstance(value, tuple):
        inner = ", ".join(show_value_type(v) for v in value)
        return f"({inner},)" if len(value) == 1 else f"({inner})"
    return str(value)


def check_facts(value: Any, depth: int = 0) -> Any:
    """Facts are JSON: None, bool, int, float, str, list and dict with text keys, of bounded size.

    Raises:
        ModelError: anything else.
    """
    if depth > MAX_DEPTH:
        raise ModelError(f"expected facts of at most {MAX_DEPTH} levels, found more")
    if value is None or isinstance(value, (bool, int, float)):
        return check_number(value)
    if isinstance(value, str):
        return check_text(value, "a fact", limit=1 << 20)
    if isinstance(value, (list, tuple)) and len(value) <= MAX_LIST:
        return [check_facts(v, depth + 1) for v in value]
    if isinstance(value, dict) and len(value) <= MAX_LIST:
        return {check_text(k, "a fact's name"): check_facts(v, depth + 1) for k, v in value.items()}
    raise ModelError(f"expected facts made of JSON values, found {_brief(value)}")
