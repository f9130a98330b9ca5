"""Many tokens: a packed weight is decoded once to a dense one, which torch multiplies.

A row's own kernel decodes: its tokens are the rows of a unit matrix, of which one loop step holds
all that is not 0, so the other steps are skipped. Every packed layout is decoded this way, exactly
but for the rounding of each weight to x's dtype.

Where it pays: tiles of the fused kernels reach about three quarters of a dense product, and
decoding costs 231/M of one (two and a half bytes per weight at 4.3 TB/s beside 2 M operations at
790 Tflop/s). Weights that are stored dense are multiplied as they lie there.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import replace

import torch

from ..compiler.ir.ops.semantic import activation, gated
from . import coded
from .prepack import Packed
from .problem import BEFORE, BEHIND, BESIDE, Problem
from .render import shares
from .row import KernelRow, TileConfig
from .rows.rounded import NORM_INPUT, round_config
from .spans import multiplied

SHARE = 0.75  # of a dense product that a fused tile reaches
FEW = 64  # tokens up to which weights are multiplied by a row that need not be decoded
DECODE = 231.0  # tokens whose product takes as long as decoding once through


def serves(row: KernelRow, problem: Problem) -> bool:
    """Whether a weight of this row can be decoded: what stands beside it is few or a product."""
    apart = problem.sparse or problem.outliers or problem.routed
    return shares(row) and row.call is None and not apart


def least(row: KernelRow, problem: Problem) -> int:
    """Tokens from which decoding once is expected to be faster than the fused kernel.

    A tile of fewer tokens than a step has columns decodes the step once for each part of them; two
    parts are hidden behind the bytes written. Nothing is decoded where a weight is stored dense.
    """
    if row.as_stored or (problem.weights == "factors" and row.factor is None):
        return FEW + 1
    if row.factor is not None:  # small tiles, behind a wait: half of a dense product at best
        return math.ceil(DECODE)
    again = max(1.0, row.step / decode_config(row, problem).BM / 2)
    return math.ceil(DECODE * again * SHARE / (1 - SHARE))


def better(row: KernelRow, problem: Problem, M: int) -> bool:
    """Whether a call without a tile of its own takes this path."""
    soonest = min(FEW + 1, DECODE * SHARE / (1 - SHARE))
    if soonest > M:
        return False
    return serves(row, problem) and least(row, problem) <= M


def weight_problem(problem: Problem) -> Problem:
    """The weight alone, of all rows as they are packed."""
    N = 16 * -(-problem.N // 16) if problem.pairs else problem.N
    return replace(problem.without(*BEFORE, *BESIDE, *BEHIND, "rounds"), N=N)


def decode_config(row: KernelRow, problem: Problem) -> TileConfig:
    """The widest tile whose tokens lie within one step; ``split`` 0 tells the kernel."""
    grid = [c for c in row.configs(weight_problem(problem)) if row.step % c.BM == 0]
    best = max(grid, key=lambda c: (c.BM, c.BN, -c.stages))
    return replace(best, split=0)


def workspace_bytes(problem: Problem, step: int = 128) -> int:
    """Bytes of the dense weight while a call lasts, or of its factors; step: of the row."""
    if problem.coded:
        both = (coded.right(problem), *coded.lefts(problem, step))
        return sum(workspace_bytes(one) for one in both)
    return problem.K * _columns(problem) * (4 if problem.x_dtype == "fp32" else 2)


def _columns(problem: Problem) -> int:
    """Rows of the weight, up to a multiple of 8: the alignment that dense products want."""
    return -(-weight_problem(problem).N // 8) * 8


Launch = Callable[..., None]


def decode(launch: Launch, packed: Packed, problem: Problem) -> torch.Tensor:
    """W transposed, [K, N] in x's dtype, rows in their packed order."""
    alone, K = weight_problem(problem), problem.K
    some = next(iter(packed.tensors.values()))
    dtype = {"fp16": torch.float16, "bf16": torch.bfloat16, "fp32": torch.float32}[problem.x_dtype]
    # Element (t, k) of the unit matrix is element K + k - t of this: a row stride of -1.
    unit = torch.zeros(2 * K, dtype=dtype, device=some.device)
    unit[K].fill_(1.0)  # on the device, as a graph may be recorded
    w = torch.empty(K, _columns(problem), dtype=dtype, device=some.device)[:, : alone.N]
    config = decode_config(packed.row, problem)
    grid = (-(-alone.N // config.BN), -(-K // config.BM), 1)
    given = {**packed.tensors, "x": unit[K:], "y": w}
    launch(packed.row, alone, config, K, given, grid=grid, strides={"x": -1})
    return w


def linear(
    launch: Launch, packed: Packed, problem: Problem, M: int, given: dict[str, torch.Tensor]
) -> torch.Tensor:
    """y [M, outputs] of x [M, K] and its sides, as `fused_linear` gives it but for roundings of
    the weight and of the sum to x's dtype before what follows them."""
    x, stored = given["x"], packed.row.as_stored
    factors = problem.weights == "factors" and not problem.coded
    # Rows of the result are in their own order, not in that of pairs.
    own = stored or (factors and bool(problem.spans))
    if own:
        given = _in_place(problem, given)
    if not (factors or problem.coded):
        w = packed["values"].T if stored else decode(launch, packed, problem)
    elif factors and not problem.spans:
        w = packed["left"][: weight_problem(problem).N].to(x.dtype).T
    if problem.gained:
        gained = Problem(
            problem.N, problem.K, x_dtype=problem.x_dtype, norm=problem.norm,
            centred=problem.centred, smooth=problem.smooth, eps=problem.eps,
        )  # fmt: skip
        scaled = x.new_empty(M, problem.K)
        tensors = {**given, "x": x, "y": scaled}
        launch(NORM_INPUT, gained, round_config(problem.K), M, tensors, grid=(1, M))
        x = scaled
    beside = problem.rank and not problem.coded
    few = x @ packed["right"][:, : problem.K].to(x.dtype).T if beside else x
    x = few if factors else x
    n, residual = weight_problem(problem).N, given.get("residual")
    if problem.coded:
        y = _of_codes(launch, packed, problem, x)
        y = y + given["bias"][: y.shape[1]].to(y.dtype) if problem.bias else y
    elif factors and problem.spans:
        y = multiplied(problem, few, packed["left"])
        y = y + given["bias"].to(y.dtype) if problem.bias else y
    elif problem.bias:
        y = torch.addmm(given["bias"][:n].to(x.dtype), x, w)
    elif residual is not None and not (problem.act or problem.pairs):
        y, residual = torch.addmm(residual, x, w), None
    else:
        y = x @ w
    if beside and problem.spans and not factors:
        sides = multiplied(problem, few, packed["left"])
        y += sides if own or not problem.pairs else _in_pairs(sides)
    elif beside and not factors:
        y.addmm_(few, given["left"][: y.shape[1]].T)
    if problem.pairs and own:
        y = gated(*y.chunk(2, -1), act=problem.act)
    elif problem.pairs:
        gate, up = y.unflatten(-1, (-1, 2, 8)).unbind(-2)
        gate, up = (t.flatten(-2)[:, : problem.outputs] for t in (gate, up))
        y = gated(gate, up, act=problem.act)
    elif problem.act:
        y = activation(y, act=problem.act)
    return y if residual is None else y + residual


def _of_codes(
    launch: Launch, packed: Packed, problem: Problem, x: torch.Tensor
) -> torch.Tensor:  # fmt: skip
    def alone(row: KernelRow, one: Problem, tensors: dict[str, torch.Tensor]) -> torch.Tensor:
        return decode(launch, Packed(row, one, tensors, {}), one)

    whole = replace(problem, N=weight_problem(problem).N)
    return coded.product(alone, packed.row, whole, packed.tensors, x)


def _in_place(problem: Problem, given: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    """The tensors beside a result whose rows are in their own order, in that order too."""
    if not problem.pairs or not (problem.bias or problem.rank):
        return given
    row = torch.arange(problem.outputs, device=given["x"].device)
    gate = row // 8 * 16 + row % 8  # as `order_rows` put them
    order = torch.cat([gate, gate + 8])
    moved = ("bias",) if problem.spans else ("bias", "left")
    return {n: t[order] if n in moved else t for n, t in given.items()}


def _in_pairs(y: torch.Tensor) -> torch.Tensor:
    """Columns of two halves, [M, N], in the order of pairs."""
    halves = y.unflatten(-1, (2, -1))
    halves = torch.nn.functional.pad(halves, (0, -halves.shape[-1] % 8))
    return halves.unflatten(-1, (-1, 8)).transpose(-3, -2).flatten(-3)
