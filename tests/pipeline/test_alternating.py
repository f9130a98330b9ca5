"""Low rank and the rest found in turn: never worse with more turns, better on what it is for."""

from itertools import pairwise

import pytest
import torch

from llmc.compiler.ir.scheme import LowRank
from llmc.compiler.ir.verifier import verify, verify_tensors
from llmc.compiler.pipeline import recipe, zoo
from llmc.compiler.pipeline.alternating import STARTS, alternated
from llmc.compiler.pipeline.compile import compile_plan
from llmc.compiler.pipeline.plan import make_plan
from llmc.compiler.pipeline.residual import compensate
from llmc.compiler.solvers import Grid, MaskRule, prepare, solve

TOKENS = torch.randint(0, 20, (6, 12), generator=torch.Generator().manual_seed(1))


def problem(seed=0, spike=0.0):
    """A weight [24, 32], with a large part of rank 2 on top, and XᵀX of correlated inputs."""
    g = torch.Generator().manual_seed(seed)
    w = torch.randn(24, 32, generator=g)
    w = w + spike * torch.randn(24, 2, generator=g) @ torch.randn(2, 32, generator=g)
    x = torch.randn(200, 32, generator=g) @ torch.randn(32, 32, generator=g)
    return w, prepare(x.T @ x)


def loss(w, factor, solution, form="outputs"):
    return compensate(w, solution.weight, LowRank(2), form, factor)[2]["loss"]


RESTS = {"w3": {"grid": Grid(3, 8)}, "2:4": {"mask": MaskRule("nm", 2, 4)},
         "2:4 w4": {"grid": Grid(4, 8), "mask": MaskRule("nm", 2, 4)}}  # fmt: skip


@pytest.mark.parametrize("start", STARTS)
@pytest.mark.parametrize("rest", RESTS)
@pytest.mark.parametrize("spike", [0.0, 8.0])
def test_more_turns_never_lose_more(start, rest, spike):
    w, factor = problem(spike=spike)

    def answer(target):
        return solve(target, factor=factor, **RESTS[rest])

    losses = [
        loss(w, factor, alternated(answer, w, LowRank(2), "outputs", factor, None, n, start))
        for n in (1, 2, 4, 6)
    ]
    assert all(b <= a * (1 + 1e-9) for a, b in pairwise(losses))
    if start == "best":
        assert losses[0] == loss(w, factor, answer(w)), "one round from the best start is lorc"


def test_one_round_from_the_rest_is_lorc():
    w, factor = problem()
    plain = solve(w, grid=Grid(3, 8), factor=factor)
    again = alternated(
        lambda t: solve(t, grid=Grid(3, 8), factor=factor), w, LowRank(2), "outputs", factor, None,
        1, "rest",
    )  # fmt: skip
    assert torch.equal(plain.weight, again.weight)


def test_own_directions_take_what_is_large():
    """A part of rank 2 that widens every group's range is out of the grid's way."""
    w, factor = problem(spike=8.0)

    def answer(target):
        return solve(target, grid=Grid(3, 8), factor=factor)

    given = (answer, w, LowRank(2), "outputs", factor, None)
    late, early = (loss(w, factor, alternated(*given, 1, s)) for s in ("rest", "low_rank"))
    assert early < 0.2 * late


@pytest.mark.parametrize(
    "text", ["w3:group=8", "prune24", "prune24,w4:group=8", "smooth,nf4:group=8"]
)
def test_the_pass_is_at_least_as_good_as_lorc(text):
    program = zoo.decoder(hidden=32, inner=32, heads=8)
    sums = []
    for more in ("lorc:rank=3", "lowrank_residual:rank=3", "lowrank_residual:rank=3,rounds=6"):
        plan = make_plan(program, recipe.from_strings([f"{text},{more}"]))
        done = compile_plan(plan, TOKENS)
        verify(done.program)
        verify_tensors(done.program)
        assert plan.program.weight_bytes() == done.program.weight_bytes()
        first = [r for r in done.records if r["site"].startswith("block0/")][:3]
        sums.append(sum(r["loss"] for r in first))
    assert sums[1] <= sums[0] * (1 + 1e-6)
    assert sums[2] <= sums[1] * (1 + 1e-6)
