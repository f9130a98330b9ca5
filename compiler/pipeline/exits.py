"""What early exits would do on calibration tokens, and the threshold that keeps an agreement.

All tokens of a window run at once, block by block. A token that left keeps its stream, and later
blocks make its keys and values from it: to the letter what decoding token by token does.
"""

from __future__ import annotations

import math
from bisect import bisect_left
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor, fx

from ..analysis.depth import Span
from ..analysis.exits import exit_spans, head_nodes
from ..ir.errors import LlmcError
from ..ir.events import Event, Listener, silent
from ..ir.exits import Exits, classified, features, similarity, sure_enough
from ..ir.graph import Program, Segment
from ..ir.interpret import run_nodes
from ..ir.refusal import Refusal
from .measure import Env, Options, Walk, batches, check_finite

# Values of λ that are looked at, evenly spread over all confidences.
_RUNGS = 1024
# Shares of the allowed disagreement at which thresholds are tried, from timid to bold.
_LEVELS = (0.01, 0.03, 0.1, 0.25, 0.4, 0.55, 0.7, 0.85, 1.0, 1.15, 1.3)


@dataclass(frozen=True)
class Seen:
    """What every exit says of every token, the exits of earlier tokens left aside.

    Attributes:
        gap, top: p1 - p2 and p1, f32 [exits, windows, length]; cos: of the stream around the
            block. right: bool, whether the exit's likeliest token is the full model's.
        final: the full model's likeliest token, int64 [windows, length].
    """

    gap: Tensor
    top: Tensor
    cos: Tensor
    right: Tensor
    final: Tensor

    def sure(self, rule: str, classifier: Tensor | None) -> Tensor:
        """Confidence of each exit by a rule, f32 [exits, windows, length]."""
        if rule == "cosine":
            return self.cos
        if rule == "softmax":
            return self.gap
        assert classifier is not None
        w = classifier[:, :, None, None]
        return torch.sigmoid(w[:, 0] * self.gap + w[:, 1] * self.top + w[:, 2])

    def part(self, windows: slice) -> Seen:
        """Some of the windows."""
        gap, top, cos, right = (p[:, windows] for p in (self.gap, self.top, self.cos, self.right))
        return Seen(gap, top, cos, right, self.final[windows])

    def only(self, exits: Sequence[int]) -> Seen:
        """Some of the exits."""
        at = list(exits)
        return Seen(self.gap[at], self.top[at], self.cos[at], self.right[at], self.final)


@dataclass(frozen=True)
class Outcome:
    """What exits did, per token, [windows, length].

    What it says is about decoded tokens: the first of a window is a prompt and never leaves.
    Attributes:
        agrees: whether the likeliest token is the full model's, bool.
        depth: blocks that were run, int64.
    """

    agrees: Tensor
    depth: Tensor

    @property
    def decoded(self) -> Outcome:
        """The tokens that may leave, [windows, length - 1]."""
        return Outcome(self.agrees[:, 1:], self.depth[:, 1:])

    @property
    def agreement(self) -> float:
        return float(self.decoded.agrees.double().mean())

    @property
    def blocks(self) -> float:
        """Mean blocks per token."""
        return float(self.decoded.depth.double().mean())

    def asked(self, depths: Sequence[int]) -> float:
        """Mean number of exits that a token came by, exits lying at these depths."""
        return sum(float((self.decoded.depth >= d).double().mean()) for d in depths)

    def shares(self, depth: int) -> list[float]:
        """Share of the tokens that ran 1, 2, …, ``depth`` blocks."""
        counts = torch.bincount(self.decoded.depth.flatten(), minlength=depth + 1)[1:]
        return (counts.double() / counts.sum()).tolist()


