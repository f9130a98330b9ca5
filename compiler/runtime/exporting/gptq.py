"""``gptq``: codes packed along inputs; version 1 where all weights are symmetric, else gptq_v2.

Version 1 stores zero points minus one, which has no place for 0, so that asymmetric weights are
written as version 2. Source: AutoGPTQ and GPTQModel.
"""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from ...ir.packing import pack
from ..artefact import versions
from .codes import Coded, Parts, groups
from .job import Job
from .quantised import Layout, Whole
from .quantised import write as write_codes

BITS = (2, 3, 4, 8)
_UNIT = 32


def write(job: Job) -> dict[str, Any]:
    """Write a job as GPTQ; see :func:`.quantised.write`."""
    layout: Layout = Gptq()
    return write_codes(job, layout)


def check_integers(weight: Coded, bits: tuple[int, ...]) -> None:
    """Raises UsageError unless codes are integers of such bits in whole groups.

    For formats of weights alone, inputs as they come; the layer and the field are named.
    """
    codes, columns = weight.codes, weight.shape[1]
    if weight.inputs is not None:
        raise weight.refuse("inputs", "inputs as they come", weight.inputs.grid.short,
                            "--format compressed-tensors holds w8a8 and fp8")  # fmt: skip
    if codes.grid != "uniform":
        raise weight.refuse("grid", "integers", codes.grid,
                            "--format compressed-tensors holds 8-bit floats")  # fmt: skip
    if codes.bits not in bits:
        told = " or ".join(map(str, bits))
        raise weight.refuse("bits", told, codes.bits, f"compile with w{bits[-1]}, say")
    if codes.group is not None and columns % codes.group:
        raise weight.refuse("group", f"a divisor of {columns} inputs", codes.group,
                            "the last group is shorter: choose one that divides")  # fmt: skip


class Gptq:
    """The layout; see :class:`.quantised.Layout`."""

    name = "gptq"

    def __init__(self) -> None:
        self.version = "gptq"

    def dtype(self, stored: torch.dtype) -> torch.dtype:
        """As the model stores them, but never fp32, which kernels refuse."""
        return torch.float16 if stored == torch.float32 else stored

    def scale(self, dtype: torch.dtype) -> torch.dtype:
        """Always fp16."""
        return torch.float16

    def check(self, weight: Coded) -> None:
        """Bits, groups, and sizes that are multiples of 32."""
        check_integers(weight, BITS)
        for what, size in zip(("outputs", "inputs"), weight.shape, strict=True):
            if size % _UNIT:
                raise weight.refuse(what, f"a multiple of {_UNIT}", size,
                                    "--format compressed-tensors takes any size")  # fmt: skip
        if not weight.codes.symmetric:
            self.version = "gptq_v2"

    def check_whole(self, whole: Whole) -> None:
        """Other schemes than the most frequent one are rules by name."""

    def tensors(self, weight: Coded, parts: Parts, in_scale: Tensor | None) -> dict[str, Tensor]:
        """qweight [K·b/32, N], qzeros [G, N·b/32], scales [G, N], g_idx [K]."""
        bits, (rows, columns) = weight.codes.bits, weight.shape
        middle = torch.full((rows, groups(weight)), 1 << (bits - 1), dtype=torch.uint8)
        zero = middle if parts.zero is None else parts.zero
        if self.version == "gptq":
            zero = zero - 1
        return {
            "qweight": pack(parts.codes, bits).t(),
            "qzeros": pack(zero.t().contiguous(), bits),
            "scales": parts.scale.t(),
            "g_idx": torch.arange(columns, dtype=torch.int32) // (weight.codes.group or columns),
        }

    def config(self, whole: Whole) -> dict[str, Any]:
        """The most frequent scheme; what differs, or is dense, is a rule of ``dynamic``."""
        count = Counter(w.scheme for w in whole.weights)
        usual = next(w for w in whole.weights if w.scheme == count.most_common(1)[0][0])
        rules: dict[str, Any] = {
            f"+:^{re.escape(w.path)}$": _settings(w)
            for w in whole.weights
            if w.scheme != usual.scheme
        }
        head_coded = not set(whole.heads).isdisjoint(w.path for w in whole.weights)
        # Loaders leave the head alone unless lm_head says otherwise.
        dense = [p for p in whole.dense if p not in whole.heads]
        rules |= {f"-:^{re.escape(p)}$": {} for p in dense}
        rules |= {f"-:^{re.escape(p)}\\..*": {} for p in whole.experts}
        return {
            "quant_method": self.name, **_settings(usual), "desc_act": False,
            "lm_head": head_coded, "checkpoint_format": self.version, "pack_dtype": "int32",
            "meta": {"quantizer": [f"llmc:{versions().get('llmc', '0')}"]},
            **({"dynamic": rules} if rules else {}),
        }  # fmt: skip

    def notes(self, weights: Sequence[Coded]) -> list[str]:
        """What does not load everywhere."""
        out = []
        if self.version == "gptq_v2":
            out.append("checkpoint_format is gptq_v2, for weights are asymmetric: a loader that "
                       "ignores the field reads zero points one too high")  # fmt: skip
        if any(w.masked for w in weights):
            out.append("zeros of the n:m mask are kept as codes: no loader runs them as sparse")
        return out


def _settings(weight: Coded) -> dict[str, Any]:
    codes = weight.codes
    return {"bits": codes.bits, "group_size": codes.group or -1, "sym": codes.symmetric}
