"""What keys and values look like on calibration tokens, and what caches make of it.

The program runs segment by segment; of each attention a bounded number of tokens is kept, then
fitted and forgotten. Fisher weights come from the reverse sweep, as squared gradients of the loss.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor, fx

from ..analysis.rotation import CacheSite, Rotation, cache_sites
from ..ir.caches import CacheScheme, from_json, set_caches
from ..ir.errors import LlmcError, ModelError, UsageError
from ..ir.events import Event, Listener, silent
from ..ir.graph import Program
from ..ir.refusal import Refusal
from ..solvers.kmeans import assign, kmeans
from .analysis import Analysis
from .measure import Options, Walk, batches, check_finite
from .reverse import value_gradients
from .structure import Choice, Context, Structural

# Tokens of one attention that are looked at, and numbers that a codebook is fitted to.
TOKENS = 1 << 14
NUMBERS = 1 << 18


@dataclass(frozen=True)
class Looked:
    """Keys and values of one attention, f32 [tokens, heads, channels], rotated or not."""

    site: CacheSite
    keys: Tensor
    values: Tensor


def watched(program: Program, site: CacheSite, turned: bool) -> tuple[str, str]:
    """Names of the values that an attention keeps: keys, before their rotation or not, values."""
    k, v = program.node(site.node).args[1:3]
    assert isinstance(k, fx.Node)
    assert isinstance(v, fx.Node)
    if turned and isinstance(site.turn, Rotation):
        k = site.turn.keys
    return k.name, v.name


def look(
    program: Program, sites: list[CacheSite], tokens: Tensor, options: Options, *, turned: bool,
    listener: Listener = silent,
) -> Iterator[Looked]:  # fmt: skip
    """Keys and values of the sites over calibration tokens int64 [samples, length], in order.

    Raises:
        ModelError: one is not finite. UsageError: a program that reads something else than ids.
    """
    names = {s.node: watched(program, s, turned) for s in sites}
    wanted = {n for pair in names.values() for n in pair}
    stride = -(-tokens.numel() // TOKENS)
    seen: dict[str, list[Tensor]] = {}

    def observe(node: fx.Node, value: object) -> None:
        if node.name in wanted:
            assert isinstance(value, Tensor)
            check_finite(node, value)
            rows = value.transpose(1, 2).flatten(0, 1)[::stride]
            seen.setdefault(node.name, []).append(rows.float().cpu())

    walk = Walk(program, device=options.device)
    todo = list(sites)
    with torch.no_grad():
        envs = batches(program, tokens, options)
        for segment in walk.segments:
            if not todo:
                return
            listener(Event("tick", {"where": segment.name}))
            envs = walk.step(segment, envs, observe)
            while todo and todo[0].segment == segment.name:
                site = todo.pop(0)
                k, v = names[site.node]
                yield Looked(site, torch.cat(seen[k]), torch.cat(seen[v]))
            # Several attentions may read one and the same keys.
            later = {n for s in todo for n in names[s.node]}
            for name in set(seen) - later:
                del seen[name]


def fisher(
    program: Program, sites: list[CacheSite], tokens: Tensor, options: Options, *, turned: bool,
    listener: Listener = silent,
) -> dict[str, Tensor]:  # fmt: skip
    """Squared gradients of the loss, f32 [tokens, heads, channels], by the watched value's name.

    Rows are those that :func:`look` gives of the same tokens.
    """
    names = {n for s in sites for n in watched(program, s, turned)}
    stride = -(-tokens.numel() // TOKENS)
    out: dict[str, list[Tensor]] = {}
    for ids in tokens.split(options.batch):
        listener(Event("tick", {"where": "reverse sweep"}))
        for name, grad in value_gradients(program, ids, names).items():
            rows = grad.float().square().transpose(1, 2).flatten(0, 1)[::stride]
            out.setdefault(name, []).append(rows)
    return {name: torch.cat(parts) for name, parts in out.items()}


def ranges(keys: Tensor, share: float) -> Tensor:
    """f32 [2, heads, channels]: per channel, the range without ``share`` of the tokens outside.

    A channel that never changes gets the smallest range around its value.
    """
    ordered = keys.sort(0).values
    cut = int(share / 2 * len(keys))
    low, high = ordered[cut], ordered[len(keys) - 1 - cut]
    least = (low.abs() + high.abs()) * 1e-6 + 1e-9
    flat = high - low < least
    low, high = torch.where(flat, low - least, low), torch.where(flat, high + least, high)
    return torch.stack([low, high])


def normalised(x: Tensor, low: Tensor, high: Tensor) -> Tensor:
    """x in its range as -1..1; what lies outside does so here too."""
    return (x - low) * (2 / (high - low).clamp_min(2.0**-24)) - 1


def token_ranges(values: Tensor, count: int) -> tuple[Tensor, Tensor]:
    """Low and high [tokens, 1, 1] of each token over all heads, without ``count`` at each end."""
    ordered = values.flatten(1).sort(1).values
    last = ordered.shape[1] - 1 - count
    return ordered[:, count, None, None], ordered[:, last, None, None]


def levels(x: Tensor, weights: Tensor | None, bits: int, *, norm: bool) -> Tensor:
    """f32 [2, 2**bits]: the codebook of normalised numbers, and what is read for each level.

    What lies outside of -1..1 is kept apart and does not count. With ``norm`` the read levels have
    the numbers' own mean and standard deviation over what was seen (Q-Norm).
    Source: KVQuant, arXiv 2401.18079, §3.3 and §3.6.
    """
    inside = (x >= -1) & (x <= 1)
    points = x[inside].double()
    mass = torch.ones_like(points) if weights is None else weights[inside].double()
    stride = -(-points.numel() // NUMBERS)
    points, mass = points[None, ::stride], mass[None, ::stride]
    centres = kmeans(points, mass, 1 << bits).clamp(-1, 1)
    read = centres
    if norm:
        given = centres.gather(1, assign(points, centres))
        spread = given.std(correction=0)
        if float(spread) > 0:
            ratio = points.std(correction=0) / spread
            read = (centres - given.mean()) * ratio + points.mean()
    return torch.cat([centres, read]).float()


def scales(keys: Tensor, top: float) -> Tensor:
    """f32 [heads, channels]: the scale with which a channel's largest number is ``top``."""
    return (keys.abs().amax(0) / top).clamp_min(2.0**-24)


