"""A fast rotation: signs or scales per channel, then an orthogonal mix of all channels.

The mix M of n = 2**k · m channels, m odd, is the Kronecker product of the Hartley matrix of m and
Hadamard matrices. It is symmetric and its own inverse, and nothing of it is stored. Sources: QuIP
(arXiv 2307.13304) for rotating both sides of a matrix, QuIP# (arXiv 2402.04396) and QuaRot (arXiv
2404.00456) for signs and Hadamard matrices.
"""

from __future__ import annotations

import math
from functools import lru_cache
from typing import Any

import torch
from torch import Tensor

from ..dims import Dim, numel, same
from ..errors import ModelError
from ..types import TensorType
from .base import Tie, llmc_op

MOST_ODD = 2048
"""The largest odd factor of a width; it is mixed by a dense matrix."""
_CHUNK = 6
"""Powers of two that one matrix mixes: 64 channels at once are faster than six butterflies."""


def mixed_by(n: int) -> tuple[int, ...]:
    """Widths of the matrices whose Kronecker product mixes n channels, the odd one first.

    Raises:
        ModelError: the odd factor of n is too large to be mixed fast.
    """
    power = (n & -n).bit_length() - 1 if n > 0 else 0
    odd = n >> power
    if n < 1 or odd > MOST_ODD:
        raise ModelError(
            f"expected channels whose odd factor is at most {MOST_ODD} to rotate, found {n}"
        )
    steps = -(-power // _CHUNK)
    sizes = [2 ** (power // steps + (i < power % steps)) for i in range(steps)]
    return (odd, *sizes) if odd > 1 or not sizes else tuple(sizes)


@lru_cache(maxsize=64)
def _matrix(n: int, dtype: torch.dtype, device: torch.device) -> Tensor:
    """[n, n] symmetric, orthogonal: Hadamard where n is a power of two, else Hartley (cas)."""
    if n & (n - 1) == 0:
        index = torch.arange(n)
        both = index[:, None] & index
        parity = torch.zeros_like(both)
        while bool(both.any()):
            parity ^= both & 1
            both >>= 1
        out = 1.0 - 2.0 * parity.double()
    else:
        # The product is reduced first: cosines of large angles lose digits.
        turn = torch.outer(torch.arange(n), torch.arange(n)) % n
        angle = turn.double() * (2 * math.pi / n)
        out = angle.cos() + angle.sin()
    return (out / math.sqrt(n)).to(device, dtype)


def mix(x: Tensor) -> Tensor:
    """x M along the last axis, in x's dtype; M M = 1."""
    shape = x.shape
    after = shape[-1]
    for n in mixed_by(shape[-1]):
        after //= n
        matrix = _matrix(n, x.dtype, x.device)
        x = matrix @ x.reshape(-1, n, after) if after > 1 else x.reshape(-1, n) @ matrix
    return x.reshape(shape)


def rotate(x: Tensor, scale: Tensor, *, inverse: bool = False) -> Tensor:
    """(x · scale) M, or with ``inverse`` (x M) / scale, which undoes it.

    Args:
        x: [..., n]. scale: [n], no entry 0; ±1 makes the rotation orthogonal.
    Returns:
        A tensor like x; computed at least in fp32.
    """
    if not x.numel():
        return x.clone()
    wide = x.to(torch.promote_types(torch.float32, x.dtype))
    scale = scale.to(wide.dtype)
    return (mix(wide) / scale if inverse else mix(wide * scale)).to(x.dtype)


def _type(x: TensorType, scale: TensorType, *, inverse: bool = False) -> TensorType:
    width = x.shape[-1] if x.rank else None
    if not isinstance(width, int) or not x.dtype.is_floating_point:
        raise ModelError(f"expected floats […, n] to rotate, found {x}")
    mixed_by(width)
    if scale.rank != 1 or not same(scale.shape[0], width) or scale.dtype == torch.bool:
        raise ModelError(f"expected a scale [{width}] beside {x}, found {scale}")
    return x


def _ties(out: TensorType, *types: Any, **attrs: Any) -> list[Tie]:
    last = out.rank - 1
    ties = [Tie("same", ((0, a),), (a,)) for a in range(last)]
    return [*ties, Tie("mix", ((0, last), (1, 0)), (last,))]


def _flops(out: TensorType, *types: Any, **attrs: Any) -> Dim:
    return numel(out.shape) * (1 + 2 * sum(mixed_by(int(out.shape[-1]))))


def _samples() -> list[tuple[tuple[Any, ...], dict[str, Any]]]:
    g = torch.Generator().manual_seed(0)

    def one(*shape: int) -> tuple[Tensor, Tensor]:
        x = torch.randn(*shape, generator=g, dtype=torch.float64)
        return x, torch.rand(shape[-1], generator=g, dtype=torch.float64) + 0.5

    signs = torch.tensor([1, -1, 1, 1, -1, 1], dtype=torch.int8)
    return [
        (one(2, 3, 8), {}), (one(2, 12), {"inverse": True}), (one(3, 7), {}),
        ((one(3, 6)[0], signs), {"inverse": True}),
    ]  # fmt: skip


llmc_op(
    "rotate",
    "(Tensor x, Tensor scale, *, bool inverse=False) -> Tensor",
    _type,
    rotate,
    ties=_ties,
    flops=_flops,
    samples=_samples,
)
