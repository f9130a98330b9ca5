"""Small linear classifiers of "this answer is the right one", fitted with scikit-learn."""

from __future__ import annotations

import math

import torch
from torch import Tensor

from ..ir.errors import UsageError

KINDS = ("logistic", "svm")


def linear_classifier(features: Tensor, right: Tensor, kind: str = "logistic") -> Tensor:
    """Weights and bias whose sigmoid says how likely an answer is right.

    ``logistic`` is logistic regression; ``svm`` a linear support vector machine, whose margin takes
    the place of the log odds. Where all answers are alike the weights are zero and the bias holds
    the log odds of (n + 1) in (n + 2).

    Args:
        features: [samples, n]; right: bool [samples].
    Returns:
        f32 [n + 1], the bias last.
    Raises:
        UsageError: no samples, or an unknown kind.
    """
    if kind not in KINDS:
        raise UsageError(f"expected a classifier of {', '.join(KINDS)}, found {kind!r}")
    samples, width = features.shape
    if not samples:
        raise UsageError("expected samples to fit a classifier on, found none")
    good = int(right.sum())
    out = torch.zeros(width + 1)
    if good in (0, samples):
        out[-1] = math.log(samples + 1) * (1 if good else -1)
        return out
    x, y = features.double().cpu().numpy(), right.cpu().numpy()
    if kind == "svm":
        from sklearn.svm import LinearSVC

        made = LinearSVC(dual=False, random_state=0).fit(x, y)
    else:
        from sklearn.linear_model import LogisticRegression

        made = LogisticRegression(random_state=0).fit(x, y)
    out[:-1] = torch.from_numpy(made.coef_[0]).float()
    out[-1] = float(made.intercept_[0])
    return out
