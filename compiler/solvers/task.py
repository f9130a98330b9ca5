"""The steps behind `solve`: plain answer, sweep, guard, extra passes. One `Task` per call."""

from __future__ import annotations

import math
from dataclasses import dataclass, field, replace
from typing import Any, NamedTuple

import torch
from torch import Tensor

from .answer import Answer, better_rows
from .double import ScaleCodes
from .grid import Fit, Grid, fits_t, rtn_t
from .hessian import Factor
from .leave_out import costly_ends
from .loss import damped_rows, exact_rows, undamp
from .masks import MaskRule, static_mask, static_score, top_per_row
from .obs import Sweep
from .outliers import largest, outlier_count
from .refine import Refiner
from .schedule import Schedule, make_schedule

_SAFE = (2.0**-32, 2.0**32)  # weights whose largest value is outside are rescaled


class Support(NamedTuple):
    """Weights that stay, bool ``[n, m]``: the mask's, and those off the grid, which win where both
    claim one (see `Answer.extra`)."""

    keep: Tensor | None = None
    extra: Tensor | None = None


def _gridded(support: Support | None) -> Tensor | None:
    """The weights that the grid is there for, None = all."""
    keep, extra = support or Support()
    if extra is None:
        return keep
    return ~extra if keep is None else keep & ~extra


def _support(answer: Answer) -> Support:
    return Support(answer.keep, answer.extra)


