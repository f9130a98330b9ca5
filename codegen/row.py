"""What a kernel row is: the op it implements, when it may be used, how it is tuned.

A row is data. The renderer reads its constants, the planner its requirements, the tuner its grid,
the report its byte count and `spec/kernels.md` all of it.
"""

from __future__ import annotations

import functools
from collections.abc import Callable, Mapping
from dataclasses import dataclass, fields, replace

import torch

from . import coded, formula, grids, mixing
from .mixture import fit
from .problem import DEFAULTS, FEATURES, Misfit, Parts, Problem, Requirement

# Two blocks of four warps fit a multiprocessor at this many; left alone, ptxas spills to fit six.
MAX_REGISTERS = 255
MIN_STEPS = 4  # of each program where several share the columns of a tile: a pipeline to fill
RANK_STEP = 16  # ranks beside a weight are padded to whole ones
TILE_ROWS = 64  # output features of one prepacked weight tile; every BN divides it or is a multiple


@dataclass(frozen=True)
class TileConfig:
    """One point of the tuning grid: BM tokens x BN output features, pipeline stages and warps.

    ``split`` programs share the columns of one tile.
    """

    BM: int
    BN: int
    stages: int = 4
    warps: int = 4
    split: int = 1


@dataclass(frozen=True)
class Argument:
    """A tensor argument of a kernel.

    Attributes:
        name: pointer ``<name>_ptr`` in the template. shape: as text. dtypes: allowed ones; where
            "fp16", "bf16" and "fp32" are, it has x's dtype unless ``dtype`` names another.
        flag: the field of `Problem` that is set when an optional argument exists.
        strided: its rows have a stride of their own, ``stride_<name>``.
        dtype: fixed element type in Triton's words, e.g. "i32"; "" for x's dtype.
    """

    name: str
    shape: str
    dtypes: tuple[str, ...]
    flag: str | None = None
    strided: bool = False
    dtype: str = ""


