"""Low rank for a residual: Eckart and Young in the weights and at the output, in fp64."""

import pytest
import torch

from llmc.compiler.ir.scheme import LowRank
from llmc.compiler.pipeline.residual import LEFT, RIGHT, compensate
from llmc.compiler.solvers import Grid, prepare, solve
from llmc.compiler.solvers.low_rank import coded, low_rank

SHAPES = [(24, 40), (40, 24), (16, 16)]


def residual(rows, columns):
    g = torch.Generator().manual_seed(rows)
    return torch.randn(rows, columns, generator=g, dtype=torch.float64)


def gram(columns, tokens):
    """Correlated inputs, one of them dead and one loud; of less than full rank for few tokens."""
    g = torch.Generator().manual_seed(columns)
    x = torch.randn(tokens, columns, generator=g, dtype=torch.float64)
    x = x @ torch.randn(columns, columns, generator=g, dtype=torch.float64)
    x[:, 3], x[:, 5] = 0.0, x[:, 5] * 50
    return x.t() @ x


def output_loss(delta, h):
    return float((delta @ h @ delta.t()).trace())


@pytest.mark.parametrize("shape", SHAPES)
def test_what_is_left_is_the_tail_of_the_spectrum(shape):
    e = residual(*shape)
    tail = torch.linalg.svdvals(e).square()
    left = []
    for k in range(min(shape) + 1):
        made = low_rank(e, k)
        assert made.left.shape == (shape[0], k)
        assert made.right.shape == (k, shape[1])
        left.append(float((e - made.product).square().sum()))
        assert left[-1] == pytest.approx(float(tail[k:].sum()), rel=1e-10, abs=1e-18)
    assert left == sorted(left, reverse=True)
    assert left[0] == float(e.square().sum())


@pytest.mark.parametrize("tokens", [9, 400])
@pytest.mark.parametrize("shape", SHAPES)
def test_at_the_output_it_is_the_tail_of_the_outputs_spectrum(shape, tokens):
    e, h = residual(*shape), gram(shape[1], tokens)
    values, vectors = torch.linalg.eigh(h)
    outputs = torch.linalg.svdvals(e @ vectors * values.clamp(min=0).sqrt()).square()
    for k in (0, 1, 3, min(shape)):
        found = output_loss(e - low_rank(e, k, h).product, h)
        slack = 1e-9 * float(outputs.sum())
        assert found == pytest.approx(float(outputs[k:].sum()), rel=1e-7, abs=slack)
        assert found <= output_loss(e - low_rank(e, k).product, h) + slack


def test_factors_share_their_length_and_zero_stays_zero():
    made = low_rank(residual(12, 20), 4, gram(20, 99))
    torch.testing.assert_close(made.left.norm(dim=0), made.right.norm(dim=1))
    assert not low_rank(torch.zeros(5, 7), 2).product.any()


def test_a_solve_never_loses_by_it():
    w, h = residual(24, 40).float(), gram(40, 200).float()
    factor = prepare(h)
    solved = solve(w, grid=Grid(3, 8), factor=factor)
    told = {}
    for form in ("outputs", "weights", "auto"):
        parts, product, told[form] = compensate(w, solved.weight, LowRank(4), form, factor)
        assert torch.equal(parts[LEFT].float() @ parts[RIGHT].float(), product)
        assert told[form]["loss"] <= told[form]["without_rank"]
        assert told[form]["without_rank"] == pytest.approx(solved.loss, rel=1e-4)
    assert told["outputs"]["loss"] < 0.8 * solved.loss
    assert told["outputs"]["loss"] <= told["weights"]["loss"] * 1.001
    assert told["auto"] == told["outputs"]


def test_without_a_gram_the_weights_count():
    w = residual(24, 40).float()
    solved = solve(w, grid=Grid(3, 8), grid_solver="rtn").weight
    _, product, told = compensate(w, solved, LowRank(6), "auto", None)
    best = torch.linalg.svdvals((w - solved).double()).square()
    assert told["loss"] == pytest.approx(
        float(best[6:].sum() / w.double().square().sum()), rel=1e-3
    )
    assert product.any()


def test_columns_that_stay_exact_are_not_touched():
    w, h = residual(24, 40).float(), gram(40, 200).float()
    columns = torch.tensor([1, 5])
    solved = (w * 4).round() / 4
    solved[:, columns] = w[:, columns]
    _, product, told = compensate(w, solved, LowRank(4), "outputs", prepare(h), columns)
    assert not product[:, columns].any()
    assert 0 < told["loss"] < told["without_rank"]


def test_what_sixteen_bits_do_not_hold_is_left_out():
    w = torch.full((4, 6), 1e12)
    parts, product, told = compensate(w, torch.zeros(4, 6), LowRank(2), "auto", None)
    assert not product.any()
    assert not parts[LEFT].any()
    assert told["loss"] == told["without_rank"] == 1.0
    assert "left out" in told["notes"][0]


# ** factors in codes **


@pytest.mark.parametrize("shape", SHAPES)
def test_coded_factors_cost_little_more_than_exact_ones(shape):
    """And never less: nothing of that rank is below the tail of the spectrum."""
    e = residual(*shape)
    for k in (1, 4, 12):
        exact = low_rank(e, k)
        tail, whole = float((e - exact.product).square().sum()), float(e.square().sum())
        found = float((e - coded(exact, e, 8).product.double()).square().sum())
        assert tail <= found <= tail + 1e-3 * whole


def test_codes_and_scales_give_the_product_exactly():
    e = residual(24, 40)
    made = coded(low_rank(e, 5), e, 8)
    for one in made:
        assert int(one.codes.max()) > 250
        assert torch.equal((one.codes.float() - 128) * one.scale, one.weight)
        assert torch.equal(one.scale.half().float(), one.scale)
    assert torch.equal(made.product, made.left.weight @ made.right.weight)


@pytest.mark.parametrize("tokens", [400, 12])
def test_the_right_factor_is_the_best_beside_the_left_one_whatever_counts(tokens):
    """A⁺·E is stationary in ‖(E - A·B)·X‖ too; rounding it costs a thousandth."""
    e, h = residual(24, 40), gram(40, tokens)
    made = coded(low_rank(e, 4, h), e, 8)
    left = made.left.weight.double()
    free = e - left @ (torch.linalg.pinv(left) @ e)
    assert float((left.t() @ free @ h).abs().max()) < 1e-8 * float((left.t() @ e @ h).abs().max())
    best, found = output_loss(free, h), output_loss(e - made.product.double(), h)
    assert best * (1 - 1e-9) <= found <= best + 2e-3 * output_loss(e, h)


def test_what_is_stored_is_what_is_measured():
    """The record's loss is that of the decoded product, and zeros where it would not fall."""
    e = residual(24, 40).float()
    h = gram(40, 400).float()
    parts, product, told = compensate(
        e, torch.zeros_like(e), LowRank(4, bits=8), "outputs", prepare(h)
    )
    assert set(parts) == {"left_codes", "left_scale", "right_codes", "right_scale"}
    assert parts["left_codes"].shape == (24, 1)
    assert parts["right_codes"].shape == (4, 10)
    loss = output_loss((e - product).double(), h.double()) / output_loss(e.double(), h.double())
    assert told["loss"] == pytest.approx(loss, rel=1e-4)
    _, product, told = compensate(e, e, LowRank(4, bits=8), "weights", None)
    assert not bool(product.any())
    assert told["loss"] == 0
