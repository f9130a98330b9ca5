"""What passes that move per-channel factors between layers share: the edge, the move, the rounding.

The graph proves the edges (see :mod:`..analysis.migrate`); such a pass only decides the factors.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field, replace
from typing import Any, ClassVar

import torch
from torch import Tensor

from ..analysis.migrate import MigrationSite
from ..ir.errors import LlmcError
from ..ir.graph import Program
from ..ir.scheme import InputGrid
from ..ir.segments import refresh_segments
from ..solvers import Grid
from .analysis import Analysis, scale_migrations
from .base import Exact, Pass, knob


@dataclass(frozen=True)
class Planned:
    """What the recipe makes of one reader: its grid, None where it stays dense.

    weighed: whether its solve reads XᵀX. reads: how its input is rounded, None where it is not.
    """

    grid: Grid | None = None
    weighed: bool = False
    reads: InputGrid | None = None


@dataclass(frozen=True)
class Edge:
    """What a decision about one site may look at.

    Attributes:
        weights: the readers' matrices [..., channels], fp32, in the site's order.
        planned: what becomes of each of them.
        stored: the narrowest dtype in which a matrix that is rescaled will be stored.
        stats: statistics of the value by name.
        shifts: whether the value can be shifted as well.
    """

    site: MigrationSite
    weights: tuple[Tensor, ...]
    planned: tuple[Planned, ...]
    stored: torch.dtype
    stats: Mapping[str, Any]
    shifts: bool = False

    def reduced(self, per_channel: Tensor, how: str) -> Tensor:
        """[channels] -> [n_scales] by ``amax`` or ``mean`` over channels that share a scale."""
        index = self.site.expand.to(per_channel.device)
        out = per_channel.new_zeros(self.site.n_scales)
        return out.scatter_reduce_(0, index, per_channel, how, include_self=False)


@dataclass(frozen=True)
class Move:
    """The decision: x becomes (x - shift) / scales.

    Attributes:
        scales: [n_scales], positive and finite.
        shift: [n_scales], None where there is none.
        record: rows for the report.
    """

    scales: Tensor
    shift: Tensor | None = None
    record: dict[str, Any] = field(default_factory=dict)


def prepared(program: Program, passes: Iterable[Pass]) -> Program:
    """The program with what the passes need to be there; itself where they need nothing."""
    new = program.clone()
    analysis = Analysis(new)
    added = [name for made in passes for name in made.prepare(new, made.sites(analysis)[0])]
    if not added:
        return program
    refresh_segments(new)
    return new


@dataclass(frozen=True)
class Equivalence(Pass):
    """Base of passes that rescale values without changing the model.

    learned: scales are trained (see :mod:`.learning`), nothing is decided from statistics.
    """

    stage = "equivalence"
    effect = Exact(rtol=1e-4)
    pattern = scale_migrations
    learned: ClassVar[bool] = False

    round: str = knob(
        "auto",
        "rounding of s: pow2 is exact in any dtype; auto takes pow2 where weights stay in 16 bits",
        choices=("auto", "pow2", "none"),
    )

    def decide(self, edge: Edge) -> Move:
        """The factors of one edge, from weights and calibration data."""
        raise LlmcError(f"expected {type(self).__name__} to decide scales, found nothing")

    def params(self, program: Program, site: MigrationSite) -> list[str]:
        """Parameters that get new tensors: the readers', then the absorbers."""
        return [p for _, p, _ in site.consumers] + [a.param for a in site.absorbers]

    def rewrite(self, program: Program, site: MigrationSite) -> list[str]:
        """The graph stays; readers and absorbers get new tensors, gains in fp32."""
        for a in site.absorbers:
            param = program.params[a.param]
            if len(param.shape) == 1:
                program.params[a.param] = replace(param, dtype=torch.float32)
        return self.params(program, site)

    def rounded(self, scales: Tensor, stored: torch.dtype) -> Tensor:
        """Scales as they are folded."""
        sixteen = stored in (torch.float16, torch.bfloat16)
        if self.round == "pow2" or (self.round == "auto" and sixteen):
            return torch.exp2(torch.round(torch.log2(scales)))
        return scales
