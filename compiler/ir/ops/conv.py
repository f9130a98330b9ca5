"""Row of the two-dimensional convolution, as vision models embed their patches with."""

from __future__ import annotations

from typing import Any

from ..dims import Dim, dim, numel, same
from ..errors import ModelError
from ..types import TensorType
from .base import Tie, aten
from .rules import one_dtype, randn


def _two(value: Any, what: str) -> tuple[int, int]:
    found = list(value) if isinstance(value, (list, tuple)) else [value]
    found = found * 2 if len(found) == 1 else found
    if len(found) != 2 or not all(isinstance(v, int) and v >= 0 for v in found):
        raise ModelError(f"expected {what} of one or two literal sizes, found {value}")
    return found[0], found[1]


def _conv2d(
    x: TensorType, w: TensorType, bias: TensorType | None = None, stride: Any = 1,
    padding: Any = 0, dilation: Any = 1, groups: int = 1,
) -> TensorType:  # fmt: skip
    """x [N, C, H, W], w [O, C, h, w], bias [O] -> [N, O, H', W']; one group."""
    if x.rank != 4 or w.rank != 4 or groups != 1:
        raise ModelError(f"expected x and weight of rank 4 in one group, found {x} and {w}")
    if not same(x.shape[1], w.shape[1]):
        raise ModelError(f"expected as many channels in x as in the weight, found {x} and {w}")
    if bias is not None and not (bias.rank == 1 and same(bias.shape[0], w.shape[0])):
        raise ModelError(f"expected a bias [{w.shape[0]}], found {bias}")
    steps, pads, spread = _two(stride, "strides"), _two(padding, "pads"), _two(dilation, "steps")
    sides: list[Dim] = []
    for a in range(2):
        reach = dim(x.shape[2 + a] + 2 * pads[a] - spread[a] * (w.shape[2 + a] - 1) - 1)
        if not isinstance(reach, int) or reach < 0 or steps[a] < 1:
            raise ModelError(f"expected literal sides that the weight fits, found {x} and {w}")
        sides.append(reach // steps[a] + 1)
    return TensorType((x.shape[0], w.shape[0], *sides), one_dtype(x, w, bias))


def _ties(
    out: TensorType, x: TensorType, w: TensorType, bias: TensorType | None = None, *rest: Any
) -> list[Tie]:
    rows = ((1, 0), (2, 0)) if bias is not None else ((1, 0),)
    return [
        Tie("same", ((0, 0),), (0,)),
        Tie("contract", ((0, 1), (1, 1))),
        Tie("same", rows, (1,)),
        *(Tie("mix", ((0, a), (1, a)), (a,)) for a in (2, 3)),
    ]


def _flops(out: TensorType, x: TensorType, w: TensorType, *rest: Any) -> Dim:
    return 2 * numel(out.shape) * numel(w.shape[1:])


aten(
    "conv2d.default",
    _conv2d,
    ties=_ties,
    flops=_flops,
    samples=lambda: [
        ((randn(2, 3, 4, 6), randn(5, 3, 2, 2), randn(5), [2, 2]), {}),
        ((randn(1, 2, 5, 4), randn(3, 2, 3, 2), None, [1, 2], [1, 0]), {}),
    ],
)
