"""How good, how fast, how big: perplexity by the papers' protocol, divergence, speed and memory."""

from __future__ import annotations

import math
import time
from collections.abc import Callable
from dataclasses import asdict, dataclass
from typing import Any, Protocol

import torch

from ..ir.errors import UsageError
from ..ir.graph import Program
from ..pipeline.data import Stream
from .executor import Runner
from .exits import ExitRunner

# Rows of the vocabulary-wide softmax computed at once: bounds memory on wide vocabularies.
_POSITIONS = 512
# Below this many windows a bootstrap says nothing: of n differences, all have one sign by chance
# with probability 2^(1-n), and then every resample agrees.
MIN_WINDOWS = 8


class Speaker(Protocol):
    """What is evaluated: a runner without cache, or one that goes token by token."""

    program: Program

    @property
    def vocabulary(self) -> int: ...

    def forward(self, input_ids: torch.Tensor) -> torch.Tensor:
        """Logits [B, S, vocabulary] of int64 [B, S]."""
        ...


@dataclass(frozen=True)
class Evaluation:
    """Perplexity of one program on one stream; numbers compare only where the header is equal.

    One stream, windows of ``window`` tokens that do not overlap, the tail dropped; in each window
    every token but the first is predicted (algorithms.md §0.3, GPTQ protocol).

    Attributes:
        data, sha256: what was read.
        window: tokens per window; windows: how many; tokens: window·windows.
        nll: mean negative log-likelihood per window, in nats.
        kl: mean KL(baseline ‖ program) per predicted token and window, in nats; empty without one.
        agree: share of predicted tokens per window whose likeliest token is the baseline's.
    """

    data: str
    sha256: str
    window: int
    windows: int
    nll: tuple[float, ...]
    kl: tuple[float, ...] = ()
    agree: tuple[float, ...] = ()

    @property
    def tokens(self) -> int:
        return self.window * self.windows

    @property
    def perplexity(self) -> float:
        mean = math.fsum(self.nll) / len(self.nll)
        return math.exp(mean) if mean < 700 else math.inf

    def to_json(self) -> dict[str, Any]:
        out: dict[str, Any] = {
            "data": self.data, "sha256": self.sha256, "window": self.window,
            "windows": self.windows, "tokens": self.tokens,
            "protocol": "one stream, windows do not overlap, tail dropped, mean over windows",
            "perplexity": self.perplexity, "nll": list(self.nll),
        }  # fmt: skip
        if self.kl:
            out["kl_to_baseline"] = math.fsum(self.kl) / len(self.kl)
            out["top1_agreement"] = math.fsum(self.agree) / len(self.agree)
            out["kl"], out["agree"] = list(self.kl), list(self.agree)
        return out


def windows_of(stream: Stream, window: int, limit: int | None = None) -> torch.Tensor:
    """int64 [windows, window]: the stream cut without overlap, the tail dropped.

    Raises:
        UsageError: fewer tokens than one window, naming both counts.
    """
    if window < 2:
        raise UsageError(f"expected a window of at least 2 tokens, found {window}")
    found = int(stream.tokens.numel())
    if found < window:
        raise UsageError(
            f"expected at least {window} tokens for one window, found {found}",
            where=stream.name,
            hint="give more text or a smaller window",
        )
    count = found // window
    if limit is not None:
        if limit < 1:
            raise UsageError(f"expected a limit of at least 1 window, found {limit}")
        count = min(count, limit)
    return stream.tokens[: count * window].view(count, window)


def evaluate(
    runner: Speaker,
    stream: Stream,
    window: int,
    *,
    baseline: Speaker | None = None,
    batch: int = 1,
    limit: int | None = None,
    progress: Callable[[int, int], None] | None = None,
) -> Evaluation:
    """Perplexity, and divergence from a baseline where one is given.

    Args:
        runner, baseline: programs without cache.
        batch: windows run together; it changes speed, never the protocol.
        limit: only the first windows (a smoke test; the count is in the result).
        progress: called with (windows done, windows in all).
    Raises:
        UsageError: too little data, a token outside the vocabulary, or a window beyond the context.
    """
    return _measure(runner, baseline, stream, window, batch, limit, progress)[0]


