"""The CPU target: torch's own kernels where they realise the scheme, by number of tokens.

Those of weights alone compute in bf16 (their only fast dtype), so scales and activations are
rounded to bf16; the plan says so. Where inputs are integers too, sums of products are exact.
An N:M weight is spread to dense codes, masked ones at the zero point: its mask
saves no time here, and the resident bytes say that too.
"""

from __future__ import annotations

from .choose import KERNELS, choose
from .kernel import CpuKernel
from .serve import call, implementation, pack, with_limit
from .table import Choice, ways_by_tokens

__all__ = [
    "KERNELS", "Choice", "CpuKernel", "call", "choose", "implementation", "pack", "ways_by_tokens",
    "with_limit",
]  # fmt: skip
