"""One weight matrix, one Hessian, one answer: the door of the solvers.

``solve`` takes a grid (codes), a mask rule, or both, and one solver for each; ``PAIRS`` says what
each pair means.

Guard: an answer that came from a sweep is compared, row by row on the calibration loss, with the
plain one (nearest code; mask by magnitude where the sweep chose it) and the
better one is kept; an unstructured SparseGPT mask is compared as a whole, because its count is
over all rows. So the loss is never above that of round-to-nearest.
"""

from __future__ import annotations

from dataclasses import dataclass, replace

import torch
from torch import Tensor

from ..ir.errors import ModelError, UsageError
from .answer import Answer
from .double import ScaleCodes
from .grid import Fit, Grid
from .hessian import Factor, prepare
from .masks import MaskRule
from .task import Task

GRID_SOLVERS = ("gptq", "rtn")
MASK_SOLVERS = ("sparsegpt", "wanda", "magnitude")

_DROP = "drop the lowest scores"
PAIRS: dict[tuple[str | None, str | None], str] = {
    (None, None): "the weight as it is",
    (None, "magnitude"): f"{_DROP} |w|; nothing else changes",
    (None, "wanda"): f"{_DROP} |w|·‖x‖ of each row; nothing else changes",
    (None, "sparsegpt"): "one OBS sweep: the mask is chosen on the way, survivors compensate",
    ("rtn", None): "the nearest code",
    ("rtn", "magnitude"): f"{_DROP} |w|; survivors to the nearest code",
    ("rtn", "wanda"): f"{_DROP} |w|·‖x‖ of each row; survivors to the nearest code",
    ("rtn", "sparsegpt"): "the OBS sweep for the mask, then survivors to the nearest code",
    ("gptq", None): "one OBS sweep that rounds",
    ("gptq", "magnitude"): f"{_DROP} |w|; then one OBS sweep rounds and compensates for both",
    ("gptq", "wanda"): f"{_DROP} |w|·‖x‖; then one OBS sweep rounds and compensates for both",
    ("gptq", "sparsegpt"): "the joint solve: one sweep chooses the mask, rounds and compensates",
}
"""What (grid solver, mask solver) means; None where there is no grid or no mask."""


@dataclass(frozen=True)
class Solution:
    """The compressed weight.

    weight: fp32 ``[m, n]``, exactly ``(codes - zero) * scale`` where there are codes (but extra).
    codes: uint8 ``[m, n]``, masked entries at the zero point.
    scale: ``[m, G]`` in the grid's scale_dtype; groups count dense inputs. None where levels are
        weights.
    table: levels or factors that the codes stand for, as the grid stores them (`Grid.stored`).
    double: what the scales decode from, None when they are stored.
    under: fp32 ``[m, n]``, what the codes give beneath extra; None where that is 0.
    zero: uint8 ``[m, G]``, None when symmetric (then it is 2**(bits-1)).
    mask: bool ``[m, n]``, True = kept.
    extra: bool ``[m, n]``, weights that stay off the grid, exact: those that the mask dropped and
        that come back (see `MaskRule.recover`), or outliers; their code is that of 0 or next to it.
        An N:M mask names outliers only in blocks that hold fewer than n other weights.
    loss: ``tr(D H D^T) / tr(W H W^T)``, undamped; with the identity where H was unusable.
    damp: the relative damping in use.
    fallbacks: everything that was given up, in words.
    rows_rtn: output rows where the plain answer was better and is kept.
    rows: fp64 ``[m]``, the loss of each output row relative to its own ``w H w^T``.
    """

    weight: Tensor
    codes: Tensor | None
    scale: Tensor | None
    zero: Tensor | None
    mask: Tensor | None
    loss: float
    damp: float
    fallbacks: tuple[str, ...] = ()
    rows_rtn: int = 0
    extra: Tensor | None = None
    table: Tensor | None = None
    double: ScaleCodes | None = None
    under: Tensor | None = None
    rows: Tensor | None = None


