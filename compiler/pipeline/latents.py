"""Narrowing what a KV cache keeps: which side of an attention can be narrowed how, and doing it.

Values: their channels are turned so that the leading ones say most behind the output projection,
which takes the inverse, and the rest is cut. Keys without a rotation: likewise, against their
queries. Keys that are rotated cannot be cut channel by channel; the matrix that makes them is
factored, and the cache keeps what lies between its factors.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor

from ..analysis.cacheable import cache_refusals
from ..analysis.cut import cut
from ..analysis.groups import Group
from ..analysis.heads import AttentionSite, Rows
from ..analysis.latents import latent_of
from ..analysis.linears import LinearSite
from ..ir.caches import CacheScheme, set_caches
from ..ir.graph import Program
from ..solvers.factor import factor, identity, whitening
from ..solvers.heads import metric
from ..solvers.latents import narrow_keys, narrow_values
from .analysis import Analysis
from .factored import factorise, names
from .sharing import NEEDS, Sharing
from .statistics import Collection

CUT, LATENT = "cut", "latent"


@dataclass(frozen=True)
class Side:
    """The keys or the values of one attention.

    Attributes:
        how: ``cut`` or ``latent``, empty where it stays; why: then the reason.
        width: numbers per token that are kept now. channels: of one head.
        group: the channels that are cut together; linear: the matrix that is factored.
    """

    how: str
    width: int
    channels: int
    why: str = ""
    group: Group | None = None
    linear: LinearSite | None = None


def sides(analysis: Analysis, site: AttentionSite) -> dict[str, Side]:
    """What can become of a site's ``keys`` and ``values``."""
    return {"keys": _keys(analysis, site), "values": _values(analysis, site)}


def _values(analysis: Analysis, site: AttentionSite) -> Side:
    channels = int(site.v.index.shape[1])
    stays = Side("", site.kv * channels, channels)
    if site.interleaved:
        return replace(stays, why="a fused projection lays q, k and v side by side in each head")
    if site.fixed_values:
        return replace(stays, why=site.fixed_values)
    group = _channels(analysis, site, 2, channels)
    if isinstance(group, str):
        return replace(stays, why=group)
    return replace(stays, how=CUT, group=group)


def _keys(analysis: Analysis, site: AttentionSite) -> Side:
    channels = int(site.k.index.shape[1])
    stays = Side("", site.kv * channels, channels)
    if site.interleaved:
        return replace(stays, why="a fused projection lays q, k and v side by side in each head")
    free = not site.fixed_keys and not len(site.pairs) and not site.norms
    if free and site.q is not None and len(site.free) == channels:
        group = _channels(analysis, site, 1, channels)
        if isinstance(group, Group):
            return replace(stays, how=CUT, group=group)
    refused = cache_refusals(analysis.program)
    if refused:
        return replace(stays, why=str(refused[0]))
    node = analysis.program.node(site.node)
    found = latent_of(node)
    if isinstance(found, str):
        return replace(stays, why=found)
    for linear in analysis.linears:
        if isinstance(linear, LinearSite) and linear.node == found.linear.name:
            return replace(stays, how=LATENT, linear=linear)
    return replace(stays, why=f"the weight of {found.linear.name} has other readers or is packed")


def _channels(analysis: Analysis, site: AttentionSite, place: int, channels: int) -> Group | str:
    """The group of the channels of attention's argument, one unit each, all heads alike."""
    value = analysis.program.node(site.node).args[place]
    name = getattr(value, "name", "")
    for group in analysis.groups:
        if any(v.node == name and v.axis == 3 for v in group.values):
            if group.blocked:
                return f"channels of {name} {group.blocked[0].reason}"
            if group.units != channels:
                return f"{group.units} of {channels} channels of {name} move alone"
            return group
    return f"channels of {name} are no group"


def wanted(sites: Iterable[AttentionSite]) -> dict[str, tuple[str, ...]]:
    """Statistics by the value that the projections of a site read."""
    rows = (r for s in sites for r in (s.q, s.k, s.v) if r is not None)
    return {r.reads: NEEDS for r in rows}


