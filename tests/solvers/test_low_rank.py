"""Low rank for a residual: Eckart and Young in the weights and at the output, in fp64."""

import pytest
import torch

from llmc.compiler.pipeline.residual import LEFT, RIGHT, compensate
from llmc.compiler.solvers import Grid, prepare, solve
from llmc.compiler.solvers.low_rank import low_rank

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
        parts, product, told[form] = compensate(w, solved.weight, 4, form, factor)
        assert torch.equal(parts[LEFT].float() @ parts[RIGHT].float(), product)
        assert told[form]["loss"] <= told[form]["without_rank"]
        assert told[form]["without_rank"] == pytest.approx(solved.loss, rel=1e-4)
    assert told["outputs"]["loss"] < 0.8 * solved.loss
    assert told["outputs"]["loss"] <= told["weights"]["loss"] * 1.001
    assert told["auto"] == told["outputs"]


def test_without_a_gram_the_weights_count():
    w = residual(24, 40).float()
    solved = solve(w, grid=Grid(3, 8), grid_solver="rtn").weight
    _, product, told = compensate(w, solved, 6, "auto", None)
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
    _, product, told = compensate(w, solved, 4, "outputs", prepare(h), columns)
    assert not product[:, columns].any()
    assert 0 < told["loss"] < told["without_rank"]


def test_what_sixteen_bits_do_not_hold_is_left_out():
    w = torch.full((4, 6), 1e12)
    parts, product, told = compensate(w, torch.zeros(4, 6), 2, "auto", None)
    assert not product.any()
    assert not parts[LEFT].any()
    assert told["loss"] == told["without_rank"] == 1.0
    assert "left out" in told["notes"][0]
