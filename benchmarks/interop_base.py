"""Rows of the table of exports and their loaders, and the model that all of them export."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from llmc.compiler import api
from llmc.compiler.capture.bisimulate import evaluate
from llmc.compiler.model import Model

ROOT = Path(__file__).resolve().parent.parent
SOURCE = ROOT / "examples" / "pylm"
GPTQ = ROOT / ".cache" / "gptqmodel"
# fp32 sums in another order; and half a step of fp16 at a weight of almost 1.
SAME, HALF_ULP = 1e-5, 2.0**-12


class NotRun(Exception):
    """A loader that is not installed; the message says how to get it."""


@dataclass
class Found:
    """What a loader made of an export; None where it does not say.

    Attributes:
        weights: largest absolute difference. logits: as a share of the largest one.
        note: what a reader of the table must know.
    """

    weights: float | None = None
    logits: float | None = None
    note: str = ""


@dataclass(frozen=True)
class Row:
    """One export and its loader.

    Attributes:
        export, loader: for the table. weights, logits: limits; None reports only.
        measure: exports, loads and compares.
    """

    export: str
    loader: str
    weights: float | None
    logits: float | None
    measure: Callable[[Subject], Found]


ROWS: list[Row] = []


def row(
    export: str, loader: str, *, weights: float | None = None, logits: float | None = None
) -> Callable[[Callable[[Subject], Found]], Callable[[Subject], Found]]:
    """Register a function as a row of the table; limits are for what it finds."""

    def add(measure: Callable[[Subject], Found]) -> Callable[[Subject], Found]:
        ROWS.append(Row(export, loader, weights, logits, measure))
        return measure

    return add


@dataclass
class Subject:
    """The model that all rows export, compiled once per pass string.

    Attributes:
        folder: for exports. ids: int64 [2, 48], tokens on which logits are compared.
    """

    folder: Path
    program: Any = None
    made: dict[str, Model] = field(default_factory=dict)
    count: int = 0

    def __post_init__(self) -> None:
        torch.set_num_threads(1)
        self.program = api.capture(SOURCE)
        g = torch.Generator().manual_seed(0)
        self.calibration = torch.randint(2048, (4, 128), generator=g)
        self.ids = torch.randint(2048, (2, 48), generator=g)

    def model(self, passes: str) -> Model:
        """The demo model under these passes."""
        if passes not in self.made:
            self.made[passes] = api.compile(self.program, passes, calibration=self.calibration)
        return self.made[passes]

    def export(self, passes: str, form: str, **more: Any) -> tuple[Model, Path]:
        """The model and a folder with its export; tokenizer files come along."""
        self.count += 1
        out, model = self.folder / f"{form}-{self.count}", self.model(passes)
        if model.tokenizer is None:
            model.tokenizer = api.find_tokenizer(SOURCE, self.program)
        model.export(out, format=form, **more)
        return model, out

    def apart(self, have: Tensor, want: Tensor) -> float:
        """The largest difference as a share of the largest value."""
        return float((have.float() - want).abs().max() / want.abs().max())

    def weights(self, model: Model) -> dict[str, Tensor]:
        """Decoded weights fp32 [N, K] by module."""
        out, program = {}, model.program
        for linear in program.calls("aten.linear.default"):
            at: Any = linear.args[1]
            while at.op == "call_function":
                at = at.all_input_nodes[0]
            name = program.params[str(at.target)].names[0]
            if ".weight." in name:
                out[name.partition(".weight.")[0]] = evaluate(program, linear.args[1])
        return out

    def worst(self, ours: dict[str, Tensor], theirs: dict[str, Tensor]) -> float:
        """The largest difference of a weight; all of ours must be there."""
        return max(float((w - theirs[path].float()).abs().max()) for path, w in ours.items())
