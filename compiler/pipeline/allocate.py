"""Sparsities of single weights from the whole model's loss, found before a round begins."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import replace

from torch import Tensor

from ..ir.events import Event, Listener
from ..solvers.shares import histogram, share_out
from .plan import Decision, Plan, Stage
from .reverse import fisher
from .solving import Work


def allocate(plan: Plan, stage: Stage, work: Work, tokens: Tensor, listener: Listener) -> None:
    """Give each decision of the stage that asked for it a sparsity of its own, in place.

    A weight's score is ½·w²·F, F the diagonal Fisher information on the first windows of
    ``tokens`` int64 [samples, length]: the second-order estimate of the loss's rise when it goes.
    Sites with the same knobs are one pool, whose overall sparsity stays what was asked for.
    """
    pools: dict[tuple[float, float, int], list[Decision]] = {}
    for d in stage.decisions.values():
        if "allocate" in d.options and d.scheme.mask is not None and d.site.param not in work.masks:
            key = (d.scheme.mask.sparsity, d.options["spread"], d.options["samples"])
            pools.setdefault(key, []).append(d)
    for (share, spread, samples), members in pools.items():
        names = [d.site.param for d in members]
        listener(Event("allocate", {"weights": len(names), "samples": min(samples, len(tokens))}))
        counts = _histograms(work, names, tokens[:samples])
        dropped = share_out(counts, share, spread)
        sizes = [int(c.sum()) for c in counts]
        found = {n: d / size for n, d, size in zip(names, dropped, sizes, strict=True)}
        _set(plan, found)


def _histograms(work: Work, names: Iterable[str], tokens: Tensor) -> list[Tensor]:
    """Scores of each named weight as it stands, counted."""
    names = list(names)
    information = fisher(work.program, tokens.to(work.device), names, work.read)
    out = []
    for name in names:
        # One at a time: what is held is the information of all weights, never all scores.
        f = information.pop(name).value
        assert f is not None
        out.append(histogram(work.weight(name).double().square() * f.to(work.device).double() / 2))
    return out


def _set(plan: Plan, found: dict[str, float]) -> None:
    for stage in plan.stages:
        for key, d in stage.decisions.items():
            share = found.get(d.site.param)
            if share is not None and d.scheme.mask is not None:
                mask = replace(d.scheme.mask, sparsity=share)
                stage.decisions[key] = replace(d, scheme=replace(d.scheme, mask=mask))
    for name, share in found.items():
        scheme = plan.schemes[name]
        assert scheme.mask is not None
        plan.schemes[name] = replace(scheme, mask=replace(scheme.mask, sparsity=share))
