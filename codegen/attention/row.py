"""What a row of cached attention is: requirements, bytes and tiles of one kernel, as data."""

from __future__ import annotations

import functools
from collections.abc import Mapping
from dataclasses import dataclass

from .. import formula
from ..problem import Misfit, Requirement
from .problem import AttentionProblem

PROCESSORS = 132  # multiprocessors of an H200; the default of splits
MAX_SPLITS = 32


@dataclass(frozen=True)
class SplitConfig:
    """How one call is cut up.

    Attributes:
        BM: rows of a product (queries x query heads of one key head). BT: tokens of one step.
        splits: runs that the tokens are cut into. stages, warps: of the pipeline and of a program.
    """

    BM: int
    BT: int
    splits: int = 1
    stages: int = 3
    warps: int = 4

    def chunk(self, tokens: int) -> int:
        """Tokens of a run: whole steps, so that no run begins inside of one."""
        return max(1, -(-tokens // (self.splits * self.BT))) * self.BT


@dataclass(frozen=True, eq=False)
class AttentionRow:
    """One kernel of a cached attention.

    Attributes:
        choices: allowed values of the text and flag fields of `AttentionProblem`.
        requires: predicates over its numeric fields.
        moves: bytes of one call over B, T, S, xb (bytes of a number), vgroup and the fields.
        steps: tokens of one step to choose from, widest first; ``fits``: predicates over BM, BT
            and ``wide`` (fp32) and the fields that keep a tile free of register spills.
        note: what a plan says beside the row's name.
    """

    name: str
    template: str
    summary: str
    choices: Mapping[str, tuple[object, ...]]
    requires: tuple[Requirement, ...]
    moves: str
    steps: tuple[int, ...] = (64, 32, 16)
    fits: tuple[str, ...] = ()
    op: str = "llmc.cached_attention"
    targets: tuple[str, ...] = ("sm_80", "sm_90")
    note: str = ""

    def misfits(self, problem: AttentionProblem) -> list[Misfit]:
        """All reasons why this row cannot serve `problem`; empty when it can."""
        return list(_misfits(self, problem))

    def bytes_moved(self, problem: AttentionProblem, batch: int, tokens: int) -> int:
        """Bytes of one call over ``tokens`` kept tokens a row of the batch, each operand once."""
        given = {
            **problem.integers(), "B": batch, "T": tokens, "S": problem.queries,
            "xb": 4 if problem.x_dtype == "fp32" else 2, "vgroup": problem.value_group,
            "per_token": int(problem.keys == "token"),
        }  # fmt: skip
        return formula.value(self.moves, given)

    def floor_us(self, problem: AttentionProblem, batch: int, tokens: int, speed: float) -> float:
        """Microseconds that these bytes take at ``speed`` bytes per second."""
        return 1e6 * self.bytes_moved(problem, batch, tokens) / speed

    def config(
        self, problem: AttentionProblem, batch: int, tokens: int, queries: int,
        processors: int = PROCESSORS,
    ) -> SplitConfig:  # fmt: skip
        """The untuned choice: two programs per multiprocessor, and at least four steps in a run."""
        rows = queries * problem.repeat
        # More rows of codes, or of fp32, than this spill; the next program finds them in the L2.
        most = {"kv": 64, "kivi": 16}.get(problem.cache, 32)
        most = min(most, 16) if problem.x_dtype == "fp32" else most
        BM = min(most, max(16, 1 << (rows - 1).bit_length()))
        given = {**problem.integers(), "BM": BM}
        BT = next(
            (t for t in self.steps if all(formula.holds(f, {**given, "BT": t}) for f in self.fits)),
            self.steps[-1],
        )
        programs = batch * problem.kv_heads * -(-rows // BM)
        long = max(1, tokens // (4 * BT))
        splits = max(1, min(MAX_SPLITS, long, -(-2 * processors // programs)))
        return SplitConfig(BM, BT, splits, stages=2 if problem.x_dtype == "fp32" else 3)


@functools.lru_cache(4096)
def _misfits(row: AttentionRow, problem: AttentionProblem) -> tuple[Misfit, ...]:
    found = []
    for field, allowed in row.choices.items():
        value = getattr(problem, field)
        if value not in allowed:
            text = " or ".join(str(v) for v in allowed)
            found.append(Misfit(row.name, field, value, text))
    values = problem.integers()
    for need in row.requires:
        if not formula.holds(need.test, values):
            found.append(Misfit(row.name, need.field, values[need.field], need.expected))
    return tuple(found)
