"""Scales that move from keys to queries: (q / s) · (k · s) = q · k, channel by channel.

Rotation by position turns channels in pairs, and commutes with a scale only where both channels of
a pair share it (OmniQuant, arXiv 2308.13137, learns them untied, which changes the logits). Query
heads that share a key head share its scales.
"""

from __future__ import annotations

import torch
from torch import Tensor

from ..ir.graph import Program, info
from ..ir.refusal import Refusal
from .absorb import Absorber
from .heads import AttentionSite, Rows, attention_sites
from .migrate import MigrationSite
from .patterns import UNSCALED, Labels

KIND = "keys"


def key_sites(program: Program) -> list[MigrationSite | Refusal]:
    """Sites and refusals in graph order, one for each ``llmc.attention`` call.

    A site has no consumers: the rows of k are multiplied, those of q divided.
    """
    out: list[MigrationSite | Refusal] = []
    for found in attention_sites(program):
        if isinstance(found, Refusal):
            out.append(found)
            continue
        why, predicate = found.fixed_keys, "keys_traced"
        if not why and found.norms:
            why, predicate = "a norm behind the projection takes every scale back", "no_key_norm"
        if not why and found.q is None:
            why = "query heads cannot be told apart"
        if why:
            path = info(program.node(found.node)).path
            reason = f"the keys of {found.node} cannot be rescaled: {why}"
            out.append(Refusal("migrate", found.node, reason, predicate, path))
        else:
            out.append(_site(program, found))
    return out


def _site(program: Program, found: AttentionSite) -> MigrationSite:
    assert found.q is not None
    size = found.k.index.shape[1]
    labels = Labels(found.kv * size)
    for head in range(found.kv):
        for a, b in found.pairs.tolist():
            labels.parent[labels.find(head * size + b)] = labels.find(head * size + a)
    count, index = labels.compact()
    by_head = index.view(found.kv, size)
    queries = by_head.repeat_interleave(found.heads // found.kv, 0)
    absorbers = [
        *_absorbers(program, found.k, by_head, 1), *_absorbers(program, found.q, queries, -1),
    ]  # fmt: skip
    name = found.id.replace("/attention", f"/{KIND}")
    return MigrationSite(
        name, KIND, found.k.node, len(index), count, index, (), tuple(absorbers), found.segment
    )


def _absorbers(program: Program, rows: Rows, scale_of: Tensor, power: int) -> list[Absorber]:
    """The matrix and the bias that make the heads; scale_of [heads, D]."""
    out = []
    for name in (rows.param, rows.bias):
        if name is not None:
            index = torch.full((program.params[name].shape[0],), UNSCALED)
            index[rows.index.flatten()] = scale_of.flatten()
            out.append(Absorber(name, 0, index, power))
    return out