class ExitWalk:
    """A program that is run over windows, block by block, with a look at the head behind blocks.

    Args:
        after: blocks behind which a token may leave, in order.
        tokens: int64 [windows, length].
    """

    def __init__(
        self, program: Program, after: Sequence[Span], tokens: Tensor, options: Options,
        listener: Listener = silent,
    ) -> None:  # fmt: skip
        found = exit_spans(program)
        if isinstance(found, Refusal):
            raise LlmcError(f"expected a program that can be left early, found {found}")
        self.program, self.tokens, self.listener = program, tokens, listener
        self._options, self._walk = options, Walk(program, device=options.device)
        self._spans = {s.block: s for s in found}
        self._exits = {s.block: i for i, s in enumerate(after)}
        self._end = program.node(found[-1].leaves)
        head = self._walk.calls(program.segments[-1])
        wanted = set(head_nodes(program))
        self._head = [n for n in head if n in wanted or n.op == "get_attr"]
        self._weights: dict[str, Tensor] = {}
        self._ready: tuple[int, list[Env]] | None = None

    @torch.no_grad()
    def look(self) -> Seen:
        """Run every block for every token and hear each exit."""
        said: list[list[Tensor]] = [[] for _ in self._exits]
        best: list[list[Tensor]] = [[] for _ in self._exits]
        final: list[Tensor] = []
        for segment, envs in self._segments():
            for i, env in enumerate(envs):
                new = self._walk.outputs(segment, env)
                span = self._spans[segment.name]
                before, after = _tensor(env, self.program.node(span.enters)), new[self._out(span)]
                assert isinstance(after, Tensor)
                check_finite(self._out(span), after)
                envs[i] = self._walk.advanced(segment, env, new)
                at = self._exits.get(segment.name)
                if at is not None:
                    logits = self._says(envs[i], after)
                    turn = similarity(before, after)[..., None]
                    said[at].append(torch.cat([features(logits), turn], -1).cpu())
                    best[at].append(logits.argmax(-1).cpu())
                if self._out(span) is self._end:
                    final.append(self._says(envs[i], after).argmax(-1).cpu())
        full = torch.cat(final)
        gap, top, cos = torch.stack([torch.cat(s) for s in said]).unbind(-1)
        right = torch.stack([torch.cat(b) == full for b in best])
        return Seen(gap, top, cos, right, full)

    @torch.no_grad()
    def run(self, exits: Exits, classifier: Tensor | None, final: Tensor) -> Outcome:
        """Let tokens leave, with the keys and values that leaving gives.

        The first token of a window is a prompt and stays, and the next one is new token 0.
        Args:
            final: the full model's likeliest tokens, int64 [windows, length].
        """
        limit = _limits(exits, self.tokens.shape[1])
        gone = [torch.zeros(ids.shape, dtype=torch.bool) for ids in self._ids()]
        said = [torch.zeros_like(ids) for ids in self._ids()]
        first = min(self._spans[b].index for b in self._exits)
        depth = [torch.full_like(ids, first) for ids in self._ids()]
        for segment, envs in self._segments(first):
            span = self._spans[segment.name]
            at = self._exits.get(segment.name)
            for i, env in enumerate(envs):
                before = _tensor(env, self.program.node(span.enters))
                left = gone[i].to(before.device)
                new = self._walk.outputs(segment, env)
                after = new[self._out(span)]
                assert isinstance(after, Tensor)
                new[self._out(span)] = after = torch.where(left[..., None], before, after)
                envs[i] = self._walk.advanced(segment, env, new)
                depth[i] += ~gone[i]
                last = self._out(span) is self._end
                if at is None and not last:
                    continue
                logits = self._says(envs[i], after) if last or exits.rule != "cosine" else None
                leave = ~gone[i]
                if at is not None and not last:
                    sure = _sure(exits, classifier, at, before, after, logits)
                    leave = leave & sure_enough(sure, limit)
                if bool(leave.any()):
                    logits = self._says(envs[i], after) if logits is None else logits
                    said[i][leave] = logits.argmax(-1).cpu()[leave]
                    gone[i] = gone[i] | leave
        return Outcome(torch.cat(said) == final, torch.cat(depth))

    def _ids(self) -> tuple[Tensor, ...]:
        return self.tokens.split(self._options.batch)

    def _segments(self, first: int = 0) -> Iterator[tuple[Segment, list[Env]]]:
        """Each block from ``first`` on with the batches' environments, which the caller moves on.

        What lies before that block is run once, however often it is asked for.
        """
        start = 1 + first
        if self._ready is None or self._ready[0] != first:
            before = batches(self.program, self.tokens, self._options)
            for segment in self._walk.segments[:start]:
                before = self._walk.step(segment, before)
            self._ready = (first, before)
        envs = list(self._ready[1])
        for segment in self._walk.segments[start:-1]:
            self.listener(Event("tick", {"where": segment.name}))
            yield segment, envs
            self._walk.forget()

    def _out(self, span: Span) -> fx.Node:
        return self.program.node(span.leaves)

    def _says(self, env: Env, stream: Tensor) -> Tensor:
        """Logits of the head on a stream, [B, S, V]."""
        result = next(n for n in self.program.output.all_input_nodes)
        given = {**env, self._end: stream}
        out = run_nodes(self._head, given, self._fetch, keep=(result,))[result]
        assert isinstance(out, Tensor)
        return out

    def _fetch(self, name: str) -> Tensor:
        """The head's weights, which every exit reads, stay loaded."""
        if name not in self._weights:
            self._weights[name] = self.program.fetch(name).to(self._options.device)
        return self._weights[name]


def _limits(exits: Exits, length: int) -> Tensor:
    """λ of every token of a window, f64 [length]; the first is a prompt and never leaves."""
    out = exits.at(torch.arange(length) - 1)
    out[0] = math.inf
    return out


def _tensor(env: Env, node: fx.Node) -> Tensor:
    found = env[node]
    assert isinstance(found, Tensor)
    return found


