"""The tuning grid of GPU kernels: buckets of tokens, and the few tiles that are worth timing.

Tiles are ordered by an estimate from counts alone, then those whose machine code spills, overfills
shared memory or takes many more issue slots than the best are dropped before any is timed.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING

from ..problem import Problem
from ..render import variant_name
from ..row import KernelRow, TileConfig
from ..variants import SHARED

if TYPE_CHECKING:
    from ..aot import AotFacts

# First and last number of tokens of a bucket; the last one of each is timed, except the open one's.
BUCKETS: tuple[tuple[int, int], ...] = (
    (1, 1), (2, 8), (9, 16), (17, 32), (33, 64), (65, 256), (257, 1 << 30),
)  # fmt: skip
OPEN = 2048
TOKENS = tuple(last if last < 1 << 30 else OPEN for _, last in BUCKETS)
MOST = 12  # candidates of a bucket
SLOTS = 1.5  # times the fewest issue slots per weight: beyond, a tile cannot be fastest

FactsOf = Callable[[KernelRow, Problem, TileConfig], "AotFacts | None"]


def bucket(M: int) -> int:
    """The number of tokens that stands for M."""
    return next(t for t, (_, last) in zip(TOKENS, BUCKETS, strict=True) if max(M, 1) <= last)


def bucket_text(tokens: int) -> str:
    """``"2-8"`` or ``">256"``: the bucket that `tokens` stands for."""
    first, last = next(b for b in BUCKETS if tokens <= b[1])
    if last == 1 << 30:
        return f">{first - 1}"
    return str(first) if first == last else f"{first}-{last}"


def bare(problem: Problem) -> Problem:
    """A problem without the sides that cost little beside its weight: measured for all of them."""
    return problem.without("bias", "residual", "out_norm", "out_eps")


def key_of(row: KernelRow, problem: Problem) -> str:
    """What measurements go by: the variant without its cheap sides, and its shape."""
    plain = dataclasses.replace(bare(problem), act=problem.act and "silu")
    return f"{variant_name(row, plain)} {problem.N}x{problem.K}"


def config_text(config: TileConfig) -> str:
    """``8x128 stages 4 warps 4``, and the split where there is one."""
    split = f" split {config.split}" if config.split > 1 else ""
    return f"{config.BM}x{config.BN} stages {config.stages} warps {config.warps}{split}"


def config_of(text: str) -> TileConfig | None:
    """The tile that `config_text` wrote; None where the text is none."""
    tile, *rest = text.split()
    try:
        named = {k: int(v) for k, v in zip(rest[::2], rest[1::2], strict=True)}
        BM, BN = (int(v) for v in tile.split("x"))
        return TileConfig(BM, BN, **named)
    except (ValueError, TypeError):
        return None


def estimate(
    row: KernelRow, problem: Problem, M: int, config: TileConfig, processors: int
) -> float:
    """Work of the busiest processor in arbitrary units: waves of programs, tokens beyond M, splits.

    It orders tiles; it is no time.
    """
    programs = -(-problem.N // config.BN) * -(-M // config.BM) * config.split
    waves = -(-programs // processors)
    columns = problem.K / config.split
    work = config.BN * columns * (1 + config.BM / 64)
    joined = config.BM * config.BN * 64 * (config.split - 1)
    # Two stages hide no latency, six take room from a second block.
    depth = 1 + 0.02 * abs(config.stages - row.stages[min(1, len(row.stages) - 1)])
    return (waves * work + joined) * depth


def candidates(
    row: KernelRow,
    problem: Problem,
    tokens: int,
    facts_of: FactsOf = lambda row, problem, config: None,
    *,
    processors: int = 132,
    target: str = "sm_90",
    most: int = MOST,
) -> tuple[TileConfig, ...]:
    """At most ``most`` tiles for a bucket, best estimate first; never empty for a served problem.

    facts_of: the facts of a tile, or None where they are not known: such a tile stays.
    """
    grid = sorted(
        _covering(row.configs(problem), tokens),
        key=lambda c: (estimate(row, problem, tokens, c, processors), -c.BN, c.stages),
    )
    # The untuned tile first; two thirds of the places to tiles that differ in more than depth.
    usual = row.default_config(problem, tokens, processors)
    apart = [c for c in grid if c.stages == usual.stages][: 2 * most // 3]
    grid = list(dict.fromkeys([usual, *apart, *grid]))
    kept: list[TileConfig] = []
    slots: list[float] = []
    for config in grid:
        facts = facts_of(row, problem, config)
        if facts is not None and refused(facts, target, slots) is not None:
            continue
        if facts is not None:
            slots.append(facts.slots)
        kept.append(config)
        if len(kept) == most:
            break
    # With nothing left every tile breaks a rule: the untuned choice runs all the same.
    return tuple(kept) or (row.default_config(problem, tokens, processors),)


def refused(facts: AotFacts, target: str, slots: Sequence[float] = ()) -> str | None:
    """Why a tile is not timed; None when it is. slots: of the tiles that are."""
    if facts.stack or facts.local_memory:
        return f"spills {facts.stack} bytes of stack"
    if facts.shared > SHARED[target]:
        return f"takes {facts.shared} bytes of shared memory"
    if slots and facts.slots > SLOTS * min(slots):
        return f"takes {facts.slots} slots per weight where another takes {min(slots)}"
    return None


def _covering(configs: Sequence[TileConfig], tokens: int) -> list[TileConfig]:
    """Tiles of the two least sizes that hold all tokens, or of the two largest where none does."""
    sizes = sorted({c.BM for c in configs})
    holding = [s for s in sizes if s >= tokens][:2]
    wanted = holding if len(holding) == 2 else sizes[-2:]
    return [c for c in configs if c.BM in wanted]
