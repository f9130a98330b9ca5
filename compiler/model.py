"""The compiled model: a callable module around a program, its plan and its records."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from functools import cached_property
from pathlib import Path
from typing import Any

import torch

from .ir.errors import UsageError
from .ir.graph import Program
from .pipeline.data import Tokenizer
from .pipeline.plan import Plan
from .pipeline.rounds import Compiled
from .runtime.cache import add_cache, cache_refusals
from .runtime.executor import Runner
from .runtime.generate import Sampling
from .runtime.generate import generate as run_generation


class Model(torch.nn.Module):
    """A compressed model: ``model(input_ids)`` gives logits [B, S, vocabulary].

    Attributes:
        program: the rewritten graph with its tensors; ``graph`` is another name of it.
        plan: what was planned; None for a loaded artefact.
        record: what decided the result: recipe, calibration data, settings.
        records: one row per solved weight (loss, damping, tokens, fallbacks).
        folds: one row per migrated scale.
        tokenizer: of the model, None where it has none.
        target: what the graph is lowered for.
    """

    def __init__(
        self,
        program: Program,
        solved: Compiled | None,
        record: dict[str, Any],
        tokenizer: Tokenizer | None = None,
        target: str = "reference",
        *,
        seconds: float = 0.0,
    ) -> None:
        super().__init__()
        self.program, self.solved, self.record = program, solved, record
        self.tokenizer, self.target, self.seconds = tokenizer, target, seconds
        self.eval()

    @property
    def graph(self) -> Program:
        """The program; ``graph.print_python()`` shows it."""
        return self.program

    @property
    def plan(self) -> Plan | None:
        return None if self.solved is None else self.solved.plan

    @property
    def records(self) -> list[dict[str, Any]]:
        return [] if self.solved is None else self.solved.records

    @property
    def folds(self) -> list[dict[str, Any]]:
        return [] if self.solved is None else self.solved.folds

    @cached_property
    def runner(self) -> Runner:
        """The program lowered for ``target``, without cache."""
        return lowered(self.program, self.target)

    @cached_property
    def generator(self) -> Runner:
        """The program with a KV cache where it can have one, lowered for ``target``."""
        if cache_refusals(self.program):
            return self.runner
        return lowered(add_cache(self.program), self.target)

    def why_no_cache(self) -> str:
        """Why generation runs without a KV cache; empty where it has one."""
        refused = cache_refusals(self.program)
        return str(refused[0]) if refused else ""

    def forward(
        self,
        input_ids: torch.Tensor,
        attention_mask: torch.Tensor | None = None,
        position_ids: torch.Tensor | None = None,
    ) -> torch.Tensor:
        """Logits [B, S, vocabulary] of int64 token ids [B, S].

        Args:
            attention_mask: [B, S], 0 or False for padding.
            position_ids: int64 [B, S]; by default real tokens counted from the left.
        """
        return self.runner.forward(input_ids, attention_mask, position_ids)

    def generate(
        self,
        prompts: str | Sequence[str] | torch.Tensor | Sequence[Sequence[int]],
        *,
        max_new_tokens: int = 64,
        temperature: float = 0.0,
        top_k: int | None = None,
        top_p: float | None = None,
        seed: int = 0,
        on_token: Callable[[int, int], None] | None = None,
    ) -> Any:
        """Continue prompts; greedy unless ``temperature`` is above 0.

        Args:
            prompts: a text, texts, token ids int64 [B, S] or lists of ids.
        Returns:
            For texts the new text (one string for one string), else lists of new token ids.
        Raises:
            UsageError: texts without a tokenizer, an empty prompt, or a bad setting.
        """
        sampling = Sampling(temperature, top_k, top_p, seed)
        ids, texts = self._ids(prompts)
        eos = self.program.facts.get("eos") or ()
        if self.tokenizer is not None and not eos:
            eos = self.tokenizer.eos
        made = run_generation(
            self.generator, ids, max_new_tokens=max_new_tokens, sampling=sampling, eos=eos,
            on_token=on_token,
        )  # fmt: skip
        if not texts:
            return made
        assert self.tokenizer is not None
        new = [self.tokenizer.decode(row) for row in made]
        return new[0] if isinstance(prompts, str) else new

    def _ids(self, prompts: Any) -> tuple[list[list[int]], bool]:
        if isinstance(prompts, torch.Tensor):
            return prompts.reshape(-1, prompts.shape[-1]).tolist(), False
        rows = [prompts] if isinstance(prompts, str) else list(prompts)
        if not rows or not all(isinstance(r, str) for r in rows):
            return [list(r) for r in rows], False
        if self.tokenizer is None:
            raise UsageError(
                "expected token ids, found text and a model without a tokenizer",
                hint="pass tokenizer= to llmc.compile",
            )
        return [self.tokenizer.encode(r) for r in rows], True

    def save(self, path: str | Path, *, force: bool = False) -> None:
        """Write an artefact folder, whole or not at all.

        Raises:
            UsageError: the folder exists and ``force`` is not given, or nothing was compiled.
            ResourceError: no space.
        """
        raise UsageError("expected a compiled model; saving is not built yet")

    @classmethod
    def load(cls, path: str | Path, *, target: str = "reference") -> Model:
        """See :func:`llmc.load`."""
        raise UsageError("loading is not built yet")

    def extra_repr(self) -> str:
        """Shown by ``print(model)``."""
        return f"{self.record.get('passes', 'dense')}, target={self.target}"


def lowered(program: Program, target: str) -> Runner:
    """A runner of a program for a target.

    Raises:
        UsageError: unknown target, or one that this machine cannot run.
    """
    if target != "reference":
        raise UsageError(f"expected target reference, found {target!r}")
    return Runner(program)
