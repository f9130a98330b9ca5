"""Grids that a kernel puts its input on: the words of `Problem.rounds`, read once.

The words are kind with bits, per, then group=, power and limit=, e.g. "int8 token limit=6.0".
"""

from __future__ import annotations

from dataclasses import dataclass

from ..compiler.ir.ops.rounding import FLOATS


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
