"""More passes over an answer: coordinate descent on codes, scales and the mask, each step exact
and never uphill.

One input at a time, everything else fixed, the loss is a parabola around ``T_j = w^_j + (D H)_j /
H_jj`` (D = W - W_hat), so the
nearest allowed value to T_j is the best one. A pass is the same walk as `obs.Sweep`, blocks and
leaves, with ``H_jk / H_kk``
in the place of ``U_jk / U_jj`` and the *change* of the value in the place of the error; it costs
one full GEMM more than half a sweep's.

Three moves, all measured on the damped Hessian:
- codes: every input to its nearest code (or, without a grid, to T_j); the mask stays.
- scales (``scales=True``): before a group's codes, its scale goes to the closed-form minimum,
rounded as stored; taken only where the loss falls.
- mask (``mask=True``, N:M only): before an M-block's codes, the support of least continuous cost
is tried with its re-fitted, rounded values; taken
  only where the loss falls. A block that holds an outlier keeps its mask.

Sources: coordinate descent after GPTQ as in QuIP's greedy passes (arXiv 2307.13304); the rest is
plain least squares.
"""

from __future__ import annotations

import torch
from torch import Tensor

from .answer import Answer
from .grid import Bounds, Grid, at_group
from .masks import BlockPick, MaskRule
from .schedule import Block, Schedule, Step