def evaluate_pair(
    runner: Speaker,
    baseline: Speaker,
    stream: Stream,
    window: int,
    *,
    batch: int = 1,
    limit: int | None = None,
    progress: Callable[[int, int], None] | None = None,
) -> tuple[Evaluation, Evaluation]:
    """The evaluation of a program against its baseline, and the baseline's own, in one run.

    Arguments and errors as for :func:`evaluate`.
    """
    mine, theirs = _measure(runner, baseline, stream, window, batch, limit, progress)
    assert theirs is not None
    return mine, theirs


def _measure(
    runner: Speaker,
    baseline: Speaker | None,
    stream: Stream,
    window: int,
    batch: int,
    limit: int | None,
    progress: Callable[[int, int], None] | None,
) -> tuple[Evaluation, Evaluation | None]:
    tokens = windows_of(stream, window, limit)
    for each in (runner, baseline):
        if each is not None:
            _checked(each, tokens, stream)
    rows: list[Score] = []
    for start in range(0, len(tokens), batch):
        ids = tokens[start : start + batch]
        logits = runner.forward(ids)
        other = None if baseline is None else baseline.forward(ids)
        for row in range(len(ids)):
            rows.append(score_window(logits[row], ids[row], None if other is None else other[row]))
        if progress is not None:
            progress(start + len(ids), len(tokens))
    header = (stream.name, stream.sha256, window, len(tokens))
    if baseline is None:
        return Evaluation(*header, tuple(r.nll for r in rows)), None
    return (
        Evaluation(
            *header, tuple(r.nll for r in rows), tuple(r.kl for r in rows),
            tuple(r.agree for r in rows),
        ),
        Evaluation(*header, tuple(r.other for r in rows)),
    )  # fmt: skip


def _checked(runner: Speaker, tokens: torch.Tensor, stream: Stream) -> None:
    """Refuse tokens of another vocabulary and windows longer than the model's context."""
    most, size = int(tokens.max()), runner.vocabulary
    if most >= size:
        raise UsageError(
            f"expected tokens below {size}, found {most}",
            where=stream.name,
            hint="was the text tokenised with another tokenizer?",
        )
    context = runner.program.facts.get("context")
    if isinstance(context, int) and tokens.shape[1] > context:
        raise UsageError(
            f"expected a window of at most {context} tokens, the model's context, "
            f"found {tokens.shape[1]}"
        )


@dataclass(frozen=True)
class Score:
    """Means over one window's predicted tokens: own NLL, KL, agreement, the baseline's NLL."""

    nll: float
    kl: float
    agree: float
    other: float


def score_window(logits: torch.Tensor, ids: torch.Tensor, other: torch.Tensor | None) -> Score:
    """Scores of one window: logits [S, vocabulary], ids [S]."""
    count = len(ids) - 1
    nll = kl = agree = theirs_nll = 0.0
    for at in range(0, count, _POSITIONS):
        stop = min(at + _POSITIONS, count)
        mine = torch.log_softmax(logits[at:stop].float(), -1)
        target = ids[at + 1 : stop + 1].to(mine.device)[:, None]
        nll -= float(mine.gather(1, target).double().sum())
        if other is not None:
            theirs = torch.log_softmax(other[at:stop].float().to(mine.device), -1)
            theirs_nll -= float(theirs.gather(1, target).double().sum())
            kl += float((theirs.exp() * (theirs - mine)).sum(-1).double().sum())
            agree += float((theirs.argmax(-1) == mine.argmax(-1)).sum())
    return Score(nll / count, max(kl, 0.0) / count, agree / count, theirs_nll / count)


@dataclass(frozen=True)
class Comparison:
    """a against b over the same windows: mean NLL difference (below 0: a is better).

    Attributes:
        low, high: 95 % bootstrap interval of ``difference``.
        p: two-sided; the share of resamples on the other side of zero, doubled, and at least
            2^(1-windows), the chance that all differences have one sign.
        All three are None below ``MIN_WINDOWS`` windows.
    """

    difference: float
    low: float | None
    high: float | None
    p: float | None
    windows: int

    @property
    def perplexity_ratio(self) -> float:
        return math.exp(self.difference)

    def to_json(self) -> dict[str, Any]:
        return asdict(self) | {
            "perplexity_ratio": self.perplexity_ratio, "windows_needed": MIN_WINDOWS,
        }  # fmt: skip


