"""Inputs put on a grid of eight bits: the kernels before a product, and what its rows share.

One launch does both where every program that reads x may as well round it itself; else a kernel of
its own writes codes and scales once, and the product reads them.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable

import torch

from ..grids import Grids
from ..prepack import expect, pad
from ..problem import Parts, Problem, Requirement
from ..row import TILE_ROWS, Argument, KernelRow, TileConfig
from .common import CHOICES, FLOATS, NORMED, SCALE, UNROUTED, UpTo

STEP = 128
INT8 = ("int8 token", "int8 token power", "int8 static")
E4M3 = ("e4m3 token", "e4m3 token power", "e4m3 static")
REQUIRES = (
    Requirement("m", "Eq(m, 0)", "0 (dense)"),
    Requirement(
        "group",
        "Eq(Mod(group, 128), 0) | Eq(group, 32) | Eq(group, 64)",
        "32, 64, a multiple of 128, or one scale per row",
    ),
    Requirement("N", "N >= 1", "at least 1"),
    Requirement("K", "K >= 16", "at least 16"),
)
TILES = (
    (8, 64), (8, 128), (16, 64), (16, 128), (32, 64), (32, 128), (64, 128), (128, 64), (128, 128),
    (128, 256),
)  # fmt: skip
# Sums per group and products of floats beside those of codes take registers.
FITS = (
    "(BM*BN < 32768) | Eq(group + residual + wide + limited + outliers, 0)",
    "(BM*BN < 16384) | (Eq(limited, 0) & (Eq(group, 0) | (group >= 128)))",
    "(BM*BN < 8192) | (Eq(limited, 0) & (Eq(group, 0) | (group >= 64)))",
    "(BM*BN < 4096) | Eq(limited*wide, 0)",
    "Ne(BM, 16) | Ne(BN, 64) | (group <= 128)",
)
# Columns kept apart come in whole steps of their own product.
APART = "32*ceiling(outliers/32)"
SIDES = (
    "xb*M*K + xb*M*out*(1 + residual) + 4*Gp*Np + xb*N*bias + 4*K*Max(norm, smooth)"
    f" + 4*K*centred"
    f" + Min(outliers, 1)*Kp + {APART}*(4 + xb*(Np + M)) + 4*out*out_norm"
)
CODES_MOVE = (
    "Np*Kp + M*Kp + 4*M + 4*Gp*Np + xb*M*out*(1 + residual) + xb*N*bias"
    f" + xb*{APART}*(Np + M) + 4*out*out_norm"
)  # fmt: skip
# Most tokens of a tile whose program rounds x itself; wider ones would spill.
MOST_ALONE = 16
# Reading x again costs a program less than another launch does up to so many bytes in all.
AGAIN = 6 << 20


_GAIN = Argument("gain", "[K]", FLOATS, "gained", dtype="fp32")
_SHIFT = Argument("shift", "[K]", ("fp32",), "centred", dtype="fp32")
_COLUMNS = (
    Argument("apart", "[Kp]", ("i8",), "outliers", dtype="i8"),
    Argument("columns", f"[{APART}]", ("i32",), "outliers", dtype="i32"),
)
_KEPT = Argument("column_weights", f"[Np, {APART}]", FLOATS, "outliers")
_SCALES = (
    Argument("in_scale", "[1]", ("fp32",), "static", dtype="fp32"),
    Argument("limit", "[1]", ("fp32",), "limited", dtype="fp32"),
)
_MADE = (
    Argument("x_scale", "[M]", ("fp32",), dtype="fp32"),
    Argument("wide", "[M, Kp]", FLOATS, "limited"),
    Argument("x_apart", f"[M, {APART}]", FLOATS, "outliers"),
)


def choices(rounds: tuple[str, ...], **more: tuple[object, ...]) -> dict[str, tuple[object, ...]]:
    """What rows with rounded inputs serve beside what all do."""
    beside = {"asym": (False,), "rank": (0,), "sparse": (False,), "spans": ("",)}
    mixing = {"mixed": (False,), "out_mixed": ("",)}
    return {**CHOICES, **UNROUTED, **beside, **mixing, "rounds": rounds, **more}


_X = Argument("x", "[M, K]", FLOATS, strided=True)
_OUT = (
    Argument("bias", "[N]", FLOATS, "bias"),
    Argument("residual", "[M, out]", FLOATS, "residual", strided=True),
    *NORMED,
    Argument("y", "[M, out]", FLOATS, strided=True),
)


def _codes(dtype: str) -> Argument:
    return Argument("codes", "[Np/64, Kp/128, 64, 128]", (dtype,), dtype=dtype)


def args(dtype: str) -> tuple[Argument, ...]:
    """Arguments of a product that rounds x itself; codes are "i8" or "fp8e4nv"."""
    return (_X, _GAIN, _SHIFT, *_SCALES, _codes(dtype), SCALE, *_COLUMNS, _KEPT, *_OUT)


def product_args(dtype: str) -> tuple[Argument, ...]:
    """Arguments of a product that reads the codes of x and their scales."""
    x = Argument("x", "[M, Kp]", (dtype,), dtype=dtype)
    return (x, _codes(dtype), SCALE, *_MADE, _KEPT, *_OUT)


def byte_tiles(codes: torch.Tensor) -> torch.Tensor:
    """int8 [N, K] -> [Np/64, Kp/128, 64, 128]."""
    codes = pad(codes, TILE_ROWS, STEP)
    tiles = codes.reshape(codes.shape[0] // TILE_ROWS, TILE_ROWS, -1, STEP)
    return tiles.permute(0, 2, 1, 3).contiguous()


def grid_tensors(problem: Problem, parts: Parts) -> dict[str, torch.Tensor]:
    """The columns kept apart, with their weights; ModelError where they do not fit."""
    made: dict[str, torch.Tensor] = {}
    device = parts["codes"].device
    if problem.outliers:
        count = problem.outliers
        expect("columns", parts.get("columns"), (count,))
        expect("column_weights", parts.get("column_weights"), (problem.N, count))
        columns = parts["columns"].to(torch.int32)
        apart = torch.zeros(-(-problem.K // STEP) * STEP, dtype=torch.int8, device=device)
        made["apart"] = apart.index_fill(0, columns.long(), 1)
        made["columns"] = torch.nn.functional.pad(columns, (0, -count % 32))
        made["column_weights"] = pad(parts["column_weights"], TILE_ROWS, 32)
    return made


def _nothing(row: KernelRow, problem: Problem, parts: Parts) -> dict[str, torch.Tensor]:
    return {}


def _round(name: str, summary: str, dtype: str, words: tuple[str, ...]) -> KernelRow:
    return KernelRow(
        name=name,
        op="llmc.round_input",
        template="round_input.py.j2",
        summary=summary,
        args=(
            _X,
            _GAIN,
            _SHIFT,
            *_SCALES,
            *_COLUMNS,
            *_MADE,
            Argument("y", "[M, Kp]", (dtype,), dtype=dtype),
        ),
        step=STEP,
        choices=choices(Grids(*words, limits=True), outliers=UpTo(4096), out_norm=(False,)),
        requires=(),
        moves=f"xb*M*K + M*Kp + 4*M + 4*K*Max(norm, smooth) + 4*K*centred + Min(outliers, 1)*Kp"
        f" + {APART}*(4 + xb*M)",
        tiles=((1, 1024), (1, 2048), (1, 4096), (1, 8192)),
        stages=(1, 1),
        fits=(),
        pack=_nothing,
        product="none",
    )


ROUND_INT8 = _round("round_int8", "norm, smooth and int8 codes with a scale per token", "i8", INT8)
ROUND_E4M3 = dataclasses.replace(
    _round("round_e4m3", "norm, smooth and e4m3 codes with a scale per token", "fp8e4nv", E4M3),
    targets=("sm_90",),
)


NORM_INPUT = dataclasses.replace(
    ROUND_INT8,
    name="norm_input",
    op="llmc.rms_norm",
    template="norm_input.py.j2",
    summary="norm and smooth alone, before a product of many tokens",
    args=(_X, _GAIN, _SHIFT, Argument("y", "[M, K]", FLOATS)),
    choices=choices(("",), out_norm=(False,)),
    moves="2*xb*M*K + 4*K + 4*K*centred",
)


def codes_problem(problem: Problem) -> Problem:
    """The problem of a product whose x is codes already."""
    return dataclasses.replace(
        problem, norm=False, centred=False, smooth=False, rounds="", rounded=problem.rounds, eps=0.0
    )


def round_problem(problem: Problem) -> Problem:
    """What the kernel before a product must know: nothing of the weight."""
    names = ("x_dtype", "norm", "centred", "smooth", "rounds", "outliers", "eps")
    return Problem(problem.N, problem.K, **{name: getattr(problem, name) for name in names})


def round_config(K: int) -> TileConfig:
    """One token per program; a row of up to 8192 columns stays in registers."""
    width = min(8192, max(1024, 1 << (K - 1).bit_length()))
    return TileConfig(1, width, 1, 4 if width <= 2048 else 8)


def one_launch(problem: Problem, config: TileConfig, M: int) -> bool:
    """Whether every program rounds x itself.

    It reads x twice, a third time where its mean must be known first, and all programs of a column
    of tiles read the same x; a launch more costs about as much as `AGAIN` bytes.
    """
    width = 4 if problem.x_dtype == "fp32" else 2
    again = -(-problem.N // config.BN) * M * problem.K * width
    times = (1 if problem.static else 2) + problem.centred
    return config.BM <= MOST_ALONE and again * times <= AGAIN


def inner(
    product: KernelRow,
) -> Callable[[KernelRow, Problem, TileConfig], tuple[KernelRow, Problem]]:
    """Which product a call launches: the row's own where every program may round x itself."""

    def chosen(row: KernelRow, problem: Problem, config: TileConfig) -> tuple[KernelRow, Problem]:
        if config.BM <= MOST_ALONE:
            return row, problem
        return product, codes_problem(problem)

    return chosen


Launch = Callable[..., None]


def call(rounding: KernelRow, product: KernelRow) -> Launch:
    """How a row with rounded inputs is launched: in one kernel, or in those two."""

    def launches(
        launch: Launch,
        row: KernelRow,
        problem: Problem,
        config: TileConfig,
        M: int,
        given: dict[str, torch.Tensor],
    ) -> None:
        if one_launch(problem, config, M):
            launch(row, problem, config, M, given)
            return
        x, width = given["x"], -(-problem.K // STEP) * STEP
        dtype = torch.int8 if row.product == "int8" else torch.float8_e4m3fn
        made = {
            "y": x.new_empty(M, width, dtype=dtype),
            "x_scale": x.new_empty(M, dtype=torch.float),
        }
        if problem.limited:
            made["wide"] = x.new_empty(M, width)
        if problem.outliers:
            made["x_apart"] = x.new_empty(M, -(-problem.outliers // 32) * 32)
        given = {**given, **made, "y": given["y"]}
        launch(
            rounding,
            round_problem(problem),
            round_config(problem.K),
            M,
            {**given, **made},
            grid=(1, M),
        )
        launch(product, codes_problem(problem), config, M, {**given, "x": made["y"]})

    return launches
