"""The reverse sweep: gradients of the whole model's loss, one block in memory at a time.

The forward pass keeps only what flows between segments; going back, each segment is run again with
autograd on, its cotangents are pushed through, and it is forgotten.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable
from typing import Any

import torch
from torch import Tensor, fx

from ..ir.errors import ModelError
from ..ir.graph import Program, Segment
from ..ir.interpret import Fetch, run_nodes
from .measure import logits_of, model_inputs, next_token_loss
from .statistics import Fisher

Env = dict[fx.Node, Any]
# What is kept of (node name, value, gradient of the value), told as soon as a segment has it.
Seen = Callable[[str, Tensor, Tensor], None]


def gradients(
    program: Program, ids: Tensor, params: Iterable[str], fetch: Fetch | None = None
) -> tuple[float, dict[str, Tensor]]:
    """Loss of one batch and its gradient for each named parameter.

    Args:
        ids: int64 [B, S], S at least 2.
        params: names; a parameter that several segments read gets the sum.
    Returns:
        (mean next-token cross-entropy, {name: gradient of the parameter's shape}).
    Raises:
        ModelError: the program is not segmented or its output is not one tensor of logits.
    """
    if not program.segments:
        raise ModelError("expected a segmented program, found none", hint="call apply_segments")
    sweep = _Sweep(program, fetch or program.fetch, set(params))
    return sweep.run(ids)


def value_gradients(
    program: Program, ids: Tensor, values: Iterable[str], fetch: Fetch | None = None,
    seen: Seen | None = None,
) -> dict[str, Tensor]:  # fmt: skip
    """Gradients of one batch's loss for values of the graph, by node name, of the values' shapes.

    A value that several later segments read gets the gradient of all of them.
    Args:
        seen: is told each value and its gradient instead, so that none is kept.
    Raises:
        ModelError: as :func:`gradients`.
    """
    sweep = _Sweep(program, fetch or program.fetch, set(), set(values), seen)
    sweep.run(ids)
    return sweep.at_values


class _Sweep:
    def __init__(
        self, program: Program, fetch: Fetch, wanted: set[str], values: set[str] | None = None,
        seen: Seen | None = None,
    ) -> None:  # fmt: skip
        self.program, self.fetch, self.wanted = program, fetch, wanted
        self.values, self.at_values = values or set(), dict[str, Tensor]()
        self.seen = seen
        self.nodes = {n.name: n for n in program.graph.nodes}
        self.found: dict[str, Tensor] = {}
        self.logits = logits_of(program)

    def run(self, ids: Tensor) -> tuple[float, dict[str, Tensor]]:
        stored: Env = {}
        inputs = model_inputs(ids)
        for node in self.program.inputs:
            stored[node] = inputs[node.name]
        with torch.no_grad():
            for segment in self.program.segments:
                kept = self._outs(segment)
                env = run_nodes(self._calls(segment), dict(stored), self.fetch, keep=kept)
                stored.update({n: env[n] for n in kept})
        loss, cotangents = self._loss(stored[self.logits], ids)
        for segment in reversed(self.program.segments):
            self._back(segment, stored, cotangents)
        return loss, self.found

    def _calls(self, segment: Segment) -> list[fx.Node]:
        return [self.nodes[n] for n in segment.nodes if self.nodes[n].op != "output"]

    def _outs(self, segment: Segment) -> list[fx.Node]:
        outs = [self.nodes[n] for n in segment.live_out if self.nodes[n].op != "output"]
        inside = set(segment.nodes)
        if self.logits.name in inside and self.logits not in outs:
            outs.append(self.logits)
        return outs

    def _loss(self, logits: Tensor, ids: Tensor) -> tuple[float, dict[fx.Node, Tensor]]:
        with torch.enable_grad():
            leaf = logits.detach().requires_grad_()
            loss = next_token_loss(leaf, ids)
            (grad,) = torch.autograd.grad(loss, leaf)
        return float(loss.detach()), {self.logits: grad}

    def _back(self, segment: Segment, stored: Env, cotangents: dict[fx.Node, Tensor]) -> None:
        outs = [n for n in self._outs(segment) if n in cotangents]
        if not outs:
            return
        leaves: dict[fx.Node, Tensor] = {}
        owned: dict[str, Tensor] = {}
        env: Env = dict(stored)
        for name in segment.live_in:
            node = self.nodes[name]
            value = stored[node]
            if isinstance(value, Tensor) and value.is_floating_point():
                env[node] = leaves[node] = value.detach().requires_grad_()

        def fetch(name: str) -> Tensor:
            if name not in self.wanted:
                return self.fetch(name)
            if name not in owned:
                owned[name] = self.fetch(name).detach().requires_grad_()
            return owned[name]

        held: dict[str, Tensor] = {}

        def observe(node: fx.Node, value: object) -> None:
            if node.name in self.values and isinstance(value, Tensor) and value.requires_grad:
                held[node.name] = value

        with torch.enable_grad():
            env = run_nodes(self._calls(segment), env, fetch, keep=outs, observe=observe)
            values = [(env[n], cotangents.pop(n)) for n in outs]
            values = [(v, g) for v, g in values if v.requires_grad]
            if not values:
                return
            targets = [*leaves.values(), *owned.values(), *held.values()]
            grads = torch.autograd.grad(
                [v for v, _ in values], targets, [g for _, g in values], allow_unused=True
            )
        for node, grad in zip(leaves, grads, strict=False):
            if grad is not None:
                cotangents[node] = cotangents[node] + grad if node in cotangents else grad
        for name, grad in zip(held, grads[len(leaves) + len(owned) :], strict=True):
            if grad is not None and self.seen is not None:
                self.seen(name, held[name].detach(), grad)
            elif grad is not None:
                self.at_values[name] = grad
        for name, grad in zip(owned, grads[len(leaves) :], strict=False):
            if grad is not None:
                self.found[name] = self.found[name] + grad if name in self.found else grad


def fisher(
    program: Program, tokens: Tensor, params: Iterable[str], fetch: Fetch | None = None
) -> dict[str, Fisher]:
    """Diagonal Fisher information of each named parameter: Σ over samples of squared gradients.

    Args:
        tokens: int64 [samples, length]; each row is one sample.
    """
    names = list(params)
    out = {name: Fisher() for name in names}
    for sample in tokens.split(1):
        _, grads = gradients(program, sample, names, fetch)
        for name, grad in grads.items():
            out[name].update(grad)
    return out
