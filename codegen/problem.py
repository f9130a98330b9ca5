"""What a kernel must compute: all static facts of one fused linear, and why a row cannot serve it.

A requirement that does not hold is a `Misfit` naming the field, never a fallback in silence.
"""

from __future__ import annotations

import functools
import re
from collections.abc import Mapping
from dataclasses import dataclass, fields, replace
from typing import Any

import torch

from .mixing import mixing

DTYPES = {"fp16": torch.float16, "bf16": torch.bfloat16, "fp32": torch.float32}


def dtype_name(dtype: torch.dtype) -> str:
    """ "fp16", "bf16" or "fp32"; another dtype by torch's own name (which every row refuses)."""
    names = {v: k for k, v in DTYPES.items()}
    return names.get(dtype, str(dtype).removeprefix("torch."))


@dataclass(frozen=True)
class Problem:
    """One compressed linear: what a row's requirements, bytes and rendering depend on.

    y = epilogue(h · Wᵀ + sides), h = grid(norm(x) · smooth). Canonical tensors ("parts") go by the
    names of :data:`PARTS`.

    Attributes:
        N, K: output features and dense input features of W [N, K]; under ``pairs="gate"`` N counts
            the rows of both halves.
        bits: bits of a stored value, 16 or 32 where weights are not codes.
        group: stored (kept) columns per scale, 0 for one scale per row.
        n, m: N:M sparsity, n kept of m; 0, 0 when dense.
        x_dtype: "fp16", "bf16" or "fp32"; scale_dtype likewise, "" where there is no scale.
        asym: a zero point is stored. bias, residual, norm: which side inputs exist. centred: the
            norm takes the mean away too, as layer_norm does.
        rounded: the grid that x is on already, e.g. "int8 token"; "" where it is on none.
        rank: of the product beside the codes; 0 where there is none.
        weights: "int" (codes on a uniform grid), "table" (codes are indices of levels), "dense"
            (floats), "paired" (outlier-victim pairs), "signs" (a sum of ``bits`` planes of ±1, a
            factor of each per group) or "factors" (no W at all: only left · right, which are floats
            or, under fewer bits, codes of one scheme).
        levels: name of the fixed levels of a table (see compiler/ir/levels.py), "" where the table
            is stored. table: "matrix" or "row" where it is stored, once or per row.
        bitmap: kept values are marked by one bit per weight; kept is their number, where known.
        sparse: entries beside the codes, in compressed rows. outliers: columns kept apart, dense.
        smooth: x is multiplied by a stored vector. mixed: its channels are mixed behind that, as
            `llmc.rotate` mixes them. rounds: the grid that the kernel itself puts its input on, in
            the words of ``rounded``.
        act: activation of the result, by the names of `llmc.activation`; "" for none.
        pairs: "gate" joins rows i and i + N/2 to act(gate) · up; "" for none.
        eps: of the norm.
        out_norm: whether rows of the result, behind its activation, are divided by their rms and
            multiplied by a stored gain before the residual is added; out_eps: of that norm.
        out_mixed: widths of sections of rows of the product whose channels are mixed back, as
            `llmc.rotate` does inversely, before a bias is added; "" where none are.
        experts: how many experts' weights the rows stack, N / experts each; 0 where it is one
            linear. chosen: experts of a token. routed: "up" multiplies each token by the rows of
            each expert that it chose, and gives a row per token and expert; "down" takes such rows,
            and gives per token their weighted sum; "" for no experts. route: how the kernel itself
            chooses, in the words of `mixture.choice`, as "softmax sum"; "" where it is told.
            always: how many of the experts, the last ones, every token goes to beside those that
            it chose; ``chosen`` counts them too.
        spans: sections of rows that have ranks of their own, as rows x rank of each: left is 0
            outside their blocks; "" where every row has them all.
    """

    N: int
    K: int
    bits: int = 4
    group: int = 128
    n: int = 0
    m: int = 0
    x_dtype: str = "fp16"
    scale_dtype: str = "fp16"
    asym: bool = False
    bias: bool = False
    residual: bool = False
    norm: bool = False
    centred: bool = False
    rounded: str = ""
    rank: int = 0
    weights: str = "int"
    levels: str = ""
    table: str = ""
    bitmap: bool = False
    sparse: bool = False
    outliers: int = 0
    smooth: bool = False
    mixed: bool = False
    rounds: str = ""
    act: str = ""
    pairs: str = ""
    eps: float = 0.0
    kept: int = 0
    out_norm: bool = False
    out_eps: float = 0.0
    out_mixed: str = ""
    experts: int = 0
    chosen: int = 0
    routed: str = ""
    route: str = ""
    always: int = 0
    spans: str = ""

    def without(self, *names: str) -> Problem:
        """The same problem where these fields stand at their defaults."""
        return replace(self, **{name: DEFAULTS[name] for name in names})

    @property
    def columns(self) -> int:
        """Stored columns of a row: K, or the kept ones under N:M."""
        return self.K * self.n // self.m if self.m else self.K

    @property
    def dense_group(self) -> int:
        """Dense columns per scale; 0 when one scale serves the row, or there is none."""
        if not self.scale_dtype or self.group <= 0 or self.group >= self.columns:
            return 0
        return self.group * self.m // self.n if self.m else self.group

    @property
    def groups(self) -> int:
        """Scales per row."""
        return -(-self.columns // self.group) if self.dense_group else 1

    @property
    def outputs(self) -> int:
        """Columns of y: N, or half of it where rows are joined in pairs; an expert's own."""
        rows = self.N // (self.experts or 1)
        return rows // 2 if self.pairs == "gate" else rows

    @property
    def sections(self) -> tuple[tuple[int, int], ...]:
        """Rows and rank of each section with a product of its own; none where ``spans`` is not
        legible."""
        return read_spans(self.spans) if self.spans else ((self.N, self.rank),)

    @property
    def coded(self) -> bool:
        """Whether W is a product of two factors that are codes."""
        return self.weights == "factors" and self.bits < 16

    @property
    def gained(self) -> bool:
        """Whether x is multiplied by a vector as it is read."""
        return self.norm or self.smooth

    @property
    def wide_router(self) -> bool:
        """Whether the router is kept in fp32, whatever x is in."""
        return self.route.endswith(" wide")

    @property
    def near_router(self) -> bool:
        """Whether there is a router that is in x's dtype."""
        return bool(self.route) and not self.wide_router

    @property
    def corrected(self) -> bool:
        """Whether experts are chosen by scores to which a stored vector is added."""
        return " added" in self.route

    @property
    def made(self) -> bool:
        """Whether x becomes another before it is multiplied by weights of floats."""
        return bool(self.rounds) or self.mixed

    @property
    def mixed_twice(self) -> bool:
        """Whether mixing takes a second turn, over rows that are left in between."""
        found = mixing(self.K) if self.mixed else None
        return found is not None and found.rest > 1

    @property
    def out_sections(self) -> tuple[int, ...]:
        """Widths of what is mixed back."""
        return tuple(int(word) for word in self.out_mixed.split() if word.isdecimal())

    @property
    def gathered(self) -> bool:
        """Whether whole rows of the product are left for the programs that come last."""
        return self.out_norm or bool(self.out_mixed)

    @property
    def centred_before(self) -> bool:
        """Whether the mean is taken away before the product; else behind it, by what rows make of
        gain and shift."""
        return self.centred and self.made

    @property
    def centred_behind(self) -> bool:
        """Whether the mean is taken away behind the product."""
        return self.centred and not self.made

    @property
    def limited(self) -> bool:
        """Whether tokens beyond a limit are not rounded."""
        return "limit=" in self.rounds or "limit=" in self.rounded

    @property
    def static(self) -> bool:
        """Whether the scale of a rounded input is stored."""
        return "static" in self.rounds


@functools.lru_cache(4096)
def read_spans(text: str) -> tuple[tuple[int, int], ...]:
    """ "64x8 32x4" -> ((64, 8), (32, 4)); () of another text."""
    if re.fullmatch(r"[1-9]\d*x[1-9]\d*( [1-9]\d*x[1-9]\d*)+", text) is None:
        return ()
    return tuple((int(n), int(r)) for n, r in (word.split("x") for word in text.split()))


PARTS = (
    "codes", "signs", "factors", "scale", "zero", "table", "meta", "bitmap", "values", "left",
    "right", "csr_values", "csr_index", "csr_starts", "columns", "column_weights", "gain", "shift",
    "smooth", "in_scale", "bias", "out_gain", "out_turn", "router", "correction",
    "left_codes", "left_scale", "left_zero", "right_codes", "right_scale", "right_zero",
)  # fmt: skip
"""Roles of the canonical tensors of a problem: codes int32 [N, words]; signs int32 [bits, N, words]
and factors [bits, N, G], planes of a sum; scale [N, G]; zero uint8 [N, G]; table [1 or N, 2**bits];
meta int32, positions of n:m; bitmap int32 [N, words]; values dense [N, columns], or flat [nnz]
under a bitmap; left [N, R]; right [R, K]; csr_* as in `llmc.add_csr`; columns int64 [c] and
column_weights [N, c]; gain and smooth [K]; shift [K], what a centred norm adds, where it adds
something; in_scale, static; bias [N]; out_gain [outputs]; out_turn [N],
what a result that is mixed back is divided by; router [experts, K], of those that are
chosen from, and a row more where the others are weighed; correction
[experts], what scores are added to; of factors that are codes, left_* and right_*: those of left
have the ranks of their row's own section, up to the most of any."""

# What a row must name among its `choices` to serve: elsewhere it must stand at its default.
FEATURES = (
    "weights", "levels", "table", "bitmap", "asym", "bias", "residual", "norm", "centred",
    "rank", "sparse", "outliers", "smooth", "mixed", "rounds", "act", "pairs", "out_norm", "routed",
    "route", "spans", "out_mixed",
)  # fmt: skip
DEFAULTS: dict[str, Any] = {f.name: f.default for f in fields(Problem)}

# What lies around a weight, by where: in front of the product, beside it, behind it, around many.
BEFORE = ("norm", "centred", "eps", "smooth", "mixed")
BESIDE = ("rank", "spans")
BEHIND = ("bias", "residual", "act", "pairs", "out_norm", "out_eps", "out_mixed")
EXPERTS = ("experts", "chosen", "routed", "route", "always")


@dataclass(frozen=True)
class Requirement:
    """A sympy predicate over the fields of `Problem`; `field` is the one a refusal names."""

    field: str
    test: str
    expected: str


@dataclass(frozen=True)
class Misfit:
    """Why a row cannot serve a problem: the field, the value found, what was expected."""

    row: str
    field: str
    found: object
    expected: str

    def __str__(self) -> str:
        return f"{self.row}: {self.field}={self.found}, expected {self.expected}"


Parts = Mapping[str, torch.Tensor]