class Narrowing:
    """New tensors of narrowed sites, one site at a time.

    Args:
        stats: of what the projections read; None measures weights alone.
    """

    def __init__(self, program: Program, stats: Collection | None) -> None:
        self.program, self.stats = program, stats
        self.work = Sharing(program)

    def narrow(
        self, site: AttentionSite, found: Mapping[str, Side], ranks: Mapping[str, int]
    ) -> tuple[dict[str, Tensor], dict[str, Any]]:
        """(tensors by name, as they are behind the cut; relative errors for the record)."""
        work, out, told = self.work, dict[str, Tensor](), dict[str, Any]()
        heads = work.heads(site)
        keeps: dict[str, dict[int, Tensor]] = {}
        for what, side in found.items():
            if side.how == LATENT and ranks[what]:
                tensors, error, notes = self._factored(side, ranks[what])
                out |= tensors
                told |= {f"{what}_error": error, **({"notes": notes} if notes else {})}
                continue
            if side.how != CUT or not ranks[what]:
                continue
            if what == "values":
                heads, lost = narrow_values(heads, ranks[what], self._root(site.v, heads.v))
            else:
                assert site.q is not None
                roots = self._root(site.q, heads.q), self._root(site.k, heads.k)
                heads, lost = narrow_keys(heads, ranks[what], *roots)
            total = lost.sum(0)
            told[f"{what}_error"] = float(total[0] / total[1]) if total[1] > 0 else 0.0
            assert side.group is not None
            _keep(keeps, side.group, ranks[what])
        if keeps:
            work.write(site, heads)
        for name, tensor in work.tensors.items():
            for axis, stays in keeps.get(name, {}).items():
                tensor = tensor.index_select(axis, stays.nonzero().flatten())
            if name in keeps:
                out[name] = tensor.to(self.program.params[name].dtype).contiguous()
        work.tensors.clear()
        return out, told

    def _root(self, rows: Rows, like: Tensor) -> Tensor:
        if self.stats is None:
            return torch.eye(like.shape[-1], dtype=like.dtype)
        gram, moments = (self.stats.get(rows.reads, n) for n in NEEDS)
        value: Any = gram.value  # type: ignore[attr-defined]
        mean: Any = moments.mean  # type: ignore[attr-defined]
        return metric(value.double().cpu() / gram.tokens, mean.cpu())

    def _factored(self, side: Side, rank: int) -> tuple[dict[str, Tensor], float, list[str]]:
        assert side.linear is not None
        weight = self.program.weights.load(side.linear.param)
        root = identity()
        if self.stats is not None:
            gram: Any = self.stats.get(side.linear.reads, "gram")
            root = whitening(gram.value.cpu())
        found = factor(weight, root, rank)
        right, (left,) = names(self.program, [side.linear])
        stored = weight.dtype
        tensors = {
            left: found.factors.left.to(stored).contiguous(),
            right: found.factors.right.to(stored).contiguous(),
        }
        return tensors, found.dropped / found.whole if found.whole else 0.0, list(found.notes)


def _keep(keeps: dict[str, dict[int, Tensor]], group: Group, rank: int) -> None:
    """Mark what stays of each axis; a fused projection holds several groups."""
    for m in group.members:
        axes = keeps.setdefault(m.param, {})
        axes[m.axis] = axes.get(m.axis, torch.tensor(True)) & (m.unit_of < rank)


def apply_ranks(
    program: Program, ranks: Mapping[str, Mapping[str, int]], tensors: Mapping[str, Tensor], *,
    made_by: str,
) -> list[str]:  # fmt: skip
    """Cut, factor and declare what is kept, in place; ranks by site and side, 0 for what stays.

    Returns:
        Names of the parameters with a new shape, or new.
    """
    analysis = Analysis(program)
    from ..analysis.heads import found_sites

    sites = found_sites(program)
    keep: dict[Group, Tensor] = {}
    factored: dict[str, tuple[LinearSite, int]] = {}
    for name, mine in ranks.items():
        for what, side in sides(analysis, sites[name]).items():
            if mine[what] and side.group is not None:
                keep[side.group] = torch.arange(mine[what])
            elif mine[what] and side.linear is not None:
                factored[sites[name].node] = side.linear, mine[what]
    changed = cut(program, keep, made_by=made_by) if keep else []
    for name, tensor in tensors.items():
        if name in program.params:
            program.set_tensor(name, tensor)
    caches = dict(program.caches)
    for slot, node in enumerate(list(program.calls("llmc.attention"))):
        if node.name not in factored:
            continue
        linear, rank = factored[node.name]
        changed += factorise(program, [linear], rank, tensors, made_by=made_by)
        found = latent_of(node)
        assert not isinstance(found, str), found
        turned = found.turn is not None
        caches[node.name] = CacheScheme("latent", 16, turned=turned, slot=slot, rank=rank)
    set_caches(program, caches)
    return list(dict.fromkeys([*changed, *(n for n in tensors if n in program.params)]))
