"""An answer in the making, as the solvers hand it to each other: transposed, in working units."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor


@dataclass
class Answer:
    """The compressed weight before it is packed up.

    value: ``[n, m]`` weights. centred: ``[n, m]`` codes minus zero point, as floats. scale, zero:
    ``[G, m]``, groups in storage order, zero None when symmetric. keep: bool ``[n, m]``, None
    without a mask. rows: ``[m]`` fp64, the loss of each output row; None = not known.
    extra: bool ``[n, m]``, weights that stay off the grid, whatever keep says (with a grid their
    ``centred`` is ``value / scale``, no code); None = there are none.
    """

    value: Tensor
    centred: Tensor | None = None
    scale: Tensor | None = None
    zero: Tensor | None = None
    keep: Tensor | None = None
    rows: Tensor | None = None
    extra: Tensor | None = None

    @property
    def support(self) -> Tensor | None:
        """Every weight that is not zero by decision: keep and extra."""
        return self.keep if self.keep is None or self.extra is None else self.keep | self.extra

    def clone(self) -> Answer:
        """A copy to improve; its losses are not known."""

        def copy(x: Tensor | None) -> Tensor | None:
            return None if x is None else x.clone()

        centred, scale, zero = copy(self.centred), copy(self.scale), copy(self.zero)
        return Answer(
            self.value.clone(), centred, scale, zero, copy(self.keep), extra=copy(self.extra)
        )

    def to_storage(self, order: Tensor | None) -> Answer:
        """From processing order back to storage order."""
        if order is None:
            return self

        def back(x: Tensor) -> Tensor:
            return torch.empty_like(x).index_copy_(0, order, x)

        centred = None if self.centred is None else back(self.centred)
        keep = None if self.keep is None else back(self.keep)
        extra = None if self.extra is None else back(self.extra)
        return Answer(back(self.value), centred, self.scale, self.zero, keep, self.rows, extra)


def better_rows(mine: Answer, other: Answer, take: Tensor) -> Answer:
    """Mine, with the rows of other where ``take`` (bool ``[m]``) says so."""

    def pick(a: Tensor | None, b: Tensor | None) -> Tensor | None:
        return None if a is None or b is None else torch.where(take, b, a)

    return Answer(
        torch.where(take, other.value, mine.value),
        pick(mine.centred, other.centred),
        pick(mine.scale, other.scale),
        pick(mine.zero, other.zero),
        pick(mine.keep, other.keep),
        pick(mine.rows, other.rows),
        pick(mine.extra, other.extra),
    )
