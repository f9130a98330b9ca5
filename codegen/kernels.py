"""The kernel rows: which op a kernel implements, when it may be used, how it is tuned.

A row is data. The renderer reads its constants, the planner its requirements, the tuner its grid,
the report its byte count and `spec/kernels.md` all of it. A requirement that does not hold is a
`Misfit` naming the field, never a fallback in silence.
"""

from __future__ import annotations

import functools
from collections.abc import Mapping
from dataclasses import dataclass, fields

import sympy
import torch

from ..compiler.ir.errors import UsageError, nearest

# Two blocks of four warps fit a multiprocessor at this many; left alone, ptxas spills to fit six.
MAX_REGISTERS = 255
TILE_ROWS = 64  # output features of one prepacked weight tile; every BN divides it or is a multiple


DTYPES = {"fp16": torch.float16, "bf16": torch.bfloat16, "fp32": torch.float32}


def dtype_name(dtype: torch.dtype) -> str:
    """ "fp16", "bf16" or "fp32"; another dtype by torch's own name (which every row refuses)."""
    names = {v: k for k, v in DTYPES.items()}
    return names.get(dtype, str(dtype).removeprefix("torch."))


@dataclass(frozen=True)
class Problem:
    """One compressed linear: what a row's requirements, bytes and rendering depend on.

    Attributes:
        N, K: output features and dense input features of W [N, K].
        bits: bits of a code. group: stored (kept) columns per scale, 0 for one scale per row.
        n, m: N:M sparsity, n kept of m; 0, 0 when dense.
        x_dtype, scale_dtype: "fp16", "bf16" or "fp32".
        asym: a zero point is stored. bias, residual, norm: which side inputs exist.
        rounded: the grid that x is on already, e.g. "int8 token"; "" where it is on none.
        rank: of the product beside the codes; 0 where there is none.
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
    rounded: str = ""
    rank: int = 0

    @property
    def columns(self) -> int:
        """Stored columns of a row: K, or the kept ones under N:M."""
        return self.K * self.n // self.m if self.m else self.K

    @property
    def dense_group(self) -> int:
        """Dense columns per scale; 0 when one scale serves the row."""
        if self.group <= 0 or self.group >= self.columns:
            return 0
        return self.group * self.m // self.n if self.m else self.group

    @property
    def groups(self) -> int:
        """Scales per row."""
        return -(-self.columns // self.group) if self.dense_group else 1


@dataclass(frozen=True)
class TileConfig:
    """One point of the tuning grid: BM tokens x BN output features, pipeline stages and warps."""

    BM: int
    BN: int
    stages: int = 4
    warps: int = 4


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


@dataclass(frozen=True)
class Argument:
    """A tensor argument: name, shape as text, allowed dtypes; optional ones name their flag."""

    name: str
    shape: str
    dtypes: tuple[str, ...]
    flag: str | None = None


@dataclass(frozen=True, eq=False)
class KernelRow:
    """One kernel: the op it implements, its template, arguments, requirements and costs.

    Attributes:
        step: dense columns handled by one loop iteration (also the tile width of the packed codes).
        choices: allowed values of the string and flag fields of `Problem`.
        moves: bytes moved by one call as a sympy expression over M, N, K, group, xb (bytes per
            activation), tiles (N and K rounded up to whole tiles: Np, Kp, Gp).
        tiles, stages: the tuning space: (BM, BN) pairs and pipeline depths.
        fits: predicates over BM, BN and the problem (`wide`: fp32 activations) that keep a tile
            free of register spills.
        rtol: expected relative error of an fp16 or bf16 call.
    """

    name: str
    op: str
    template: str
    summary: str
    args: tuple[Argument, ...]
    step: int
    choices: Mapping[str, tuple[object, ...]]
    requires: tuple[Requirement, ...]
    moves: str
    tiles: tuple[tuple[int, int], ...]
    stages: tuple[int, ...]
    fits: tuple[str, ...]
    targets: tuple[str, ...] = ("sm_80", "sm_90")
    rtol: float = 1e-2

    def misfits(self, problem: Problem) -> list[Misfit]:
        """All reasons why this row cannot serve `problem`; empty when it can."""
        return list(_misfits(self, problem))

    def bytes_moved(self, problem: Problem, M: int) -> int:
        """Bytes of one call at M tokens, each operand once (the floor is this over bandwidth)."""
        width = 4 if problem.x_dtype == "fp32" else 2
        Np, Kp = _up(problem.N, TILE_ROWS), _up(problem.K, self.step)
        values = {
            **_integers(problem),
            "M": M,
            "xb": width,
            "Np": Np,
            "Kp": Kp,
            "Gp": packed_groups(self, problem),
        }
        return int(_evaluate(self.moves, values))

    def configs(self, problem: Problem) -> tuple[TileConfig, ...]:
        """The tuning grid for `problem`; BN divides the padded rows, as codes have no row guard."""
        return _configs(self, problem)

    def default_config(self, problem: Problem, M: int, processors: int = 132) -> TileConfig:
        """The untuned choice: the smallest BM that covers M, the widest BN that fills the GPU."""
        grid = self.configs(problem)
        BM = min((c.BM for c in grid if c.BM >= M), default=max(c.BM for c in grid))
        wide_first = sorted({c.BN for c in grid if BM == c.BM}, reverse=True)
        tokens = -(-M // BM)
        filling = [b for b in wide_first if -(-problem.N // b) * tokens >= processors]
        BN = (filling or wide_first[-1:])[0]
        return next(c for c in grid if (c.BM, c.BN, c.stages) == (BM, BN, self.stages[1]))

    def matrix_instruction(self, target: str, x_dtype: str, config: TileConfig) -> str:
        """The matrix instruction (SASS mnemonic prefix) that this tile must compile to."""
        tail = {"fp16": "", "bf16": ".BF16", "fp32": ".TF32"}[x_dtype]
        if target == "sm_90" and config.BM >= 16 and config.BN >= 64:
            return f"HGMMA.64x{config.BM}x{8 if x_dtype == 'fp32' else 16}.F32{tail}"
        return f"HMMA.{1688 if x_dtype == 'fp32' else 16816}.F32{tail}"


@functools.lru_cache(4096)
def _misfits(row: KernelRow, problem: Problem) -> tuple[Misfit, ...]:
    """Layers of a model are alike, so one problem is asked about again and again."""
    found = []
    for field, allowed in row.choices.items():
        value = getattr(problem, field)
        if value not in allowed:
            text = " or ".join(str(v) for v in allowed)
            found.append(Misfit(row.name, field, value, text))
    values = _integers(problem)
    for need in row.requires:
        if not bool(_evaluate(need.test, values)):
            found.append(Misfit(row.name, need.field, values[need.field], need.expected))
    return tuple(found)


@functools.lru_cache(4096)
def _configs(row: KernelRow, problem: Problem) -> tuple[TileConfig, ...]:
    padded = _up(problem.N, TILE_ROWS)
    known = {**_integers(problem), "wide": int(problem.x_dtype == "fp32")}
    tiles = [
        (BM, BN)
        for BM, BN in row.tiles
        if padded % BN == 0
        and all(bool(_evaluate(test, {**known, "BM": BM, "BN": BN})) for test in row.fits)
    ]
    # A matrix instruction takes 16 rows of weights per warp: four warps would do 32 rows twice.
    return tuple(
        TileConfig(BM, BN, stages, 2 if BN == 32 else 4)
        for BM, BN in tiles
        for stages in row.stages
    )


def packed_groups(row: KernelRow, problem: Problem) -> int:
    """Scales per row as prepacked: groups smaller than a step are padded to whole steps."""
    group = problem.dense_group
    if not group:
        return 1
    if group >= row.step:
        return -(-problem.K // group)
    return -(-problem.K // row.step) * (row.step // group)


def _up(value: int, multiple: int) -> int:
    return -(-value // multiple) * multiple


def _integers(problem: Problem) -> dict[str, int]:
    """The numeric fields of a problem, flags as 0 and 1, `group` in dense columns."""
    values = {
        f.name: int(getattr(problem, f.name))
        for f in fields(problem)
        if not isinstance(getattr(problem, f.name), str)
    }
    return {**values, "group": problem.dense_group}


@functools.cache
def _symbols() -> dict[str, sympy.Symbol]:
    # Every name is a symbol of ours: N and group mean something else inside sympy.
    names = [f.name for f in fields(Problem)] + ["M", "xb", "Np", "Kp", "Gp", "BM", "BN", "wide"]
    return {n: sympy.Symbol(n, integer=True, nonnegative=True) for n in names}


@functools.cache
def _expression(text: str) -> sympy.Basic:
    return sympy.sympify(text, locals=_symbols())


def _evaluate(text: str, values: Mapping[str, int]) -> sympy.Basic:
    return _expression(text).subs({_symbols()[k]: v for k, v in values.items()})


_FLOATS = ("fp16", "bf16", "fp32")


def _linear_args(codes: str) -> tuple[Argument, ...]:
    return (
        Argument("x", "[M, K]", _FLOATS),
        Argument("codes", codes, ("i32",)),
        Argument("scale", "[Np/64, Gp, 64]", ("i32",)),
        Argument("bias", "[N]", _FLOATS, "bias"),
        Argument("residual", "[M, N]", _FLOATS, "residual"),
        Argument("gain", "[K]", _FLOATS, "norm"),
        Argument("y", "[M, N]", _FLOATS),
    )


_SIDES = "xb*M*K + xb*M*N + 4*Gp*Np + xb*N*bias + xb*M*N*residual + 4*K*norm"
_CHOICES: dict[str, tuple[object, ...]] = {
    "x_dtype": _FLOATS,
    "scale_dtype": ("fp16", "bf16"),
    **dict.fromkeys(("asym", "bias", "residual", "norm"), (False, True)),
    "rank": (0,),
}

W4A16 = KernelRow(
    name="w4a16",
    op="llmc.fused_linear",
    template="w4a16.py.j2",
    summary="4-bit weights, symmetric or with zero points, one scale per group or per row",
    args=_linear_args("[Np/64, Kp/128, 64, 16]"),
    step=128,
    choices=_CHOICES,
    requires=(
        Requirement("bits", "Eq(bits, 4)", "4"),
        Requirement("m", "Eq(m, 0)", "0 (dense)"),
        Requirement(
            "group",
            "Eq(Mod(group, 128), 0) | Eq(group, 32) | Eq(group, 64)",
            "32, 64, a multiple of 128, or one scale per row",
        ),
        Requirement("N", "N >= 1", "at least 1"),
        Requirement("K", "K >= 16", "at least 16"),
    ),
    moves=f"Np*Kp/2 + {_SIDES}",
    tiles=(
        (8, 32),
        (8, 64),
        (8, 128),
        (16, 32),
        (16, 64),
        (16, 128),
        (32, 64),
        (32, 128),
        (64, 64),
    ),
    stages=(3, 4, 6),
    fits=("Eq(wide, 0) | (BM <= 16)", "(BM < 64) | (group >= 64) | Eq(group, 0) | Eq(norm, 0)"),
)

W4A16_24 = KernelRow(
    name="w4a16_24",
    op="llmc.fused_linear",
    template="w4a16_24.py.j2",
    summary="2:4 sparse 4-bit weights: kept codes and keep masks, spread to dense in registers",
    args=_linear_args("[Np/64, Kp/256, 3, 64, 8]"),
    step=256,
    choices=_CHOICES,
    requires=(
        Requirement("bits", "Eq(bits, 4)", "4"),
        Requirement("n", "Eq(n, 2)", "2"),
        Requirement("m", "Eq(m, 4)", "4"),
        Requirement(
            "group",
            "Eq(Mod(group, 256), 0) | Eq(group, 32) | Eq(group, 64) | Eq(group, 128)",
            "32, 64, 128, a multiple of 256 dense columns, or one scale per row",
        ),
        Requirement("N", "N >= 1", "at least 1"),
        Requirement("K", "(K >= 16) & Eq(Mod(K, 4), 0)", "at least 16, a multiple of 4"),
    ),
    moves=f"3*Np*Kp/8 + {_SIDES}",
    tiles=((8, 32), (16, 32), (16, 64), (16, 128), (32, 64)),
    stages=(2, 3),
    fits=("Eq(wide, 0) | (BM * BN <= 1024)", "Eq(norm, 0) | (BN <= 64)"),
)

ROWS: tuple[KernelRow, ...] = (W4A16, W4A16_24)


def row(name: str) -> KernelRow:
    """The row called `name`; UsageError with the nearest name when there is none."""
    for candidate in ROWS:
        if candidate.name == name:
            return candidate
    known = [r.name for r in ROWS]
    raise UsageError(
        f"no kernel row {name!r}, rows are {', '.join(known)}", hint=nearest(name, known)
    )


def choose(problem: Problem) -> tuple[KernelRow | None, list[Misfit]]:
    """The first row that serves `problem`, or None with every row's refusals."""
    refused: list[Misfit] = []
    for candidate in ROWS:
        why = candidate.misfits(problem)
        if not why:
            return candidate, []
        refused += why
    return None, refused