class Refiner:
    """Coordinate descent on an `Answer`, in place.

    weight_t: ``[n, m]``. hessian: ``[n, n]`` with its ridge already added. schedule: natural
    order. rule: for ``mask=True``. unit: see `Grid.store`. table: of the answer's fit.
    """

    def __init__(
        self,
        weight_t: Tensor,
        hessian: Tensor,
        schedule: Schedule,
        answer: Answer,
        *,
        grid: Grid | None = None,
        rule: MaskRule | None = None,
        scales: bool = False,
        mask: bool = False,
        unit: float = 1.0,
        table: Tensor | None = None,
    ) -> None:
        self.table = table
        self.w, self.h, self.schedule, self.answer = weight_t, hessian, schedule, answer
        self.grid, self.unit, self.scales = grid, unit, scales
        self.m = 0
        if mask and rule is not None and rule.kind == "nm" and BlockPick.affordable(rule.n, rule.m):
            self.m = m = rule.m
            blocks = torch.stack([hessian[i : i + m, i : i + m] for i in range(0, len(hessian), m)])
            jitter = blocks.diagonal(dim1=1, dim2=2) * 1e-6 + 1e-9 * hessian.diagonal().mean()
            self.inverses = torch.linalg.inv(blocks + torch.diag_embed(jitter))
            self.pick = BlockPick(self.inverses, rule.n, m)
        width = max(b.end - b.start for b in schedule.blocks)
        rows = weight_t.shape[1]
        self.t = weight_t.new_empty(width, rows)  # targets T
        self.q = weight_t.new_empty(width, rows)  # new values (codes where there is a grid)
        self.change = weight_t.new_empty(width, rows)
        self.v = hessian.new_zeros(width, width)
        self.delta = weight_t - answer.value
        diagonal = hessian.diagonal()
        self.inverse = torch.where(diagonal > 0, 1 / diagonal, 0.0)[:, None]
        self.group = 0
        self.bounds: Bounds = (0.0, 0.0)

    def run(self) -> None:
        """One pass over all inputs."""
        if self.scales and len(self.schedule.groups) == 1 and self.grid is not None:
            self._scale_whole_row()
        for block in self.schedule.blocks:
            a, b = block.start, block.end
            size = b - a
            value = self.answer.value[a:b]
            torch.mul(self.h[a:b, a:b], self.inverse[a:b].t(), out=self.v[:size, :size])
            t = self.t[:size]
            torch.mm(self.h[a:b], self.delta, out=t)
            t.mul_(self.inverse[a:b]).add_(value)
            for step in block.steps:
                if step.kind == "leaf":
                    self._leaf(block, step)
                elif step.kind == "open":
                    self._open(block, step)
                elif step.kind == "close":
                    self._close(block, step)
                else:
                    t[step.b : step.c].addmm_(
                        self.v[step.a : step.b, step.b : step.c].t(),
                        self.change[step.a : step.b],
                        alpha=-1,
                    )
            torch.sub(self.w[a:b], value, out=self.delta[a:b])

    def _open(self, block: Block, step: Step) -> None:
        """Move the group's scale, then go over to its units."""
        if self.grid is None or self.answer.scale is None:
            return
        self.group = step.group
        if self.scales and len(self.schedule.groups) > 1:
            self._scale_group(block, step)
        zero = self.answer.zero
        one = None if zero is None else zero[self.group]
        self.bounds = self.grid.bounds(one, at_group(self.table, self.group))
        self.t[step.a : step.b].div_(self.answer.scale[self.group])

    def _close(self, block: Block, step: Step) -> None:
        """Note the group's new values; changes go back to real units."""
        q = self.q[step.a : step.b]
        at = slice(block.start + step.a, block.start + step.b)
        if self.answer.centred is None or self.answer.scale is None:
            self.answer.value[at] = q
            return
        scale = self.answer.scale[self.group]
        self.answer.centred[at] = q
        torch.mul(q, scale, out=self.answer.value[at])
        self.change[step.a : step.b].mul_(scale)

    def _leaf(self, block: Block, step: Step) -> None:
        a, b = step.a, step.b
        at = slice(block.start + a, block.start + b)
        answer, t, q, change = self.answer, self.t[a:b], self.q[a:b], self.change[a:b]
        keep = None if answer.keep is None else answer.keep[at]
        extra = None if answer.extra is None else answer.extra[at]
        old = (answer.value if answer.centred is None else answer.centred)[at]
        bounds = None if answer.centred is None else self.bounds
        start = old.clone() if self.m else old
        v = self.v[a:b, a:b]
        for i in range(b - a):
            if self.m and i % self.m == 0 and keep is not None:
                moved = self._support(block.start + a + i, t[i:], old, keep, i, bounds)
                t[i:].sub_(v[i : i + self.m, i:].t() @ moved)
                t[i : i + self.m].add_(moved)  # an input's own change does not move its target
            if bounds is None or self.grid is None:
                q[i] = t[i]
            else:
                self.grid.snap(t[i], bounds, q[i])
            if keep is not None:
                q[i].mul_(keep[i])
            if extra is not None:
                torch.where(extra[i], t[i], q[i], out=q[i])
            torch.sub(q[i], old[i], out=change[i])
            if i + 1 < b - a:
                t[i + 1 :].addr_(v[i, i + 1 :], change[i], alpha=-1)
        if self.m:
            torch.sub(q, start, out=change)

    def _support(
        self, at: int, t: Tensor, old: Tensor, keep: Tensor, i: int, bounds: Bounds | None
    ) -> Tensor:
        """Try the best other support of the M-block at input ``at``; returns the change
        ``[m, rows]``.

        t: targets from the block on. old, keep: of the whole leaf, the block at i; both
        are updated in place.
        """
        m = self.m
        h = self.h[at : at + m, at : at + m]
        values, kept = old[i : i + m], keep[i : i + m]
        best = values + self.inverses[at // m] @ ((t[:m] - values) * h.diagonal()[:, None])
        support, trial = self.pick.restrict(at // m, best)
        if bounds is not None and self.grid is not None:
            trial = self.grid.snap(trial, bounds, trial).mul_(support)
        far, near = values - best, trial - best
        better = (near * (h @ near)).sum(0) < (far * (h @ far)).sum(0)
        if self.answer.extra is not None:
            # The choices drop m - n of all inputs, and one that is off the grid is not dropped.
            better &= ~self.answer.extra[at : at + m].any(0)
        moved = torch.where(better, trial - values, 0.0)
        values.add_(moved)
        kept.copy_(torch.where(better, support, kept))
        return moved

    def _scale_group(self, block: Block, step: Step) -> None:
        """Move the scale of a group to the minimum of the loss along its own values."""
        a, b = step.a, step.b
        size = block.end - block.start
        at = slice(block.start + a, block.start + b)
        value = self.answer.value[at]
        rows = self.h[block.start : block.end, at] @ value
        diagonal = self.h.diagonal()[at, None]
        slope = (value * (self.t[a:b] - value) * diagonal).sum(0)
        step_by = self._rescale(slope, (value * rows[a:b]).sum(0))
        self.t[:size].addcmul_(rows * self.inverse[block.start : block.end], step_by, value=-1)
        self.t[a:b].addcmul_(value, step_by)
        self._exact(at)

    def _scale_whole_row(self) -> None:
        value = self.answer.value
        rows = self.h @ value
        slope = (rows * self.delta).sum(0)
        self._rescale(slope, (value * rows).sum(0))
        self._exact(slice(None))
        torch.sub(self.w, value, out=self.delta)

    def _rescale(self, slope: Tensor, curve: Tensor) -> Tensor:
        """Set the group's scale where that lowers the loss; returns the relative change per row.

        Along ``value * (1 + t)`` the loss changes by ``-2 t slope + t^2 curve``.
        """
        assert self.grid is not None
        assert self.answer.scale is not None
        scale = self.answer.scale[self.group]
        ideal = torch.where(curve > 0, slope / curve, 0.0).clamp(-0.5, 1.0)
        trial = self.grid.store(scale * (1 + ideal), self.unit)
        t = trial / scale - 1
        falls = (t * t * curve - 2 * t * slope) < 0
        scale.copy_(torch.where(falls, trial, scale))
        return torch.where(falls, t, 0.0)

    def _exact(self, at: slice) -> None:
        """Values again from codes and scale, so that no rounding creeps in."""
        assert self.answer.centred is not None
        assert self.answer.scale is not None
        torch.mul(self.answer.centred[at], self.answer.scale[self.group], out=self.answer.value[at])
