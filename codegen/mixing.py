"""How a kernel mixes the channels of a row as `llmc.rotate` does, and which widths it can.

n = odd · 2**k channels are rows of ``wide`` neighbours. A tile of such rows is multiplied by the
Hadamard matrix of ``wide`` from the right and by one of ``deep`` on its diagonal from the left, so
each run of deep · wide channels is mixed in registers; what is left, ``rest`` runs, is mixed by one
more product of a matrix [rest, rest], Hartley of the odd factor times Hadamard of what remains.
"""

from __future__ import annotations

from typing import Any, NamedTuple

SIDE = 64  # of the largest matrix in registers
LEAST = 16  # of the smallest that a matrix instruction takes
MOST = 1 << 16  # channels of a row


class Mixing(NamedTuple):
    """One width in the terms of a template; ``odd`` is the odd factor of ``rest``."""

    width: int
    wide: int
    deep: int
    rest: int
    odd: int

    @property
    def tile(self) -> int:
        """Rows of ``wide`` channels of a tile, whole runs."""
        return max(LEAST, self.deep)

    def terms(self) -> dict[str, Any]:
        """All of it as plain numbers."""
        run = self.wide * self.deep
        columns = min(run, max(LEAST, 2048 // padded(self.rest)))
        return {
            **self._asdict(), "tile": self.tile, "run": run, "side": padded(self.rest),
            "columns": columns, "unit": self.width**-0.5,
        }  # fmt: skip


def padded(count: int) -> int:
    """The least side of a matrix instruction that holds ``count``."""
    return max(LEAST, 1 << (count - 1).bit_length())


def mixing(width: int) -> Mixing | None:
    """How a kernel mixes ``width`` channels; None where it cannot."""
    power = width & -width
    wide = min(power, SIDE)
    deep = min(power // max(wide, 1), SIDE)
    if not wide or wide < LEAST or width > MOST or width // (wide * deep) > SIDE:
        return None
    return Mixing(width, wide, deep, width // (wide * deep), width // power)


EXPECTED = f"at most {MOST}, a multiple of {LEAST} whose odd factor is at most {SIDE}"
"""What a width must be, in words."""


def unfit(problem: Any) -> list[tuple[str, str]]:
    """Fields of a problem that mixes which are not what kernels need, each with what is."""
    found: list[tuple[str, str]] = []
    if problem.mixed and mixing(problem.K) is None:
        found.append(("K", f"{EXPECTED} where x is mixed"))
    if problem.mixed and problem.rounds:
        found.append(("rounds", "none where x is mixed"))
    if problem.out_mixed:
        found += _unfit_behind(problem)
    if problem.mixed and problem.experts:
        found.append(("mixed", "False among experts"))
    return found


def _unfit_behind(problem: Any) -> list[tuple[str, str]]:
    found = []
    if sum(problem.out_sections) != problem.N or 0 in problem.out_sections:
        found.append(("out_mixed", f"widths of {problem.N} rows"))
    if any(mixing(width) is None for width in problem.out_sections):
        found.append(("out_mixed", f"widths of {EXPECTED}"))
    beside = {"spans": "", "experts": 0}
    found += [(n, f"{v or 'none'} where the result is mixed back") for n, v in beside.items()
              if getattr(problem, n) != v]  # fmt: skip
    return found


def roomy(problem: Any, tiles: list[tuple[int, int]]) -> list[tuple[int, int]]:
    """Those tiles whose warps hold what is mixed at a time: 32 rows have two, which spill it."""
    widths = [problem.K] * problem.mixed + list(problem.out_sections)
    found = [one for width in widths if (one := mixing(width)) is not None]
    if all(one.tile * one.wide <= 2048 for one in found):
        return tiles
    return [(BM, BN) for BM, BN in tiles if BN > 32] or tiles
