"""The sweep against exact identities and against a plain column-by-column solver, all in fp64."""

from __future__ import annotations

import pytest
import torch

from llmc.compiler.solvers.grid import Grid, rtn, rtn_t
from llmc.compiler.solvers.hessian import prepare
from llmc.compiler.solvers.loss import damped_rows, exact_rows, undamp
from llmc.compiler.solvers.masks import MaskRule, pick_nm
from llmc.compiler.solvers.obs import Sweep
from llmc.compiler.solvers.schedule import make_schedule

TWO_FOUR = MaskRule("nm", 2, 4)
HALF = MaskRule("unstructured", sparsity=0.5)
CASES = [
    (Grid(4, 16), None),
    (Grid(4, None), None),
    (Grid(3, 32, symmetric=False), None),
    (Grid(2, 24, clip="mse"), None),
    (None, TWO_FOUR),
    (None, HALF),
    (Grid(4, 16), TWO_FOUR),
    (Grid(4, None), MaskRule("nm", 4, 8)),
    (Grid(4, 32, symmetric=False), HALF),
]


def sweep(problem, *, grid=None, rule=None, block=128, act=False, **options):
    """Run one sweep; returns (weights [m, n] in natural order, the result, the factor)."""
    n = problem.weight.shape[1]
    factor = prepare(problem.hessian)
    schedule = make_schedule(
        grid.spans(n) if grid else [(0, n)],
        unit=rule.unit if rule else 1,
        block=block,
        importance=factor.diagonal if act else None,
    )
    order = torch.arange(n) if schedule.order is None else schedule.order
    wt = problem.weight.t()[order].contiguous()
    out = Sweep(wt, factor.root(schedule.order), schedule, grid=grid, rule=rule, **options).run()
    value = torch.empty_like(out.value).index_copy_(0, order, out.value)
    return value.t(), out, factor


def columnwise(problem, grid, rule, damp=0.01):
    """GPTQ, SparseGPT and the joint solve, the slow way, with the inverse Hessian."""
    w, h = problem.weight.clone(), problem.hessian.clone()
    m, n = w.shape
    h += damp * h.diagonal().mean() * torch.eye(n, dtype=h.dtype)
    u = torch.linalg.cholesky(torch.linalg.inv(h), upper=True)
    q = torch.zeros_like(w)
    width = n if grid is None or grid.group is None else grid.group
    fit, keep = None, torch.ones(m, n, dtype=torch.bool)
    for j in range(n):
        if grid is not None and j % width == 0:
            span = slice(j, j + width)
            kept = None
            if rule is not None:
                kept = pick_nm((w[:, span] / u.diagonal()[span]).t().abs(), rule.n, rule.m)
            weight_of = (1 / u.diagonal()[span].square())[:, None]
            fit = grid.fit(w[:, span].t(), keep=kept, importance=weight_of)
        if rule is not None and j % rule.m == 0:
            span = slice(j, j + rule.m)
            score = (w[:, span] / u.diagonal()[span]).abs()
            keep[:, span] = pick_nm(score.t(), rule.n, rule.m).t()
        q[:, j] = w[:, j]
        if fit is not None:
            q[:, j] = grid.centred(w[:, j][None], fit)[0] * fit.scale
        q[:, j] *= keep[:, j]
        e = (w[:, j] - q[:, j]) / u[j, j]
        w[:, j + 1 :] -= e[:, None] * u[j, j + 1 :]
    return q


@pytest.mark.parametrize(("grid", "rule"), CASES)
@pytest.mark.parametrize("act", [False, True])
def test_accumulated_errors_are_the_damped_loss(problem, grid, rule, act):
    found, out, factor = sweep(problem, grid=grid, rule=rule, act=act)
    truth = problem.loss(found, factor.ridge)
    assert float(out.rows.sum()) == pytest.approx(truth, rel=1e-12)


def test_diagonal_of_the_root_is_the_conditional_inverse(problem):
    factor = prepare(problem.hessian)
    h = problem.hessian + factor.ridge * torch.eye(64, dtype=torch.float64)
    d = 1 / factor.root().diagonal()
    for j in (0, 1, 17, 40, 63):
        expected = torch.linalg.inv(h[j:, j:])[0, 0]
        torch.testing.assert_close(d[j].square(), expected, rtol=1e-10, atol=0)
    root = factor.root()
    torch.testing.assert_close(root @ root.t(), h, rtol=1e-12, atol=1e-12)
    assert torch.equal(root, root.triu())