@dataclass(frozen=True, eq=False)
class KernelRow:
    """One kernel: the op it implements, its template, arguments, requirements and costs.

    Attributes:
        step: dense columns handled by one loop iteration (also the tile width of the packed codes).
        choices: allowed values of the string and flag fields of `Problem`; a feature that it does
            not name must stand at its default.
        pack: (row, problem, canonical parts) -> the tensors that the kernel reads, by argument.
        product: what is multiplied: "float" (fp16, bf16 or tf32), "int8" or "fp8".
        moves: bytes moved by one call as a sympy expression over M, N, K, group, xb (bytes per
            activation), out (columns of y), tiles (N and K rounded up to whole tiles: Np, Kp, Gp),
            Tp (rows of a stored table), Rp, Lp, Lg (rows of right, elements of left, its scales).
        tiles, stages, splits: the tuning space: (BM, BN) pairs, pipeline depths, and programs that
            share the columns of a tile.
        fits: predicates over BM, BN and the problem (`wide`: fp32 activations) that keep a tile
            free of register spills.
        rtol: expected relative error of an fp16 or bf16 call.
        call: (launch, row, problem, config, M, tensors) -> None, where a call of this row is more
            than the launch of its own kernel.
        inner: (row, problem, config) -> the row and problem of the product that such a call
            launches with ``config``.
        as_stored: it reads the canonical weight [N, K], rows in their own order even under
            ``pairs``, so what is as it was stays the tensor that it was.
        factor: of two factors that are codes, the row that packs and decodes either.
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
    pack: Callable[[KernelRow, Problem, Parts], dict[str, torch.Tensor]]
    product: str = "float"
    targets: tuple[str, ...] = ("sm_80", "sm_90")
    rtol: float = 1e-2
    splits: tuple[int, ...] = (1,)
    call: Callable[..., None] | None = None
    inner: Callable[[KernelRow, Problem, TileConfig], tuple[KernelRow, Problem]] | None = None
    as_stored: bool = False
    factor: KernelRow | None = None

    def misfits(self, problem: Problem) -> list[Misfit]:
        """All reasons why this row cannot serve `problem`; empty when it can."""
        return list(_misfits(self, problem))

    def bytes_moved(self, problem: Problem, M: int) -> int:
        """Bytes of one call at M tokens, each operand once (the floor is this over bandwidth)."""
        if problem.routed:
            return self.bytes_moved(fit.touched(problem, M), 0) + fit.around(problem, M)
        width = 4 if problem.x_dtype == "fp32" else 2
        Np, Kp = _up(problem.N, TILE_ROWS), _up(problem.K, self.step)
        values = {
            **_integers(problem),
            "M": M,
            "xb": width,
            "Np": Np,
            "Kp": Kp,
            "Gp": packed_groups(self, problem),
            "out": problem.outputs,
            "Rp": sum(_up(rank, RANK_STEP) for _, rank in problem.sections),
            "Lp": _left(problem),
            "Tp": Np if problem.table == "row" else TILE_ROWS,
            **(coded.sizes(problem, self.step) if problem.coded else {}),
        }
        return formula.value(self.moves, values)

    def configs(self, problem: Problem) -> tuple[TileConfig, ...]:
        """The tuning grid for `problem`; BN divides the padded rows, as codes have no row guard."""
        return _configs(self, problem)

    def default_config(self, problem: Problem, M: int, processors: int = 132) -> TileConfig:
        """The untuned choice: the smallest BM that covers M, the widest BN that fills the GPU.

        Where no BN does alone, columns are split among as few programs as fill nine tenths of it.
        """
        grid = self.configs(problem)
        each = fit.tokens_of(problem, M) if problem.routed else M
        BM = min((c.BM for c in grid if each <= c.BM), default=max(c.BM for c in grid))
        tokens = fit.tiles(problem, M, BM) if problem.routed else -(-M // BM)
        held = [c for c in grid if (c.BM, c.stages) == (BM, self.stages[1])]
        N = problem.N // (problem.experts or 1)
        programs = {c: -(-N // c.BN) * tokens * c.split for c in held}
        whole = [c for c in held if c.split == 1 and programs[c] >= processors]
        enough = whole or [c for c in held if 10 * programs[c] >= 9 * processors]
        if enough:
            return max(enough, key=lambda c: (c.BN, -c.split))
        return max(held, key=lambda c: (programs[c], c.BN))

    def matrix_instruction(self, target: str, x_dtype: str, config: TileConfig) -> str:
        """The matrix instruction (SASS mnemonic prefix) that this tile must compile to."""
        if self.product in ("int8", "fp8"):
            return _eight_bits(self.product, target, config)
        tail = {"fp16": "", "bf16": ".BF16", "fp32": ".TF32"}[x_dtype]
        if target == "sm_90" and config.BM >= 16 and config.BN >= 64:
            return f"HGMMA.64x{config.BM}x{8 if x_dtype == 'fp32' else 16}.F32{tail}"
        return f"HMMA.{1688 if x_dtype == 'fp32' else 16816}.F32{tail}"


def _eight_bits(product: str, target: str, config: TileConfig) -> str:
    """Of int8 and e4m3 products; e4m3 without a warp group falls to products of fp16."""
    group = target == "sm_90" and config.BM >= 16 and config.BN >= 64
    if product == "int8":
        return f"IGMMA.64x{config.BM}x32.S8.S8" if group else "IMMA.16832.S8.S8.SAT"
    return f"QGMMA.64x{config.BM}x32.F32.E4M3.E4M3" if group else "HMMA.16816.F32"


@functools.lru_cache(4096)
def _misfits(row: KernelRow, problem: Problem) -> tuple[Misfit, ...]:
    """Layers of a model are alike, so one problem is asked about again and again."""
    found = []
    defaults = {field: (DEFAULTS[field],) for field in FEATURES}
    for field, allowed in {**defaults, **row.choices}.items():
        value = getattr(problem, field)
        if value not in allowed:
            text = " or ".join(str(v) or "none" for v in allowed)
            found.append(Misfit(row.name, field, value, text))
    values = _integers(problem)
    if problem.pairs and (problem.N % 2 or not problem.act):
        field, expected = ("N", "even") if problem.N % 2 else ("act", "an activation")
        found.append(Misfit(row.name, field, values.get(field, ""), f"{expected} where rows pair"))
    if problem.centred and not problem.norm:
        found.append(Misfit(row.name, "norm", False, "True where its mean is taken away"))
    if problem.sections and problem.spans and (expected := _spans_expected(row, problem)):
        found.append(Misfit(row.name, "spans", problem.spans, expected))
    for field, expected in (*fit.unfit(problem), *mixing.unfit(problem), *grids.unfit(problem)):
        found.append(Misfit(row.name, field, getattr(problem, field), expected))
    for need in row.requires:
        if not formula.holds(need.test, values):
            found.append(Misfit(row.name, need.field, values[need.field], need.expected))
    return tuple(found)


def _spans_expected(row: KernelRow, problem: Problem) -> str:
    """What sections are expected, where they are no such; a tile's rows are of one section, or of
    two where they pair."""
    rows = [n for n, _ in problem.sections]
    ranks = sum(rank for _, rank in problem.sections)
    if (sum(rows), ranks) != (problem.N, problem.rank) or problem.experts:
        return "rows x rank of each section, all of them N x rank"
    if problem.pairs:
        return "" if rows == [problem.N // 2] * 2 else "the two halves where rows pair"
    least = min(BN for _, BN in row.tiles)
    whole = not any(n % least for n in rows[:-1])
    return "" if whole else f"whole {least} rows in each section but the last"


def _holds_sections(problem: Problem, BM: int, BN: int) -> bool:
    """Whether a tile's rows lie in one section, or where two pair, its sums fit twice."""
    if not problem.spans:
        return True
    return BM < 64 if problem.pairs else not any(n % BN for n, _ in problem.sections[:-1])


def _left(problem: Problem) -> int:
    """Elements of left as packed."""
    step = TILE_ROWS // 2 if problem.spans and problem.pairs else TILE_ROWS
    return sum(_up(rows, step) * _up(rank, RANK_STEP) for rows, rank in problem.sections)


@functools.lru_cache(4096)
def _configs(row: KernelRow, problem: Problem) -> tuple[TileConfig, ...]:
    padded = _up(problem.N // (problem.experts or 1), TILE_ROWS)
    known = {**_integers(problem), "wide": int(problem.x_dtype == "fp32")}
    tiles = [
        (BM, BN)
        for BM, BN in row.tiles
        if padded % BN == 0
        and _holds_sections(problem, BM, BN)
        and all(formula.holds(test, {**known, "BM": BM, "BN": BN}) for test in row.fits)
    ]
    tiles = mixing.roomy(problem, tiles)
    # A matrix instruction takes 16 rows of weights per warp: four warps would do 32 rows twice.
    whole = tuple(
        TileConfig(BM, BN, stages, 2 if BN == 32 else 8 if BM * BN >= 16384 else 4)
        for BM, BN in tiles
        for stages in row.stages
    )
    steps = -(-problem.K // row.step)
    return tuple(
        replace(config, split=split)
        for split in (row.splits if not problem.routed else (1,))
        for config in whole
        if split == 1 or steps >= MIN_STEPS * split
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
        if not isinstance(getattr(problem, f.name), (str, float))
    }
    flags = {"limited": int(problem.limited), "made": int(problem.made)}
    flags["turned"] = int(bool(problem.out_mixed))
    return {**values, "group": problem.dense_group, **flags}
