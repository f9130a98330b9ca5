"""Timing the tiles of GPU kernels, for `llmc tune --target triton`.

A time is the median of CUDA graph replays that go round over copies of the weight beyond three
times the L2 cache, so that each call reads its weight from memory as a decoding model does.
"""

from __future__ import annotations

import dataclasses
import functools
import statistics
from collections.abc import Callable, Sequence
from typing import Any

import torch

from ...compiler.ir.errors import LlmcError, ResourceError
from .. import facts as aot_facts
from ..aot import AotFacts
from ..device import installed, unavailable
from ..graphs import captured
from ..kernels import choose
from ..launch import fused_linear
from ..prepack import Packed, prepack
from ..problem import DTYPES, Problem
from ..row import KernelRow, TileConfig
from ..samples import random_parts
from ..variants import TARGETS, Variant
from .cache import Machine
from .choices import gpu
from .grid import TOKENS, bare, bucket_text, candidates, config_text, key_of
from .tuners import Trial, Tuner

ROTATE = 3  # times the L2 cache
L2 = 60 * 2**20  # where the device does not tell
REPEATS = 20
SHAPES = ((4096, 4096), (28672, 4096), (4096, 14336), (6144, 4096))
SCHEMES: tuple[dict[str, object], ...] = (
    {"bits": 4, "group": 128}, {"bits": 4, "group": 128, "asym": True}, {"bits": 8, "group": 0},
    {"bits": 4, "group": 64, "n": 2, "m": 4},
)  # fmt: skip

Timer = Callable[[KernelRow, Problem, int, Sequence[TileConfig]], dict[TileConfig, float]]
"""Seconds of a call by tile; a tile that does not run is left out."""


def why_not() -> str | None:
    """Why nothing can be timed here."""
    if not torch.cuda.is_available():
        return "no CUDA device"
    return unavailable()


def machine() -> Machine:
    """This machine's GPU, or what it would be."""
    return gpu() or Machine("triton", "no CUDA device", compiler=_compiler())


def _compiler() -> str:
    return f"triton {aot_facts.compiler()}" if installed() else "no triton"


def target() -> str:
    """The machine whose facts prune: sm_90, or sm_80 where the device is older."""
    old = torch.cuda.is_available() and torch.cuda.get_device_capability() < (9, 0)
    return TARGETS[0] if old else TARGETS[1]


def typical() -> list[Problem]:
    """Common schemes at the shapes of an 8B model."""
    return [
        Problem(N, K, x_dtype="bf16", **scheme)  # type: ignore[arg-type]
        for N, K in SHAPES
        for scheme in SCHEMES
    ]


def trials(problems: Sequence[Problem], tokens: Sequence[int]) -> list[Trial]:
    """One decision per variant, shape and bucket, where more than one tile may be fastest; without
    the sides that a call would have to bring.

    Only facts that are known already prune here, so that this compiles nothing; `measure` compiles.
    """
    found: dict[tuple[str, int], Trial] = {}
    for problem in map(bare, problems):
        row, _ = choose(problem)
        if row is None:
            continue
        key = key_of(row, problem)
        for count in tokens:
            tiles = candidates(row, problem, count, known_facts, target=target())
            if len(tiles) > 1:
                made = Trial(key, count, tuple(map(config_text, tiles)), problem)
                found.setdefault((key, count), made)
    return list(found.values())


def known_facts(row: KernelRow, problem: Problem, config: TileConfig) -> AotFacts | None:
    """Facts that an earlier compile left in the cache; none without Triton."""
    if not installed():
        return None
    return aot_facts.kept(Variant(row.name, "tuned", problem, config, target()))


def compiled_facts(row: KernelRow, problem: Problem, config: TileConfig) -> AotFacts | None:
    """Facts from the cache, or from the compiler; None where a tile does not compile."""
    try:
        variant = Variant(row.name, "tuned", problem, config, target())
        (facts,) = aot_facts.gather([variant], processes=1)
    except ResourceError:
        return None
    return facts if isinstance(facts, AotFacts) else None


def measure(
    trial: Trial,
    *,
    timer: Timer | None = None,
    facts_of: Callable[[KernelRow, Problem, TileConfig], AotFacts | None] = compiled_facts,
) -> dict[str, float]:
    """Seconds by tile of a trial, pruned by the facts of each; ``timer``: graph replays when None.

    ResourceError when no tile runs.
    """
    row, why = choose(trial.problem)
    if row is None:
        raise ResourceError(f"expected a kernel for {trial.key}, found none: {why[0]}")
    tiles = candidates(row, trial.problem, trial.tokens, facts_of, target=target())
    seconds = (timer or graph_seconds)(row, trial.problem, trial.tokens, tiles)
    if not seconds:
        raise ResourceError(f"expected a tile of {trial.key} that runs, found none")
    return {config_text(c): s for c, s in seconds.items()}


def graph_seconds(
    row: KernelRow, problem: Problem, M: int, tiles: Sequence[TileConfig]
) -> dict[TileConfig, float]:
    """Median seconds of one call by tile, on the current CUDA device."""
    x = torch.randn(M, problem.K, device="cuda").to(DTYPES[problem.x_dtype])
    packed = _rotating(row, problem)
    found = {}
    for config in tiles:
        try:
            found[config] = replayed(functools.partial(_call, x, config), packed)
        except (LlmcError, torch.OutOfMemoryError, RuntimeError):
            continue  # a tile that this GPU cannot launch is no candidate
    return found


def _call(x: torch.Tensor, config: TileConfig, packed: Packed) -> torch.Tensor:
    return fused_linear(packed, x, config=config)


@functools.lru_cache(1)
def _rotating(row: KernelRow, problem: Problem) -> list[Packed]:
    """Copies of one random weight, beyond three times the L2 cache; kept for the next bucket."""
    one = prepack(row, problem, **random_parts(problem, device="cuda"))
    copies = max(2, rotate_bytes() // max(1, one.bytes) + 1)

    def copied(packed: Packed) -> Packed:
        return dataclasses.replace(packed, tensors={n: t.clone() for n, t in one.tensors.items()})

    return [one, *(copied(one) for _ in range(copies - 1))]


def rotate_bytes() -> int:
    """Bytes of weights that no cache holds."""
    return ROTATE * int(getattr(torch.cuda.get_device_properties(0), "L2_cache_size", 0) or L2)


def replayed(call: Callable[[Any], object], over: Sequence[Any], repeats: int = REPEATS) -> float:
    """Median seconds of ``call`` of each, from replays of one CUDA graph that calls all."""

    def each() -> None:
        for one in over:
            call(one)

    # The first call of all, too: each weight makes what it keeps outside of the graph.
    graph, _ = captured(each, device=torch.device("cuda", torch.cuda.current_device()))
    graph.replay()
    times = []
    for _ in range(repeats):
        start, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
        start.record()
        graph.replay()
        end.record()
        end.synchronize()
        times.append(start.elapsed_time(end) * 1e-3 / len(over))
    return statistics.median(times)


TUNER = Tuner("triton", why_not, machine, typical, trials, TOKENS, measure, bucket_text)
