"""Evaluating a model as it writes: every token decoded on its own, beside the model without that.

Exits and caches that are kept as codes act only while decoding, so a window is read token by token.
"""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import torch
from torch import fx

from ..ir.caches import PLAIN, sizes_of
from ..ir.graph import State
from .cache import Cache
from .evaluate import Evaluation, Score, Speaker, score_window
from .executor import Runner
from .exits import ExitRunner


class Stepwise:
    """Logits of whole windows, one token after the other through cache and exits.

    The first token of a window is a prompt and runs at full depth; all others may leave.
    Args:
        runner: has a cache; full: the same model without one, every token at full depth.
    Attributes:
        program: that of ``runner``.
        counts: decoded tokens by the blocks that they ran, from 1 on; empty without exits.
        cache: that of the last window.
    """

    def __init__(self, runner: Runner, full: Speaker) -> None:
        self.runner, self.full, self.program = runner, full, runner.program
        self.counts = [0] * runner.depth if isinstance(runner, ExitRunner) else []
        self.cache: Cache | None = None
        self._agreed = 0
        self._scores: list[Score] = []

    @property
    def vocabulary(self) -> int:
        return self.runner.vocabulary

    def forward(self, input_ids: torch.Tensor) -> torch.Tensor:
        """Logits [B, S, vocabulary] of int64 [B, S]; the full model's scores are kept beside."""
        batch, length = input_ids.shape
        self.cache = cache = self.runner.start(batch, length)
        out: list[torch.Tensor] = []
        for t in range(length):
            out.append(self.runner.forward(input_ids[:, t : t + 1], cache=cache))
            if isinstance(self.runner, ExitRunner):
                for used in self.runner.used if t else ():
                    self.counts[used - 1] += 1
        logits = torch.cat(out, 1)
        whole = self.full.forward(input_ids)
        same = logits.argmax(-1) == whole.argmax(-1).to(logits.device)
        self._agreed += int(same[:, 1:].sum())
        self._scores += [score_window(*row) for row in zip(logits, input_ids, whole, strict=True)]
        return logits

    @property
    def blocks(self) -> float:
        """Mean blocks per decoded token."""
        total = sum(self.counts)
        return sum(n * c for n, c in enumerate(self.counts, 1)) / total if total else 0.0

    def to_json(self, of: Evaluation) -> dict[str, Any]:
        """``exits`` and ``cache``, what each did on the windows of ``of``, where there is one."""
        out: dict[str, Any] = {}
        if isinstance(self.runner, ExitRunner):
            out["exits"] = self._against(of) | self._exits(self.runner)
        if self.program.caches:
            out["cache"] = self._cache() | self._against(of)
        return out

    def _against(self, of: Evaluation) -> dict[str, Any]:
        """Agreement with the full model, and its perplexity."""
        s = self._scores
        header = (of.data, of.sha256, of.window, of.windows)
        rows = ((r.nll for r in s), (r.kl for r in s), (r.agree for r in s))
        told = Evaluation(*header, *map(tuple, rows)).to_json()
        full = Evaluation(*header, tuple(r.other for r in s))
        return {
            "agreement": told["top1_agreement"], "kl_to_full": told["kl_to_baseline"],
            "full_perplexity": full.perplexity,
        }  # fmt: skip

    def _exits(self, runner: ExitRunner) -> dict[str, Any]:
        return runner.exits.to_json() | {
            # Of the tokens that may leave, as calibration counts; a window's last is one of them.
            "agreement": self._agreed / sum(self.counts),
            "threshold": runner.exits.threshold,
            "decoded_tokens": sum(self.counts), "blocks": runner.depth,
            "blocks_per_token": self.blocks,
            "tokens_by_blocks": {str(n): c for n, c in enumerate(self.counts, 1)},
        }  # fmt: skip

    def _cache(self) -> dict[str, Any]:
        """Bytes of all states of one window's batch, as kept and as they would be kept plainly."""
        assert self.cache is not None
        nodes = {str(n.kwargs["state"]): n for n in self.program.calls("llmc.cached_attention")}
        states = [_plain(s, nodes[s.name]) for s in self.program.states.values()]
        plain = Cache(states, self.cache.batch, self.cache.length, "meta")
        bits = numbers = 0.0
        for name, scheme in self.program.caches.items():
            heads, k, v = sizes_of(nodes[name])
            bits += scheme.token_bits(heads, k, v)
            numbers += heads * (k + v)
        tokens = self.cache.batch * self.cache.length
        return {
            "kinds": sorted({c.kind for c in self.program.caches.values()}),
            "bits": sorted({c.bits for c in self.program.caches.values()}),
            "states": len(self.program.states), "kept": len(self.program.caches),
            "bytes": self.cache.bytes, "plain_bytes": plain.bytes,
            "bytes_per_token": self.cache.bytes / tokens,
            "plain_bytes_per_token": plain.bytes / tokens, "bits_per_number": bits / numbers,
        }  # fmt: skip


def _plain(state: State, node: fx.Node) -> State:
    """The state as it would be kept if nothing was said: whole keys."""
    heads, k, _ = sizes_of(node)
    keys = state.types[0]
    whole = keys.with_shape(keys.shape[0], heads, keys.shape[2], k)
    return replace(state, kind=PLAIN, types=(whole, state.types[1]))
