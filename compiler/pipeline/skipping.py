"""What blocks do to the stream, and the loss without some of them, with no weight loaded twice.

Block influence is ShortGPT's (arXiv 2403.03853), the angle that of "The Unreasonable
Ineffectiveness of the Deeper Layers" (arXiv 2403.17887), the greedy search SLEB's (2402.09025).
"""

from __future__ import annotations

from collections.abc import Collection, Sequence
from dataclasses import dataclass
from math import pi

import torch
from torch import Tensor

from ..analysis.depth import beside, spans
from ..ir.events import Event, Listener, silent
from ..ir.graph import Program, Segment
from ..ir.interpret import run_nodes
from .measure import Env, Meter, Options, Walk, batches, for_logits, stream


def cosines(a: Tensor, b: Tensor) -> Tensor:
    """cos of the angle between rows of a and b, [..., n] -> [...], fp64; two equal rows give 1."""
    a, b = a.double(), b.double()
    lengths = a.norm(dim=-1) * b.norm(dim=-1)
    cos = (a * b).sum(-1) / lengths.where(lengths > 0, 1.0)
    return cos.clamp(-1.0, 1.0).where((a != b).any(-1), 1.0)


@dataclass(frozen=True)
class Course:
    """The stream along the blocks.

    Attributes:
        influence: BI_i = 1 - mean over tokens of cos(stream before block i, behind it).
        ends: the stream at the last token of every window before each block and behind the last
            one, [blocks + 1, windows, hidden].
    """

    influence: list[float]
    ends: Tensor

    def angle(self, first: int, count: int) -> float:
        """Mean over windows of arccos(cos) / π around ``count`` blocks from ``first`` on."""
        return float(cosines(self.ends[first], self.ends[first + count]).arccos().mean() / pi)


def course(program: Program, tokens: Tensor, options: Options, listener: Listener) -> Course:
    """Run the program once and keep what the stream says about its blocks.

    Args:
        tokens: int64 [samples, length].
    """
    sums: dict[str, float] = {}
    counts: dict[str, int] = {}
    ends: list[list[Tensor]] = [[]]
    for one in stream(program, tokens, options, listener):
        if one.block not in sums:
            sums[one.block], counts[one.block] = 0.0, 0
            ends.append([])
        cos = cosines(one.enters, one.leaves)
        sums[one.block] += float((1 - cos).sum())
        counts[one.block] += cos.numel()
        ends[-1].append(one.leaves[:, -1].float().cpu())
        if len(ends) == 2:
            ends[0].append(one.enters[:, -1].float().cpu())
    return Course([sums[b] / counts[b] for b in sums], torch.stack([torch.cat(e) for e in ends]))


class Skipping:
    """The calibration loss of a program without some of its blocks.

    The stream is kept where the first of the blocks in question begins, so each answer costs the
    segments from there on.
    """

    def __init__(
        self, program: Program, candidates: Collection[str], tokens: Tensor, options: Options,
        listener: Listener = silent,
    ) -> None:  # fmt: skip
        self.program, self.tokens, self.listener = program, tokens, listener
        self.walk = Walk(program, device=options.device)
        self._past = {s.block: (s, beside(program, s)) for s in spans(program)}
        names = [s.name for s in self.walk.segments]
        self._first = min((names.index(c) for c in candidates), default=len(names))
        with torch.no_grad():
            self._envs = batches(program, tokens, for_logits(program, tokens, options))
            for segment in self.walk.segments[: self._first]:
                self._envs = self.walk.step(segment, self._envs)

    def loss(self, gone: Collection[str]) -> float:
        """Mean next-token cross-entropy without the blocks ``gone``, all among the candidates."""
        with torch.no_grad():
            return self._rest(self._first, self._envs, gone)

    def without_one_more(
        self, gone: Collection[str], candidates: Sequence[str]
    ) -> dict[str, float]:
        """The loss without ``gone`` and each candidate in turn.

        The stream up to a candidate is that without ``gone`` alone, and is run once for all.
        """
        out: dict[str, float] = {}
        left = set(candidates)
        with torch.no_grad():
            envs = self._envs
            for i, segment in enumerate(self.walk.segments[self._first :], self._first):
                if segment.name in left:
                    left.remove(segment.name)
                    over = [self._over(segment, env) for env in envs]
                    out[segment.name] = self._rest(i + 1, over, gone)
                if not left:
                    break
                envs = self._through(segment, envs, gone, None)
        return out

    def greedy(
        self, candidates: Sequence[str], count: int
    ) -> list[tuple[str, float, dict[str, float]]]:
        """The block to drop next, again and again: (block, loss without it, loss by candidate)."""
        out: list[tuple[str, float, dict[str, float]]] = []
        while len(out) < count:
            gone = [block for block, _, _ in out]
            found = self.without_one_more(gone, [c for c in candidates if c not in gone])
            best = min(found, key=found.__getitem__)
            out.append((best, found[best], found))
        return out

    def _rest(self, start: int, envs: list[Env], gone: Collection[str]) -> float:
        meter = Meter(self.program, self.tokens)
        for segment in self.walk.segments[start:]:
            envs = self._through(segment, envs, gone, meter)
        return meter.mean()

    def _through(
        self, segment: Segment, envs: list[Env], gone: Collection[str], meter: Meter | None
    ) -> list[Env]:
        self.listener(Event("tick", {"where": segment.name}))
        if segment.name in gone:
            return [self._over(segment, env) for env in envs]
        return self.walk.step(segment, envs, meter)

    def _over(self, segment: Segment, env: Env) -> Env:
        """The environment behind a block that is left out: the stream goes on as it came."""
        span, made = self._past[segment.name]
        done = run_nodes(made, dict(env), self.walk.fetch, keep=made) if made else {}
        enters, leaves = (self.program.node(n) for n in (span.enters, span.leaves))
        return self.walk.advanced(segment, env, {**{n: done[n] for n in made}, leaves: env[enters]})
