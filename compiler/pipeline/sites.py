"""What weight passes share: preconditions, and blocks that stay as they are, with the reasons."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from ..analysis.linears import LinearSite
from ..ir.refusal import Refusal
from .analysis import Analysis
from .base import Pass, Precondition, knob
from .experts import STACKED


def _in_block(made: Any, site: LinearSite) -> str | None:
    if site.head:
        return "the output head stays dense: its error reaches the logits directly"
    return None


def _not_router(made: Any, site: LinearSite) -> str | None:
    if site.router:
        return "a router chooses experts; an error there sends tokens to the wrong ones"
    return None


BLOCK_WEIGHT = (
    Precondition("not_head", _in_block), Precondition("not_router", _not_router), *STACKED,
)  # fmt: skip


@dataclass(frozen=True)
class Protecting(Pass):
    """Base of passes over weights that can leave the first and last blocks as they are."""

    protect_first: int = knob(0, "blocks at the start that stay as they are", lo=0)
    protect_last: int = knob(0, "blocks at the end that stay as they are", lo=0)

    def sites(self, analysis: Analysis) -> tuple[list[Any], list[Refusal]]:
        """Sites outside of protected blocks; those inside are refusals."""
        found, refused = super().sites(analysis)
        blocks = len(analysis.blocks)
        free: list[Any] = []
        kept: list[Refusal] = []
        for site in found:
            at = analysis.block_of(site.segment)
            if self.protect_first <= at < blocks - self.protect_last or at < 0:
                free.append(site)
                continue
            why = f"block {at} of {blocks} is protected"
            by = next(iter(self.variants))
            kept.append(Refusal(by, site.node, why, "protected", analysis.path(site.node)))
        return free, kept + refused
