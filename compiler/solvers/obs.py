"""One sweep over the inputs that rounds, prunes, or does both at once, each error pushed onto the
inputs still free.

Names: W ``[m, n]``, held transposed ``[n, m]``; D = W - W_hat; ``H + ridge*I = R R^T``; U = R^-1.
Settling input j (``q_j`` = its final value) with the updated weight w_j leaves the error ``err_j =
w_j - q_j`` and moves the rest by
``w_k -= err_j U_jk / U_jj``; the damped loss is the sum of ``(err_j R_jj)^2``.

*Left-looking*: because D = E U, the updated weights of block b, given only the inputs before it,
are ``W_b + (D_<b R_<b,b) U_bb``. So a block is brought up to
date by one GEMM against R just before it is settled, nothing behind it is touched, and the inverse
Hessian is never formed.

The walk inside a block is done in units of the group's scale, where rounding is ``round`` and
``clamp`` alone.

Sources: GPTQ (arXiv 2210.17323), SparseGPT (arXiv 2301.00774), QuIP's LDLQ (arXiv 2307.13304; the
form with R is LDLQ).
"""

from __future__ import annotations

import torch
from torch import Tensor

from .answer import Answer
from .grid import Bounds, Fit, Grid, at_group
from .masks import BlockPick, MaskRule, ScorePick, apart, drop_smallest, pick_nm, top_per_row
from .schedule import Block, Schedule, Step


