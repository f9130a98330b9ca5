"""Whether a program can have a KV cache: all but causal attention treats tokens one by one."""

from __future__ import annotations

from typing import Any

from torch import fx

from ..ir.graph import Program, info, tensor_type
from ..ir.refusal import Refusal
from .slopes import makers, slopes_of
from .tokenwise import prove_tokenwise

_BY = "cache"


def cache_refusals(program: Program) -> list[Refusal]:
    """Why ``program`` cannot have a KV cache; empty when it can."""
    out = list(prove_tokenwise(program, makers(program)))
    seen = False
    for node in program.calls("llmc.attention"):
        seen = True
        reason = _attention_refusal(node)
        if reason is not None:
            out.append(Refusal(_BY, node.name, reason[1], reason[0], info(node).path))
    if not seen:
        name = program.output.name
        out.append(Refusal(_BY, name, "the program has no llmc.attention node", "has_attention"))
    return out


def argument(node: fx.Node, position: int, name: str) -> Any:
    """An argument of a call, given by position or by name; None where it is not given."""
    return node.args[position] if len(node.args) > position else node.kwargs.get(name)


def _attention_refusal(node: fx.Node) -> tuple[str, str] | None:
    q_pos, k_pos = argument(node, 3, "q_pos"), argument(node, 4, "k_pos")
    if not node.kwargs.get("causal", True):
        return "causal", "attention that is not causal reads tokens that are still to come"
    slopes = None if argument(node, 6, "bias") is None else slopes_of(node)
    if isinstance(slopes, str):
        return "no_bias", f"a bias on the scores is laid out for all keys at once: {slopes}"
    if k_pos is not q_pos:
        return "own_keys", "keys and queries have positions of their own, as in cross-attention"
    lengths = [tensor_type(node.args[i]).shape[2] for i in (0, 1)]  # type: ignore[arg-type]
    if lengths[0] != lengths[1]:
        return "own_keys", f"{lengths[0]} queries read {lengths[1]} keys, as in cross-attention"
    return None
