"""In which dtype a whole model computes on this processor, and why."""

from __future__ import annotations

import statistics

import torch

from ..tuning.cache import Table
from .table import machine, measured, shipped

KEY = "dense"
# Instructions that multiply bf16; without them it is converted, which is slower than fp32.
BF16 = ("amx_bf16", "avx512_bf16", "bf16")


def compute_dtype() -> tuple[torch.dtype, str]:
    """bf16 where linears in it were measured to be faster than in fp32, else fp32; and the reason.

    Without measurements on this machine the processor's instructions decide.
    """
    own = measured().table
    for table, words in ((own, "measured here"), (shipped(), "measured on the same processor")):
        if table is None or (table is not own and table.machine.name != machine().name):
            continue
        ratio = _ratio(table)
        if ratio is not None:
            dtype = torch.bfloat16 if ratio > 1 else torch.float32
            return dtype, f"linears in bf16 take 1/{ratio:.2f} of the time of fp32, {words}"
    names = machine().name.split(", ")
    has = next((i for i in BF16 if i in names), None)
    if has is None:
        return torch.float32, "this processor multiplies no bf16 (llmc tune measures)"
    return torch.bfloat16, f"this processor has {has} (llmc tune measures)"


def _ratio(table: Table) -> float | None:
    """Median ratio of fp32's seconds to bf16's over all dense entries; None without any."""
    found = [
        e.seconds["fp32"] / e.seconds["bf16"]
        for e in table.entries
        if e.key.startswith(f"{KEY} ") and {"fp32", "bf16"} <= set(e.seconds)
    ]
    return statistics.median(found) if found else None
