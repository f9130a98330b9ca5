"""Which pairs of a token and an expert there are, in the order of experts: who makes it, and what
the programs of a launch leave for each other.

For few pairs the kernel of gate and up chooses by itself. Programs with a low ticket multiply the
router, as those of a product of low rank multiply by right (see ``workspace``); the last of them
chooses, and counts for each pair those before it. For more, or where the graph chose, torch sorts.
Either way nothing waits for the CPU: all sizes follow from the number of tokens.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

import torch

from ..problem import Problem
from ..row import TileConfig
from . import choice as choices
from . import fit
from .choice import read_choice

MOST = 512  # pairs that one program puts in order
JOB = 16  # rows of the router that a program multiplies at a time
MOST_RUNS = 8


@dataclass(frozen=True)
class Routing:
    """order int32 [P]: pairs t*k + slot by expert; where int32 [P]: the place of each pair there;
    starts int32 [E + 1]: where each expert's begin; shares fp32 [P]: weight of each pair."""

    order: torch.Tensor
    where: torch.Tensor
    starts: torch.Tensor
    shares: torch.Tensor

    @property
    def tensors(self) -> dict[str, torch.Tensor]:
        """By argument of a kernel."""
        return {
            "order": self.order, "where": self.where, "starts": self.starts, "shares": self.shares
        }  # fmt: skip


def empty(problem: Problem, M: int, device: torch.device) -> Routing:
    """Room for what a kernel itself makes."""
    pairs, how = M * problem.chosen, {"dtype": torch.int32, "device": device}
    order, where = (torch.empty(pairs, **how) for _ in range(2))  # type: ignore[call-overload]
    starts = torch.empty(problem.experts + 1, **how)  # type: ignore[call-overload]
    return Routing(order, where, starts, torch.empty(pairs, device=device))


def told(problem: Problem, index: torch.Tensor, weight: torch.Tensor) -> Routing:
    """Of index and weight [T, k]; an index that is none of an expert reads no memory of others."""
    flat = index.reshape(-1).clamp(0, problem.experts - 1)
    by_expert, order = flat.sort(stable=True)
    places = torch.arange(len(flat), device=flat.device)
    every = torch.arange(problem.experts + 1, device=flat.device, dtype=flat.dtype)
    where = torch.empty_like(order).scatter_(0, order, places)
    starts = torch.searchsorted(by_expert, every)
    int32 = torch.int32
    shares = weight.reshape(-1).float().contiguous()
    return Routing(order.to(int32), where.to(int32), starts.to(int32), shares)


def choose(
    problem: Problem, h: torch.Tensor, tensors: Mapping[str, torch.Tensor]
) -> tuple[torch.Tensor, torch.Tensor]:
    """Index and weight [T, k] of what experts read, h [T, K], as `Problem.route` says.

    tensors: the packed router, and correction where there is one.
    """
    h = h.float() if problem.wide_router else h
    products, choice = (h @ tensors["router"].to(h.dtype).T).float(), read_choice(problem.route)
    assert choice is not None
    correction = tensors.get("correction")
    return choices.choose(choice, products, fit.picked(problem), correction, problem.always)


# ** workspaces **


def blocks(problem: Problem) -> int:
    """Blocks of 16 rows of the router."""
    return -(-fit.router_rows(problem) // JOB)


def runs(problem: Problem) -> int:
    """Runs of columns into which the router is cut."""
    count = MOST_RUNS
    while count > 1 and (256 * count > problem.K or blocks(problem) * count > 128):
        count //= 2
    return count


def constants(problem: Problem, config: TileConfig, M: int, processors: int) -> dict[str, int]:
    """RUNS and MAKERS; one processor: programs run in turn."""
    jobs = blocks(problem) * runs(problem) * -(-M // config.BM)
    programs = fit.rows_of(problem) // config.BN * fit.tiles(problem, M, config.BM)
    makers = max(1, min(jobs, programs, processors))
    return {"RUNS": runs(problem), "MAKERS": 1 << (makers.bit_length() - 1)}


def needed(problem: Problem) -> bool:
    """Whether programs leave each other anything."""
    return bool(problem.route) or problem.routed == "down"


def sizes(problem: Problem, config: TileConfig, M: int) -> tuple[int, int]:
    """Elements of the scratch (fp32) and of the counters (int32)."""
    if problem.routed == "down":
        return M * problem.chosen * problem.outputs, problem.outputs // config.BN
    if problem.route:
        return runs(problem) * M * (JOB * blocks(problem) + 1), 3
    return 0, 0
