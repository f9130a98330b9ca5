"""The Fisher information of single weights, for solves that weigh each weight's error by it."""

from __future__ import annotations

from torch import Tensor

from ..ir.events import Event, Listener
from .plan import Stage
from .reverse import fisher
from .solving import Work


def inform(stage: Stage, work: Work, tokens: Tensor, listener: Listener) -> None:
    """Hand the working copy the information of each weight of the stage that asked for it.

    It is taken on the first windows of ``tokens`` int64 [samples, length], on the weights as they
    stand when the round begins, and held until they are solved.
    """
    asked: dict[int, list[str]] = {}
    for d in stage.decisions.values():
        if d.options.get("weigh") == "fisher":
            asked.setdefault(int(d.options["samples"]), []).append(d.site.param)
    for samples, names in asked.items():
        listener(Event("inform", {"weights": len(names), "samples": min(samples, len(tokens))}))
        found = fisher(work.program, tokens[:samples].to(work.device), names, work.read)
        for name, one in found.items():
            if one.value is not None:
                work.information[name] = one.value
