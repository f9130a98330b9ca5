"""How far an input may be off that a kernel has put on a grid: a code off where a tie is near."""

from __future__ import annotations

import torch

from llmc.codegen import meaning
from llmc.codegen.grids import parse
from llmc.codegen.problem import Problem
from llmc.compiler.ir.ops.rounding import _dynamic, round_input, scale_of

SUM = 2.0**-24  # unit roundoff of fp32


def on_grid(
    p: Problem, parts: dict[str, torch.Tensor], h: torch.Tensor, slack: float, own: torch.Tensor,
    u: float,
) -> tuple[torch.Tensor, torch.Tensor]:  # fmt: skip
    """The size of h [M, K] on its grid, and how far each of it may be off.

    slack, own: relative and absolute error of h as it is rounded. u: unit roundoff of the dtype
    that values are rounded to behind the grid; 0 where codes are multiplied as they are.
    """
    grid = parse(p.rounds)
    if grid is None or grid.per not in ("token", "static"):
        # A grid of another kind would need a bound of its own: no case is judged by a wrong one.
        raise ValueError(f"expected a grid of a token or a stored scale, found {p.rounds!r}")
    exact = meaning.rounded(p, parts, h)
    slack += 8 * SUM
    off = slack * exact.abs() + own
    off += 1.01 * u * exact.abs() + 2.0**-25 * (p.x_dtype == "fp16") * (u > 0)
    group = grid.group or p.K
    for t in range(h.shape[0]):
        if 0 < grid.limit < h[t].abs().max():
            continue  # such a token is on no grid
        top = torch.stack([part.abs().amax() for part in h[t].split(group)])
        unit = scale_of(top, grid.kind, grid.bits, grid.power)
        if grid.kind == "pairs":
            unit = _dynamic(h[t : t + 1], grid.kind, grid.bits, "token", grid.power)
        unit = parts["in_scale"] if grid.per == "static" else unit
        step = slack * h[t].abs() + own[t]
        unit, kind, bits = unit.double().reshape(-1), grid.kind, grid.bits
        ends = [round_input(h[t] + s * step, unit, kind=kind, bits=bits, per="static", group=group)
                for s in (-1, 1)]  # fmt: skip
        tops = top.clamp(1e-30).repeat_interleave(group)[: p.K]
        off[t] += (ends[1] - ends[0]).abs() + exact[t].abs() * own[t].amax() / tops
    return exact.abs(), off
