"""Which modules a compressed-tensors target means: a name, a class, or ``re:`` and a pattern."""

from __future__ import annotations

import re
from functools import cache

from .base import wrong

_LONGEST = 256
# A repeat inside of a repeated group can take exponential time, and patterns come from strangers.
_NESTED = re.compile(r"[*+}]\)?[^()]*\)(?:[*+]|\{)|\([^()]*[*+}][^()]*\)(?:[*+]|\{)")


@cache
def _pattern(text: str) -> re.Pattern[str]:
    if len(text) > _LONGEST or _NESTED.search(text) or re.search(r"\\\d", text):
        raise wrong("targets", f"simple patterns of at most {_LONGEST} characters", text)
    try:
        return re.compile(text)
    except re.error as e:
        raise wrong("targets", "regular expressions", f"{text[:24]} ({e.msg})") from None


def matches(target: str, name: str, kind: str) -> bool:
    """Whether a target means the module of that name and class.

    Raises:
        ModelError: a pattern that is none, or that may take for ever.
    """
    if target.startswith("re:"):
        return _pattern(target.removeprefix("re:")).match(name) is not None
    return target in (name, kind)
