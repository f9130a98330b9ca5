"""Where an attention's keys are made from a narrower value that could be kept in their place."""

from __future__ import annotations

from dataclasses import dataclass, replace

from torch import fx

from ..ir.caches import CacheScheme
from ..ir.dims import same
from ..ir.errors import ModelError, UsageError
from ..ir.graph import Program, tensor_type
from ..ir.ops.base import row_of
from .flow import LINEAR
from .rotation import Rotation, rotation_of


@dataclass(frozen=True)
class Latent:
    """Keys [B, KV, S, D] are linear(value, weight, bias) [B, S, KV·D], head by head, then turned.

    Attributes:
        linear: the matrix product; value: what it reads [B, S, R]; weight: [KV·D, R], a parameter
            or what decodes one; bias: [KV·D] or None.
        rank: R; turn: the rotation behind it, None where there is none.
    """

    linear: fx.Node
    value: fx.Node
    weight: fx.Node
    bias: fx.Node | None
    rank: int
    turn: Rotation | None


def latent_of(node: fx.Node) -> Latent | str:
    """What an attention's keys are made of; the reason where they are no linear's plain result."""
    turn = rotation_of(node)
    if isinstance(turn, str):
        return turn
    keys = node.args[1] if turn is None else turn.keys
    assert isinstance(keys, fx.Node)
    laid = keys.args[0] if keys.op == "call_function" else None
    if not isinstance(laid, fx.Node) or not _swaps_heads(keys):
        return f"{keys.name} is no transpose of heads and tokens"
    linear = laid.args[0] if laid.op == "call_function" and laid.args else None
    if not isinstance(linear, fx.Node) or row_of(laid).name not in _VIEWS:
        return f"{laid.name} is no view of a matrix's rows as heads"
    if linear.op != "call_function" or row_of(linear).name != LINEAR:
        return f"{linear.name} is no linear"
    split, whole = tensor_type(laid), tensor_type(linear)
    if split.rank != 4 or whole.rank != 3 or not same(split.shape[2] * split.shape[3],
                                                      whole.shape[2]):  # fmt: skip
        return f"{laid.name} lays out {split}, not tokens by heads"
    value, weight = linear.args[0], linear.args[1]
    bias = linear.args[2] if len(linear.args) > 2 else linear.kwargs.get("bias")
    assert isinstance(value, fx.Node)
    assert isinstance(weight, fx.Node)
    rank = tensor_type(value).shape[2]
    if not isinstance(rank, int):
        return f"{value.name} has a symbolic width"
    return Latent(linear, value, weight, bias if isinstance(bias, fx.Node) else None, rank, turn)


def _records(program: Program) -> list[tuple[str, CacheScheme, Latent | str]]:
    """Each record of latents with its attention's name and what the graph says of it."""
    nodes = {n.name: n for n in program.calls("llmc.attention")}
    return [
        (name, scheme, latent_of(nodes[name]))
        for name, scheme in program.caches.items()
        if scheme.kind == "latent" and name in nodes
    ]


def check_latents(program: Program) -> None:
    """Raises ModelError where a record of latents does not say what the graph does."""
    for name, scheme, found in _records(program):
        if isinstance(found, str):
            why = found
        elif (found.rank, found.turn is not None) != (scheme.rank, scheme.turned):
            why = f"{found.value.name} has {found.rank} channels, the record {scheme.rank}"
        else:
            continue
        raise ModelError(f"expected keys that a latent makes: {why}", where=f"node {name}")


def renew_latents(program: Program, by: str) -> None:
    """Let records of latents say what a rewrite by pass ``by`` left of them, in place.

    Raises:
        UsageError: what a cache was to keep is no linear's plain input any more.
    """
    for name, scheme, found in _records(program):
        if isinstance(found, str):
            raise UsageError(
                f"expected {by} to leave the matrix that makes keys of kept latents a plain "
                f"linear: {found}", where=f"node {name}",
                hint="let a recipe skip that weight, or keep_keys=1 of kv_rank",
            )  # fmt: skip
        program.caches[name] = replace(scheme, rank=found.rank)


_VIEWS = ("aten.reshape.default", "aten.view.default")


def _swaps_heads(node: fx.Node) -> bool:
    name = row_of(node).name
    if name == "aten.transpose.int":
        return {int(str(a)) % 4 for a in node.args[1:3]} == {1, 2}
    return name == "aten.permute.default" and list(node.args[1]) == [0, 2, 1, 3]  # type: ignore[arg-type]
