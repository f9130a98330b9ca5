"""Measuring the ways of CPU kernels on this machine, for `llmc tune`."""

from __future__ import annotations

import statistics
import time
from collections.abc import Callable, Mapping, Sequence
from functools import partial

import torch

from ...compiler.ir import packing
from ...compiler.ir.errors import ResourceError
from ..problem import DTYPES, Problem
from ..tuning.tuners import Trial, Tuner
from .choose import choose
from .decoded import DENSE
from .serve import pack
from .table import key_of, machine, one_thread

SHAPES = ((4096, 4096), (1024, 1024), (512, 2048))
DTYPES_TRIED = {"bf16": torch.bfloat16, "fp32": torch.float32}
SECONDS = 0.4  # per way and number of tokens, at most about so long
TURNS = 15


def typical() -> list[Problem]:
    """Common schemes at common shapes."""
    schemes = [(4, 128, False), (4, 32, False), (4, 128, True), (3, 128, False), (8, 0, False),
               (8, 128, False)]  # fmt: skip
    found = [
        Problem(N, K, bits=bits, group=group, asym=asym, x_dtype="bf16")
        for N, K in SHAPES
        for bits, group, asym in schemes
    ]
    return found + [_dense(N, K) for N, K in SHAPES]


def _dense(N: int, K: int) -> Problem:
    """A linear without a scheme: what the dtype of a whole model is chosen by."""
    return Problem(N, K, bits=16, group=0, weights="dense", x_dtype="bf16", scale_dtype="")


def trials(problems: Sequence[Problem], tokens: Sequence[int]) -> list[Trial]:
    """One decision per scheme, shape and number of tokens, where a kernel has several ways."""
    found: dict[tuple[str, int], Trial] = {}
    for problem in problems:
        kernel, _ = choose(problem)
        if kernel is None:
            continue
        ways = tuple(DTYPES_TRIED) if kernel is DENSE else tuple(kernel.ways)
        if len(ways) < 2:
            continue
        key = key_of(kernel, problem)
        for count in tokens:
            found.setdefault((key, count), Trial(key, count, ways, problem))
    return list(found.values())


def measure(trial: Trial) -> dict[str, float]:
    """Median seconds of each way, in turn, so that drift meets all alike."""
    problem = trial.problem
    kernel, why = choose(problem)
    if kernel is None:
        raise ResourceError(f"expected a CPU kernel for {trial.key}, found none: {why}")
    g = torch.Generator().manual_seed(0)
    x = torch.randn(trial.tokens, problem.K, generator=g)
    if kernel is DENSE:
        weight = torch.randn(problem.N, problem.K, generator=g)
        both = {n: (x.to(d), weight.to(d)) for n, d in DTYPES_TRIED.items()}
        return timed({n: partial(torch.nn.functional.linear, *given) for n, given in both.items()})
    packed = pack(kernel, problem, random_parts(problem, g))
    x = x.to(DTYPES.get(problem.x_dtype, torch.bfloat16))
    return timed({n: partial(way, problem, x, packed) for n, way in kernel.ways.items()})


def timed(
    calls: Mapping[str, Callable[[], object]], *, turns: int = TURNS, seconds: float = SECONDS
) -> dict[str, float]:
    """Median seconds by name, taken in turn; fewer turns where one takes long.

    The thread's own time where there is one thread, which others on the machine do not change.
    """
    clock = time.thread_time if one_thread() else time.perf_counter
    taken: dict[str, list[float]] = {name: [] for name in calls}
    with torch.no_grad():
        for call in calls.values():
            call()
        for turn in range(turns):
            for name, call in calls.items():
                if turn >= 3 and sum(taken[name]) > seconds:
                    continue
                began = clock()
                call()
                taken[name].append(max(clock() - began, 1e-9))
    return {name: statistics.median(times) for name, times in taken.items()}


def random_parts(problem: Problem, g: torch.Generator) -> dict[str, torch.Tensor]:
    """Canonical parts of a random weight of integers."""
    q = torch.randint(0, 1 << problem.bits, (problem.N, problem.columns), generator=g)
    scale = torch.rand(problem.N, problem.groups, generator=g) * 0.02 + 0.005
    parts = {
        "codes": packing.pack(q, problem.bits),
        "scale": scale.to(DTYPES.get(problem.scale_dtype, torch.float16)),
    }
    if problem.asym:
        zero = torch.randint(0, 1 << problem.bits, scale.shape, generator=g)
        parts["zero"] = zero.to(torch.uint8)
    if problem.m:
        blocks = (problem.N, problem.K // problem.m, problem.m)
        kept = torch.rand(blocks, generator=g).argsort(-1) < problem.n
        spread = torch.zeros(problem.N, problem.K)
        _, parts["meta"] = packing.compress_nm(spread, kept.flatten(-2), problem.n, problem.m)
    return parts


TUNER = Tuner(
    "cpu", lambda: None, machine, typical, trials, (1, 4, 16, 32, 64, 256, 1024), measure
)  # fmt: skip
