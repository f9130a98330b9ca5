"""Laws of `solve` on random shapes, grids, masks and Hessians."""

from __future__ import annotations

import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from llmc.compiler.solvers import Grid, MaskRule, prepare, rtn, solve
from llmc.compiler.solvers.masks import static_mask


@st.composite
def tasks(draw):
    """(weight, hessian, options of solve) that fit together."""
    kept_of = draw(st.sampled_from([(1, 2), (2, 4), (1, 4), (4, 8)]))
    rule = draw(
        st.sampled_from(
            [None, MaskRule("nm", *kept_of), MaskRule("unstructured", sparsity=0.35)],
        )
    )
    unit = rule.unit if rule else 1
    n = unit * draw(st.integers(1, 40 // unit))
    group = draw(st.sampled_from([None, 8, 16, 24]))
    grid = Grid(
        draw(st.sampled_from([2, 3, 4, 8])),
        group,
        symmetric=draw(st.booleans()),
        clip=draw(st.sampled_from(["absmax", "mse"])),
    )
    g = torch.Generator().manual_seed(draw(st.integers(0, 999)))
    tokens = draw(st.sampled_from([1, n, 4 * n]))
    x = torch.randn(tokens, n, generator=g) * torch.logspace(0, 1, n)
    x = x + draw(st.sampled_from([0.0, 1.0])) * x.roll(1, 1)
    weight = torch.randn(draw(st.integers(1, 6)), n, generator=g)
    options = {
        "grid": draw(st.sampled_from([grid, None])),
        "mask": rule,
        "grid_solver": draw(st.sampled_from(["gptq", "rtn"])),
        "mask_solver": draw(st.sampled_from(["sparsegpt", "wanda", "magnitude"])),
        "act_order": draw(st.booleans()),
        "block": draw(st.sampled_from([8, 40, 128])),
        "sweeps": draw(st.integers(0, 2)),
        "mask_search": draw(st.booleans()),
    }
    return weight, x.T @ x, options


@settings(max_examples=200, deadline=None)
@given(tasks())
def test_laws(task):
    weight, hessian, options = task
    m, n = weight.shape
    s = solve(weight, hessian, **options)
    assert bool(torch.isfinite(s.weight).all())
    grid, rule = options["grid"], options["mask"]
    if grid is not None:
        group = grid.group or n
        scale = s.scale.float().repeat_interleave(group, 1)[:, :n]
        zero = float(grid.implied_zero)
        if s.zero is not None:
            zero = s.zero.float().repeat_interleave(group, 1)[:, :n]
        assert torch.equal((s.codes.float() - zero) * scale, s.weight)
        assert int(s.codes.max()) < 2**grid.bits
    if rule is not None:
        assert bool((s.weight[~s.mask] == 0).all())
        if rule.kind == "nm":
            assert bool((s.mask.view(m, -1, rule.m).sum(-1) == rule.n).all())
    metric = prepare(hessian).hessian.double()

    def loss(found):
        d = (weight - found).double()
        return float((d @ metric * d).sum())

    diagonal = prepare(hessian).diagonal
    plain, keep = weight, None
    if rule is not None:
        solver = options["mask_solver"]
        solver = "magnitude" if solver == "sparsegpt" else solver
        keep = static_mask(rule, solver, weight.t(), diagonal).t()
        plain = weight * keep
    if grid is not None:
        plain = rtn(weight, grid, keep=keep, importance=diagonal).weight
    whole = loss(torch.zeros_like(weight))
    assert loss(s.weight) <= loss(plain) * (1 + 1e-4) + 1e-9 * whole
    assert abs(s.loss - loss(s.weight) / whole) <= 1e-3 * s.loss + 1e-6
