"""Linear classifiers: near Bayes on planted data, sane where there is nothing to tell apart."""

import math

import pytest
import torch

from llmc.compiler.ir.errors import UsageError
from llmc.compiler.solvers.classify import linear_classifier


@pytest.mark.parametrize("kind", ["logistic", "svm"])
def test_finds_the_planted_direction(kind):
    g = torch.Generator().manual_seed(0)
    x = torch.rand(4000, 2, generator=g)
    right = torch.rand(4000, generator=g) < torch.sigmoid(12 * (x[:, 0] - 0.5))
    w = linear_classifier(x, right, kind)
    assert w.shape == (3,)
    assert w.dtype == torch.float32
    assert w[0] > 5 * abs(w[1])
    said = torch.sigmoid(x @ w[:2] + w[2]) > 0.5
    best = (x[:, 0] > 0.5) == right
    assert (said == right).double().mean() > best.double().mean() - 0.01


def test_logistic_probabilities_are_calibrated():
    g = torch.Generator().manual_seed(1)
    x = torch.rand(20000, 2, generator=g)
    right = torch.rand(20000, generator=g) < torch.sigmoid(4 * x[:, 0] - 1)
    w = linear_classifier(x, right)
    p = torch.sigmoid(x @ w[:2] + w[2])
    for low in (0.3, 0.5, 0.7):
        inside = (p >= low) & (p < low + 0.2)
        gap = right[inside].double().mean() - p[inside].double().mean()
        assert abs(gap) < 0.03


@pytest.mark.parametrize("good", [True, False])
def test_answers_that_are_all_alike(good):
    w = linear_classifier(torch.rand(9, 2), torch.full((9,), good))
    assert w[:2].tolist() == [0, 0]
    assert w[2] == pytest.approx(math.log(10) * (1 if good else -1))


def test_refusals():
    with pytest.raises(UsageError, match="found none"):
        linear_classifier(torch.zeros(0, 2), torch.zeros(0, dtype=torch.bool))
    with pytest.raises(UsageError, match="found 'forest'"):
        linear_classifier(torch.zeros(2, 2), torch.tensor([True, False]), "forest")