def solve(
    weight: Tensor,
    hessian: Tensor | None = None,
    *,
    grid: Grid | None = None,
    mask: MaskRule | None = None,
    grid_solver: str = "gptq",
    mask_solver: str = "sparsegpt",
    damp: float = 0.01,
    act_order: bool = False,
    block: int = 128,
    factor: Factor | None = None,
    keep: Tensor | None = None,
    sweeps: int = 0,
    refit: bool = True,
    mask_search: bool = False,
    extra: Tensor | None = None,
    sensitivity: Tensor | None = None,
    fit: Fit | None = None,
    threshold: float | None = None,
    most: float = 1.0,
) -> Solution:
    """Compress weight ``[m, n]`` (out x in) for inputs with ``hessian`` = X^T X ``[n, n]``.

    act_order: most important inputs first (whole groups and M-blocks, so storage does not change).
    block: inputs per lazy update: speed only, but an unstructured SparseGPT mask is chosen
        block by block.
    factor: from `prepare`, instead of hessian and damp, when several weights read the same input
        (or stack their rows: rows are independent).
    keep: bool ``[m, n]``, a mask that is already decided; survivors compensate if mask_solver is
        "sparsegpt" or a sweep rounds. extra: weights that stay off the grid, whatever the mask
        says: they take no place among its kept ones, and its zeros fall on others.
    sensitivity: ``[m, n]``, the weight of each weight's squared error where levels are fitted
        (the Fisher information); without it, the diagonal of H.
    fit: scales ``[G, m]`` and zero points of a uniform grid that are decided already.
    threshold: a sweep keeps weights off the grid, exact, whose squared error over the variance that
        the inputs still free leave it exceeds this, relative to the mean of what dropping a weight
        costs; most: the share of the weights that may be. Ranges that are fitted before the sweep
        leave out those that widen them for more than that. With a mask, a sweep without it finds
        outliers first.
    sweeps: passes of coordinate descent over the answer, each as exact as the first sweep and never
        uphill; with refit they move the group scales too, with mask_search the N:M mask.

    Nothing here is random. Raises UsageError for options that do not fit together, ModelError for
    weights that are not finite.
    """
    _check(weight, grid, mask, grid_solver, mask_solver, block, sweeps, keep)
    _check_extra(mask, keep, extra, mask_search, grid, weight)
    if threshold is not None and (extra is not None or grid is None or grid_solver != "gptq"):
        raise UsageError("threshold: expected a grid, the gptq solver and no outliers beside it")
    n = weight.shape[1]
    if factor is None:
        factor = prepare(hessian, damp, inputs=n, device=weight.device)
    if factor.hessian.shape[0] != n:
        raise UsageError(
            f"hessian: expected [{n}, {n}] for this weight, found {list(factor.hessian.shape)}"
        )
    task = Task(
        weight,
        factor,
        grid,
        mask,
        grid_solver,
        mask_solver,
        act_order,
        block,
        keep,
        sweeps,
        refit,
        mask_search,
        extra,
        sensitivity,
        fit,
        threshold,
        most,
    )
    if threshold is not None and (mask is not None or keep is not None):
        task = task.apart()
    return _packed(task, task.refined(task.run()))


def _check(
    weight: Tensor,
    grid: Grid | None,
    mask: MaskRule | None,
    grid_solver: str,
    mask_solver: str,
    block: int,
    sweeps: int,
    keep: Tensor | None,
) -> None:
    if weight.ndim != 2 or 0 in weight.shape:
        raise UsageError(f"weight: expected [out, in], found {list(weight.shape)}")
    n = weight.shape[1]
    if grid_solver not in GRID_SOLVERS:
        raise UsageError(f"grid_solver: expected one of {GRID_SOLVERS}, found {grid_solver!r}")
    if mask_solver not in MASK_SOLVERS:
        raise UsageError(f"mask_solver: expected one of {MASK_SOLVERS}, found {mask_solver!r}")
    if sweeps < 0:
        raise UsageError(f"sweeps: expected 0 or more, found {sweeps}")
    if block < 1:
        raise UsageError(f"block: expected at least 1, found {block}")
    if mask is not None and n % mask.unit:
        raise UsageError(
            f"{mask.n}:{mask.m} mask: expected inputs in multiples of {mask.m}, found {n}"
        )
    if mask is not None and grid is not None and grid.group is not None and grid.group % mask.unit:
        raise UsageError(
            f"grid group: expected a multiple of {mask.m} with a {mask.n}:{mask.m} mask, "
            f"found {grid.group}"
        )
    if mask is not None and grid is not None and mask.kind != "nm" and not grid.has_zero:
        raise UsageError(
            "grid: expected one that holds 0 beside unstructured zeros, found one that does not",
            hint="an N:M mask stores no code for a zero",
        )
    if keep is not None and keep.shape != weight.shape:
        raise UsageError(f"keep: expected {list(weight.shape)}, found {list(keep.shape)}")
    if not bool(torch.isfinite(torch.stack(torch.aminmax(weight))).all()):
        raise ModelError(
            "weight: expected finite values, found NaN or Inf", hint="check the checkpoint"
        )


