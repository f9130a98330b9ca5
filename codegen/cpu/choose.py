"""All CPU kernels in order of preference, and the choice among them."""

from __future__ import annotations

from ..problem import Problem
from .bytes8 import BYTES
from .decoded import DECODED, DENSE, FACTORS
from .kernel import CpuKernel
from .nibbles import NIBBLES, PLANES
from .products import ONEDNN, PRODUCTS

KERNELS: tuple[CpuKernel, ...] = (
    ONEDNN, PRODUCTS, NIBBLES, BYTES, PLANES, DECODED, DENSE, FACTORS,
)  # fmt: skip


def choose(problem: Problem) -> tuple[CpuKernel | None, str]:
    """The kernel that serves `problem`, or None and each kernel's reason."""
    reasons = []
    for kernel in KERNELS:
        why = kernel.misfit(problem)
        if why is None:
            return kernel, ""
        reasons.append(f"{kernel.name}: {why}")
    return None, "; ".join(reasons)