def compare(a: Evaluation, b: Evaluation, samples: int = 10_000, seed: int = 0) -> Comparison:
    """Paired bootstrap over windows.

    Raises:
        UsageError: the two were not measured on the same windows.
    """
    for name in ("sha256", "window", "windows"):
        mine, theirs = getattr(a, name), getattr(b, name)
        if mine != theirs:
            raise UsageError(
                f"expected two evaluations of the same windows, found {name} {mine} and {theirs}"
            )
    diff = torch.tensor(a.nll, dtype=torch.float64) - torch.tensor(b.nll, dtype=torch.float64)
    n = len(diff)
    if n < MIN_WINDOWS:
        return Comparison(float(diff.mean()), None, None, None, n)
    generator = torch.Generator().manual_seed(seed)
    means = torch.empty(samples, dtype=torch.float64)
    chunk = max(1, 4_000_000 // n)
    for start in range(0, samples, chunk):
        rows = min(chunk, samples - start)
        picked = torch.randint(0, n, (rows, n), generator=generator)
        means[start : start + rows] = diff[picked].mean(1)
    low, high = torch.quantile(means, torch.tensor([0.025, 0.975], dtype=torch.float64)).tolist()
    side = min(int((means <= 0).sum()), int((means >= 0).sum()))
    p = min(1.0, max(2 * (side + 1) / (samples + 1), 2.0 ** (1 - n)))
    return Comparison(float(diff.mean()), low, high, p, n)


@dataclass(frozen=True)
class Speed:
    """Tokens per second of prefill and of decode, apart; median over ``repeats``.

    ``blocks`` is the mean number of blocks that a decoded token ran, None without early exits.
    """

    batch: int
    prompt: int
    new: int
    repeats: int
    prefill: float
    decode: float
    blocks: float | None = None

    def to_json(self) -> dict[str, Any]:
        more = {} if self.blocks is None else {"blocks_per_token": self.blocks}
        return more | {
            "batch": self.batch, "prompt_tokens": self.prompt, "new_tokens": self.new,
            "repeats": self.repeats, "prefill_tokens_per_second": self.prefill,
            "decode_tokens_per_second": self.decode,
        }  # fmt: skip


def speed(
    runner: Runner, tokens: torch.Tensor, *, batch: int = 1, prompt: int = 128, new: int = 32,
    repeats: int = 3,
) -> Speed:  # fmt: skip
    """Time a cached program: ``prompt`` tokens at once, then ``new`` tokens one by one.

    Args:
        tokens: int64 [n]; rows are taken from its start, repeated when it is short.
    Raises:
        UsageError: a program without cache, or sizes below 1.
    """
    if not runner.cached:
        raise UsageError("expected a program with a KV cache, found none; add_cache makes one")
    if min(batch, prompt, new, repeats) < 1:
        raise UsageError(f"expected sizes of at least 1, found {[batch, prompt, new, repeats]}")
    need = batch * prompt
    ids = tokens.repeat(-(-need // tokens.numel()))[:need].view(batch, prompt)
    fill: list[float] = []
    step: list[float] = []
    used: list[int] = []
    for turn in range(repeats + 1):
        cache = runner.start(batch, prompt + new)
        begin = _now(runner)
        logits = runner.forward(ids, cache=cache)
        middle = _now(runner)
        for _ in range(new):
            chosen = logits[:, -1].argmax(-1, keepdim=True)
            logits = runner.forward(chosen, cache=cache)
            if isinstance(runner, ExitRunner):
                used += runner.used
        end = _now(runner)
        if turn:  # the first turn warms up
            fill.append(batch * prompt / (middle - begin))
            step.append(batch * new / (end - middle))
    middle_of = repeats // 2
    blocks = sum(used) / len(used) if used else None
    return Speed(
        batch, prompt, new, repeats, sorted(fill)[middle_of], sorted(step)[middle_of], blocks
    )


def _now(runner: Runner) -> float:
    if runner.device.type == "cuda":
        torch.cuda.synchronize(runner.device)
    return time.perf_counter()


def peak_rss() -> int:
    """Most bytes of memory that this process has had resident so far."""
    import resource
    import sys

    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return peak if sys.platform == "darwin" else peak * 1024
