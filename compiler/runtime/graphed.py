"""Decoding by a recorded step: one token a row, its position and the cache's length on the device.

What changes from token to token is in tensors that stay in place: token ids, positions and how many
tokens are kept. One decoder serves one batch; buckets of batch sizes are several decoders.
"""

from __future__ import annotations

import functools
from collections.abc import Callable

import torch

from ..ir.errors import LlmcError, ResourceError, UsageError
from .attend import Attend
from .cache import Cache
from .executor import Runner

Recorded = Callable[[], torch.Tensor]
# Kinds of state whose tokens are kept alike whatever their number: no host decides what is due.
KINDS = ("kv", "int8", "fp8")
ATTENTION = "llmc.cached_attention"
LEAST = 8  # steps from which recording one, which takes a few, is worth it
ALIKE = 2e-3  # of the largest logit: how far a replay may be from the same launches


def decoder_for(runner: Runner, cache: Cache, tokens: int) -> GraphDecoder | str:
    """A decoder for a cache that holds a prompt and gets up to ``tokens`` in all, or why not."""
    if runner.device.type != "cuda":
        return f"expected a CUDA device, found {runner.device}"
    if type(runner) is not Runner:
        return "early exits choose in each step which blocks run"
    if tokens - cache.length < LEAST:
        return f"expected {LEAST} steps or more, found {tokens - cache.length}"
    try:
        return GraphDecoder(runner, cache, tokens)
    except LlmcError as error:
        return error.message


class GraphDecoder:
    """Steps of one token a row of a program whose cached attention runs on kernels.

    Args:
        cache: state that holds the prompt; a forward beside the decoder may follow at any time.
        tokens: how many it has room for in all; the buffers are made so long, and stay.
        record: what records a step; default: a CUDA graph.
    Raises:
        UsageError: an attention that is not on a kernel, or state that cannot be recorded.
        ResourceError: no CUDA device, with the default ``record``.
    """

    def __init__(
        self, runner: Runner, cache: Cache, tokens: int,
        record: Callable[[Callable[[], torch.Tensor]], Recorded] | None = None,
    ) -> None:  # fmt: skip
        for node in runner.program.calls(ATTENTION):
            state = str(node.kwargs["state"])
            kind = runner.program.states[state].kind
            runs = runner.implementation(node.name)
            if runs is None or isinstance(runs, Attend) or kind not in KINDS:
                raise UsageError(
                    f"expected cached attention on a kernel over a cache of {', '.join(KINDS)}, "
                    f"found {kind} in state {state}", where=f"node {node.name}",
                    hint="decode without graphs",
                )  # fmt: skip
        if not cache.length:
            raise UsageError("expected a cache that holds a prompt, found an empty one")
        self.runner, self.cache, self.tokens = runner, cache, tokens
        for held in cache.states.values():
            held.reserve(tokens)
        make = functools.partial(torch.zeros, device=runner.device)
        self._ids = make(cache.batch, 1, dtype=torch.int64)
        self._positions = make(cache.batch, 1, dtype=torch.int64)
        self._kept = make(1, dtype=torch.int32)
        self._record, self._at = record or self._graph, cache.length
        self._replay: Recorded | None = None
        self._checked = False

    def step(self, ids: torch.Tensor, positions: torch.Tensor) -> torch.Tensor:
        """Logits [B, 1, vocabulary] of one token a row, int64 [B, 1]; overwritten by the next step.

        The first replay for another token than the recorded one is compared with plain launches.
        After an error the cache holds what it held before.
        Raises:
            UsageError: no room for another token, or another shape. ResourceError: a replay gives
            other numbers. RuntimeError: the step cannot be recorded.
        """
        shape, length = tuple(self._ids.shape), self.cache.length
        if tuple(ids.shape) != shape or tuple(positions.shape) != shape:
            raise UsageError(
                f"expected ids and positions {list(shape)}, found {list(ids.shape)} and "
                f"{list(positions.shape)}"
            )
        if length >= self.tokens:
            raise UsageError(f"expected at most {self.tokens} tokens, found {length} and one more")
        self._at = length
        self._ids.copy_(ids)
        self._positions.copy_(positions)
        self._kept.fill_(length)
        try:
            out = self._step()
        except BaseException:
            self._set(length)
            raise
        self._set(length + 1)
        return out

    def _step(self) -> torch.Tensor:
        if self._replay is None:
            self._replay = self._record(self._forward)
            return self._replay()
        if self._checked:
            return self._replay()
        wanted = self._forward().clone()
        out = self._replay()
        if float((out - wanted).abs().max()) > ALIKE * float(wanted.abs().max()):
            raise ResourceError(
                "expected a recorded step to give what its launches give, found other numbers",
                hint="decode without graphs",
            )
        self._checked = True
        return out

    def _forward(self) -> torch.Tensor:
        """The step's forward; as often as it runs, its token is the one behind those kept."""
        self._set(self._at)
        self.cache.counter = self._kept
        try:
            return self.runner.forward(self._ids, None, self._positions, self.cache)
        finally:
            self.cache.counter = None

    def _set(self, length: int) -> None:
        for state in self.cache.states.values():
            state.length = length

    def _graph(self, step: Callable[[], torch.Tensor]) -> Recorded:
        from ...codegen.graphs import record

        return record(step, device=self.runner.device)
