"""What the programs of one launch leave for each other: partial sums, and counters that every
launch finds and leaves at zero.

Five things need it. Under ``split`` several programs share the columns of a tile, and the last one
to finish adds what all of them left, in the order of their columns. Beside a product of low rank,
the programs that start first multiply x by right, and the epilogues wait for it; of factors that
are codes by whole tiles of right, whose runs the last one to finish adds in their order. They wait
for programs that have started only: a ticket tells who makes, and tickets that make are never more
than processors, so those before them always find room to run. Before a norm of the result every
program leaves its part of the rows, and of the sums of their squares; the last one of a block of
tokens reads all of it. Where x is put on a grid before weights of floats, or mixed, the programs
that start first make it, and all wait for them in the same way. Where a result is mixed back, the
programs that come last share whole rows, and wait for each other: they are as few, so whoever has
not come yet finds room. These bytes stay in the L2 cache: none of them is read from memory.
"""

from __future__ import annotations

from .ending import enders, terms
from .mixture import routing
from .prepack import Packed
from .problem import Problem
from .row import RANK_STEP as JOB  # rows of right that a program multiplies at a time
from .row import TileConfig
from .spans import ranks

DEPTH = 128  # columns of right at a time; its rows are padded to whole ones
MOST_RUNS = 8
LINE = 32  # fp32 numbers of a line of the cache


def runs(problem: Problem, config: TileConfig) -> int:
    """Runs of columns into which one row of right is cut: more make sooner what all wait for, but
    everybody adds their parts."""
    count = MOST_RUNS
    while count > 1 and (256 * count > problem.K or _blocks(problem, config) * count > 128):
        count //= 2
    return count


def _blocks(problem: Problem, config: TileConfig) -> int:
    """Of rows of right that a program multiplies at a time: a tile of them where they are codes."""
    return -(-ranks(problem) // config.BN) if problem.coded else ranks(problem) // JOB


def constants(problem: Problem, config: TileConfig, M: int, processors: int) -> dict[str, int]:
    """The compile-time constants that say who does what; one processor: programs run in turn."""
    found = {"SPLIT": config.split}
    if problem.route:
        return found | routing.constants(problem, config, M, processors)
    if problem.rank:
        columns, rows = _tiles(problem, config, M)
        jobs = _blocks(problem, config) * runs(problem, config)
        makers = max(1, min(jobs, columns * config.split, processors // rows))
        # One kernel for all numbers of tokens of a bucket: a power of two.
        found |= {"RUNS": runs(problem, config), "MAKERS": 1 << (makers.bit_length() - 1)}
    if problem.made:  # a token each
        columns, rows = _tiles(problem, config, M)
        hands = max(1, min(config.BM, columns * config.split, processors // rows))
        found["HANDS"] = 1 << (hands.bit_length() - 1)
    return found | _enders(problem, config, M, processors)


def _enders(problem: Problem, config: TileConfig, M: int, processors: int) -> dict[str, int]:
    """How many programs of a block of tokens mix what is mixed back."""
    if not problem.out_mixed:
        return {}
    columns, rows = _tiles(problem, config, M)
    return {"ENDERS": enders(problem, config.BM, columns, processors // rows)}


def needed(problem: Problem, config: TileConfig) -> bool:
    """Whether a launch has a workspace at all."""
    return config.split > 1 or problem.rank > 0 or routing.needed(problem)


def sizes(problem: Problem, config: TileConfig, M: int) -> tuple[int, int]:
    """Elements of the scratch (fp32) and of the counters (int32)."""
    if problem.routed:
        return routing.sizes(problem, config, M)
    columns, rows = _tiles(problem, config, M)
    scratch = counters = 0
    if problem.rank:
        sums = runs(problem, config) + problem.coded
        scratch += rows * sums * ranks(problem) * config.BM
        counters += (2 + problem.coded * _blocks(problem, config)) * rows
    if config.split > 1:
        scratch += columns * rows * config.split * (config.BN + 8) * config.BM
        counters += columns * rows
    return scratch, counters


def whole_sizes(problem: Problem, config: TileConfig, M: int) -> tuple[int, int]:
    """Elements of the whole rows of a product (fp32), and of their counters (int32)."""
    columns, rows = _tiles(problem, config, M)
    if problem.out_mixed:
        return rows * config.BM * problem.N, 2 * rows
    part = config.BN // 2 if problem.pairs else config.BN
    return rows * columns * (part * config.BM + max(LINE, config.BM)), rows


def made_sizes(problem: Problem, config: TileConfig, M: int) -> tuple[int, int]:
    """Elements of an input that the kernel makes (of x's dtype), and of its counters (int32)."""
    return M * problem.K, 2 * _tiles(problem, config, M)[1]


def moved(problem: Problem, config: TileConfig, M: int) -> int:
    """Bytes of partial sums: written once and read once."""
    values = routing.sizes(problem, config, M)[0] if problem.route else 0
    if problem.rank:
        values += (runs(problem, config) + problem.coded) * ranks(problem) * M
    if config.split > 1:
        columns, _ = _tiles(problem, config, M)
        beside = 0 if problem.made else problem.norm + problem.centred
        values += columns * config.split * (config.BN + beside) * M
    if problem.out_mixed:
        values += (3 if terms(problem)["twice"] else 2) * problem.N * M
    if problem.mixed_twice:
        values += problem.K * M
    if problem.out_norm:
        values += (problem.outputs + _tiles(problem, config, M)[0]) * M
    return 8 * values


def call_bytes(packed: Packed, config: TileConfig, M: int) -> int:
    """Bytes of one call: what the row counts, sparse entries as packed, and partial sums."""
    sparse = sum(t.nbytes for name, t in packed.tensors.items() if name.startswith("entry_"))
    own = packed.row.bytes_moved(packed.problem, M)
    return own + sparse + moved(packed.problem, config, M)


def _tiles(problem: Problem, config: TileConfig, M: int) -> tuple[int, int]:
    return -(-problem.N // config.BN), -(-M // config.BM)
