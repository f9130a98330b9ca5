"""Bad calibration (R12): nothing not finite out, never worse than rounding, every fallback said."""

from __future__ import annotations

import itertools

import pytest
import torch

from llmc.compiler.solvers import Grid, MaskRule, prepare, rtn, solve
from llmc.compiler.solvers.masks import static_mask

N, M = 32, 8


def _x(tokens: int = 64) -> torch.Tensor:
    x = torch.randn(tokens, N, generator=torch.Generator().manual_seed(7))
    x[:, 2] *= 30
    return x


def _gram(x: torch.Tensor) -> torch.Tensor:
    return x.T @ x


def _edit(*changes: tuple[int, int, float]) -> torch.Tensor:
    h = _gram(_x())
    for i, j, value in changes:
        h[i, j] = value
    return h


def _duplicate() -> torch.Tensor:
    x = _x()
    x[:, 7] = x[:, 6]
    x[:, 9] = -x[:, 6]
    return _gram(x)


def _dead(*at: int) -> torch.Tensor:
    x = _x()
    x[:, list(at)] = 0
    return _gram(x)


def _constant() -> torch.Tensor:
    x = _x()
    x[:, 4] = 5.0
    return _gram(x)


def _indefinite() -> torch.Tensor:
    h = _gram(_x())
    q, _ = torch.linalg.qr(torch.randn(N, N, generator=torch.Generator().manual_seed(8)))
    return h - 150 * torch.outer(q[0], q[0])


NAN, INF = float("nan"), float("inf")
HESSIANS = {
    "good": (_gram(_x()), None),
    "zero": (torch.zeros(N, N), "all zero"),
    "rank 1": (_gram(_x(1)), None),
    "one token, one input": (_gram(torch.eye(N)[:1]), "31 dead"),
    "two tokens": (_gram(_x(2)), None),
    "constant input": (_constant(), None),
    "all ones": (torch.ones(N, N), None),
    "duplicates": (_duplicate(), None),
    "one dead": (_dead(5), "1 dead"),
    "half dead": (_dead(*range(0, N, 2)), "16 dead"),
    "all but one dead": (_dead(*range(1, N)), "31 dead"),
    "nan upper": (_edit((1, 9, NAN)), "NaN or Inf"),
    "nan lower": (_edit((9, 1, NAN)), "NaN or Inf"),
    "nan diagonal": (_edit((3, 3, NAN)), "NaN or Inf"),
    "all nan": (torch.full((N, N), NAN), "NaN or Inf"),
    "inf upper": (_edit((1, 9, INF)), "NaN or Inf"),
    "inf lower": (_edit((9, 1, -INF)), "NaN or Inf"),
    "inf diagonal": (_edit((0, 0, INF)), "NaN or Inf"),
    "negative diagonal": (_edit((3, 3, -1.0)), "negative diagonal"),
    "one triangle": (_gram(_x()).triu(), "not symmetric"),
    "indefinite": (_indefinite(), "not positive definite"),
    "dead with ghosts": (_edit((5, 5, 0.0)), "1 dead"),
    "1e30": (_gram(_x()) * 1e30, None),
    "1e-30": (_gram(_x()) * 1e-30, None),
    "1e-42": (_gram(_x()) * 1e-42, None),
    "huge outlier": (_edit((2, 2, 1e12)), None),
    "identity": (torch.eye(N), None),
    "tiny diagonal": (_gram(_x() * torch.logspace(-8, 2, N)), None),
    "int32": (_gram(_x()).int(), None),
    "fp16": (_gram(_x()).half(), None),
}
TASKS = {
    "gptq": {"grid": Grid(4, 8)},
    "gptq row": {"grid": Grid(3, None, symmetric=False, clip="mse"), "act_order": True},
    "2:4": {"mask": MaskRule("nm", 2, 4)},
    "half": {"mask": MaskRule("unstructured", sparsity=0.5)},
    "joint": {"grid": Grid(4, 8), "mask": MaskRule("nm", 2, 4), "act_order": True},
    "refined": {
        "grid": Grid(4, 8),
        "mask": MaskRule("nm", 2, 4),
        "sweeps": 2,
        "mask_search": True,
    },
    "wanda": {"grid": Grid(4, 16), "mask": MaskRule("nm", 2, 4), "mask_solver": "wanda"},
}


def usable(hessian: torch.Tensor) -> torch.Tensor:
    """The metric that answers are judged by: what `prepare` made of the Hessian."""
    factor = prepare(hessian)
    factor.root()
    return factor.hessian.double()


