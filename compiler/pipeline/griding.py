"""From a scheme's codes to the solver's grid, and which weights stay beside it."""

from __future__ import annotations

from functools import partial
from typing import Any

import torch
from torch import Tensor

from ..ir.levels import WIDTHS, levels
from ..ir.ops.pairs import USUAL, pair_codes, round_pairs
from ..ir.scheme import Codes, Mask, Sparse
from ..ir.types import DTYPES
from ..solvers import Factor, Grid
from ..solvers.bcq import BinaryGrid
from ..solvers.bilevel import BilevelGrid
from ..solvers.lut import LutGrid
from ..solvers.outliers import by_density, by_size
from ..solvers.pairs import PairGrid
from ..solvers.tables import QuantileGrid, TableGrid


def grid_of(codes: Codes | None, options: dict[str, Any], mask: Mask | None = None) -> Grid | None:
    """The solver's grid for a scheme's codes; None without any.

    options: ``clip`` and ``percentile`` of grids that have scales. mask: where it scatters zeros, a
    table of levels holds 0.
    """
    if codes is None:
        return None
    dtype = torch.float32 if codes.double or codes.bilevel else DTYPES[codes.scale_dtype]
    if codes.grid in ("lut", "shared"):
        pinned = mask is not None and not mask.structured
        one = codes.grid == "shared"
        return LutGrid(codes.bits, None, scale_dtype=dtype, shared=one, pinned=pinned)
    if codes.grid == "signs":
        return BinaryGrid(codes.bits, codes.group, scale_dtype=dtype)
    # A learned range is a share of the whole one.
    clip = options.get("clip", "absmax")
    shared: dict[str, Any] = {
        "clip": "absmax" if clip == "learned" else clip,
        "percentile": options.get("percentile", 99.9),
        "scale_dtype": dtype,
        "power": codes.power,
        "double": codes.double,
    }
    if codes.grid in WIDTHS:
        values = tuple(levels(codes.grid, codes.bits).tolist())
        return TableGrid(codes.bits, codes.group, values=values, **shared)
    if codes.grid == "pairs":
        rounded = partial(round_pairs, bits=codes.bits)
        encoded = partial(pair_codes, bits=codes.bits)
        return PairGrid(
            codes.bits, codes.group, rounded=rounded, encoded=encoded, usual=USUAL, **shared
        )
    if codes.grid == "quantile":
        return QuantileGrid(codes.bits, codes.group, **shared)
    if codes.bilevel:
        shared["scale_bits"] = codes.bilevel
        return BilevelGrid(codes.bits, codes.group, codes.symmetric, **shared)
    return Grid(codes.bits, codes.group, codes.symmetric, **shared)


def outliers(
    weight: Tensor,
    sparse: Sparse | None,
    options: dict[str, Any],
    factor: Factor | None,
    sensitivity: Tensor | None,
    keep: Tensor | None = None,
) -> Tensor | None:
    """Weights of [m, n] that stay beside the codes, bool; None where the scheme has none.

    sensitivity: [m, n], the Fisher information; without it the diagonal of H times w² ranks. keep:
    a mask of an earlier round, whose zeros stay.
    options: ``sensitive``, the part of the share that is ranked so; ``density``, the log-density
    that counts instead of the share, which is then a limit.
    """
    # Those beyond a threshold are found by the sweep.
    if sparse is None or sparse.kind != "outliers" or "threshold" in options:
        return None
    if "density" in options:
        return by_density(weight, options["density"], sparse.share, keep)
    sensitive = options.get("sensitive", 0.0)
    if sensitivity is None:
        sensitivity = weight.square()
        if factor is not None:
            sensitivity = sensitivity * factor.diagonal.to(weight)
    sensitivity = sensitivity.to(weight)
    if keep is None:
        return by_size(weight, sensitivity, sparse.share - sensitive, sensitive)
    ranked = sensitivity.masked_fill(~keep, -1.0)
    return by_size(weight, ranked, sparse.share - sensitive, sensitive) & keep
