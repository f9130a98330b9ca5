"""Pure tensor numerics: grids, masks, Hessian factors and the OBS sweep. Knows no graph.

>>> solution = solve(weight, hessian, grid=Grid(4), mask=MaskRule("nm", 2, 4))   # the joint solve
"""

from __future__ import annotations

from .grid import Grid, Rounded, rtn
from .hessian import NO_HESSIAN, Factor, prepare
from .masks import MaskRule
from .solve import GRID_SOLVERS, MASK_SOLVERS, PAIRS, Solution, solve

__all__ = [
    "GRID_SOLVERS",
    "MASK_SOLVERS",
    "NO_HESSIAN",
    "PAIRS",
    "Factor",
    "Grid",
    "MaskRule",
    "Rounded",
    "Solution",
    "prepare",
    "rtn",
    "solve",
]
