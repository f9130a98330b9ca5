"""What passes that write codes share: sites, solver knobs, groups that divide, the rewrite."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, ClassVar

from ..analysis.linears import LinearSite
from ..ir.errors import UsageError
from ..ir.graph import Program
from ..ir.scheme import Codes, InputGrid, Sparse
from .analysis import linear_weights
from .base import Example, Lossy, Precondition, knob
from .clipping import clip_knob, share_knob, static_grid
from .encode import encode_codes, encode_outliers
from .inputs import encode_input
from .sites import BLOCK_WEIGHT, Protecting

AUTO = "auto"
SMALLEST = 32
"""Inputs that share a scale at least where auto chooses."""


def group_divides(made: Any, site: LinearSite) -> str | None:
    """An explicit group must divide; the default one ends in a shorter group instead."""
    g, n = made.group, site.in_features
    if g == AUTO or g is None or g >= n or n % g == 0 or not made.explicit("group"):
        return None
    fits = [d for d in range(1, n + 1) if n % d == 0]
    near = min(fits, key=lambda d: (abs(d - g), d))
    raise UsageError(
        f"{made.called}:group: expected a divisor of {n} inputs, found {g}",
        where=site.id,
        hint=f"the nearest is group={near}",
    )


def group_knob(default: int | None) -> Any:
    """The knob ``group`` of a pass with scales."""
    text = "inputs that share a scale, or row; the default ends in a shorter group; auto chooses"
    return knob(default, text, lo=8, hi=65536, words=(AUTO,))


def halvings(inputs: int, unit: int = 1) -> list[int]:
    """Groups that auto tries of a row of that many inputs, largest first: it and whole halves."""
    out = [inputs]
    while out[-1] % 2 == 0 and out[-1] // 2 >= SMALLEST and (out[-1] // 2) % unit == 0:
        out.append(out[-1] // 2)
    return out


@dataclass(frozen=True)
class Coding(Protecting):
    """Base of passes that replace a weight by codes, one grid per pass."""

    stage = "grid"
    effect = Lossy("perplexity")
    needs: ClassVar[tuple[str, ...]] = ("gram",)
    pattern = linear_weights
    preconditions: ClassVar[tuple[Precondition, ...]] = BLOCK_WEIGHT
    hits: ClassVar[tuple[Example, ...]] = (
        Example("llama_gqa"),
        Example("with_bias"),
        Example("odd_inputs"),
    )
    misses: ClassVar[tuple[Example, ...]] = (Example("tied_head", "param_read_once"),)

    solver: str = knob(
        "gptq",
        "how codes are chosen: gptq lets the inputs still free compensate, rtn takes the nearest",
        choices=("gptq", "rtn"),
    )
    damp: float = knob(0.01, "damping relative to the mean diagonal of XᵀX", lo=0.0, hi=10.0)
    act_order: bool = knob(False, "most important inputs first, inside the solver")
    sweeps: int = knob(0, "further sweeps of coordinate descent, never uphill", lo=0, hi=100)

    def codes(self, site: LinearSite) -> Codes:
        """The scheme's codes at a site."""
        raise UsageError(f"{type(self).__name__} has no grid")

    def beside(self, site: LinearSite) -> Sparse | None:
        """Weights that stay beside the codes at a site."""
        return None

    def reads(self, site: LinearSite) -> InputGrid | None:
        """The grid of what the weight reads at a site."""
        return None

    def facts(self, site: LinearSite) -> dict[str, Any]:
        found = {"sparse": self.beside(site), "input_grid": self.reads(site)}
        stated = {k: v for k, v in found.items() if v is not None}
        return {"codes": self.codes(site), **stated}

    def solving(self, site: LinearSite) -> dict[str, Any]:
        shared = ("damp", "act_order", "sweeps", "refit")
        given = {k: getattr(self, k) for k in shared if self.explicit(k)}
        return {"grid_solver": self.solver} | given

    def rewrite(self, program: Program, site: LinearSite) -> list[str]:
        sparse, grid, made = self.beside(site), self.reads(site), []
        columns = sparse if sparse is not None and sparse.kind == "columns" else None
        if sparse is not None and columns is None:
            made += encode_outliers(program, site.node, sparse, made_by=self.called, slot=site.slot)
        made += encode_codes(
            program, site.node, self.codes(site), made_by=self.called, slot=site.slot
        )
        if grid is not None:
            made += encode_input(program, site.node, grid, columns, made_by=self.called)
        return made


@dataclass(frozen=True)
class GroupedCoding(Coding):
    """Base of passes with a scale per group of inputs."""

    preconditions: ClassVar[tuple[Precondition, ...]] = (
        *BLOCK_WEIGHT,
        Precondition("group_divides", group_divides),
    )

    group: int | str | None = group_knob(128)
    fall: float = knob(
        0.1, "share by which the error must fall for group=auto to halve", lo=0.0, hi=0.99
    )
    clip: str = knob(
        "absmax",
        "how the range is fitted: absmax takes it all, mse searches the shrink that costs least, "
        "percentile leaves out the rarest, output searches what each group loses at the output",
        choices=("absmax", "mse", "percentile", "output"),
    )
    percentile: float = knob(99.9, "share of the weights that clip=percentile keeps", lo=51, hi=100)
    double: bool = knob(False, "scales are 8-bit codes themselves, in blocks of 256")
    power: bool = knob(False, "scales are powers of two")
    refit: bool = knob(True, "let the further sweeps move the scales too")

    def check(self) -> None:
        if self.explicit("percentile") and self.clip != "percentile":
            raise UsageError(f"{self.called}:percentile: expected clip=percentile beside it")
        if self.explicit("fall") and self.group != AUTO:
            raise UsageError(f"{self.called}:fall: expected group=auto beside it")
        if self.double and self.power:
            raise UsageError(f"{self.called}: expected one of double and power, found both")

    def grouped(self, site: LinearSite) -> int | None:
        """Inputs per scale at a site, None = the row; for auto the fewest that it may choose."""
        group = halvings(site.in_features)[-1] if self.group == AUTO else self.group
        return None if not isinstance(group, int) or group >= site.in_features else group

    def solving(self, site: LinearSite) -> dict[str, Any]:
        fit: dict[str, Any] = {"clip": self.clip}
        if self.clip == "percentile":
            fit["percentile"] = self.percentile
        if self.group == AUTO:
            fit["fall"] = self.fall
        return super().solving(site) | fit


@dataclass(frozen=True)
class RoundedCoding(GroupedCoding):
    """Base of passes that round what a weight reads too, once for all weights that read it."""

    needs = ("gram", "absmax")
    misses = (*Coding.misses, Example("moe", "read_plain"))

    act: str = knob(
        "token",
        "scales of the inputs: one per token, one per tensor as it comes, or static from "
        "calibration",
        choices=("token", "tensor", "static"),
    )
    act_group: int | None = knob(None, "channels of an input that share a scale", lo=2, hi=65536)
    act_clip: str = clip_knob()
    act_percentile: float | None = share_knob()

    def check(self) -> None:
        super().check()
        self.rounded(8)

    def rounded(self, bits: int, kind: str = "int", power: bool = False) -> InputGrid:
        """The input grid with the pass's scales."""
        how = (self.act_group, power, self.act_clip, self.act_percentile)
        return static_grid(self.called, bits, self.act, kind, *how)