@dataclass
class Task:
    """One call of `solve`; its options are documented there.

    Working units: weights transposed to ``wt`` [n, m], in the factor's dtype, divided by ``unit``,
    a power of two that is 1 unless the weights are extreme.
    """

    weight: Tensor
    factor: Factor
    grid: Grid | None
    mask: MaskRule | None
    grid_solver: str
    mask_solver: str
    act_order: bool
    block: int
    keep: Tensor | None
    sweeps: int
    refit: bool
    mask_search: bool
    extra: Tensor | None = None
    sensitivity: Tensor | None = None
    given: Fit | None = None
    threshold: float | None = None
    most: float = 1.0
    unit: float = 1.0
    rows_rtn: int = 0
    notes: tuple[str, ...] = ()
    wt: Tensor = field(init=False)
    fixed: Support | None = field(init=False, default=None)
    beside: Tensor | None = field(init=False, default=None)
    fit: Fit | None = field(init=False, default=None)
    double: ScaleCodes | None = field(init=False, default=None)

    def __post_init__(self) -> None:
        keep, extra = (None if s is None else s.t().contiguous() for s in (self.keep, self.extra))
        if self.mask is None and not (keep is None and extra is None):
            self.fixed = Support(keep, extra)
        self.beside = extra if self.mask is not None else None
        work = self.weight.to(self.factor.hessian.dtype)
        low, high = torch.aminmax(work)
        top = max(-float(low), float(high))
        if top > 0 and not _SAFE[0] <= top <= _SAFE[1]:
            self.unit = 2.0 ** math.frexp(top)[1]
            work = (work.double() / self.unit).to(work.dtype)
        self.wt = work.t().contiguous()
        if self.given is not None:
            self.fit = self.given._replace(scale=(self.given.scale / self.unit).to(work.dtype))
        elif self.grid is not None and self.grid.clip == "output" and not self.grid.whole:
            # Ranges are chosen before anything is rounded.
            h = self.factor.hessian
            self.fit = fits_t(
                self.wt, self.grid, keep=_gridded(self._first), importance=h, unit=self.unit
            )
        elif self.grid is not None and self.grid.whole and not self._fitted_late:
            # What a sweep will drop is not known yet; scores of the dense weights foretell it.
            expected = self._static("wanda" if self.mask_solver == "sparsegpt" else None)
            self._fit_whole(self.wt, expected)

    @property
    def _fitted_late(self) -> bool:
        """Whether a sweep for the mask alone moves the weights before any is rounded."""
        masked = self.mask is not None or self.keep is not None
        return masked and self.mask_solver == "sparsegpt" and self.grid_solver == "rtn"

    @property
    def _first(self) -> Support | None:
        """What is known to stay before anything is decided."""
        return self.fixed if self.beside is None else Support(None, self.beside)

    def _fit_whole(self, wt: Tensor, support: Support | None) -> None:
        assert self.grid is not None
        self.fit, self.double = self.grid.fit_whole(
            wt, keep=_gridded(support), importance=self.importance, unit=self.unit
        )

    def apart(self) -> Task:
        """With a mask: the weights that a sweep without one keeps, decided, instead of a threshold.

        What a mask dropped in an earlier round stays dropped.
        """
        alone = replace(self, mask=None, keep=None)
        extra = alone._split().extra
        assert extra is not None
        extra = extra.t() if self.keep is None else extra.t() & self.keep
        return replace(self, extra=extra, threshold=None, notes=alone.notes)

    @property
    def importance(self) -> Tensor:
        """What a fit weighs errors by: ``[n, m]`` where each weight's sensitivity is known."""
        if self.grid is not None and self.grid.clip == "output":
            return self.factor.hessian
        if self.sensitivity is None:
            return self.factor.diagonal
        return self.sensitivity.t().to(self.wt)

    def run(self) -> Answer:
        """The answer of the chosen pair, guarded."""
        masked = self.mask is not None or self.keep is not None
        by_sweep = (self.grid is not None and self.grid_solver == "gptq") or (
            masked and self.mask_solver == "sparsegpt"
        )
        if not by_sweep:
            return self._plain(self._static())
        frozen = self.fixed
        if frozen is None and self.mask is not None and self.mask_solver != "sparsegpt":
            frozen = self._static()
        swept = self._sweep(frozen) if self.threshold is None else self._split()
        if self.threshold is not None:
            frozen = _support(swept)
        if self.grid is not None and self.grid_solver == "rtn":
            if self.grid.whole and self.given is None:
                self._fit_whole(swept.value, _support(swept))
            swept = self._plain(_support(swept), swept.value)
        return self._guard(swept, frozen)

    def refined(self, answer: Answer) -> Answer:
        """The answer after the extra sweeps, where there is something to refine."""
        touched = self.grid is not None or answer.keep is not None
        return self._refine(answer) if self.sweeps and touched else answer

    def _static(self, solver: str | None = None) -> Support | None:
        if self.fixed is not None or self.mask is None:
            return self.fixed
        solver = solver or self.mask_solver
        keep = static_mask(self.mask, solver, self.wt, self.factor.diagonal, self.beside)
        if not self.mask.recover:
            return Support(keep, self.beside)
        score = static_score(solver, self.wt, self.factor.diagonal)
        return Support(keep, top_per_row(score, self.mask.recover) & ~keep)

    def _plain(self, support: Support | None, wt: Tensor | None = None) -> Answer:
        """No compensation: mask, then the nearest code."""
        wt = self.wt if wt is None else wt
        keep, extra = support or Support()
        if self.grid is None:
            whole = keep if keep is None or extra is None else keep | extra
            return Answer(wt if whole is None else wt * whole, keep=keep, extra=extra)
        value, centred, fit = rtn_t(
            wt,
            self.grid,
            keep=_gridded(support),
            importance=self.factor.diagonal,
            unit=self.unit,
            fit=self.fit,
        )
        if extra is not None:
            value = torch.where(extra, wt, value)
            centred = torch.where(extra, wt / self.grid.spread(fit.scale, len(wt)), centred)
        return Answer(value, centred, fit.scale, fit.zero, keep, extra=extra)

    def _schedule(self, grid: Grid | None, importance: Tensor | None = None) -> Schedule:
        n = len(self.wt)
        return make_schedule(
            grid.spans(n) if grid is not None else [(0, n)],
            unit=1 if self.mask is None else self.mask.unit,
            block=self.block,
            importance=importance,
        )

    def _split(self) -> Answer:
        """The sweep that keeps outliers, with ranges that were fitted without them if that pays."""
        self._leave_out()
        first = self._sweep(None)
        grid, held = self.grid, (self.fit, self.double)
        assert first.extra is not None
        if grid is None or not grid.whole or not bool(first.extra.any()):
            return first
        self._fit_whole(self.wt, _support(first))
        again = self._sweep(None)
        if float(self.losses(again).sum()) < float(self.losses(first).sum()):
            return again
        self.fit, self.double = held
        return first

    def _leave_out(self) -> None:
        """Fit without the weights that widen a range for more than the threshold."""
        grid, threshold = self.grid, self.threshold
        if grid is None or not grid.whole or not grid.scaled or threshold is None:
            return
        order = self._schedule(grid, self.factor.diagonal if self.act_order else None).order
        square = self.factor.root(order).diagonal().square()
        if order is not None:
            square = torch.empty_like(square).index_copy_(0, order, square)
        limit = threshold * float((self.wt.var(1, correction=0) * square).mean())
        most = outlier_count(self.most, self.wt.numel())
        wide = costly_ends(self.wt, grid, square, limit, most, self.unit)
        if bool(wide.any()):
            self._fit_whole(self.wt, Support(None, wide))

    def _sweep(self, frozen: Support | None) -> Answer:
        grid = self.grid if self.grid_solver == "gptq" else None
        schedule = self._schedule(grid, self.factor.diagonal if self.act_order else None)
        order = schedule.order
        root = self.factor.root(order)
        wt, hessian = self.wt, self.factor.hessian
        keep, extra = frozen or Support(None, self.beside)
        if order is not None:
            wt, hessian = wt[order], hessian[order][:, order]
            keep = None if keep is None else keep[order]
            extra = None if extra is None else extra[order]
        shared: dict[str, Any] = {
            "grid": grid, "rule": self.mask, "keep": keep, "scales": self.fit, "unit": self.unit,
        }  # fmt: skip
        limit = None
        if self.threshold is not None:
            dropped = wt.var(1, correction=0) * root.diagonal().square()
            limit = self.threshold * float(dropped.mean())
        sweep = Sweep(wt, root, schedule, extra=extra, limit=limit, **shared)
        out = sweep.run()
        most = outlier_count(self.most, wt.numel())
        if sweep.cost is not None and out.extra is not None and int(out.extra.sum()) > most:
            self.notes += (f"outliers: {int(out.extra.sum())} exceed the limit, {most} are kept",)
            kept = largest(sweep.cost, most)
            out = Sweep(wt, root, schedule, extra=kept, **shared).run()
        assert out.rows is not None
        out.rows = undamp(out.rows, wt - out.value, hessian, self.factor.ridge)
        return out.to_storage(order)

    def _refine(self, start: Answer) -> Answer:
        """Coordinate descent on the damped loss; rows whose undamped loss rose keep the start."""
        hessian = self.factor.hessian.clone()
        hessian.diagonal().add_(self.factor.ridge)
        better = start.clone()
        refiner = Refiner(
            self.wt,
            hessian,
            self._schedule(self.grid),
            better,
            grid=self.grid,
            rule=self.mask,
            scales=self.refit and self.fit is None,
            mask=self.mask_search and self.fixed is None,
            unit=self.unit,
            table=None if self.fit is None else self.fit.table,
        )
        for _ in range(self.sweeps):
            refiner.run()
        return better_rows(better, start, self.losses(start) < self.losses(better))

    def losses(self, answer: Answer) -> Tensor:
        """Row losses of an answer, [m] fp64."""
        if answer.rows is None:
            answer.rows = self.row_losses(self.wt - answer.value)
        return answer.rows

    def row_losses(self, delta_t: Tensor) -> Tensor:
        """tr(d H d^T) of each row of D, [m] fp64."""
        root = self.factor.ready
        if root is None:
            return exact_rows(delta_t, self.factor.hessian)
        rows = damped_rows(delta_t, root)
        return undamp(rows, delta_t, self.factor.hessian, self.factor.ridge)

    def _guard(self, swept: Answer, frozen: Support | None) -> Answer:
        """Keep the plain answer where it is better; see the module docstring."""
        plain = self._plain(frozen if frozen is not None else self._static("magnitude"))
        swept_rows, plain_rows = self.losses(swept), self.losses(plain)
        better = plain_rows < swept_rows
        if self.mask is not None and self.mask.kind == "unstructured" and frozen is None:
            better = (plain_rows.sum() < swept_rows.sum()).expand_as(plain_rows)
        self.rows_rtn = int(better.sum())
        if self.rows_rtn == len(better):
            self.notes += ("sweep: no row better than round-to-nearest, which is kept",)
        return better_rows(swept, plain, better) if self.rows_rtn else swept