def plain(weight: torch.Tensor, task: dict, hessian: torch.Tensor) -> torch.Tensor:
    """Magnitude (or Wanda) mask, then nearest codes with the same grid."""
    keep = None
    importance = usable(hessian).diagonal().float()
    if "mask" in task:
        solver = task.get("mask_solver", "magnitude")
        keep = static_mask(task["mask"], solver, weight.t(), importance).t()
    if "grid" in task:
        return rtn(weight, task["grid"], keep=keep, importance=importance).weight
    return weight * keep


@pytest.mark.parametrize("size", [1.0, 1e-3])
@pytest.mark.parametrize(("name", "task"), list(itertools.product(HESSIANS, TASKS)))
def test_degenerate_hessians(name, task, size):
    hessian, reason = HESSIANS[name]
    options = TASKS[task]
    weight = torch.randn(M, N, generator=torch.Generator().manual_seed(9)) * size
    s = solve(weight, hessian, **options)
    assert bool(torch.isfinite(s.weight).all())
    assert s.loss == s.loss
    assert s.loss < INF
    if reason is not None:
        assert any(reason in f for f in s.fallbacks), s.fallbacks
    metric = usable(hessian)

    def loss(found: torch.Tensor) -> float:
        d = (weight - found).double()
        return float((d @ metric * d).sum())

    whole = float((weight.double() @ metric * weight.double()).sum())
    assert loss(s.weight) <= loss(plain(weight, options, hessian)) * (1 + 1e-4) + 1e-12 * whole
    if "grid" in options and "mask" not in options:
        # nothing that is large enough for its grid is zeroed, dead inputs least of all
        big = weight.abs() > 0.6 * float(s.scale.max())
        dead = prepare(hessian).diagonal == 0
        assert bool((s.weight[:, dead][big[:, dead]] != 0).all())


@pytest.mark.parametrize("size", [1e30, 3e38, 1e-30, 1e-38])
@pytest.mark.parametrize("task", TASKS)
def test_extreme_weights(size, task):
    weight = torch.randn(M, N, generator=torch.Generator().manual_seed(9)).clamp(-1, 1) * size
    s = solve(weight, HESSIANS["good"][0], **TASKS[task])
    assert bool(torch.isfinite(s.weight).all())
    assert s.loss == s.loss
    assert s.loss < INF
    if "grid" in TASKS[task] and size > 1:
        assert any("saturate" in f for f in s.fallbacks)
    if "grid" in TASKS[task] and size < 1:
        assert any("vanish" in f for f in s.fallbacks)
    wide = dict(TASKS[task])
    if "grid" in wide and size > 1:
        g = wide["grid"]
        wide["grid"] = Grid(g.bits, g.group, g.symmetric, g.clip, torch.float32)
        roomy = solve(weight, HESSIANS["good"][0], **wide)
        assert roomy.loss < 0.5
        assert roomy.fallbacks == ()


def test_a_zero_weight_is_no_problem():
    s = solve(torch.zeros(M, N), HESSIANS["good"][0], grid=Grid(4, 8), mask=MaskRule("nm", 2, 4))
    assert s.loss == 0
    assert bool((s.weight == 0).all())


def test_dead_inputs_are_rounded_to_nearest():
    weight = torch.randn(M, N, generator=torch.Generator().manual_seed(10))
    dead = list(range(8, 16))
    s = solve(weight, _dead(*dead), grid=Grid(4, 8))
    assert torch.equal(s.weight[:, dead], rtn(weight, Grid(4, 8)).weight[:, dead])


def test_damping_climbs_only_as_far_as_needed():
    s = solve(torch.randn(M, N), _indefinite(), grid=Grid(4, 8))
    assert 0.01 < s.damp <= 1.0
    assert any("damp raised" in f for f in s.fallbacks)
    assert solve(torch.randn(M, N), _gram(_x(1)), grid=Grid(4, 8), damp=0.0).damp > 0


def test_no_damping_needed_no_damping_used():
    s = solve(torch.randn(M, N), _gram(_x(4096)), grid=Grid(4, 8), damp=0.0)
    assert s.damp == 0
    assert s.fallbacks == ()


def test_one_row_and_one_input():
    assert solve(torch.ones(1, N), _gram(_x()), grid=Grid(4, 8, clip="mse")).loss < 1e-6
    s = solve(torch.full((3, 1), 0.3), torch.ones(1, 1), grid=Grid(4))
    assert s.codes.shape == (3, 1)
