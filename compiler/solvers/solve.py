"""One weight matrix, one Hessian, one answer: the door of the solvers.

``solve`` takes a grid (codes), a mask rule, or both, and one solver for each. What each pair means:

============  ================  ======================================================
grid_solver   mask_solver       meaning
============  ================  ======================================================
no grid       no mask           the weight as it is
no grid       magnitude, wanda  drop the lowest scores, nothing else changes
no grid       sparsegpt         one OBS sweep: the mask is chosen on the way, survivors
                                compensate
rtn           no mask           nearest code
rtn           magnitude, wanda  drop the lowest scores, survivors to the nearest code
rtn           sparsegpt         the OBS sweep for the mask, then survivors to the
                                nearest code
gptq          no mask           one OBS sweep that rounds
gptq          magnitude, wanda  the mask is fixed first; one OBS sweep rounds and
                                compensates for both
gptq          sparsegpt         the *joint* solve: one sweep chooses the mask and
                                rounds, and compensates for both
============  ================  ======================================================

Guard: an answer that came from a sweep is compared, row by row on the calibration loss, with the
plain one (nearest code; mask by magnitude where the sweep chose it) and the
better one is kept; an unstructured SparseGPT mask is compared as a whole, because its count is
over all rows. So the loss is never above that of round-to-nearest.
"""

from __future__ import annotations

import math
from dataclasses import dataclass, replace

import torch
from torch import Tensor

from ..ir.errors import ModelError, UsageError
from .grid import Fit, Grid, rtn_t
from .hessian import Factor, prepare
from .loss import damped_rows, exact_rows, undamp
from .masks import MaskRule, static_mask
from .obs import Sweep
from .schedule import make_schedule

GRID_SOLVERS = ("gptq", "rtn")
MASK_SOLVERS = ("sparsegpt", "wanda", "magnitude")
_SAFE = (2.0**-32, 2.0**32)  # weights whose largest value is outside are rescaled by a power of two


