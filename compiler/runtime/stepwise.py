"""Evaluating a model that leaves early: every token decoded on its own, beside the full model."""

from __future__ import annotations

from typing import Any

import torch

from .evaluate import Evaluation, Score, Speaker, score_window
from .exits import ExitRunner


class Stepwise:
    """Logits of whole windows, one token after the other through the exits.

    The first token of a window is a prompt and runs at full depth; all others may leave.
    Args:
        runner: takes exits; full: the same model without cache, every token at full depth.
    Attributes:
        program: that of ``runner``.
        counts: decoded tokens by the blocks that they ran, from 1 on.
    """

    def __init__(self, runner: ExitRunner, full: Speaker) -> None:
        self.runner, self.full, self.program = runner, full, runner.program
        self.counts = [0] * runner.depth
        self._scores: list[Score] = []

    @property
    def vocabulary(self) -> int:
        return self.runner.vocabulary

    def forward(self, input_ids: torch.Tensor) -> torch.Tensor:
        """Logits [B, S, vocabulary] of int64 [B, S]; the full model's scores are kept beside."""
        batch, length = input_ids.shape
        cache = self.runner.start(batch, length)
        out: list[torch.Tensor] = []
        for t in range(length):
            out.append(self.runner.forward(input_ids[:, t : t + 1], cache=cache))
            for used in self.runner.used if t else ():
                self.counts[used - 1] += 1
        logits = torch.cat(out, 1)
        whole = self.full.forward(input_ids)
        self._scores += [score_window(*row) for row in zip(logits, input_ids, whole, strict=True)]
        return logits

    @property
    def blocks(self) -> float:
        """Mean blocks per decoded token."""
        total = sum(self.counts)
        return sum(n * c for n, c in enumerate(self.counts, 1)) / total if total else 0.0

    def to_json(self, of: Evaluation) -> dict[str, Any]:
        """What the exits did on the windows of ``of``, against the full model."""
        s = self._scores
        header = (of.data, of.sha256, of.window, of.windows)
        rows = ((r.nll for r in s), (r.kl for r in s), (r.agree for r in s))
        told = Evaluation(*header, *map(tuple, rows)).to_json()
        full = Evaluation(*header, tuple(r.other for r in s))
        return self.runner.exits.to_json() | {
            "threshold": self.runner.exits.threshold,
            "decoded_tokens": sum(self.counts), "blocks": self.runner.depth,
            "blocks_per_token": self.blocks,
            "tokens_by_blocks": {str(n): c for n, c in enumerate(self.counts, 1)},
            "agreement": told["top1_agreement"], "kl_to_full": told["kl_to_baseline"],
            "full_perplexity": full.perplexity,
        }  # fmt: skip
