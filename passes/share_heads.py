"""share_heads: several key and value heads become one that their query heads share."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass, replace
from typing import Any

import torch

from ..compiler.analysis.cut import cut
from ..compiler.analysis.heads import AttentionSite, attention_sites, found_sites
from ..compiler.analysis.unweave import unweave
from ..compiler.ir.errors import UsageError
from ..compiler.ir.events import Event
from ..compiler.ir.graph import Program, tensor_type
from ..compiler.ir.refusal import Refusal
from ..compiler.pipeline.analysis import Analysis
from ..compiler.pipeline.base import Example, Lossy, Precondition, knob
from ..compiler.pipeline.measure import collect
from ..compiler.pipeline.sharing import Sharing, roots, wanted
from ..compiler.pipeline.structure import Choice, Context, Structural


def _attentions(analysis: Analysis) -> Iterator[AttentionSite | Refusal]:
    """Pattern: every attention whose heads are rows of projections."""
    found = attention_sites(analysis.program)
    woven = [s for s in found if isinstance(s, AttentionSite) and s.interleaved]
    apart = found
    if woven:
        # Whether keys can be cut alone shows once they lie apart.
        clone = analysis.program.clone()
        unweave(clone, woven)
        apart = attention_sites(clone)
    for site, then in zip(found, apart, strict=True):
        if isinstance(site, AttentionSite) and isinstance(then, Refusal):
            yield replace(then, node=site.node)
        else:
            yield site


def _more_heads(made: Any, site: AttentionSite) -> str | None:
    if site.kv <= made.kv:
        return f"it has {site.kv} key heads already, no more than {made.kv}"
    if site.kv % made.kv:
        fit = ", ".join(str(n) for n in range(1, site.kv) if site.kv % n == 0)
        raise UsageError(
            f"share_heads:kv: expected a divisor of the {site.kv} key heads, found {made.kv}",
            where=site.id, hint=f"these fit: {fit}",
        )  # fmt: skip
    return None


@dataclass(frozen=True)
class ShareHeads(Structural):
    """K_g = mean of K_h, V_g = mean of V_h over the heads h of group g; query heads keep their own.

    Before the mean heads are turned towards each other, which is exact: values by orthogonal maps
    that the output projection undoes, keys in each rotary pair by a rotation and a scale that the
    queries undo. Like heads are grouped; query heads and the output projection's columns follow.
    The KV cache shrinks with the heads. Without training behind it, expect a loss.
    """

    variants = {"share_heads": {}}
    stage = "heads"
    effect = Lossy("perplexity")
    source = "GQA, arXiv 2305.13245; Gower, Psychometrika 40 (1975)"
    pattern = _attentions
    preconditions = (Precondition("more_heads", _more_heads),)
    hits = (Example("llama_gqa"), Example("with_bias"), Example("layer_norm"))
    misses = (
        Example("shared_keys", "heads_read_once"),
        Example("gives_keys", "heads_kept"),
    )

    kv: int = knob(1, "key heads that each layer keeps; divides the number that it has", lo=1)
    align: bool = knob(True, "turn heads towards each other first, which is exact")
    group: str = knob("similar", "which heads share", choices=("similar", "adjacent"))
    metric: str = knob(
        "weights",
        "likeness of heads: of their weights, or of what they give on calibration data",
        choices=("weights", "activations"),
    )
    method: str = knob("mean", "what a group's head is", choices=("mean",))

    def calibrated(self) -> bool:
        return self.metric == "activations"

    def predict(self, analysis: Analysis, sites: list[AttentionSite]) -> Choice:
        return Choice({"kv": {s.id: self.kv for s in sites}})

    def decide(self, context: Context, sites: list[AttentionSite]) -> Choice:
        program, found = _apart(context.program.clone(), [s.id for s in sites])
        stats = None
        if self.calibrated():
            stats = collect(
                context.program, context.data, wanted(found), context.options, context.listener
            )
        work = Sharing(program)
        choice = Choice({"kv": dict.fromkeys(found, self.kv)})
        for name, site in found.items():
            context.listener(Event("tick", {"where": name}))
            record = work.share(
                site, self.kv, align=self.align, similar=self.group == "similar",
                roots=None if stats is None else roots(stats, site),
            )  # fmt: skip
            choice.records.append(record)
            choice.tensors.update(work.results())
        return choice

    def apply(self, program: Program, choice: Choice) -> list[str]:
        program, found = _apart(program, list(choice.data["kv"]))
        keep = {}
        for name, count in choice.data["kv"].items():
            for group in (found[name].keys, found[name].values):
                keep[group] = torch.arange(count)
        divisors = _divisors(program, found.values(), choice.data["kv"])
        changed = cut(program, keep, made_by=self.called or "share_heads")
        for name, divisor in divisors.items():
            node = program.node(name)
            node.kwargs = {k: v for k, v in node.kwargs.items() if k != "count"}
            if divisor != tensor_type(node).shape[-1]:
                node.kwargs = {**node.kwargs, "count": divisor}
        for name, tensor in choice.tensors.items():
            program.set_tensor(name, tensor)
        return list(dict.fromkeys([*changed, *choice.tensors]))


def _divisors(
    program: Program, sites: Iterable[AttentionSite], kv: Mapping[str, int]
) -> dict[str, int]:
    """What norms over all key heads divide by, fewer heads standing for all: the mean square stays.

    A cut keeps the whole divisor, as if the other heads were zero.
    """
    out = {}
    for site in sites:
        for name in (*site.keys.norms, *site.values.norms):
            node = program.node(name)
            whole = node.kwargs.get("count") or tensor_type(node).shape[-1]
            assert isinstance(whole, int)
            out[name] = whole * kv[site.id] // site.kv
    return out


def _apart(program: Program, ids: list[str]) -> tuple[Program, dict[str, AttentionSite]]:
    """The program rewritten in place so that keys can be cut alone, and those sites in it."""
    found = found_sites(program)
    if any(found[i].interleaved for i in ids):
        unweave(program, [found[i] for i in ids])
        found = found_sites(program)
    return program, {i: found[i] for i in ids}
