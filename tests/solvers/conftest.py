"""A small layer problem with every difficulty of a real one, in fp64."""

from __future__ import annotations

from dataclasses import dataclass

import pytest
import torch
from torch import Tensor


@dataclass(frozen=True)
class Problem:
    """weight [m, n] and hessian [n, n], both fp64."""

    weight: Tensor
    hessian: Tensor

    def loss(self, found: Tensor, ridge: float = 0.0) -> float:
        """tr(D H D^T) with the ridge added to H, not divided by anything."""
        d = self.weight - found.double()
        h = self.hessian + ridge * torch.eye(len(self.hessian), dtype=torch.float64)
        return float((d @ h * d).sum())


def make_problem(
    m: int = 24,
    n: int = 64,
    *,
    tokens: int = 256,
    seed: int = 0,
    outlier: bool = True,
    dead: bool = False,
) -> Problem:
    """Power-law spectrum under a random rotation, one outlier input, optionally a dead one."""
    g = torch.Generator().manual_seed(seed)
    double = {"generator": g, "dtype": torch.float64}
    spectrum = torch.arange(1, n + 1, dtype=torch.float64) ** -0.7
    rotation = torch.linalg.qr(torch.randn(n, n, **double))[0]
    x = torch.randn(tokens, n, **double) * spectrum.sqrt() @ rotation
    if outlier:
        x[:, 3] *= 20
    if dead:
        x[:, 5] = 0
    return Problem(torch.randn(m, n, **double) / n**0.5, x.T @ x)


@pytest.fixture(scope="session")
def problem() -> Problem:
    """24 x 64, 256 tokens, one outlier input."""
    return make_problem()


@pytest.fixture(scope="session")
def build():
    """`make_problem`, for tests that need another one."""
    return make_problem
