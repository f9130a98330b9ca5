"""Preconditions that weight passes share, each with the reason that a refusal carries."""

from __future__ import annotations

from typing import Any

from ..analysis.linears import LinearSite
from .base import Precondition


def _in_block(made: Any, site: LinearSite) -> str | None:
    if site.head:
        return "the output head stays dense: its error reaches the logits directly"
    return None


def _not_router(made: Any, site: LinearSite) -> str | None:
    if site.router:
        return "a router chooses experts; an error there sends tokens to the wrong ones"
    return None


BLOCK_WEIGHT = (Precondition("not_head", _in_block), Precondition("not_router", _not_router))
