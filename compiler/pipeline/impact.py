"""Mixed precision, what a choice costs: the rise of the model's loss that each option predicts.

Every option is solved everywhere once, as the recipe would; the solves tell the relative error of
each output of each weight, which no scale that moved between layers changes. Three measures:

proxy   tr(D H Dᵀ) / tr(W H Wᵀ), the relative squared error of the layer's output.
fisher  ½ Σ_i E[g_i²] E[e_i²] over outputs i, g the gradient of the summed loss for the output and e
        its error: the second-order rise of the loss with the Fisher information for its Hessian.
loss    the model's loss on the held-out slice with this group alone as the option leaves it.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from typing import Any

import torch
from torch import Tensor

from ..analysis.linears import LinearSite
from ..ir.events import Event, Listener, silent
from ..ir.graph import Program
from .measure import Options
from .reverse import value_gradients

MEASURES = ("proxy", "fisher", "loss")
# Windows of calibration that gradients are taken of.
WINDOWS = 32


class Noted:
    """A listener that passes on what it hears and keeps each solved weight's relative losses.

    Attributes:
        loss: of the whole weight by site; rows: fp64 [out] of each output.
    """

    def __init__(self, listener: Listener = silent) -> None:
        self.listener = listener
        self.loss: dict[str, float] = {}
        self.rows: dict[str, Tensor] = {}

    def __call__(self, event: Event) -> None:
        if event.kind == "site":
            site = str(event.data["site"])
            self.loss[site] = float(event.data["loss"])
            rows: Any = event.data.get("rows")
            if rows is not None:
                self.rows[site] = rows.cpu()
        self.listener(event)


def information(
    program: Program, tokens: Tensor, sites: Iterable[LinearSite], options: Options,
    listener: Listener = silent,
) -> dict[str, Tensor]:  # fmt: skip
    """What a relative error of 1 of each output costs: fp64 [out] by node, in nats per token.

    ½·S·(S-1)·E[g²]·E[y²], g the gradient of a window's mean loss for the output y, S its length.
    Args:
        tokens: int64 [samples, length]; gradients are taken window by window, of the first ones.
    """
    device = torch.device(options.device)
    named = {s.node for s in sites}
    squares: dict[str, list[Tensor]] = {}

    def seen(node: str, value: Tensor, grad: Tensor) -> None:
        more = [x.double().square().flatten(0, -2).mean(0).cpu() for x in (grad, value)]
        known = squares.get(node)
        squares[node] = more if known is None else [a + b for a, b in zip(known, more, strict=True)]

    windows = tokens[:WINDOWS]
    for ids in windows.split(1):
        listener(Event("tick", {"where": "reverse sweep"}))
        value_gradients(
            program, ids.to(device), named, lambda name: program.fetch(name).to(device), seen
        )
    length, count = tokens.shape[1], len(windows)
    scale = length * (length - 1) / 2 / count**2
    return {node: scale * g * y for node, (g, y) in squares.items()}


def predicted(
    noted: Noted, sites: Sequence[LinearSite], known: dict[str, Tensor] | None
) -> float:  # fmt: skip
    """The rise that one option predicts for a group: by ``known`` information, else the proxy.

    Outputs of stacked experts are no outputs of their node: all of them count alike.
    """
    total = 0.0
    for site in sites:
        if site.id not in noted.loss:
            continue
        loss, rows = noted.loss[site.id], noted.rows.get(site.id)
        if known is None:
            total += loss
        elif rows is None or len(rows) != len(known[site.node]):
            total += float(known[site.node].sum()) * loss
        else:
            total += float(known[site.node] @ rows)
    return total
