"""``compressed-tensors``: pack-quantized, int-quantized and float-quantized linears.

Our packed rows are the format's: element i of a row at bit i·b, little end first. Source: the
compressed-tensors package, 0.20.
"""

from __future__ import annotations

import re
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from ...ir.packing import pack
from .codes import Coded, Parts
from .job import Job
from .quantised import Layout, Whole
from .quantised import write as write_codes

PACKED, INTEGER, FLOAT = "pack-quantized", "int-quantized", "float-quantized"


def write(job: Job) -> dict[str, Any]:
    """Write a job as compressed-tensors; see :func:`.quantised.write`."""
    layout: Layout = CompressedTensors()
    return write_codes(job, layout)


def form(weight: Coded) -> str:
    """The format of one weight.

    Raises:
        UsageError: there is none; the layer and the field are named.
    """
    codes, rows, read = weight.codes, weight.codes.group is None, weight.inputs
    grid = read.grid if read is not None else None
    if codes.grid == "e5m2":
        raise weight.refuse("grid", "e4m3 floats", "e5m2", "compile with format=e4m3")
    if grid is not None:
        kind = {"uniform": "int", "e4m3": "e4m3"}[codes.grid]
        if (grid.kind, grid.bits) != (kind, 8) or codes.bits != 8:
            raise weight.refuse("inputs", "8-bit integers beside 8-bit integers, or e4m3 beside "
                                "e4m3", weight.short, "w8a8 and fp8 give these")  # fmt: skip
        if grid.group is not None or (grid.power and not grid.static):
            found = f"groups of {grid.group}" if grid.group else "powers of two"
            raise weight.refuse("inputs", "one scale per token or tensor", found,
                                "compile without act_group and act_power")  # fmt: skip
        if not rows or not codes.symmetric:
            raise weight.refuse("group", "symmetric codes with one scale per row beside rounded "
                                "inputs", codes.short, "compile without group")  # fmt: skip
        return INTEGER if kind == "int" else FLOAT
    if codes.grid == "e4m3":
        if not rows:
            raise weight.refuse("group", "one scale per row of 8-bit floats",
                                f"groups of {codes.group}", "compile without group")  # fmt: skip
        return FLOAT
    if codes.bits not in (4, 8):
        raise weight.refuse("bits", "4 or 8", codes.bits, "compile with w4 or w8; gptq also holds "
                            "2 and 3")  # fmt: skip
    if codes.group is not None and weight.shape[1] % codes.group:
        raise weight.refuse("group", f"a divisor of {weight.shape[1]} inputs", codes.group,
                            "the last group is shorter: choose one that divides")  # fmt: skip
    return PACKED


class CompressedTensors:
    """The layout; see :class:`.quantised.Layout`."""

    name = "compressed-tensors"

    def dtype(self, stored: torch.dtype) -> torch.dtype:
        """As the model stores them; scales follow."""
        return stored

    def scale(self, dtype: torch.dtype) -> torch.dtype:
        """Loaders read scales in the model's dtype."""
        return dtype

    def check(self, weight: Coded) -> None:
        """See :func:`form`."""
        form(weight)

    def check_whole(self, whole: Whole) -> None:
        """Each scheme has a group of its own in the config."""

    def tensors(self, weight: Coded, parts: Parts, in_scale: Tensor | None) -> dict[str, Tensor]:
        """As tabulated: packed words and their shape, or one byte per weight."""
        kind, bits = form(weight), weight.codes.bits
        out = {"weight_scale": parts.scale}
        if kind == PACKED:
            out["weight_packed"] = pack(parts.codes, bits)
            out["weight_shape"] = torch.tensor(weight.shape)
            if parts.zero is not None:
                out["weight_zero_point"] = pack(parts.zero.t().contiguous(), bits).t()
        elif kind == INTEGER:
            out["weight"] = (parts.codes.to(torch.int16) - 128).to(torch.int8)
        else:
            out["weight"] = parts.codes.view(torch.float8_e4m3fn)
        if in_scale is not None:
            # Linears that share an input share its scale; the file holds one for each.
            out["input_scale"] = in_scale.float().clone()
        return out

    def config(self, whole: Whole) -> dict[str, Any]:
        """One group of targets per scheme; what stays dense is ignored by name."""
        kinds: dict[Any, list[Coded]] = {}
        for weight in whole.weights:
            kinds.setdefault(weight.scheme, []).append(weight)
        forms = [form(w[0]) for w in kinds.values()]
        groups = {}
        for i, (kind, some) in enumerate(zip(forms, kinds.values(), strict=True)):
            first = some[0]
            groups[f"group_{i}"] = {
                "targets": ["Linear"] if len(kinds) == 1 else [w.path for w in some],
                "weights": _weights(first), "input_activations": _inputs(first),
                "output_activations": None, "format": kind,
            }  # fmt: skip
        # Engines match experts by the names of their parts, which the model stacks.
        experts = [f"re:{re.escape(p)}\\..*" for p in whole.experts]
        return {
            "quant_method": self.name, "format": forms[0] if len(set(forms)) == 1
            else "mixed-precision", "quantization_status": "compressed", "config_groups": groups,
            "ignore": [*whole.dense, *experts], "kv_cache_scheme": None,
            "global_compression_ratio": None,
        }  # fmt: skip

    def notes(self, weights: Sequence[Coded]) -> list[str]:
        """What does not load everywhere."""
        out = []
        uneven = [w.path for w in weights if not w.codes.symmetric]
        if uneven:
            out.append(
                f"{len(uneven)} linears are asymmetric: transformers loads them only with "
                "CompressedTensorsConfig(dequantize=True); symmetric codes load everywhere"
            )
        if any(w.masked for w in weights):
            out.append("zeros of the n:m mask are kept as codes: no loader runs them as sparse")
        return out


def _weights(weight: Coded) -> dict[str, Any]:
    codes = weight.codes
    return {
        "num_bits": codes.bits, "type": "int" if codes.grid == "uniform" else "float",
        "symmetric": codes.symmetric, "dynamic": False,
        "strategy": "channel" if codes.group is None else "group", "group_size": codes.group,
    }  # fmt: skip


def _inputs(weight: Coded) -> dict[str, Any] | None:
    if weight.inputs is None:
        return None
    grid = weight.inputs.grid
    return {
        "num_bits": 8, "type": "int" if grid.kind == "int" else "float", "symmetric": True,
        "dynamic": not grid.static, "strategy": "token" if grid.per == "token" else "tensor",
    }  # fmt: skip