@pytest.mark.parametrize(
    ("grid", "rule"),
    [
        (Grid(4, None), None),
        (Grid(4, 16), None),
        (Grid(3, 24), None),
        (Grid(2, 64, clip="mse"), None),
        (Grid(4, 32, symmetric=False), None),
        (None, TWO_FOUR),
        (None, MaskRule("nm", 1, 4)),
        (Grid(4, 16), TWO_FOUR),
        (Grid(4, None), TWO_FOUR),
        (Grid(3, 32, symmetric=False), MaskRule("nm", 4, 8)),
    ],
)
def test_equals_the_column_by_column_solver(problem, grid, rule):
    found, _, _ = sweep(problem, grid=grid, rule=rule)
    torch.testing.assert_close(found, columnwise(problem, grid, rule), rtol=1e-9, atol=1e-12)


def test_left_looking_equals_ldlq_feedback(problem):
    """QuIP's LDLQ form: w_j plus earlier errors times a unit triangular factor; same codes."""
    grid = Grid(4, None)
    factor = prepare(problem.hessian)
    root = factor.root()
    feedback = root / root.diagonal()  # unit upper triangular
    w = problem.weight
    fit = grid.fit(w.t(), importance=root.diagonal().square()[:, None])
    q = torch.zeros_like(w)
    for j in range(w.shape[1]):
        target = w[:, j] + (w[:, :j] - q[:, :j]) @ feedback[:j, j]
        q[:, j] = grid.centred(target[None], fit)[0] * fit.scale
    found, _, _ = sweep(problem, grid=grid)
    torch.testing.assert_close(found, q, rtol=1e-12, atol=0)


@pytest.mark.parametrize("block", [16, 32, 48, 64, 1000])
@pytest.mark.parametrize(
    ("grid", "rule"),
    [(Grid(4, None), None), (Grid(4, 16), None), (None, TWO_FOUR), (Grid(4, 16), TWO_FOUR)],
)
def test_block_size_changes_nothing(problem, grid, rule, block):
    base, _, _ = sweep(problem, grid=grid, rule=rule, block=128)
    found, _, _ = sweep(problem, grid=grid, rule=rule, block=block)
    torch.testing.assert_close(found, base, rtol=1e-9, atol=1e-12)


@pytest.mark.parametrize("symmetric", [True, False])
@pytest.mark.parametrize("act", [False, True])
def test_diagonal_hessian_is_round_to_nearest_bit_for_bit(problem, build, symmetric, act):
    grid = Grid(4, 16, symmetric=symmetric)
    plain = type(problem)(problem.weight, torch.diag(problem.hessian.diagonal()))
    found, _, _ = sweep(plain, grid=grid, act=act)
    assert torch.equal(found, rtn(problem.weight, grid).weight)


def test_wanda_mask_is_the_sparsegpt_mask_for_a_diagonal_hessian(problem):
    h = problem.hessian.diagonal()
    plain = type(problem)(problem.weight, torch.diag(h))
    _, out, factor = sweep(plain, rule=TWO_FOUR)
    damped = h + factor.ridge
    assert torch.equal(out.keep, pick_nm((problem.weight * damped.sqrt()).t().abs(), 2, 4))


@pytest.mark.parametrize("grid", [None, Grid(4, 16)])
@pytest.mark.parametrize("rule", [MaskRule("nm", n, m) for n, m in ((2, 4), (1, 4), (4, 8))])
@pytest.mark.parametrize("exact_pick", [False, True])
@pytest.mark.parametrize("act", [False, True])
def test_nm_counts_are_exact(problem, grid, rule, exact_pick, act):
    found, _, _ = sweep(problem, grid=grid, rule=rule, exact_pick=exact_pick, act=act)
    kept = (found != 0).view(found.shape[0], -1, rule.m).sum(-1)
    assert int(kept.max()) <= rule.n
    if grid is None:
        assert int(kept.min()) == rule.n


@pytest.mark.parametrize("sparsity", [0.0, 0.3, 0.5, 0.77, 1.0])
def test_unstructured_counts_are_exact(problem, sparsity):
    rule = MaskRule("unstructured", sparsity=sparsity)
    found, out, _ = sweep(problem, rule=rule, block=24)
    dropped = round(sparsity * found.numel())
    assert int((~out.keep).sum()) == dropped
    assert int((found == 0).sum()) == dropped


