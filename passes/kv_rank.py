"""kv_rank: fewer numbers per token in the KV cache, by low rank of keys and values."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

from ..compiler.analysis.heads import AttentionSite, attention_sites
from ..compiler.ir.errors import UsageError
from ..compiler.ir.events import Event
from ..compiler.ir.refusal import Refusal
from ..compiler.pipeline.analysis import Analysis
from ..compiler.pipeline.base import Example, Lossy, knob
from ..compiler.pipeline.latents import CUT, LATENT, Narrowing, Side, apply_ranks, sides, wanted
from ..compiler.pipeline.measure import collect
from ..compiler.pipeline.structure import Choice, Context, Structural


def _attentions(analysis: Analysis) -> Iterator[AttentionSite | Refusal]:
    """Pattern: every attention whose keys or values can be kept in fewer numbers."""
    for site in attention_sites(analysis.program):
        if isinstance(site, AttentionSite):
            found = sides(analysis, site)
            if not any(s.how for s in found.values()):
                why = "; ".join(f"{what}: {s.why}" for what, s in found.items())
                yield Refusal("kv_rank", site.node, why, "can_be_narrowed")
                continue
        yield site


@dataclass(frozen=True)
class KVRank(Structural):
    """V → V' of fewer channels, absorbed by the output projection; K → B x kept, A (B x) read.

    Each value head keeps the directions that say most behind the output projection. Keys without a
    rotation shrink likewise, against their queries. Rotated keys come from a factored matrix: the
    cache keeps the latent B x of all heads, before the rotation, and makes keys of it when they are
    read, which costs rank x width products per token that is read. At full rank nothing changes.
    """

    variants = {"kv_rank": {}}
    stage = "latents"
    effect = Lossy("perplexity")
    needs = ("gram",)
    source = "ASVD, arXiv 2312.05821 §4 (KV cache); DeepSeek-V2, arXiv 2405.04434 §2.1"
    pattern = _attentions
    hits = (Example("llama_gqa"), Example("with_bias"), Example("with_rope"))
    misses = (Example("shared_keys", "heads_read_once"),)

    keep: float = knob(0.5, "share of the numbers of each token that is kept", lo=0.01, hi=1.0)
    keep_keys: float | None = knob(None, "keep of keys alone; 1 leaves them", lo=0.01, hi=1.0)
    keep_values: float | None = knob(None, "keep of values alone; 1 leaves them", lo=0.01, hi=1.0)
    multiple: int = knob(8, "channels and ranks are multiples of it", lo=1, hi=1024)
    metric: str = knob(
        "activations",
        "what directions are ranked by: what they say on calibration data, or weights alone",
        choices=("activations", "weights"),
    )

    def calibrated(self) -> bool:
        return self.metric == "activations"

    def predict(self, analysis: Analysis, sites: list[Any]) -> Choice:
        ranks: dict[str, dict[str, int]] = {}
        records = []
        for site in sites:
            found = sides(analysis, site)
            ranks[site.id] = {what: self._rank(what, s) for what, s in found.items()}
            records.append(_record(site, found, ranks[site.id]))
        if not any(r for mine in ranks.values() for r in mine.values()):
            raise UsageError(
                f"{self.called}: expected shares that take numbers away, found {self._asked()}, "
                f"rounded to multiples of {self.multiple}",
                where=sites[0].id, hint="keep less, or give a smaller multiple",
            )  # fmt: skip
        return Choice({"ranks": ranks}, records=records)

    def _asked(self) -> str:
        return " and ".join(f"{self._share(w):g} of {w}" for w in ("keys", "values"))

    def _share(self, what: str) -> float:
        own = self.keep_keys if what == "keys" else self.keep_values
        return self.keep if own is None else own

    def _rank(self, what: str, side: Side) -> int:
        """What stays of a side: channels of a head, or the rank of all; 0 where nothing goes."""
        whole = {CUT: side.channels, LATENT: side.width}.get(side.how, 0)
        share = self._share(what)
        step = self.multiple if whole >= 2 * self.multiple else 1
        rank = max(step, round(share * whole / step) * step)
        if side.how == LATENT and side.linear is not None:
            rank = min(rank, side.linear.in_features)
        return rank if rank < whole else 0

    def decide(self, context: Context, sites: list[Any]) -> Choice:
        choice = self.predict(context.analysis, sites)
        stats = None
        if self.calibrated():
            stats = collect(
                context.program, context.data, wanted(sites), context.options, context.listener
            )
        work = Narrowing(context.program, stats)
        for site, record in zip(sites, choice.records, strict=True):
            context.listener(Event("tick", {"where": site.id}))
            found = sides(context.analysis, site)
            made, told = work.narrow(site, found, choice.data["ranks"][site.id])
            choice.tensors.update(made)
            record.update(told)
        return choice

    def apply(self, program: Any, choice: Choice) -> list[str]:
        return apply_ranks(
            program, choice.data["ranks"], choice.tensors, made_by=self.called or "kv_rank"
        )


def _record(site: AttentionSite, found: dict[str, Side], ranks: dict[str, int]) -> dict[str, Any]:
    """Numbers per token before and after, and what reading one more token then costs."""
    kept = {}
    for what, side in found.items():
        whole = {CUT: site.kv * ranks[what], LATENT: ranks[what]}.get(side.how, 0)
        kept[what] = whole if ranks[what] else side.width
    latent = found["keys"].how == LATENT and ranks["keys"] > 0
    return {
        "site": site.id,
        "numbers_per_token": sum(kept.values()),
        "before": sum(s.width for s in found.values()),
        "keys": _said(found["keys"], ranks["keys"]),
        "values": _said(found["values"], ranks["values"]),
        "flops_per_read_token": 2 * ranks["keys"] * found["keys"].width if latent else 0,
    }


def _said(side: Side, rank: int) -> str:
    if not side.how:
        return f"stay: {side.why}"
    if not rank:
        return "stay as asked"
    return {CUT: f"{rank} of {side.channels} channels", LATENT: f"latent of {rank}"}[side.how]
