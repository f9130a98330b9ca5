"""What mixed precision aims at: stored bits per weight, a share of the model, or a perplexity."""

from __future__ import annotations

import math
import re
from dataclasses import dataclass
from typing import Literal

from ..ir.errors import UsageError
from .candidates import Table

_BUDGET = re.compile(r"ppl\+(\d+(?:\.\d*)?|\.\d+)(%?)")
_SIZE = re.compile(r"(\d+(?:\.\d*)?|\.\d+)%")
FLAGS = ("bits", "size", "budget")


@dataclass(frozen=True)
class Target:
    """One aim.

    ``value``: bits per weight that the grid pass speaks about, scales and all; or the share of the
    captured model's bytes; or what the perplexity may rise by, ``relative`` to the model's own.
    """

    kind: Literal["bits", "size", "budget"]
    value: float
    text: str
    relative: bool = False

    @property
    def flag(self) -> str:
        """As typed: ``--bits 4.25``."""
        return f"--{self.kind} {self.text}"

    def bytes(self, table: Table) -> int:
        """Stored bytes that the groups of a table may take.

        Raises:
            UsageError: below the least or above the most that the options store, with the range.
        """
        least, most = (
            sum(pick(g.size(i) for i in g.allowed) for g in table.groups) for pick in (min, max)
        )
        if self.kind == "bits":
            budget = math.floor(self.value * table.weights / 8 + 1e-6)
            low, high = (8 * b / table.weights for b in (least, most))
            what = f"{_up(low)}..{high:g} bits per weight"
        else:
            budget = math.floor(self.value * table.whole + 1e-6) - table.rest
            low, high = (100 * (table.rest + b) / table.whole for b in (least, most))
            what = f"{_up(low)}%..{min(high, 100):g}% of the model"
        if not least <= budget or budget > most:
            raise UsageError(f"--{self.kind}: expected {what}, found {self.text}")
        return budget

    def loss(self, dense: float) -> float:
        """The mean loss that may be reached, of the captured model's own."""
        if self.relative:
            return dense + math.log1p(self.value)
        return math.log(math.exp(dense) + self.value)


def _up(value: float) -> str:
    """Six digits, never below the value: the end of a range that may be typed."""
    scale = 10 ** (5 - math.floor(math.log10(value)))
    return f"{math.ceil(value * scale - 1e-6) / scale:g}"


def read_target(
    bits: float | None = None, size: str | None = None, budget: str | None = None
) -> Target | None:
    """The aim that was given, None where none was.

    Args:
        bits: e.g. 4.25; size: ``60%``; budget: ``ppl+2%`` or ``ppl+0.3``.
    Raises:
        UsageError: more than one, or one that cannot be read.
    """
    given = [f for f, v in zip(FLAGS, (bits, size, budget), strict=True) if v is not None]
    if len(given) > 1:
        found = " and ".join(f"--{f}" for f in given)
        raise UsageError(f"expected one of --bits, --size and --budget, found {found}")
    if bits is not None:
        if isinstance(bits, bool) or not math.isfinite(bits) or bits <= 0:
            raise UsageError(f"--bits: expected bits per weight such as 4.25, found {bits}")
        return Target("bits", float(bits), f"{bits:g}")
    if size is not None:
        match = _SIZE.fullmatch(str(size).strip())
        if match is None:
            raise UsageError(f"--size: expected a share such as 60%, found {str(size)!r}")
        return Target("size", float(match[1]) / 100, str(size).strip())
    if budget is not None:
        match = _BUDGET.fullmatch(str(budget).strip())
        if match is None:
            raise UsageError(f"--budget: expected ppl+2% or ppl+0.3, found {str(budget)!r}")
        share = bool(match[2])
        value = float(match[1]) / (100 if share else 1)
        return Target("budget", value, str(budget).strip(), share)
    return None
