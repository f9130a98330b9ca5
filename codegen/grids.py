"""Grids that a kernel puts its input on: the words of `Problem.rounds`, read once.

The words are kind with bits, per, then group=, power and limit=, e.g. "int8 token limit=6.0".
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from ..compiler.ir.ops.pairs import USUAL, wide_values
from ..compiler.ir.ops.rounding import FLOATS, grid_top


@dataclass(frozen=True)
class Grid:
    """One grid in the terms of `round_input`; limit 0 for none."""

    kind: str
    bits: int
    per: str
    group: int = 0
    power: bool = False
    limit: float = 0.0

    @property
    def words(self) -> str:
        """What tells kernels apart: all but the number behind the limit."""
        kind = self.kind if self.kind in FLOATS else f"{self.kind}{self.bits}"
        more = [f"group={self.group}"] * bool(self.group) + ["power"] * self.power
        return " ".join([kind, self.per, *more])


def parse(words: str) -> Grid | None:
    """The grid that ``words`` name; None where they name none."""
    word, *rest = words.split(" ")
    kind = word.rstrip("0123456789")
    bits = word[len(kind) :]
    if word in FLOATS:
        kind, bits = word, str(FLOATS[word][0])
    if not rest or not bits:
        return None
    group, power, limit = 0, False, 0.0
    for more in rest[1:]:
        name, _, value = more.partition("=")
        try:
            if name == "group":
                group = int(value)
            elif name == "limit":
                limit = float(value)
            elif more == "power":
                power = True
            else:
                return None
        except ValueError:
            return None
    return Grid(kind, int(bits), rest[0], group, power, limit)


GROUPS = tuple(1 << n for n in range(1, 11))
"""Channels that may share a scale of their own token: whole groups are read at a time."""


class Made(tuple[str, ...]):
    """Choices of `rounds`: none, or any grid of a token's own, or whose scales are stored."""

    def __new__(cls) -> Made:
        known = f"int2 to int8 or {' or '.join(FLOATS)} or pairs4 or pairs8"
        return super().__new__(cls, ("", f"{known}, per token or static"))

    def __contains__(self, words: object) -> bool:
        grid = parse(str(words))
        if grid is None:
            return words == ""
        widths = (4, 8) if grid.kind == "pairs" else range(2, 9)
        if grid.kind not in ("int", "pairs", *FLOATS) or grid.bits not in widths:
            return False
        groups = (0,) if grid.kind == "pairs" else (0, *GROUPS)
        return grid.per == "static" or (grid.per == "token" and grid.group in groups)


def unfit(problem: Any) -> list[tuple[str, str]]:
    """Fields of a problem with a grid which are not what any kernel needs, each with what is."""
    odd = "pairs" in problem.rounds and problem.K % 2
    return [("K", "even where x is rounded in pairs")] if odd else []


def terms(words: str) -> dict[str, Any]:
    """The grid that ``words`` name in the terms of a template; mantissa 0 for integers.

    Of pairs: wide, the least and the largest outlier, with the bits of their mantissas.
    """
    grid = parse(words)
    assert grid is not None
    _, exponent, mantissa = FLOATS.get(grid.kind, (0, 0, 0))
    wide: dict[str, Any] = {}
    if grid.kind == "pairs":
        values = wide_values(grid.bits)
        digits = 1 if grid.bits == 4 else 3
        wide = {"least": float(values[1]), "most": float(values[-1]), "mantissa": digits}
    return {
        "top": grid_top(grid.kind, grid.bits), "mantissa": mantissa,
        "lowest": 2 - (1 << exponent >> 1), "group": grid.group, "power": grid.power,
        "static": grid.per == "static", "limited": grid.limit > 0, "wide": wide, "usual": USUAL,
    }  # fmt: skip


class Grids(tuple[str, ...]):
    """Choices of `rounds`: grids by their words, each with any limit or none where ``limits``."""

    limits: bool

    def __new__(cls, *words: str, limits: bool = False) -> Grids:
        made = super().__new__(cls, words)
        made.limits = limits
        return made

    def __contains__(self, words: object) -> bool:
        grid = parse(str(words))
        known = grid is not None and any(w == grid.words for w in self)
        return known and (self.limits or not grid or not grid.limit)
