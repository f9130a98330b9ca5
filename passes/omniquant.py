"""omniquant: learn the scales that move between layers from what each block puts out."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from ..compiler.analysis.key_scales import key_sites
from ..compiler.ir.refusal import Refusal
from ..compiler.pipeline.analysis import Analysis
from ..compiler.pipeline.base import Example, knob
from ..compiler.pipeline.equivalence import Equivalence


@dataclass(frozen=True)
class OmniQuant(Equivalence):
    """Q(W·s) (x / s), s trained on each block's output error with straight-through rounding.

    Training sees the grid that the same recipe gives the readers; with clip=learned the shares of
    its ranges are trained beside the scales. Kept is the best state on windows that were not
    trained on, s = 1 with whole ranges included.
    """

    variants = {"omniquant": {}}
    source = "OmniQuant, arXiv 2308.13137"
    hits = (Example("llama_gqa"), Example("layer_norm"), Example("one_plus_gain"), Example("moe"))
    misses = (
        Example("norm_feeds_add", "all_users_rewritten"),
        Example("gelu_between", "absorbable"),
    )
    learned = True

    epochs: int = knob(4, "passes over the windows that it trains on", lo=0, hi=1000)
    windows: int = knob(16, "calibration windows that it trains on", lo=1)
    keys: bool = knob(
        False,
        "scales between queries and keys too, equal for channels that rotate together; they change "
        "nothing where weights alone are rounded",
    )

    def sites(self, analysis: Analysis) -> tuple[list[Any], list[Refusal]]:
        """All edges; those between queries and keys where they were asked for."""
        found, refused = super().sites(analysis)
        keys = key_sites(analysis.program) if self.keys else []
        found += [k for k in keys if not isinstance(k, Refusal)]
        return found, refused + [k for k in keys if isinstance(k, Refusal)]
