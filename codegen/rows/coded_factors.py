"""A weight that is a product of two factors of codes, multiplied in one launch.

Programs that start first multiply the input by tiles of right, by the main loop of the row of such
codes; then all multiply what those have left by tiles of left, by the same loop.
"""

from __future__ import annotations

from dataclasses import replace

from ..coded import WEIGHT, pack
from ..row import Argument, KernelRow
from .bytes import W8A16
from .common import CHOICES, UNROUTED, UpTo
from .int4 import W4A16
from .tables import W2A16, W3A16

# Around both factors; what each stores is read once, its scales with it.
MOVES = "xb*M*K + xb*M*out*(1 + residual) + xb*N*bias + 4*K*Max(norm, smooth) + 8*Np*centred"
MOVES += " + 4*out*out_norm + 4*(Lg + Gp*Rp)"


def _args(inner: KernelRow) -> tuple[Argument, ...]:
    """x, what the row stores of a weight once for either factor, and all that lies around."""
    around = [a for a in inner.args if a.name not in ("left", "right")]
    stored = [a for a in around if a.name in WEIGHT]
    rest = [a for a in around if a.name not in (*WEIGHT, "x")]
    shapes = [("right", "of [rank, K]"), ("left", "of [N, rank]")]
    both = [
        replace(a, name=f"{side}_{a.name}", shape=f"{a.shape} {what}")
        for side, what in shapes
        for a in stored
    ]
    return (around[0], *both, *rest)


def _row(name: str, inner: KernelRow, bits: int) -> KernelRow:
    return KernelRow(
        name=name,
        op="llmc.fused",
        template=inner.template,
        summary=f"two factors of {bits}-bit codes: programs share the product with the first, "
        "then go on with theirs",
        args=_args(inner),
        step=inner.step,
        choices={
            **CHOICES,
            **UNROUTED,
            "weights": ("factors",),
            "rank": UpTo(16384, least=1),
            "rounds": ("",),
            "mixed": (False,),
            "out_mixed": ("",),
            "sparse": (False,),
        },
        requires=inner.requires,
        moves=f"{bits}*(Lp + Rp*Kp)/8 + {MOVES}",
        # Beside a rank, only 4-bit codes are decoded in more than 1024 sums.
        tiles=((8, 32), (8, 64), (16, 32), (16, 64), *[(32, 64)] * (bits == 4)),
        stages=(3, 4, 6),
        fits=(*inner.fits, "Eq(wide, 0) | (BM * BN <= 512)"),
        pack=pack,
        factor=inner,
    )


W4_FACTORS = _row("w4_factors", W4A16, 4)
W8_FACTORS = _row("w8_factors", W8A16, 8)
W3_FACTORS = _row("w3_factors", W3A16, 3)
W2_FACTORS = _row("w2_factors", W2A16, 2)