def table(
    looked: Looked, weights: Mapping[str, Tensor], names: tuple[str, str], bits: int, share: float,
    count: int, *, norm: bool,
) -> dict[str, Tensor]:  # fmt: skip
    """Ranges and codebooks of one attention by part; ``weights`` by the watched value's name."""
    span = ranges(looked.keys, share)
    own = token_ranges(looked.values, count)
    out = {"key_range": span}
    sides = (("key_levels", looked.keys, (span[0], span[1])), ("value_levels", looked.values, own))
    for name, (part, x, (low, high)) in zip(names, sides, strict=True):
        mass = weights.get(name)
        if mass is not None:  # the gradient for a number in -1..1 is that for x times dx
            mass = mass * ((high - low) / 2).square()
        out[part] = levels(normalised(x, low, high), mass, bits, norm=norm)
    return out


@dataclass(frozen=True)
class CachePass(Structural):
    """Base of the passes that say how caches are kept; its sites are :class:`CacheSite`."""

    def scheme(self, site: CacheSite) -> CacheScheme:
        """The record of one attention.

        Raises:
            ModelError: sizes of the attention that the knobs do not fit.
        """
        raise LlmcError(f"expected {type(self).__name__} to say how it keeps, found nothing")

    def fit(self, context: Context, sites: list[CacheSite]) -> dict[str, dict[str, Tensor]]:
        """Tensors by part for each site's node, from calibration data."""
        return {}

    def predict(self, analysis: Analysis, sites: list[Any]) -> Choice:
        rows, data = [], {}
        for site in sites:
            try:
                scheme = self.scheme(site)
                scheme.value_group(site.v)
            except ModelError as e:
                raise UsageError(
                    f"{self.called}: {e.message}", where=site.id, hint=e.hint
                ) from None
            data[site.node] = scheme.to_json()
            sizes = (site.heads, site.k, site.v)
            rows.append({
                "site": site.id, "numbers_per_token": site.heads * (site.k + site.v),
                "bits_per_number": scheme.token_bits(*sizes) / (site.heads * (site.k + site.v)),
            })  # fmt: skip
        return Choice({"caches": data}, records=rows)

    def decide(self, context: Context, sites: list[Any]) -> Choice:
        choice = self.predict(context.analysis, sites)
        if not self.calibrated():
            return choice
        found = self.fit(context, sites)
        slots = {s.node: s.slot for s in sites}
        tensors = {
            f"cache.{slots[node]}.{part}": t for node, mine in found.items()
            for part, t in mine.items()
        }  # fmt: skip
        return replace(choice, tensors=tensors)

    def apply(self, program: Program, choice: Choice) -> list[str]:
        caches = {n: from_json(c) for n, c in choice.data["caches"].items()}
        set_caches(program, program.caches | caches, choice.tensors)
        return list(choice.tensors)


def kept_attention(analysis: Analysis) -> Iterator[CacheSite | Refusal]:
    """Pattern: every attention of a program that can have a KV cache and says nothing of it yet."""
    for site in cache_sites(analysis.program):
        held = analysis.program.caches.get(site.node)
        if held is None:
            yield site
        else:
            reason = f"its cache is kept as {held.kind} already"
            yield Refusal("cache", site.node, reason, "plain_cache")
