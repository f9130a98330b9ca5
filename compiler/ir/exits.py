"""Early exits as data: after which blocks a token may leave, and how sure the model must be.

The graph has no control flow. An exit lies between two segments: the epilogue (final norm and head)
reads the residual stream that leaves a block, as it else reads the one that leaves the last block.
What decides is here, once, for calibration and for running.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from .errors import ModelError
from .literals import MAX_LIST, check_text

if TYPE_CHECKING:
    from .graph import Program, Weights

RULES = ("softmax", "cosine", "classifier")
# The classifier's tensor: for each exit the weights of gap and top probability, and the bias.
CLASSIFIER = "exits.classifier"
TAU = 4.0
MAX_DECAY = 1 << 31


@dataclass(frozen=True)
class Exits:
    """Where and when a token may leave (CALM, arXiv 2207.07061; AdaInfer, arXiv 2403.02181).

    Attributes:
        rule: how sure a token is after a block. ``softmax``: the gap p1 - p2 of its two likeliest
            next tokens; ``cosine``: cos of the stream before and after the block; ``classifier``:
            a logistic classifier of (p1 - p2, p1).
        blocks: names of the segments after which a token may leave, in order.
        threshold: λ; a token leaves at the first exit where it is at least this sure. Above 1 no
            token ever leaves.
        decay: N of CALM's decaying threshold clip(0.9 λ + 0.1 exp(-4 t / N), 0, 1) for the t-th new
            token; None keeps λ.
    """

    rule: str
    blocks: tuple[str, ...]
    threshold: float
    decay: int | None = None

    def __post_init__(self) -> None:
        if self.rule not in RULES:
            raise ModelError(f"expected an exit rule of {RULES}, found {self.rule!r}")
        if not self.blocks or len(set(self.blocks)) != len(self.blocks):
            raise ModelError(f"expected exits after blocks that differ, found {self.blocks}")
        if not (math.isfinite(self.threshold) and -1 <= self.threshold <= 2):
            raise ModelError(f"expected an exit threshold in -1..2, found {self.threshold}")
        if self.decay is not None and not 1 <= self.decay < MAX_DECAY:
            raise ModelError(f"expected a decay of 1..2**31 tokens, found {self.decay}")

    @property
    def never(self) -> bool:
        """Whether no token can leave early."""
        return self.threshold > 1

    @property
    def classifies(self) -> bool:
        """Whether the rule needs the classifier's tensor, f32 [exits, 3]."""
        return self.rule == "classifier"

    @property
    def shape(self) -> tuple[int, int]:
        """Shape of the classifier's tensor."""
        return (len(self.blocks), 3)

    @property
    def bytes(self) -> int:
        """Bytes of the classifier's tensor, 0 where the rule has none."""
        return 4 * math.prod(self.shape) if self.classifies else 0

    def at(self, t: Tensor | int) -> Tensor:
        """λ of the t-th new token, counted from 0; f64 of the shape of ``t``."""
        step = torch.as_tensor(t, dtype=torch.float64)
        if self.decay is None or self.never:
            return torch.full_like(step, self.threshold)
        return (0.9 * self.threshold + 0.1 * torch.exp(-TAU * step / self.decay)).clamp(0, 1)

    def to_json(self) -> dict[str, Any]:
        """JSON values that :func:`from_json` reads; λ is spelled in hex, to the bit."""
        return {
            "rule": self.rule, "blocks": list(self.blocks),
            "threshold": float(self.threshold).hex(), "decay": self.decay,
        }  # fmt: skip


def from_json(data: Any) -> Exits:
    """The record of :meth:`Exits.to_json`.

    Raises:
        ModelError: anything else; the field is named.
    """
    fields = {"rule", "blocks", "threshold", "decay"}
    if not isinstance(data, dict) or set(data) != fields:
        raise ModelError(f"expected exits with fields {sorted(fields)}, found others")
    blocks, decay = data["blocks"], data["decay"]
    if not isinstance(blocks, list) or len(blocks) > MAX_LIST:
        raise ModelError("expected a list of names", where="blocks")
    if decay is not None and type(decay) is not int:
        raise ModelError(f"expected a whole number or null, found {decay!r}", where="decay")
    names = tuple(check_text(b, "a name") for b in blocks)
    return Exits(check_text(data["rule"], "a rule"), names, _number(data["threshold"]), decay)


def _number(text: Any) -> float:
    try:
        found = float.fromhex(check_text(text, "a number", limit=40))
    except (ValueError, OverflowError):
        raise ModelError(f"expected a number in hex, found {text!r}", where="threshold") from None
    if found.hex() != text:
        raise ModelError(f"expected {found.hex()!r}, found {text!r}", where="threshold")
    return found


def set_exits(program: Program, exits: Exits | None, classifier: Tensor | None = None) -> None:
    """Declare exits, in place; ``classifier`` is f32 [exits, 3] where the rule wants one.

    Raises:
        ModelError: a segment that the program does not have, or a classifier that does not fit.
    """
    from .graph import DictWeights

    if exits is not None and classifier is not None:
        _check_classifier(exits, classifier)
        if not isinstance(program.weights, DictWeights):
            program.weights = DictWeights({}, program.weights)
        program.weights.tensors[CLASSIFIER] = classifier
    program.exits = exits
    check_exits(program)


def check_exits(program: Program) -> None:
    """Raises ModelError unless the exits lie after segments of the program, in their order."""
    if program.exits is None:
        return
    names = [s.name for s in program.segments]
    places = [names.index(b) if b in names[:-1] else -1 for b in program.exits.blocks]
    for name, place, before in zip(program.exits.blocks, places, [0, *places], strict=False):
        if place <= before:
            raise ModelError(f"expected exits after blocks in order, found {name!r}", where="exits")


def classifier_of(exits: Exits, weights: Weights) -> Tensor | None:
    """The classifier's tensor, None where the rule has none.

    Raises:
        ModelError: missing, of another shape or dtype, or not finite.
    """
    if not exits.classifies:
        return None
    found = weights.load(CLASSIFIER)
    _check_classifier(exits, found)
    return found


def _check_classifier(exits: Exits, found: Tensor) -> None:
    if tuple(found.shape) != exits.shape or found.dtype != torch.float32:
        raise ModelError(
            f"expected tensor {CLASSIFIER} f32{list(exits.shape)}, found "
            f"{found.dtype}{list(found.shape)}"
        )
    if not bool(torch.isfinite(found).all()):
        raise ModelError(f"expected finite numbers in tensor {CLASSIFIER}, found NaN or inf")


# ** confidence **


def features(logits: Tensor) -> Tensor:
    """(p1 - p2, p1) of the two likeliest tokens: logits [..., V] -> f32 [..., 2]."""
    wide = logits.float()
    best = torch.exp(wide.topk(2, -1).values - wide.logsumexp(-1, keepdim=True))
    return torch.stack([best[..., 0] - best[..., 1], best[..., 0]], -1)


def similarity(before: Tensor, after: Tensor) -> Tensor:
    """cos of two states [..., H] -> f32 [...], at most 1."""
    found = torch.nn.functional.cosine_similarity(before.float(), after.float(), dim=-1)
    return found.clamp(-1, 1)


def classified(logits: Tensor, row: Tensor) -> Tensor:
    """Probability that the exit says what the full model says: logits [..., V], row [3]."""
    w = row.to(logits.device)
    return torch.sigmoid(features(logits) @ w[:2] + w[2])


def sure_enough(sure: Tensor, limit: Tensor | float) -> Tensor:
    """Whether confidences reach λ: compared in f64, in which λ is kept, whatever their dtype."""
    return sure.double() >= limit
