"""Sharing the heads of attention sites: tensors loaded, aligned, put in order, pooled, written.

Each step works on whole parameters through the index maps of the sites, so fused projections,
biases, gains told by head and whatever else follows a head take part without being named.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor

from ..analysis.groups import Group
from ..analysis.heads import AttentionSite, Rows, units_of
from ..ir.errors import ModelError
from ..ir.graph import Program
from ..solvers.heads import Heads, Maps, metric, share
from .statistics import Collection, Gram, Moments

NEEDS = ("gram", "moments")


def roots(stats: Collection, site: AttentionSite) -> tuple[Tensor, Tensor]:
    """(of keys, of values): how inputs weigh, from statistics of what the two projections read."""
    out = []
    for rows in (site.k, site.v):
        gram, moments = (stats.get(rows.reads, n) for n in NEEDS)
        assert isinstance(gram, Gram)
        assert isinstance(moments, Moments)
        assert gram.value is not None
        assert moments.mean is not None
        out.append(metric(gram.value.double().cpu() / gram.tokens, moments.mean.cpu()))
    return out[0], out[1]


@dataclass
class Sharing:
    """Parameters of a program while heads of its sites are shared.

    Attributes:
        tensors: fp64 by name, whole; dropped: indices of axis 0 that go in the end.
    """

    program: Program
    tensors: dict[str, Tensor] = field(default_factory=dict)
    dropped: dict[str, list[Tensor]] = field(default_factory=dict)

    def load(self, name: str) -> Tensor:
        """The parameter in fp64, to be changed in place.

        Raises:
            ModelError: NaN or Inf.
        """
        if name not in self.tensors:
            tensor = self.program.weights.load(name).double()
            if not bool(torch.isfinite(tensor).all()):
                names = self.program.params[name].names or (name,)
                raise ModelError(f"expected finite weights, found NaN or Inf in {names[0]}")
            self.tensors[name] = tensor.clone()
        return self.tensors[name]

    def share(
        self, site: AttentionSite, count: int, *, align: bool = True, similar: bool = True,
        roots: tuple[Tensor, Tensor] | None = None,
    ) -> dict[str, Any]:  # fmt: skip
        """Align, order and pool one site's heads to ``count`` key heads; returns its record."""
        keys, values = Maps.none(), Maps.none()
        why_keys, why_values = site.fixed_keys, site.fixed_values
        if align:
            keys, left = self.key_maps(site)
            why_keys = why_keys or left
            if not why_values:
                values = Maps.orthogonal(site.v.index.shape[1])
        done = share(
            self.heads(site), count, keys, values, similar=similar and not site.fixed_order,
            key_root=roots[0] if roots else None, value_root=roots[1] if roots else None,
        )  # fmt: skip
        self.write(site, done.aligned)
        self.order(site, done.groups)
        self.pool(site.keys, done.groups)
        self.pool(site.values, done.groups)
        said = {
            "keys": "not asked" if not align else why_keys or "aligned",
            "values": "not asked" if not align else why_values or "aligned",
            "order": site.fixed_order or ("by likeness" if similar else "kept"),
        }
        errors = {
            f"{what}_error{kind}": round(value, 6)
            for what, pair in done.errors.items()
            for kind, value in zip(("", "_unaligned"), pair, strict=True)
        }
        return {
            "site": site.id, "before": site.kv, "after": count, "groups": done.groups.tolist(),
            **errors, **said,
        }  # fmt: skip

    # ** reading **

    def heads(self, site: AttentionSite) -> Heads:
        """The site's heads in fp64; queries and columns that cannot be told apart are empty."""
        k, v = self._rows(site.k), self._rows(site.v)
        q = k.new_zeros(site.heads, *k.shape[1:]) if site.q is None else self._rows(site.q)
        o = v.new_zeros(site.heads, v.shape[1], 0)
        if site.o is not None:
            o = self.load(site.o.param).T[site.o.index]
        return Heads(q, k, v, o)

    def _rows(self, rows: Rows) -> Tensor:
        """[heads, D, n + 1], the bias in the last column."""
        weight = self.load(rows.param)[rows.index]
        bias = weight.new_zeros(rows.index.shape)
        if rows.bias is not None:
            bias = self.load(rows.bias)[rows.index]
        return torch.cat([weight, bias[..., None]], -1)

    def key_maps(self, site: AttentionSite) -> tuple[Maps, str]:
        """Maps of keys that the norms on the way let through, and what they do not."""
        if site.fixed_keys:
            return Maps.none(), ""
        pairs, free = site.pairs, site.free
        for _, norm in site.norms:
            gain = torch.ones(norm.index.shape, dtype=torch.float64)
            if norm.gain is not None:
                gain = self.load(norm.gain)[norm.index.clamp_min(0)] + norm.offset
            # A channel that the norm does not see must not mix with one that it does.
            seen = torch.where(norm.index >= 0, gain, torch.nan).nan_to_num(float("inf"))
            pairs = pairs[(seen[:, pairs[:, 0]] == seen[:, pairs[:, 1]]).all(0)]
            if len(free) and not bool((seen[:, free] == seen[:, free[:1]]).all()):
                free = free[:0]
        lost = len(site.pairs) - len(pairs), len(site.free) - len(free)
        why = ""
        if any(lost):
            why = (
                f"{lost[0]} of {len(site.pairs)} rotary pairs and {lost[1]} of {len(site.free)} "
                "other channels stay: gains of a norm differ there"
            )
        return Maps(pairs, free, scale=not site.norms), why

    # ** writing **

    def write(self, site: AttentionSite, new: Heads) -> None:
        """Write heads in their old places."""
        for rows, made in ((site.q, new.q), (site.k, new.k), (site.v, new.v)):
            if rows is not None:
                self.load(rows.param)[rows.index] = made[..., :-1]
                if rows.bias is not None:
                    self.load(rows.bias)[rows.index] = made[..., -1]
        if site.o is not None:
            self.load(site.o.param)[:, site.o.index.flatten()] = new.o.flatten(0, 1).T

    def order(self, site: AttentionSite, groups: Tensor) -> None:
        """Put query heads, and all that is told by them, in the order of the groups."""
        repeat = site.heads // site.kv
        order = (groups.flatten()[:, None] * repeat + torch.arange(repeat)).flatten()
        if torch.equal(order, torch.arange(site.heads)):
            return
        for m in site.queries.members:
            tensor, at = self.load(m.param), units_of(m, site.heads)
            taken = tensor.index_select(m.axis, at[order].flatten())
            tensor.index_copy_(m.axis, at.flatten(), taken)

    def pool(self, group: Group, groups: Tensor) -> None:
        """Mean of each group of heads in the place of the first heads; the others are dropped."""
        for m in group.members:
            if m.axis != 0:
                raise ModelError(f"expected heads on axis 0 of {m.param}, found {m.axis}")
            tensor, at = self.load(m.param), units_of(m, group.units)
            tensor[at[: len(groups)]] = tensor[at][groups].mean(1)
            self.dropped.setdefault(m.param, []).append(at[len(groups) :].flatten())

    def results(self) -> dict[str, Tensor]:
        """New tensors by name, cut, in the dtypes in which the parameters are stored.

        What was loaded is forgotten, so that one site is held at a time.
        """
        out = {}
        for name, tensor in self.tensors.items():
            stays = torch.ones(len(tensor), dtype=torch.bool)
            for gone in self.dropped.get(name, ()):
                stays[gone] = False
            out[name] = tensor[stays].to(self.program.params[name].dtype).contiguous()
        self.tensors.clear()
        self.dropped.clear()
        return out


def wanted(sites: Mapping[str, AttentionSite]) -> dict[str, tuple[str, ...]]:
    """What :func:`roots` reads, by the value that projections of keys and values read."""
    return {rows.reads: NEEDS for s in sites.values() for rows in (s.k, s.v)}