def _check_extra(
    mask: MaskRule | None,
    keep: Tensor | None,
    extra: Tensor | None,
    mask_search: bool,
    grid: Grid | None,
    weight: Tensor,
) -> None:
    if mask is not None and mask.recover and mask_search:
        raise UsageError("mask_search: expected a mask without recovered weights, found recover")
    if extra is None:
        return
    if mask is not None and mask.recover:
        raise UsageError("extra: expected a mask without recovered weights beside it")
    if extra.shape != weight.shape or (grid is None and keep is None):
        raise UsageError(f"extra: expected {list(weight.shape)} beside a grid or keep")


def _packed(task: Task, answer: Answer) -> Solution:
    """Back to [m, n], real units, stored dtypes; with codes, the weight is made from them."""
    energy, rows = task.row_losses(task.wt), task.losses(answer)
    reference, found = float(energy.sum()), float(rows.sum())
    solution = Solution(
        weight=task.weight,
        codes=None,
        scale=None,
        zero=None,
        mask=None if answer.keep is None else answer.keep.t().contiguous(),
        loss=found / reference if reference > 0 else 0.0,
        damp=task.factor.damp,
        fallbacks=task.factor.fallbacks + task.notes,
        rows_rtn=task.rows_rtn,
        extra=None if answer.extra is None else answer.extra.t().contiguous(),
        rows=torch.where(energy > 0, rows / energy.clamp_min(1e-300), 0.0),
    )
    grid = task.grid
    if grid is None or answer.centred is None or answer.scale is None:
        return replace(solution, weight=_real(answer.value, task.unit).t().contiguous())
    n = len(task.wt)
    scale = (answer.scale.double() * task.unit).to(grid.scale_dtype)
    stored = scale.float()
    fit = Fit(answer.scale, answer.zero, None if task.fit is None else task.fit.table)
    centred, under = answer.centred, None
    if answer.extra is not None:
        centred = torch.where(answer.extra, 0.0, centred)
    codes = grid.codes(centred, fit)
    table = None if fit.table is None else grid.stored(fit.table, task.unit)
    if table is not None and not grid.scaled:
        # Levels are weights: as stored, not as they are in working units.
        values = grid.decoded(codes, table, n)
        if answer.keep is not None:
            values = values * answer.keep
    else:
        values = centred.float() * grid.spread(stored, n)
    if answer.extra is not None:
        under = None if grid.has_zero else values.t().contiguous()
        values = torch.where(answer.extra, _real(answer.value, task.unit), values)
    notes = solution.fallbacks
    if grid.scaled:
        notes += _extremes(scale, grid)
    return replace(
        solution,
        weight=values.t().contiguous(),
        codes=codes.t().contiguous(),
        scale=scale.t().contiguous() if grid.scaled else None,
        zero=None if fit.zero is None else fit.zero.to(torch.uint8).t().contiguous(),
        fallbacks=notes,
        table=table,
        double=task.double,
        under=under,
    )


def _extremes(scale: Tensor, grid: Grid) -> tuple[str, ...]:
    """What happened to scales at the ends of their dtype's range."""
    top = torch.finfo(grid.scale_dtype).max
    ends = (("saturate", scale >= top), ("vanish in", scale <= grid.floor))
    return tuple(
        f"grid: {int(where.sum())} scales {what} {grid.scale_dtype}"
        for what, where in ends
        if bool(where.any())
    )


def _real(value: Tensor, unit: float) -> Tensor:
    """Values in working units as fp32."""
    if unit == 1.0:
        return value.float()
    limit = torch.finfo(torch.float32).max
    return (value.double() * unit).clamp(-limit, limit).float()
