"""early_exit: let a token leave as soon as the model is sure of the next one."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, replace
from functools import cached_property
from typing import Any

import torch
from torch import Tensor

from ..compiler.analysis.cacheable import cache_refusals
from ..compiler.analysis.cost import CostModel
from ..compiler.analysis.depth import Span
from ..compiler.analysis.exits import exit_spans
from ..compiler.ir.errors import GateError, UsageError
from ..compiler.ir.exits import CLASSIFIER, Exits, set_exits
from ..compiler.ir.graph import Program
from ..compiler.ir.refusal import Refusal
from ..compiler.pipeline.analysis import Analysis
from ..compiler.pipeline.base import Example, Lossy, knob
from ..compiler.pipeline.exits import ExitWalk, Ladder, Outcome, Seen, lowest
from ..compiler.pipeline.structure import Choice, Context, Structural
from ..compiler.solvers.classify import linear_classifier

_NEVER = 2.0


def places_to_leave(analysis: Analysis) -> Iterator[Span | Refusal]:
    """Pattern: the boundary behind every block but the last, in a program that can be cached."""
    refused = cache_refusals(analysis.program)
    if refused:
        yield from refused
        return
    found = exit_spans(analysis.program)
    if isinstance(found, Refusal):
        yield found
    elif len(found) < 2:
        why = "the program has one block, and behind it there is nothing to save"
        yield Refusal("exits", found[0].node, why, "blocks_behind", analysis.path(found[0].node))
    else:
        yield from found[:-1]


@dataclass(frozen=True)
class EarlyExit(Structural):
    """While decoding, a token leaves behind the first block where c >= λ, through norm and head.

    c is the gap of the two likeliest tokens (softmax), the cosine of the stream around the block
    (cosine), or a classifier of gap and top probability, fitted for each block on half of the
    calibration windows; so is the first exit, each look at the head counted. The other half
    calibrates λ: the lowest whose agreement with the full model's likeliest tokens is as high as
    asked, by a test at level ``error``; exits that none of its tokens took are left out. Later
    blocks make the token's keys and values from the stream with which it left. Prompts run at full
    depth.
    """

    variants = {"early_exit": {}}
    stage = "exit"
    effect = Lossy("agreement with the full model")
    source = "CALM, arXiv 2207.07061; AdaInfer, arXiv 2403.02181; Learn then Test, arXiv 2110.01052"
    pattern = places_to_leave
    hits = (Example("four_blocks"),)
    misses = (Example("one_block", "blocks_behind"),)

    agreement: float = knob(
        0.95, "share of tokens that must be the full model's", lo=0.01, hi=0.9999
    )
    rule: str = knob(
        "softmax", "what says how sure a token is", choices=("softmax", "cosine", "classifier")
    )
    threshold: float | None = knob(
        None, "λ, instead of calibrating it; above 1 no token leaves", lo=-1.0, hi=2.0
    )
    first: int | None = knob(
        None, "first block behind which a token may leave; none: where it costs least", lo=0
    )
    every: int = knob(1, "an exit behind every n-th block from there on", lo=1)
    decay: int | None = knob(
        None, "new tokens n over which λ relaxes to clip(0.9 λ + 0.1 exp(-4 t / n), 0, 1)",
        lo=1, hi=2**31 - 1,
    )  # fmt: skip
    error: float = knob(0.05, "how often a calibrated λ may miss the agreement", lo=1e-9, hi=0.5)
    classifier: str = knob("logistic", "how the classifier is fitted", choices=("logistic", "svm"))

    def check(self) -> None:
        if self.threshold is not None and self.explicit("agreement"):
            raise UsageError("early_exit: expected agreement or threshold, found both")
        if self.explicit("classifier") and self.rule != "classifier":
            raise UsageError(
                f"early_exit:classifier: expected rule=classifier with it, found rule={self.rule}"
            )

    def calibrated(self) -> bool:
        return self.threshold is None or self.rule == "classifier"

    def forwards(self, sites: list[Any]) -> float:
        if not self.calibrated():
            return 0.0
        return 1.0 if self.threshold is not None else 5.0

    def predict(self, analysis: Analysis, sites: list[Any]) -> Choice:
        places = self._places(sites, self.first or 0)
        choice = self._choice(places, _NEVER if self.threshold is None else self.threshold)
        # Calibration leaves exits out, and with each a row of the classifier: these are the most.
        return replace(choice, exact=self.threshold is not None or self.rule != "classifier")

    def decide(self, context: Context, sites: list[Any]) -> Choice:
        places = self._places(sites, self.first or 0)
        if not self.calibrated():
            assert self.threshold is not None
            return self._choice(places, self.threshold)
        tokens = context.data
        # Half fits; what is held out tells how alike a window's tokens are, for which it takes two.
        least = 4 if self.threshold is None else 2
        if len(tokens) < least:
            raise UsageError(
                f"early_exit: expected {least} calibration windows or more, found {len(tokens)}",
                hint="--samples",
            )
        run = (context.options, context.listener)
        seen = ExitWalk(context.program, sites, tokens, *run).look()
        half = len(tokens) // 2
        fit, held = seen.part(slice(None, half)), seen.part(slice(half, None))
        made = self._fit(fit) if self.rule == "classifier" else None
        depth = len(context.analysis.blocks)
        if self.threshold is not None:
            trial = self._trial(places, sites, fit, made, depth)
            return self._choice(places, self.threshold, trial.classifier)
        head = 0.0 if self.rule == "cosine" else _head_in_blocks(context.program)
        firsts = [s.index for s in sites] if self.first is None else [self.first]
        trials = [
            self._trial(self._places(sites, f), sites, fit, made, depth) for f in firsts
        ]  # fmt: skip
        trial = min(trials, key=lambda t: t.cost(self.agreement, head))
        walk = ExitWalk(context.program, trial.places, tokens[half:], *run)

        def tried() -> Iterator[tuple[float, Outcome]]:
            for value in trial.ladder.around(self.agreement):
                exits = replace(trial.exits, threshold=value)
                yield value, walk.run(exits, trial.classifier, held.final)

        records: list[dict[str, Any]] = []
        found = lowest(tried(), self.agreement, self.error, records)
        if found is None or not bool((found[1].depth < depth).any()):
            raise self._missed(records)
        value, outcome = found
        measured = {
            "wanted": self.agreement, "error": self.error,
            "fit": trial.ladder.outcome(value).agreement, "held_out": outcome.agreement,
            "tokens": outcome.decoded.depth.numel(),
            "blocks_per_token": outcome.blocks, "of": depth,
            "heads_asked_per_token": outcome.asked(trial.depths[:-1]), "head_in_blocks": head,
            "shares": outcome.shares(depth),
        }  # fmt: skip
        # Behind a block where none of these tokens left, asking the head is a cost alone.
        taken = [i for i, d in enumerate(trial.depths[:-1]) if bool((outcome.depth == d).any())]
        kept = None if trial.classifier is None else trial.classifier[taken]
        choice = self._choice([trial.places[i] for i in taken], value, kept)
        records += _by_exit(sites, seen)
        return replace(choice, data=choice.data | {"measured": measured}, records=records)

    def apply(self, program: Program, choice: Choice) -> list[str]:
        d = choice.data
        exits = Exits(d["rule"], tuple(d["blocks"]), d["threshold"], d["decay"])
        set_exits(program, exits, choice.tensors.get(CLASSIFIER))
        return list(choice.tensors)

    def _places(self, sites: list[Span], first: int) -> list[Span]:
        """The boundaries that ``first`` and ``every`` leave.

        Raises:
            UsageError: none.
        """
        out = [s for s in sites if s.index >= first and (s.index - first) % self.every == 0]
        if not out:
            last = max(s.index for s in sites)
            raise UsageError(f"early_exit:first: expected 0..{last}, found {first}")
        return out

    def _choice(
        self, places: list[Span], threshold: float, classifier: Tensor | None = None
    ) -> Choice:
        blocks = [p.block for p in places]
        data = {"rule": self.rule, "blocks": blocks, "threshold": threshold, "decay": self.decay}
        return Choice(data, {} if classifier is None else {CLASSIFIER: classifier})

    def _fit(self, seen: Seen) -> Tensor:
        """A classifier for each exit, f32 [exits, 3], from the tokens that may leave."""
        pairs = torch.stack([seen.gap, seen.top], -1)[:, :, 1:].flatten(1, 2)
        rows = zip(pairs, seen.right[:, :, 1:].flatten(1), strict=True)
        return torch.stack([linear_classifier(x, y, self.classifier) for x, y in rows])

    def _trial(
        self, places: list[Span], sites: list[Span], seen: Seen, made: Tensor | None, depth: int
    ) -> _Trial:
        at = [sites.index(p) for p in places]
        exits = Exits(self.rule, tuple(p.block for p in places), _NEVER, self.decay)
        depths = [*(p.index + 1 for p in places), depth]
        return _Trial(places, exits, seen.only(at), None if made is None else made[at], depths)

    def _missed(self, records: list[dict[str, Any]]) -> GateError:
        found = "no threshold to try"
        if records:
            row = records[-1]
            found = f"{row['agreement']:.4f} (p {row['p']:.2g}) at {row['threshold']:.4f}"
        return GateError(
            f"expected a threshold that keeps an agreement of {self.agreement:g} on held-out "
            f"windows, found {found}: the exits would never be taken",
            where="early_exit",
            hint="less agreement, more --samples, another rule, or threshold=2 for the full model",
        )


@dataclass(frozen=True)
class _Trial:
    """Exits behind some blocks, and what they would do on the windows that fit them."""

    places: list[Span]
    exits: Exits
    seen: Seen
    classifier: Tensor | None
    depths: list[int]

    @cached_property
    def ladder(self) -> Ladder:
        return Ladder(self.seen, self.exits, self.classifier, self.depths)

    def cost(self, agreement: float, head: float) -> float:
        """Blocks per token at an agreement, each look at the head counted as ``head`` blocks."""
        value = self.ladder.lowest(agreement)
        outcome = self.ladder.outcome(_NEVER if value is None else value)
        return outcome.blocks + head * outcome.asked(self.depths[:-1])


def _head_in_blocks(program: Program) -> float:
    """Operations of the head over those of a block, for one token."""
    costs = CostModel(program, 1, 1)
    *blocks, head = (costs.segment(s).flops for s in program.segments[1:])
    return head * len(blocks) / max(sum(blocks), 1)


def _by_exit(places: list[Span], seen: Seen) -> list[dict[str, Any]]:
    """How often the head behind each block says what the full model says, of decoded tokens."""
    gap, cos, right = (t[..., 1:].double().mean((1, 2)) for t in (seen.gap, seen.cos, seen.right))
    return [
        {"block": p.index, "agreement_if_all_left": float(right[i]),
         "mean_gap": float(gap[i]), "mean_cosine": float(cos[i])}
        for i, p in enumerate(places)
    ]  # fmt: skip