@dataclass(frozen=True)
class Solution:
    """The compressed weight.

    weight: fp32 ``[m, n]``, exactly ``(codes - zero) * scale`` where there are codes. codes:
    uint8 ``[m, n]``, masked entries at the zero point. scale: ``[m, G]`` in the
    grid's scale_dtype; zero: uint8 ``[m, G]``, None when symmetric (then 2**(bits-1)). mask:
    bool ``[m, n]``, True = kept. Groups count dense inputs. loss: ``tr(D H D^T) / tr(W H
    W^T)`` on the undamped Hessian
    (with the identity where the Hessian was unusable; see fallbacks). damp: relative damping
    used. rows_rtn: output rows where the plain answer was better. fallbacks: everything that
    was given up, in words.
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


@dataclass
class _State:
    """An answer in the making: transposed, natural order, working units.

    rows: ``[m]`` fp64 undamped losses, None = not known yet.
    """

    value: Tensor
    centred: Tensor | None = None
    fit: Fit | None = None
    keep: Tensor | None = None
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
) -> Solution:
    """Compress weight ``[m, n]`` (out x in, any float dtype) for inputs with ``hessian`` = X^T
    X ``[n, n]``.

    factor: from `prepare`, instead of hessian and damp, when several weights read the same
    input (or stack their rows: rows are independent). keep: bool ``[m, n]``, a mask that is
    already decided
    (rule and mask_solver are then not consulted). act_order: most important inputs first.
    block: inputs per lazy update (speed only, save for unstructured masks, which are chosen
    per block).
    Nothing here is random. Raises UsageError for options that do not fit together, ModelError
    for weights that are not finite.
    """
    _check(weight, grid, mask, grid_solver, mask_solver, block, keep)
    n = weight.shape[1]
    if factor is None:
        factor = prepare(hessian, damp, inputs=n, device=weight.device)
    if factor.hessian.shape[0] != n:
        raise UsageError(
            f"hessian: expected [{n}, {n}] for this weight, found {list(factor.hessian.shape)}"
        )
    task = _Task(weight, factor, grid, mask, grid_solver, mask_solver, act_order, block, keep)
    return task.finish(task.run())


def _check(
    weight: Tensor,
    grid: Grid | None,
    mask: MaskRule | None,
    grid_solver: str,
    mask_solver: str,
    block: int,
    keep: Tensor | None,
) -> None:
    if weight.ndim != 2 or 0 in weight.shape:
        raise UsageError(f"weight: expected [out, in], found {list(weight.shape)}")
    n = weight.shape[1]
    if grid_solver not in GRID_SOLVERS:
        raise UsageError(f"grid_solver: expected one of {GRID_SOLVERS}, found {grid_solver!r}")
    if mask_solver not in MASK_SOLVERS:
        raise UsageError(f"mask_solver: expected one of {MASK_SOLVERS}, found {mask_solver!r}")
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
    if keep is not None and keep.shape != weight.shape:
        raise UsageError(f"keep: expected {list(weight.shape)}, found {list(keep.shape)}")
    if not bool(torch.isfinite(torch.stack(torch.aminmax(weight))).all()):
        raise ModelError(
            "weight: expected finite values, found NaN or Inf", hint="check the checkpoint"
        )


class _Task:
    """One call of `solve`; weights transposed, a power of two taken out of extreme ones."""

    def __init__(
        self,
        weight: Tensor,
        factor: Factor,
        grid: Grid | None,
        mask: MaskRule | None,
        grid_solver: str,
        mask_solver: str,
        act_order: bool,
        block: int,
        keep: Tensor | None,
    ) -> None:
        self.factor, self.grid, self.mask, self.block = factor, grid, mask, block
        self.grid_solver, self.mask_solver, self.act_order = grid_solver, mask_solver, act_order
        self.fixed = None if keep is None else keep.t().contiguous()
        work = weight.to(factor.hessian.dtype)
        low, high = torch.aminmax(work)
        top = max(-float(low), float(high))
        self.unit = 1.0
        if top > 0 and not _SAFE[0] <= top <= _SAFE[1]:
            self.unit = 2.0 ** math.frexp(top)[1]
            work = (work.double() / self.unit).to(work.dtype)
        self.weight, self.wt = work, work.t().contiguous()
        self.notes: tuple[str, ...] = ()
        self.rows_rtn = 0

    @property
    def masked(self) -> bool:
        return self.mask is not None or self.fixed is not None

    def run(self) -> _State:
        """The answer of the chosen pair, guarded."""
        by_sweep = (self.grid is not None and self.grid_solver == "gptq") or (
            self.mask is not None and self.mask_solver == "sparsegpt" and self.fixed is None
        )
        if not by_sweep:
            return self._plain(self._static_keep())
        frozen = self.fixed
        if frozen is None and self.mask is not None and self.mask_solver != "sparsegpt":
            frozen = self._static_keep()
        swept = self._sweep(frozen)
        if self.grid is not None and self.grid_solver == "rtn":
            swept = self._plain(swept.keep, swept.value)
        return self._guard(swept, frozen)

    def _static_keep(self, solver: str | None = None) -> Tensor | None:
        if self.fixed is not None or self.mask is None:
            return self.fixed
        return static_mask(self.mask, solver or self.mask_solver, self.wt, self.factor.diagonal)

    def _plain(self, keep: Tensor | None, wt: Tensor | None = None) -> _State:
        """No compensation: mask, then the nearest code."""
        wt = self.wt if wt is None else wt
        if self.grid is None:
            return _State(wt if keep is None else wt * keep, keep=keep)
        value, centred, fit = rtn_t(
            wt, self.grid, keep=keep, importance=self.factor.diagonal, unit=self.unit
        )
        return _State(value, centred, fit, keep)

    def _sweep(self, frozen: Tensor | None) -> _State:
        n = self.wt.shape[0]
        grid = self.grid if self.grid_solver == "gptq" else None
        schedule = make_schedule(
            grid.spans(n) if grid is not None else [(0, n)],
            unit=1 if self.mask is None else self.mask.unit,
            block=self.block,
            importance=self.factor.diagonal if self.act_order else None,
        )
        order = schedule.order
        root = self.factor.root(order)
        wt = self.wt if order is None else self.wt[order]
        out = Sweep(
            wt,
            root,
            schedule,
            grid=grid,
            rule=self.mask,
            keep=frozen if frozen is None or order is None else frozen[order],
            unit=self.unit,
        ).run()
        hessian = self.factor.hessian
        if order is not None:
            hessian = hessian[order][:, order]
        rows = undamp(out.row_loss, wt - out.value, hessian, self.factor.ridge)

        def back(x: Tensor | None) -> Tensor | None:
            if x is None or order is None:
                return x
            return torch.empty_like(x).index_copy_(0, order, x)

        value = back(out.value)
        assert value is not None
        fit = None if out.scale is None else Fit(out.scale, out.zero)
        return _State(value, back(out.centred), fit, back(out.keep), rows)

    def losses(self, state: _State) -> Tensor:
        """Row losses of an answer, [m] fp64."""
        if state.rows is None:
            state.rows = self._row_losses(self.wt - state.value)
        return state.rows

    def _row_losses(self, delta_t: Tensor) -> Tensor:
        root = self.factor.ready
        if root is None:
            return exact_rows(delta_t, self.factor.hessian)
        rows = damped_rows(delta_t, root)
        return undamp(rows, delta_t, self.factor.hessian, self.factor.ridge)

    def _guard(self, swept: _State, frozen: Tensor | None) -> _State:
        """Keep the plain answer where it is better; see the module docstring."""
        plain = self._plain(frozen if frozen is not None else self._static_keep("magnitude"))
        swept_rows, plain_rows = self.losses(swept), self.losses(plain)
        free = self.mask is not None and self.mask.kind == "unstructured" and frozen is None
        if free:
            better = (plain_rows.sum() < swept_rows.sum()).expand_as(plain_rows)
        else:
            better = plain_rows < swept_rows
        self.rows_rtn = int(better.sum())
        if not self.rows_rtn:
            return swept
        if self.rows_rtn == len(better):
            self.notes += ("sweep: no row better than round-to-nearest, which is kept",)

        def pick(a: Tensor | None, b: Tensor | None) -> Tensor | None:
            return None if a is None or b is None else torch.where(better, a, b)

        value = torch.where(better, plain.value, swept.value)
        fit = None
        if plain.fit is not None and swept.fit is not None:
            scale = torch.where(better, plain.fit.scale, swept.fit.scale)
            fit = Fit(scale, pick(plain.fit.zero, swept.fit.zero))
        return _State(
            value,
            pick(plain.centred, swept.centred),
            fit,
            pick(plain.keep, swept.keep),
            torch.where(better, plain_rows, swept_rows),
        )

    def finish(self, state: _State) -> Solution:
        """Back to [m, n], real units, stored dtypes; with codes, the weight is made from them."""
        reference = float(self._row_losses(self.wt).sum())
        found = float(self.losses(state).sum())
        solution = Solution(
            weight=self.weight,
            codes=None,
            scale=None,
            zero=None,
            mask=None if state.keep is None else state.keep.t().contiguous(),
            loss=found / reference if reference > 0 else 0.0,
            damp=self.factor.damp,
            fallbacks=self.factor.fallbacks + self.notes,
            rows_rtn=self.rows_rtn,
        )
        grid = self.grid
        if grid is None or state.centred is None or state.fit is None:
            value = state.value.t().contiguous()
            if self.unit != 1.0:
                limit = torch.finfo(torch.float32).max
                value = (value.double() * self.unit).clamp(-limit, limit)
            return replace(solution, weight=value.float())
        n = len(self.wt)
        scale = (state.fit.scale.double() * self.unit).to(grid.scale_dtype)
        zero = state.fit.zero
        shift = float(grid.implied_zero) if zero is None else grid.spread(zero, n)
        values = state.centred.float() * grid.spread(scale.float(), n)
        full = int((scale >= torch.finfo(grid.scale_dtype).max).sum())
        note = f"grid: {full} scales saturate {grid.scale_dtype}"
        return replace(
            solution,
            weight=values.t().contiguous(),
            codes=(state.centred + shift).to(torch.uint8).t().contiguous(),
            scale=scale.t().contiguous(),
            zero=None if zero is None else zero.to(torch.uint8).t().contiguous(),
            fallbacks=(*solution.fallbacks, note) if full else solution.fallbacks,
        )
