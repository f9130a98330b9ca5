"""Structural passes: they change shapes or topology, each measured, decided and applied as a whole.

All places of such a pass are decided together (a ranking needs them all), on the program as the
pass finds it. At plan time the decision is predicted without a tensor; the sizes are the same, or a
bound where measurement decides.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any

from torch import Tensor

from ..ir.errors import LlmcError
from ..ir.events import Listener
from ..ir.graph import Program
from ..ir.segments import refresh_segments
from .analysis import Analysis
from .base import Pass
from .measure import Options, gives_logits, loss

_LOSS_WINDOWS = 8


@dataclass(frozen=True)
class Choice:
    """What a structural pass decided.

    Attributes:
        data: JSON-able: kept units by group id, dropped blocks, …; ``apply`` reads it.
        tensors: new tensors by parameter name (biases, pooled heads); empty in a prediction.
        records: rows for the report (the score of each unit, the loss after each drop, …).
        exact: the sizes are those that compiling gives; False: a bound, measurement decides.
    """

    data: dict[str, Any]
    tensors: dict[str, Tensor] = field(default_factory=dict)
    records: list[dict[str, Any]] = field(default_factory=list)
    exact: bool = True


@dataclass(frozen=True)
class Context:
    """What a decision may look at; the program is not to be changed.

    Attributes:
        program: as the pass finds it, segmented; analysis: of that program.
        tokens: int64 [samples, length], None where no calibration data was given.
        options: how calibration runs; listener: told of progress.
    """

    program: Program
    analysis: Analysis
    tokens: Tensor | None
    options: Options
    listener: Listener

    @property
    def data(self) -> Tensor:
        """The calibration tokens of a pass that said it needs some.

        Raises:
            LlmcError: there are none.
        """
        if self.tokens is None:
            raise LlmcError("expected a pass that reads calibration data to say so, found none")
        return self.tokens


@dataclass(frozen=True)
class Structural(Pass):
    """Base of the passes that change shapes or topology.

    ``sites`` are found like those of any pass, less the ones that a recipe skips.
    """

    def calibrated(self) -> bool:
        """Whether ``decide`` reads calibration tokens."""
        return bool(self.needs)

    def forwards(self, sites: list[Any]) -> float:
        """How many forwards of the whole model over the calibration data ``decide`` takes."""
        return float(self.calibrated())

    def held(self, sites: list[Any]) -> int:
        """Bytes that ``decide`` holds at most beside the weights and values of one segment."""
        return 0

    def predict(self, analysis: Analysis, sites: list[Any]) -> Choice:
        """A choice of the sizes that ``decide`` gives, or a bound; no tensor is loaded.

        Raises:
            UsageError: knobs that these sites cannot take.
        """
        raise LlmcError(f"expected {type(self).__name__} to say what it predicts, found nothing")

    def decide(self, context: Context, sites: list[Any]) -> Choice:
        """The choice, from weights and calibration data.

        Raises:
            UsageError: knobs that these sites cannot take. ModelError: a value is not finite.
        """
        return self.predict(context.analysis, sites)

    def apply(self, program: Program, choice: Choice) -> list[str]:
        """Rewrite a program in place, without loading tensors that exist.

        Returns:
            Names of the parameters with a new shape or a new tensor.
        """
        raise LlmcError(f"expected {type(self).__name__} to have a rewrite, found none")

    def told_losses(self, context: Context, choice: Choice) -> list[dict[str, Any]]:
        """A row with the model's loss on a few calibration windows before and after the rewrite.

        None where there are no tokens, or the program gives no logits over them.
        """
        if context.tokens is None:
            return []
        tokens = context.tokens[:_LOSS_WINDOWS]
        if not gives_logits(context.program, int(tokens.max())):
            return []
        after = context.program.clone()
        self.apply(after, choice)
        refresh_segments(after)
        return [{
            "site": "model", "windows": len(tokens),
            "loss_before": loss(context.program, tokens, context.options),
            "loss_after": loss(after, tokens, context.options),
        }]  # fmt: skip