class Sweep:
    """State of one sweep: preallocated buffers, and the row views that the inner loop uses
    again in every block.

    weight_t: ``[n, m]`` in processing order. root: R ``[n, n]`` in the same order. grid, rule:
    None to leave out. keep: a frozen mask ``[n, m]`` (then rule is not consulted). scales:
    with a grid of one group per row or precomputed groups, the
    fits ``[G, m]``; None fits each group when it is reached. exact_pick: choose whole N:M
    blocks by their joint cost instead of one score per weight. unit: see `Grid.store`.
    extra: weights that stay off the grid whatever the mask says, bool ``[n, m]``; a
    rule that recovers chooses its own: the best scores of each row's dense weights, where the
    N:M mask dropped them. Such a weight is settled where it stands and leaves no error.
    limit: with a grid, weights whose rounding would cost more are such, as they are reached.
    """

    def __init__(
        self,
        weight_t: Tensor,
        root: Tensor,
        schedule: Schedule,
        *,
        grid: Grid | None = None,
        rule: MaskRule | None = None,
        keep: Tensor | None = None,
        scales: Fit | None = None,
        exact_pick: bool = False,
        unit: float = 1.0,
        extra: Tensor | None = None,
        limit: float | None = None,
    ) -> None:
        self.w, self.root, self.schedule = weight_t, root, schedule
        self.grid, self.unit = grid, unit
        self.rule = rule if keep is None else None
        n, m = weight_t.shape
        width = max(b.end - b.start for b in schedule.blocks)
        new = weight_t.new_empty
        self.cur, self.err, self.q = new(width, m), new(width, m), new(width, m)
        self.v = root.new_zeros(width, width)
        self.masked = rule is not None or keep is not None
        self.keep_f = new(width, m) if self.masked else None
        self.keep, self.extra = keep, extra
        self.beside = extra if self.rule is not None else None
        self.top: Tensor | None = None
        if self.rule is not None and self.rule.recover:
            # |w|·d ranks as the sweep's own score does, and dropping may not be undone later.
            self.top = top_per_row((weight_t * root.diagonal()[:, None]).abs(), self.rule.recover)
            self.extra = torch.zeros_like(self.top)
        self.limit = limit
        self.cost = None if limit is None else new(n, m)
        if limit is not None:
            self.extra = torch.zeros(n, m, dtype=torch.bool, device=weight_t.device)
        if self.masked and keep is None:
            self.keep = torch.ones(n, m, dtype=torch.bool, device=weight_t.device)
        self.delta = new(n, m)
        self.value = new(n, m)
        self.centred = new(n, m) if grid is not None else None
        self.scale = self.zero = None
        self.whole_row = grid is not None and len(schedule.groups) == 1
        if grid is not None:
            groups = len(schedule.groups)
            self.scale = new(groups, m)
            self.zero = None if grid.symmetric else new(groups, m)
            if scales is not None:
                self.scale.copy_(scales.scale)
                if self.zero is not None and scales.zero is not None:
                    self.zero.copy_(scales.zero)
        self.fitted = scales is not None
        self.table = None if scales is None else scales.table
        self.exact = (
            exact_pick
            and self.beside is None
            and self.rule is not None
            and self.rule.kind == "nm"
            and BlockPick.affordable(self.rule.n, self.rule.m)
        )
        if self.rule is not None and self.rule.kind == "nm" and not self.exact:
            self.score_pick = ScorePick(self.rule.n, self.rule.m, weight_t)
        self.group = 0
        self.bounds: Bounds = (0.0, 0.0)
        self.leaf_views: dict[tuple[int, int], list[tuple[Tensor, ...]]] = {}

    def run(self) -> Answer:
        """Settle every input; the answer is in processing order, its row losses are damped ones."""
        m = self.w.shape[1]
        losses = torch.zeros(m, dtype=torch.float64, device=self.w.device)
        d2 = self.root.diagonal().square()
        if self.whole_row and not self.fitted:
            self._fit_whole_row(d2)
        for block in self.schedule.blocks:
            a, b = block.start, block.end
            self._load(block)
            if self.rule is not None and self.rule.kind == "unstructured":
                self._choose_unstructured(block, d2)
            elif self.keep is not None and self.rule is None:
                self._frozen(block)
            for step in block.steps:
                if step.kind == "leaf":
                    self._leaf(block, step)
                elif step.kind == "update":
                    self.cur[step.b : step.c].addmm_(
                        self.v[step.a : step.b, step.b : step.c].t(),
                        self.err[step.a : step.b],
                        alpha=-1,
                    )
                elif step.kind == "open":
                    self._open(step, d2[a + step.a : a + step.b], a + step.a)
                else:
                    self._close(block, step)
            losses += (d2[a:b] @ self.err[: b - a].square()).double()
            torch.sub(self.w[a:b], self.value[a:b], out=self.delta[a:b])
        return Answer(
            self.value, self.centred, self.scale, self.zero, self.keep, losses, self.extra
        )

    def _load(self, block: Block) -> None:
        """Bring the block up to date with every error made before it."""
        a, b = block.start, block.end
        size = b - a
        corner = self.root[a:b, a:b]
        eye = torch.eye(size, dtype=corner.dtype, device=corner.device)
        inverse = torch.linalg.solve_triangular(corner, eye, upper=True)
        torch.mul(inverse, corner.diagonal()[:, None], out=self.v[:size, :size])
        if a:
            seen = self.root[:a, a:b].t() @ self.delta[:a]
            torch.addmm(self.w[a:b], inverse.t(), seen, out=self.cur[:size])
        else:
            self.cur[:size].copy_(self.w[:b])
        if self.exact and self.rule is not None:
            m = self.rule.m
            u = torch.stack([inverse[i : i + m, i : i + m] for i in range(0, size, m)])
            self.pick = BlockPick(u.mT @ u, self.rule.n, m)

    def _fit_whole_row(self, d2: Tensor) -> None:
        grid = self.grid
        assert grid is not None
        keep = self.keep if self.rule is None else self._predict(self.w, d2, 0)
        keep = self._gridded(keep, slice(None))
        fit = grid.fit(self.w, keep=keep, importance=d2[:, None], unit=self.unit)
        self._set(fit)

    def _gridded(self, keep: Tensor | None, at: slice) -> Tensor | None:
        """The weights of some inputs that the grid is there for, None = all."""
        if self.extra is None:
            return keep
        free = ~self.extra[at]
        return free if keep is None else keep & free

    def _predict(self, w: Tensor, d2: Tensor, at: int) -> Tensor:
        """The mask that the rule would choose on w, the inputs from ``at`` on, if nothing were
        updated any more."""
        assert self.rule is not None
        beside = None if self.beside is None else self.beside[at : at + len(w)]
        score = apart(w.square() * d2[:, None], beside, self.rule)
        if self.rule.kind == "nm":
            return pick_nm(score, self.rule.n, self.rule.m)
        return drop_smallest(score, round(self.rule.sparsity * score.numel()))

    def _open(self, step: Step, d2: Tensor, at: int) -> None:
        """Fit the group's scale and go over to its units."""
        if self.grid is None or self.scale is None:
            return
        self.group = step.group
        if not self.fitted and not self.whole_row:
            self._fit_group(self.grid, step, d2, at)
        zero = None if self.zero is None else self.zero[self.group]
        self.bounds = self.grid.bounds(zero, at_group(self.table, self.group))
        self.cur[step.a : step.b].div_(self.scale[self.group])

    def _close(self, block: Block, step: Step) -> None:
        """Note the group's final values; errors go back to real units."""
        q = self.q[step.a : step.b]
        at = slice(block.start + step.a, block.start + step.b)
        if self.centred is None or self.scale is None:
            self.value[at] = q
            return
        self.centred[at] = q
        torch.mul(q, self.scale[self.group], out=self.value[at])
        self.err[step.a : step.b].mul_(self.scale[self.group])

    def _fit_group(self, grid: Grid, step: Step, d2: Tensor, at: int) -> None:
        w = self.cur[step.a : step.b]
        keep = None
        if self.keep_f is not None:
            if self.rule is not None and self.rule.kind == "nm":
                keep = self._predict(w, d2, at)
            else:
                keep = self.keep_f[step.a : step.b] > 0
        keep = self._gridded(keep, slice(at, at + step.b - step.a))
        self._set(grid.fit(w, keep=keep, importance=d2[:, None], unit=self.unit))

    def _set(self, fit: Fit) -> None:
        assert self.scale is not None
        self.scale[self.group] = fit.scale
        if self.zero is not None and fit.zero is not None:
            self.zero[self.group] = fit.zero

    def _frozen(self, block: Block) -> None:
        assert self.keep is not None
        assert self.keep_f is not None
        self.keep_f[: block.end - block.start].copy_(self.keep[block.start : block.end])

    def _choose_unstructured(self, block: Block, d2: Tensor) -> None:
        """SparseGPT's choice: the block's smallest scores over all rows, exact in total count."""
        assert self.rule is not None
        assert self.keep is not None
        a, b = block.start, block.end
        m = self.w.shape[1]
        count = round(self.rule.sparsity * b * m) - round(self.rule.sparsity * a * m)
        beside = None if self.beside is None else self.beside[a:b]
        score = apart(self.cur[: b - a].square() * d2[a:b, None], beside, self.rule)
        self.keep[a:b] = drop_smallest(score, count)
        self._frozen(block)

    def _views(self, a: int, b: int) -> list[tuple[Tensor, ...]]:
        if (a, b) not in self.leaf_views:
            rows = []
            for j in range(a, b):
                row = [self.cur[j], self.q[j], self.err[j]]
                if self.keep_f is not None:
                    row.append(self.keep_f[j])
                row += [self.cur[j + 1 : b], self.v[j, j + 1 : b]]
                rows.append(tuple(row))
            self.leaf_views[a, b] = rows
        return self.leaf_views[a, b]

    def _leaf(self, block: Block, step: Step) -> None:
        """Settle the inputs of one leaf, one by one."""
        a, b = step.a, step.b
        snap = None if self.grid is None else self.grid.snap
        picks = self.rule is not None and self.rule.kind == "nm"
        unit = self.rule.m if picks and self.rule is not None else 1
        for i, view in enumerate(self._views(a, b)):
            if picks and i % unit == 0:
                self._choose_block(block, a + i, unit)
            w_j, q_j, err_j = view[:3]
            if snap is not None:
                snap(w_j, self.bounds, q_j)
                if self.keep_f is not None:
                    q_j.mul_(view[3])
            else:
                torch.mul(w_j, view[3], out=q_j)
            if self.limit is not None:
                self._judge(block.start + a + i, w_j, q_j)
            if self.extra is not None:
                torch.where(self.extra[block.start + a + i], w_j, q_j, out=q_j)
            torch.sub(w_j, q_j, out=err_j)
            if i + 1 < b - a:
                view[-2].addr_(view[-1], err_j, alpha=-1)

    def _judge(self, at: int, w: Tensor, q: Tensor) -> None:
        """Mark weights of one input whose rounding from w to q costs more than the limit."""
        assert self.scale is not None
        assert self.cost is not None
        assert self.limit is not None
        assert self.extra is not None
        cost = self.cost[at]
        torch.sub(w, q, out=cost).mul_(self.scale[self.group]).mul_(self.root[at, at]).square_()
        torch.gt(cost, self.limit, out=self.extra[at])

    def _choose_block(self, block: Block, a: int, unit: int) -> None:
        """Pick the kept weights of the M-block that starts at a, on fully updated weights."""
        assert self.rule is not None
        assert self.keep is not None
        assert self.keep_f is not None
        w = self.cur[a : a + unit]
        at = block.start + a
        if self.exact:
            keep = self.pick.keep(a // unit, w)
        else:
            d = self.root.diagonal()[at : at + unit, None]
            beside = None if self.beside is None else self.beside[at : at + unit]
            keep = self.score_pick.keep(apart((w * d).abs(), beside, self.rule))
        self.keep[at : at + unit] = keep
        self.keep_f[a : a + unit] = keep
        if self.top is not None and self.extra is not None:
            self.extra[at : at + unit] = self.top[at : at + unit] & ~keep