def test_one_dropped_weight_per_row_is_bounded(problem):
    """w^2 / [H^-1]_jj <= the sweep's loss <= w^2 H_jj, since only later inputs can compensate."""
    m, n = problem.weight.shape
    h = problem.hessian + prepare(problem.hessian).ridge * torch.eye(n, dtype=torch.float64)
    at = torch.arange(m) * 2 + 1
    keep = torch.ones(m, n, dtype=torch.bool)
    keep[torch.arange(m), at] = False
    _, out, _ = sweep(problem, keep=keep.t().contiguous())
    w2 = problem.weight[torch.arange(m), at].square()
    low = w2 / torch.linalg.inv(h).diagonal()[at]
    high = w2 * h.diagonal()[at]
    assert bool((out.rows >= low * (1 - 1e-9)).all())
    assert bool((out.rows <= high * (1 + 1e-9)).all())


def test_dropping_the_last_input_compensates_nothing(problem):
    keep = torch.ones(problem.weight.t().shape, dtype=torch.bool)
    keep[-1] = False
    found, _, _ = sweep(problem, keep=keep)
    assert torch.equal(found[:, :-1], problem.weight[:, :-1])


@pytest.mark.parametrize("rule", [TWO_FOUR, HALF])
def test_least_squares_on_the_same_mask_is_never_worse_than_the_sweep(problem, rule):
    found, out, factor = sweep(problem, rule=rule)
    h = problem.hessian + factor.ridge * torch.eye(64, dtype=torch.float64)
    best = torch.zeros_like(found)
    for i, kept in enumerate(out.keep.t()):
        right = h[kept] @ problem.weight[i]
        best[i, kept] = torch.linalg.solve(h[kept][:, kept], right)
    floor, swept = problem.loss(best, factor.ridge), problem.loss(found, factor.ridge)
    cut = problem.loss(problem.weight * out.keep.t(), factor.ridge)
    assert floor <= swept * (1 + 1e-12)
    assert swept < cut


def test_a_whole_block_pick_beats_single_scores_for_the_first_block(problem):
    """With one M-block to prune and everything after it free, the exact pick is the optimum."""
    n = problem.weight.shape[1]
    h = problem.hessian + prepare(problem.hessian).ridge * torch.eye(n, dtype=torch.float64)
    inverse = torch.linalg.inv(h)
    _, out, _ = sweep(problem, rule=TWO_FOUR, exact_pick=True)
    w = problem.weight[:, :4]
    costs = []
    pairs = [(i, j) for i in range(4) for j in range(i + 1, 4)]
    for i, j in pairs:
        at = torch.tensor([i, j])
        block = torch.linalg.inv(inverse[at][:, at])
        costs.append(torch.einsum("ri,ij,rj->r", w[:, at], block, w[:, at]))
    best = torch.stack(costs).argmin(0)
    for row, choice in enumerate(best.tolist()):
        assert [i for i in range(4) if not out.keep[i, row]] == list(pairs[choice])


def test_loss_from_the_factor_equals_loss_from_the_hessian(problem):
    factor = prepare(problem.hessian)
    delta = (problem.weight - rtn_t(problem.weight.t(), Grid(3, 16))[0].t()).t().contiguous()
    damped = damped_rows(delta, factor.root())
    plain = undamp(damped, delta, factor.hessian, factor.ridge)
    torch.testing.assert_close(plain, exact_rows(delta, factor.hessian), rtol=1e-9, atol=0)


def test_fp32_agrees_with_fp64(problem):
    single = type(problem)(problem.weight.float(), problem.hessian.float())
    exact, _, factor = sweep(problem, grid=Grid(4, 16), rule=TWO_FOUR)
    found, out, _ = sweep(single, grid=Grid(4, 16), rule=TWO_FOUR)
    a, b = problem.loss(found), problem.loss(exact)
    assert a == pytest.approx(b, rel=0.05)  # a code that falls the other way changes what follows
    assert float(out.rows.sum()) == pytest.approx(problem.loss(found, factor.ridge), rel=1e-4)
    assert float((found.double() == exact).double().mean()) > 0.9
