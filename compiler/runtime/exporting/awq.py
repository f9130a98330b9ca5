"""``awq``: 4-bit codes with zero points, packed along outputs in the GEMM layout of AutoAWQ."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from ...ir.errors import UsageError
from .codes import Coded, Parts, groups
from .gptq import check_integers
from .job import Job
from .quantised import Layout, Whole
from .quantised import write as write_codes

_UNIT = 8


def write(job: Job) -> dict[str, Any]:
    """Write a job as AWQ; see :func:`.quantised.write`."""
    layout: Layout = Awq()
    return write_codes(job, layout)


class Awq:
    """The layout; see :class:`.quantised.Layout`."""

    name = "awq"

    def dtype(self, stored: torch.dtype) -> torch.dtype:
        """As the model stores them, but never fp32, which kernels refuse."""
        return torch.float16 if stored == torch.float32 else stored

    def scale(self, dtype: torch.dtype) -> torch.dtype:
        """Always fp16."""
        return torch.float16

    def check(self, weight: Coded) -> None:
        """4 bits in whole groups, and whole words of outputs."""
        check_integers(weight, (4,))
        if weight.shape[0] % _UNIT:
            raise weight.refuse("outputs", f"a multiple of {_UNIT}", weight.shape[0],
                                "--format compressed-tensors takes any size")  # fmt: skip

    def check_whole(self, whole: Whole) -> None:
        """One group size for all, and a head that is dense."""
        first = whole.weights[0]
        for weight in whole.weights:
            if weight.path in whole.heads:
                raise weight.refuse("head", "a dense head", weight.short,
                                    "--format compressed-tensors holds it")  # fmt: skip
            if weight.codes.group != first.codes.group:
                raise UsageError(
                    f"group: expected {first.codes.group or 'rows'} as in {first.path}, found "
                    f"{weight.codes.group or 'rows'}", where=weight.path,
                    hint="awq has one group size; --format compressed-tensors holds several",
                )  # fmt: skip

    def tensors(self, weight: Coded, parts: Parts, in_scale: Tensor | None) -> dict[str, Tensor]:
        """qweight [K, N/8], qzeros [G, N/8], scales [G, N]; symmetric weights get a zero of 8."""
        from ...capture.foreign.awq import interleave

        middle = torch.full((weight.shape[0], groups(weight)), 8, dtype=torch.uint8)
        zero = middle if parts.zero is None else parts.zero
        return {
            "qweight": interleave(parts.codes.t().contiguous()),
            "qzeros": interleave(zero.t().contiguous()),
            "scales": parts.scale.t(),
        }

    def config(self, whole: Whole) -> dict[str, Any]:
        """One scheme; what is dense is named."""
        return {
            "quant_method": self.name, "bits": 4, "group_size": whole.weights[0].codes.group or -1,
            "zero_point": True, "version": "gemm",
            "modules_to_not_convert": [*whole.dense, *whole.experts],
        }  # fmt: skip

    def notes(self, weights: Sequence[Coded]) -> list[str]:
        """What does not load everywhere."""
        if any(w.masked for w in weights):
            return ["zeros of the n:m mask are kept as codes: no loader runs them as sparse"]
        return []