def _sure(
    exits: Exits, classifier: Tensor | None, at: int, before: Tensor, after: Tensor,
    logits: Tensor | None,
) -> Tensor:  # fmt: skip
    if logits is None:
        return similarity(before, after).cpu()
    if classifier is None:
        return features(logits)[..., 0].cpu()
    return classified(logits, classifier[at]).cpu()


# ** thresholds **


def replay(seen: Seen, exits: Exits, classifier: Tensor | None, depths: Sequence[int]) -> Outcome:
    """What exits do where every earlier token ran in full, from what each exit said.

    Args:
        depths: blocks that a token which leaves at each exit has run, and last those of the model.
    """
    limit = _limits(exits, seen.final.shape[1])
    leaves = sure_enough(seen.sure(exits.rule, classifier), limit)
    leaves = torch.cat([leaves, torch.ones_like(leaves[:1])])
    first = leaves.int().argmax(0)
    right = torch.cat([seen.right, torch.ones_like(seen.right[:1])])
    return Outcome(right.gather(0, first[None])[0], torch.tensor(depths)[first])


class Ladder:
    """Values of λ from timid to bold, and what they do on what was seen.

    Args:
        exits: rule, blocks and decay; its threshold is not looked at.
        depths: as for :func:`replay`.
    """

    def __init__(
        self, seen: Seen, exits: Exits, classifier: Tensor | None, depths: Sequence[int]
    ) -> None:
        self._seen, self._exits, self._depths = seen, exits, depths
        self._classifier = classifier
        sure = seen.sure(exits.rule, classifier).flatten().double()
        if exits.decay is not None:
            sure = torch.cat([sure, sure / 0.9])
        grid = torch.quantile(_thinned(sure), torch.linspace(0, 1, _RUNGS, dtype=torch.float64))
        self.rungs = sorted({min(float(q), 1.0) for q in grid} | {1.0}, reverse=True)

    def outcome(self, threshold: float) -> Outcome:
        """What one λ does where every earlier token ran in full."""
        tried = replace(self._exits, threshold=threshold)
        return replay(self._seen, tried, self._classifier, self._depths)

    def lowest(self, agreement: float) -> float | None:
        """The lowest λ that keeps an agreement; None where not even 1 does."""
        missed = bisect_left(
            self.rungs, True, key=lambda value: self.outcome(value).agreement < agreement
        )
        return self.rungs[missed - 1] if missed else None

    def around(self, agreement: float) -> list[float]:
        """λs to try for an agreement, from timid to bold: each the lowest that keeps a level."""
        levels = (1 - share * (1 - agreement) for share in _LEVELS)
        found = {value for level in levels if (value := self.lowest(level)) is not None}
        return sorted(found, reverse=True)


def _thinned(values: Tensor, most: int = 1 << 20) -> Tensor:
    """At most that many of the values, evenly taken; quantiles need no more."""
    return values[:: -(-values.numel() // most)]


def doubt(agrees: Tensor, agreement: float) -> float:
    """How likely so many tokens agree by chance when fewer than ``agreement`` do: a p-value.

    Chernoff's bound on the binomial tail, exp(-n KL(r ‖ 1 - agreement)) for a share r of tokens
    that disagree. Tokens of a window are alike, so n is the number of tokens over the design effect
    that the spread of the windows' means shows (Kish); one window shows none and counts as one.

    Args:
        agrees: bool [windows, length].
    """
    windows, length = agrees.shape
    wrong, risk = 1 - float(agrees.double().mean()), 1 - agreement
    if wrong >= risk:
        return 1.0
    effect = 1.0 if windows > 1 else float(length)
    if windows > 1 and wrong > 0:
        spread = float(agrees.double().mean(1).var())
        effect = max(1.0, spread * length / (wrong * (1 - wrong)))
    kl = (1 - wrong) * math.log((1 - wrong) / (1 - risk))
    if wrong > 0:
        kl += wrong * math.log(wrong / risk)
    return math.exp(-windows * length / effect * kl)


def lowest(
    tried: Iterator[tuple[float, Outcome]], agreement: float, error: float,
    records: list[dict[str, Any]],
) -> tuple[float, Outcome] | None:  # fmt: skip
    """The last threshold of a sequence, from timid to bold, before one fails its test.

    Fixed-sequence testing (Learn then Test, arXiv 2110.01052): each is tested at the full level, as
    nothing is tested after the first that fails. One row per test goes to ``records``.
    """
    best = None
    for value, outcome in tried:
        p = doubt(outcome.decoded.agrees, agreement)
        records.append({
            "threshold": value, "agreement": outcome.agreement, "p": p,
            "blocks_per_token": outcome.blocks,
        })  # fmt: skip
        if p > error:
            break
        best = (value, outcome)
    return best
