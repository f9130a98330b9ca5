"""Text from a program: greedy or sampled, one prompt or a left-padded batch, cached if possible."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass

import torch

from ..ir.errors import LlmcError, UsageError
from ..pipeline.data import Tokenizer
from .cache import Cache
from .executor import Runner
from .exits import ExitRunner
from .graphed import GraphDecoder, decoder_for

OnToken = Callable[[int, int], None]
OnDepth = Callable[[int, int], None]
OnNote = Callable[[str], None]


@dataclass(frozen=True)
class Sampling:
    """How the next token is chosen.

    Attributes:
        temperature: 0 takes the likeliest token; else logits are divided by it.
        top_k: only the k likeliest tokens take part; None for all.
        top_p: only the smallest set of likeliest tokens whose probability reaches it; None for all.
        seed: of the draws; one seed gives one text.
    """

    temperature: float = 0.0
    top_k: int | None = None
    top_p: float | None = None
    seed: int = 0

    def check(self) -> None:
        """Raises UsageError for a value out of range, naming it."""
        if not (self.temperature >= 0 and self.temperature != float("inf")):
            raise UsageError(f"expected temperature >= 0, found {self.temperature}")
        if self.top_k is not None and self.top_k < 1:
            raise UsageError(f"expected top_k >= 1, found {self.top_k}")
        if self.top_p is not None and not 0 < self.top_p <= 1:
            raise UsageError(f"expected top_p in (0, 1], found {self.top_p}")
        if self.temperature == 0 and (self.top_k is not None or self.top_p is not None):
            raise UsageError(
                "expected a temperature above 0 with top_k or top_p, found 0",
                hint="set a temperature or leave them out",
            )


def choose(
    logits: torch.Tensor, sampling: Sampling, generator: torch.Generator | None
) -> torch.Tensor:
    """The next token of each row: logits [B, vocabulary] -> int64 [B]."""
    if sampling.temperature == 0:
        return logits.argmax(-1)
    scores = logits.double() / sampling.temperature
    if sampling.top_k is not None and sampling.top_k < scores.shape[-1]:
        least = scores.topk(sampling.top_k, -1).values[:, -1:]
        scores = scores.masked_fill(scores < least, float("-inf"))
    if sampling.top_p is not None and sampling.top_p < 1:
        ordered, where = scores.sort(dim=-1, descending=True, stable=True)
        weights = torch.softmax(ordered, -1)
        # A token stays while those before it have not reached top_p; the first one always stays.
        beyond = weights.cumsum(-1) - weights >= sampling.top_p
        scores = scores.masked_fill(torch.zeros_like(beyond).scatter(1, where, beyond), -torch.inf)
    return torch.multinomial(torch.softmax(scores, -1), 1, generator=generator).squeeze(1)


def generate(
    runner: Runner,
    prompts: Sequence[Sequence[int]],
    *,
    max_new_tokens: int,
    sampling: Sampling | None = None,
    eos: Iterable[int] = (),
    on_token: OnToken | None = None,
    on_depth: OnDepth | None = None,
    on_note: OnNote | None = None,
) -> list[list[int]]:
    """New token ids of each prompt, without the token that ended it.

    A cached program reads each token once; any other program is run on the whole text each step.
    On a CUDA device a step over a cache is recorded as a graph where it can be.
    Args:
        prompts: token ids, at least one each; shorter rows are padded on the left.
        eos: ids that end a row.
        on_token: called with (row, token) as soon as a token is known.
        on_depth: called with (row, blocks executed) before it, where the runner takes exits; a
            row's first new token comes from its prompt, at full depth.
        on_note: told why steps on a CUDA device are launched one kernel at a time, if they are.
    Raises:
        UsageError: no prompt, an empty one, an id outside the vocabulary, or a bad setting.
    """
    sampling = sampling or Sampling()
    sampling.check()
    if max_new_tokens < 1:
        raise UsageError(f"expected max_new_tokens >= 1, found {max_new_tokens}")
    ids, valid = pad_left(prompts)
    _check_ids(runner, ids, max_new_tokens)
    positions = (valid.long().cumsum(1) - 1).clamp_min(0)
    cache, steps = None, None
    if runner.cached:
        cache = runner.start(len(prompts), ids.shape[1] + max_new_tokens)
        steps = Steps(runner, cache, ids.shape[1] + max_new_tokens, on_note)
    generator = torch.Generator(runner.device).manual_seed(sampling.seed)
    ends = frozenset(eos)
    done = [False] * len(prompts)
    out: list[list[int]] = [[] for _ in prompts]
    step, step_valid, step_positions = ids, valid, positions
    for _ in range(max_new_tokens):
        if steps is not None and cache is not None and cache.length:
            logits = steps.forward(step, step_valid, step_positions)[:, -1]
        else:
            logits = runner.forward(step, step_valid, step_positions, cache)[:, -1]
        chosen = choose(logits, sampling, generator).cpu()
        for row, token in enumerate(chosen.tolist()):
            if done[row]:
                continue
            if token in ends:
                done[row] = True
                continue
            out[row].append(token)
            if on_depth is not None and isinstance(runner, ExitRunner):
                on_depth(row, runner.used[row])
            if on_token is not None:
                on_token(row, token)
        if all(done):
            break
        real = torch.ones(len(prompts), 1, dtype=torch.bool)
        following = positions[:, -1:] + 1
        if cache is not None:
            step, step_valid, step_positions = chosen[:, None], real, following
        else:
            step = torch.cat([step, chosen[:, None]], 1)
            step_valid = torch.cat([step_valid, real], 1)
            step_positions = torch.cat([step_positions, following], 1)
        positions = following
    return out


class Steps:
    """Forwards of one real token a row over a cache: replays of a graph while these work."""

    def __init__(self, runner: Runner, cache: Cache, tokens: int, on_note: OnNote | None) -> None:
        self._runner, self._cache, self._tokens, self._on_note = runner, cache, tokens, on_note
        self._decoder: GraphDecoder | None = None
        self._tried = False

    def forward(
        self, ids: torch.Tensor, valid: torch.Tensor, positions: torch.Tensor
    ) -> torch.Tensor:
        """Logits [B, 1, vocabulary]; those of a graph are overwritten by the next call."""
        if not self._tried:
            self._tried = True
            found = decoder_for(self._runner, self._cache, self._tokens)
            if isinstance(found, str):
                self._note(found)
            else:
                self._decoder = found
        if self._decoder is not None:
            try:
                return self._decoder.step(ids, positions)
            except (LlmcError, RuntimeError) as error:  # it left the cache as it was
                self._decoder = None
                self._note(str(error).partition("\n")[0])
        return self._runner.forward(ids, valid, positions, self._cache)

    def _note(self, why: str) -> None:
        if self._on_note is not None and self._runner.device.type == "cuda":
            self._on_note(f"no CUDA graph, each kernel is launched by itself: {why}")


def _check_ids(runner: Runner, ids: torch.Tensor, new: int) -> None:
    facts, longest = runner.program.facts, ids.shape[1]
    context = facts.get("context")
    if isinstance(context, int) and longest + new > context:
        raise UsageError(
            f"expected at most {context} tokens, found {longest} of the prompt and {new} new"
        )
    size = runner.vocabulary
    if int(ids.max()) >= size or int(ids.min()) < 0:
        worst = int(ids.max()) if int(ids.max()) >= size else int(ids.min())
        raise UsageError(f"expected token ids below {size}, found {worst}")


def pad_left(prompts: Sequence[Sequence[int]]) -> tuple[torch.Tensor, torch.Tensor]:
    """Token ids int64 [B, S] padded on the left with 0, and which are real, bool [B, S].

    Raises:
        UsageError: no prompt or an empty one.
    """
    if not prompts or any(len(p) == 0 for p in prompts):
        raise UsageError("expected prompts of at least one token, found none or an empty one")
    width = max(len(p) for p in prompts)
    ids = torch.zeros(len(prompts), width, dtype=torch.int64)
    valid = torch.zeros(len(prompts), width, dtype=torch.bool)
    for row, prompt in enumerate(prompts):
        ids[row, width - len(prompt) :] = torch.tensor(list(prompt))
        valid[row, width - len(prompt) :] = True
    return ids, valid


class TextStream:
    """Text of tokens as they come: a character that is not complete yet waits for its last byte."""

    def __init__(self, tokenizer: Tokenizer) -> None:
        self._tokenizer = tokenizer
        self._ids: list[int] = []
        self._shown = 0

    def push(self, token: int) -> str:
        """The text that this token completes; often one word, sometimes nothing."""
        self._ids.append(token)
        text = self._tokenizer.decode(self._ids)
        if text.endswith("�"):
            return ""
        new, self._shown = text[self._shown :], len(text)
        return new

    def rest(self) -> str:
        """What was held back at the end."""
        text = self._tokenizer.decode(self._ids)
        new, self._shown = text[self._shown :], len(text)
        return new
