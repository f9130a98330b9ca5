"""Blocks that a knob lists, as in 3+5, where -1 is the last."""

from __future__ import annotations

from ..ir.errors import UsageError


def block_numbers(text: str, where: str, total: int | None = None) -> list[int]:
    """The listed numbers as they stand; of ``total`` blocks, counted from the first.

    Raises:
        UsageError: something else than numbers with + between, or a block that is not there.
    """
    try:
        given = [int(part) for part in text.split("+")]
    except ValueError:
        raise UsageError(f"{where}: expected numbers as in 3+5, found {text!r}") from None
    if total is None:
        return given
    for i in given:
        if not -total <= i < total:
            raise UsageError(f"{where}: expected blocks {-total}..{total - 1}, found {i}")
    return [i + total if i < 0 else i for i in given]
