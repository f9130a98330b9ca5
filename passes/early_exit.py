"""early_exit: let a token leave as soon as the model is sure of the next one."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor

from ..compiler.analysis.cacheable import cache_refusals
from ..compiler.analysis.depth import Span
from ..compiler.analysis.exits import exit_spans
from ..compiler.ir.errors import GateError, UsageError
from ..compiler.ir.exits import CLASSIFIER, Exits, set_exits
from ..compiler.ir.graph import Program
from ..compiler.ir.refusal import Refusal
from ..compiler.pipeline.analysis import Analysis
from ..compiler.pipeline.base import Example, Lossy, knob
from ..compiler.pipeline.exits import ExitWalk, Outcome, Seen, lowest, replay, thresholds
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
    calibration windows. The other half calibrates λ: the lowest whose agreement with the full
    model's likeliest tokens is as high as asked, by a test at level ``error``; exits that none of
    its tokens took are left out. Later blocks make the token's keys and values from the stream with
    which it left. Prompts run at full depth.
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
    first: int = knob(0, "the first block behind which a token may leave", lo=0)
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
        return self._choice(self._places(sites), _NEVER if self.threshold is None else None)

    def decide(self, context: Context, sites: list[Any]) -> Choice:
        places = self._places(sites)
        if not self.calibrated():
            return self._choice(places)
        tokens = context.data
        if len(tokens) < 2:
            raise UsageError(
                f"early_exit: expected two calibration windows or more, found {len(tokens)}",
                hint="--samples",
            )
        run = (context.options, context.listener)
        seen = ExitWalk(context.program, places, tokens, *run).look()
        half = len(tokens) // 2
        fit, held = seen.part(slice(None, half)), seen.part(slice(half, None))
        made = self._fit(fit) if self.rule == "classifier" else None
        tensors = {} if made is None else {CLASSIFIER: made}
        if self.threshold is not None:
            return replace(self._choice(places), tensors=tensors)
        exits = self._exits(places, _NEVER)
        depths = [*(p.index + 1 for p in places), len(context.analysis.blocks)]
        walk = ExitWalk(context.program, places, tokens[half:], *run)
        ladder = thresholds(fit, exits, made, depths, self.agreement)

        def tried() -> Iterator[tuple[float, Outcome]]:
            for value in ladder:
                yield value, walk.run(replace(exits, threshold=value), made, held.final)

        records: list[dict[str, Any]] = []
        found = lowest(tried(), self.agreement, self.error, records)
        if found is None or not bool((found[1].depth < depths[-1]).any()):
            raise self._missed(records)
        value, outcome = found
        before = replay(fit, replace(exits, threshold=value), made, depths)
        measured = {
            "wanted": self.agreement, "error": self.error, "fit": before.agreement,
            "held_out": outcome.agreement, "tokens": held.final.numel(),
            "blocks_per_token": outcome.blocks, "of": depths[-1],
            "shares": outcome.shares(depths[-1]),
        }  # fmt: skip
        records += _by_exit(places, seen)
        # Behind a block where none of these tokens left, asking the head is a cost alone.
        taken = [i for i, d in enumerate(depths[:-1]) if bool((outcome.depth == d).any())]
        if made is not None:
            tensors = {CLASSIFIER: made[taken]}
        data = self._choice([places[i] for i in taken], value).data | {"measured": measured}
        return Choice(data, tensors, records)

    def apply(self, program: Program, choice: Choice) -> list[str]:
        d = choice.data
        exits = Exits(d["rule"], tuple(d["blocks"]), d["threshold"], d["decay"])
        set_exits(program, exits, choice.tensors.get(CLASSIFIER))
        return list(choice.tensors)

    def _places(self, sites: list[Span]) -> list[Span]:
        """The boundaries that ``first`` and ``every`` leave.

        Raises:
            UsageError: none.
        """
        out = [
            s for s in sites if s.index >= self.first and not (s.index - self.first) % self.every
        ]
        if not out:
            last = max(s.index for s in sites)
            raise UsageError(f"early_exit:first: expected 0..{last}, found {self.first}")
        return out

    def _exits(self, places: list[Span], threshold: float) -> Exits:
        return Exits(self.rule, tuple(p.block for p in places), threshold, self.decay)

    def _choice(self, places: list[Span], threshold: float | None = None) -> Choice:
        if threshold is None:
            assert self.threshold is not None
            threshold = self.threshold
        blocks = [p.block for p in places]
        data = {"rule": self.rule, "blocks": blocks, "threshold": threshold, "decay": self.decay}
        return Choice(data)

    def _fit(self, seen: Seen) -> Tensor:
        """A classifier for each exit, f32 [exits, 3]."""
        pairs = torch.stack([seen.gap, seen.top], -1).flatten(1, 2)
        right = seen.right.flatten(1)
        rows = zip(pairs, right, strict=True)
        return torch.stack([linear_classifier(x, y, self.classifier) for x, y in rows])

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


def _by_exit(places: list[Span], seen: Seen) -> list[dict[str, Any]]:
    """How often the head behind each block says what the full model says, over all windows."""
    return [
        {"block": p.index, "agreement_if_all_left": float(seen.right[i].double().mean()),
         "mean_gap": float(seen.gap[i].mean()), "mean_cosine": float(seen.cos[i].mean())}
        for i, p in enumerate(places)
    ]  # fmt: skip
