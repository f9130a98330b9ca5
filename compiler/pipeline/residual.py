"""Low rank beside a weight: y = linear(x, Ŵ) + linear(linear(x, B), A), A·B ≈ W - Ŵ.

The factors are stored in 16 bits, or in 8-bit codes with a scale per row. They read what the weight
reads, rounded where that is.
"""

from __future__ import annotations

from dataclasses import replace
from functools import partial
from typing import Any

import torch
from torch import Tensor, fx

from ..ir import packing
from ..ir.build import result_type
from ..ir.graph import Program, info, tensor_type
from ..ir.scheme import Codes, LowRank
from ..solvers import Factor
from ..solvers.loss import exact_rows
from ..solvers.low_rank import LowRankFactors, coded, low_rank
from . import decoding
from .inputs import piece

LEFT, RIGHT = "left", "right"
"""Ends of the names of A and B."""
STORED = torch.float16
"""What the factors are stored in; solved ones are balanced, so that its range is no limit."""


def encode_low_rank(program: Program, node: str, low: LowRank, *, made_by: str) -> list[str]:
    """Add a product of that rank to a linear; after its codes. Returns the new parameters."""
    linear = program.node(node)
    x = linear.args[0]
    assert isinstance(x, fx.Node)
    source: Any = linear.args[1]
    while source.op == "call_function":
        source = source.all_input_nodes[0]
    base, made = str(source.target).partition(".")[0], list[str]()
    new = partial(piece, program, base, linear, linear, made_by, made)
    rows, inputs = tensor_type(linear).shape[-1], tensor_type(x).shape[-1]
    readers, after = list(linear.users), linear.next
    where: dict[str, Any] = {"before": after, "made_by": made_by, "like": linear}

    def stored(name: str, rows: int, columns: int) -> fx.Node:
        if low.bits == 16:
            return new(name, (rows, columns), STORED, False)

        def part(suffix: str, shape: tuple[int, ...], dtype: torch.dtype) -> fx.Node:
            return new(f"{name}_{suffix}", shape, dtype)

        return decoding.emit(program, Codes(low.bits, None), part, rows, columns, columns, **where)

    right = stored(RIGHT, low.rank, int(inputs))
    left = stored(LEFT, int(rows), low.rank)
    few = program.emit("aten.linear.default", x, right, **where)
    part = program.emit("aten.linear.default", few, left, **where)
    total = program.emit("aten.add.Tensor", linear, part, **where)
    for reader in readers:
        reader.replace_input_with(linear, total)
    if program.output in readers:
        kind = result_type(program.output.args[0])
        program.output.meta["llmc"] = replace(info(program.output), type=kind)
    return made


def compensate(
    weight: Tensor, solved: Tensor, low: LowRank, form: str, factor: Factor | None,
    columns: Tensor | None = None,
) -> tuple[dict[str, Tensor], Tensor, dict[str, Any]]:  # fmt: skip
    """What of ``weight - solved`` [m, n] the factors give back.

    form: ``outputs`` weighs errors by the factor's Hessian, ``weights`` takes all alike, ``auto``
    the first where there is one. columns: inputs that the factors do not see.
    Returns:
        Factors by suffix; their product as stored, fp32; a record with the loss without and with
        them. Factors that would not lower it on the calibration tokens are zero.
    """
    missing = (weight - solved).float()
    hessian = None if factor is None else factor.hessian
    seen = hessian
    if columns is not None:
        missing = missing.index_fill(1, columns, 0.0)
        if hessian is not None:
            seen = hessian.index_fill(0, columns, 0.0).index_fill(1, columns, 0.0)
    parts, product = _stored(
        low_rank(missing, low.rank, None if form == "weights" else seen), missing, low.bits
    )

    def loss(delta: Tensor) -> float:
        d = delta.double()
        if hessian is None:
            return float(d.square().sum())
        return float(exact_rows(d.t(), hessian.double()).sum())

    whole, before = loss(weight.float()), loss(weight - solved)
    after = loss(weight - solved - product) if bool(torch.isfinite(product).all()) else torch.inf
    notes: tuple[str, ...] = ()
    if after > before:
        nothing = LowRankFactors(
            weight.new_zeros(len(weight), low.rank, dtype=torch.float64),
            weight.new_zeros(low.rank, weight.shape[1], dtype=torch.float64),
        )
        (parts, product), after = _stored(nothing, torch.zeros_like(missing), low.bits), before
        notes = (f"low rank: {low.rank} directions lower no loss, left out",)
    scale = 1.0 / whole if whole > 0 else 0.0
    told = {"rank": low.rank, "loss": after * scale, "without_rank": before * scale, "notes": notes}
    return parts, product, told


def _stored(
    factors: LowRankFactors, missing: Tensor, bits: int
) -> tuple[dict[str, Tensor], Tensor]:  # fmt: skip
    """Factors by suffix as they are stored, and their product, fp32."""
    if bits == 16:
        held = factors.stored(STORED)
        product = held.left.float() @ held.right.float()
        return {LEFT: held.left, RIGHT: held.right}, product
    best = coded(factors, missing, bits)
    parts: dict[str, Tensor] = {}
    for name, one in ((LEFT, best.left), (RIGHT, best.right)):
        parts |= {
            f"{name}_codes": packing.pack(one.codes, bits),
            f"{name}_scale": one.scale.to(STORED),
        }
    return parts, best.product
