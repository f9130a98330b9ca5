"""a8 and a4: what linears read on a grid, whatever their weights are."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from ..compiler.analysis.linears import LinearSite
from ..compiler.ir.errors import ModelError, UsageError
from ..compiler.ir.graph import Program
from ..compiler.ir.ops.rounding import grid_top
from ..compiler.ir.scheme import InputGrid
from ..compiler.pipeline.analysis import linear_weights
from ..compiler.pipeline.base import Example, Lossy, knob
from ..compiler.pipeline.clipping import clip_knob, share_knob, static_grid
from ..compiler.pipeline.inputs import encode_input
from ..compiler.pipeline.sites import BLOCK_WEIGHT, Protecting


@dataclass(frozen=True)
class RoundInputs(Protecting):
    """x → grid(x), once for all linears that read x; nothing else sees the rounded value.

    It stands beside any weight grid and mask of the same string: nf4,a8 is W4A8 with normal floats.
    """

    variants = {"a8": {"bits": 8}, "a4": {"bits": 4}}
    stage = "inputs"
    effect = Lossy("perplexity")
    needs = ("absmax", "absmean")
    source = "ZeroQuant, arXiv 2206.01861; SmoothQuant, arXiv 2211.10438"
    pattern = linear_weights
    preconditions = BLOCK_WEIGHT
    hits = (Example("llama_gqa"), Example("with_bias"), Example("odd_inputs"))
    misses = (Example("tied_head", "param_read_once"),)

    bits: int = knob(8, "bits of a code", lo=2, hi=8)
    kind: str = knob(
        "int", "integers, floats of few bits, or outlier-victim pairs",
        choices=("int", "e4m3", "e5m2", "e2m1", "pairs"),
    )  # fmt: skip
    act: str = knob(
        "token",
        "scales: one per token, one per tensor as it comes, or static from calibration",
        choices=("token", "tensor", "static"),
    )
    act_group: int | None = knob(None, "channels that share a scale", lo=2, hi=65536)
    act_clip: str = clip_knob()
    act_percentile: float | None = share_knob()
    power: bool = knob(False, "scales are powers of two")

    def check(self) -> None:
        try:
            grid_top(self.kind, self.bits)
        except ModelError as e:
            raise UsageError(f"{self.called}:kind: {e.message}") from None
        self._grid()

    def facts(self, site: LinearSite) -> dict[str, Any]:
        return {"input_grid": self._grid()}

    def rewrite(self, program: Program, site: LinearSite) -> list[str]:
        return encode_input(program, site.node, self._grid(), made_by=self.called)

    def _grid(self) -> InputGrid:
        how = (self.act_group, self.power, self.act_clip, self.act_percentile)
        return static_grid(self.called, self.bits, self.act, self.kind, *how)
