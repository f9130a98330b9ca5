"""Decoding by a recorded step: one token a row, its position and the cache's length on the device.

What changes from token to token is in tensors that stay in place: token ids, positions and how many
tokens are kept. One decoder serves one batch; buckets of batch sizes are several decoders.
"""

from __future__ import annotations

import functools
from collections.abc import Callable

import torch

from ..ir.errors import UsageError
from .attend import Attend
from .cache import Cache
from .executor import Runner

Recorded = Callable[[], torch.Tensor]
# Kinds of state whose tokens are kept alike whatever their number: no host decides what is due.
KINDS = ("kv", "int8", "fp8")
ATTENTION = "llmc.cached_attention"


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

    def step(self, ids: torch.Tensor, positions: torch.Tensor) -> torch.Tensor:
        """Logits [B, 1, vocabulary] of one token a row, int64 [B, 1]; overwritten by the next step.

        Raises:
            UsageError: no room for another token, or another shape.
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
        if self._replay is None:
            self._replay = self._record(self._forward)
        out = self._replay()
        self._set(length + 1)
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
