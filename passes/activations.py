"""w8a8, w4a8, fp8 and the ZeroQuants: weights on one grid, what they read on another."""

from __future__ import annotations

from dataclasses import dataclass

from ..compiler.analysis.linears import LinearSite
from ..compiler.ir.scheme import Codes, InputGrid
from ..compiler.pipeline.base import knob
from ..compiler.pipeline.coding import RoundedCoding

_ROW = "inputs that share a scale, or row"
_GROUP = f"{_ROW}; the default ends in a shorter group"


@dataclass(frozen=True)
class W8A8(RoundedCoding):
    """W → q·s per row and x → q·s per token, all q bytes, so that products are of integers.

    act=token, tensor and static are SmoothQuant's O1, O2 and O3. Behind smooth in the same string,
    everything is fitted and calibrated on smoothed values.
    """

    variants = {"w8a8": {}}
    source = "SmoothQuant, arXiv 2211.10438; LLM.int8, arXiv 2208.07339"

    group: int | None = knob(None, _ROW, lo=8, hi=65536)

    def codes(self, site: LinearSite) -> Codes:
        group = self.grouped(site)
        return Codes(8, group, double=self.double, power=self.power)

    def reads(self, site: LinearSite) -> InputGrid | None:
        return self.rounded(8)


@dataclass(frozen=True)
class W4A8(RoundedCoding):
    """W → 4-bit codes in groups, x → bytes per token."""

    variants = {"w4a8": {}}
    source = "ZeroQuant, arXiv 2206.01861; QQQ, arXiv 2406.09904"

    clip: str = knob(
        "mse",
        "how the range is fitted: mse searches the shrink that costs least, absmax takes it all, "
        "percentile leaves out the rarest",
        choices=("mse", "absmax", "percentile"),
    )
    act_bits: int = knob(8, "bits of an input's code", lo=2, hi=8)

    def codes(self, site: LinearSite) -> Codes:
        group = self.grouped(site)
        return Codes(4, group, double=self.double, power=self.power)

    def reads(self, site: LinearSite) -> InputGrid | None:
        return self.rounded(self.act_bits)


@dataclass(frozen=True)
class ZeroQuant(RoundedCoding):
    """W → the nearest code in groups of inputs, x → bytes per token; nothing is searched."""

    variants = {"zeroquant": {}}
    source = "ZeroQuant, arXiv 2206.01861"

    bits: int = knob(8, "bits of a weight's code", lo=2, hi=8)
    solver: str = knob(
        "rtn", "how codes are chosen: rtn takes the nearest, gptq lets the inputs still free "
        "compensate", choices=("rtn", "gptq"),
    )  # fmt: skip

    def codes(self, site: LinearSite) -> Codes:
        group = self.grouped(site)
        return Codes(self.bits, group, double=self.double, power=self.power)

    def reads(self, site: LinearSite) -> InputGrid | None:
        return self.rounded(8)


@dataclass(frozen=True)
class Fp8(RoundedCoding):
    """W and x → 8-bit floats times a scale: per row of W, per token or tensor of x, or static."""

    variants = {"fp8": {}}
    source = "FP8 formats, arXiv 2209.05433"

    group: int | None = knob(None, _ROW, lo=8, hi=65536)
    format: str = knob("e4m3", "exponent and mantissa bits of W", choices=("e4m3", "e5m2"))
    act_format: str = knob("e4m3", "exponent and mantissa bits of x", choices=("e4m3", "e5m2"))

    def codes(self, site: LinearSite) -> Codes:
        group = self.grouped(site)
        return Codes(8, group, grid=self.format, double=self.double, power=self.power)

    def reads(self, site: LinearSite) -> InputGrid | None:
        return self.rounded(8, self.act_format)


@dataclass(frozen=True)
class ZeroQuantFP(RoundedCoding):
    """W → 4-bit floats in groups whose scales only move exponents, x → 8-bit floats per token.

    So a weight's 4-bit float becomes an 8-bit one by adding to its exponent. bits=8 takes e4m3 for
    W; act_format=e2m1 makes it W4A4.
    """

    variants = {"zeroquant_fp": {}}
    source = "ZeroQuant-FP, arXiv 2307.09782"

    bits: int = knob(4, "bits of a weight's float", lo=4, hi=8)
    power: bool = knob(True, "scales of W are powers of two")
    act_format: str = knob("e4m3", "the float of x", choices=("e4m3", "e5m2", "e2m1"))
    act_power: bool = knob(False, "scales of x are powers of two")

    def codes(self, site: LinearSite) -> Codes:
        grid = "e2m1" if self.bits == 4 else "e4m3"
        return Codes(self.bits, self.grouped(site), grid=grid, double=self.double, power=self.power)

    def reads(self, site: LinearSite) -> InputGrid | None:
        bits = 4 if self.act_format == "e2m1" else 8
        return self.rounded(bits, self.act_format, self.act_power)
