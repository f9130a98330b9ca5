"""What a cached attention reads in place of a plain one's keys and bias."""

from __future__ import annotations

from typing import Any

from torch import fx

from ..analysis.latents import latent_of
from ..analysis.rotation import Rotation, rotation_of
from ..analysis.slopes import Slopes
from ..ir.errors import ModelError
from ..ir.graph import Program, tensor_type

BY = "cache"


def before_rotation(
    node: fx.Node, attrs: dict[str, Any]
) -> tuple[fx.Node, tuple[fx.Node, fx.Node]]:
    """Keys, cosines and sines of a rotation that moves behind the state."""
    found = rotation_of(node)
    if not isinstance(found, Rotation):
        why = found or "they are not rotated"
        raise ModelError(f"expected keys that can be kept before their rotation: {why}",
                         where=f"node {node.name}")  # fmt: skip
    attrs["interleaved"] = found.interleaved
    return found.keys, (found.cos, found.sin)


def latent(
    program: Program, node: fx.Node, attrs: dict[str, Any]
) -> tuple[fx.Node, tuple[fx.Node | None, ...]]:
    """What keys are made of, [B, 1, S, R], and what makes them: rotation, matrix, bias."""
    found = latent_of(node)
    if isinstance(found, str):
        raise ModelError(f"expected keys that a latent makes: {found}", where=f"node {node.name}")
    kept = program.emit(
        "aten.unsqueeze.default", found.value, 1, before=node, made_by=BY, like=node
    )
    if found.turn is None:
        return kept, (None, None, found.weight, found.bias)
    attrs["interleaved"] = found.turn.interleaved
    return kept, (found.turn.cos, found.turn.sin, found.weight, found.bias)


def slopes(program: Program, node: fx.Node, found: Slopes) -> fx.Node:
    """The slopes [H] of a bias that each key has by its position."""
    value, axis = found.param, found.axis
    for at in reversed(range(tensor_type(value).rank)):
        if at != axis:
            value = program.emit(
                "aten.select.int", value, at, 0, before=node, made_by=BY, like=node
            )
    return value
