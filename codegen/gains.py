"""Parts brought into 16 bits: gains of norms in fp16, and scales that are decoded.

The kernel multiplies x by the gain before 1/rms is known. With the gain over 2**k, so that none is
above 1, the product is never larger than x; what multiplies it is scaled by 2**k, which is exact.
An input that the kernel rounds is in fp32 until it is normed, and needs none of this.

Scales that are codes themselves decode to fp32, of which a kernel reads 16 bits: those of x's own
dtype, whose rounding its bound of error holds anyway.
"""

from __future__ import annotations

import math
from dataclasses import replace

import torch

from ..compiler.ir.errors import ModelError
from .problem import DTYPES, Problem


def in_range(
    problem: Problem, parts: dict[str, torch.Tensor]
) -> tuple[dict[str, torch.Tensor], str]:
    """Parts of the same meaning with gain at most 1 in magnitude, where x is fp16 behind a norm.

    Returns:
        The parts, and what was done, in words.

    Raises:
        ModelError: a weight that 2**k takes out of its dtype's range.
    """
    if problem.x_dtype != "fp16" or not problem.norm or problem.made:
        return parts, ""
    top = float(parts["gain"].abs().max()) if parts["gain"].numel() else 0.0
    power = 2.0 ** math.ceil(math.log2(top)) if top > 1 and math.isfinite(top) else 1.0
    if power == 1.0:
        return parts, ""
    out = {**parts, "gain": parts["gain"] / power}
    if "shift" in out:
        out["shift"] = out["shift"] / power
    for role in scaled(problem):
        if role not in parts:
            raise ModelError(f"expected {role} to scale with the gain of a norm, found none")
        out[role] = parts[role] * power
        if not bool(out[role].isfinite().all()):
            raise ModelError(
                f"expected {role} that can be scaled by {power:g} in {parts[role].dtype}, found "
                "one that leaves its range", hint="run the model in bf16",
            )  # fmt: skip
    return out, f"gain over {power:g}, weight times it, so that x * gain stays in fp16"


def scaled(problem: Problem) -> list[str]:
    """The parts that the normed input is multiplied with, one of each product."""
    weight = {"int": "scale", "paired": "scale", "dense": "values", "factors": "left",
              "signs": "factors"}.get(problem.weights, "table")  # fmt: skip
    weight = "left_scale" if problem.coded else weight
    if problem.weights == "table" and problem.scale_dtype:
        weight = "scale"
    beside = {"router": problem.route, "left": problem.rank and problem.weights != "factors",
              "csr_values": problem.sparse, "column_weights": problem.outliers}  # fmt: skip
    return [weight, *(role for role, there in beside.items() if there)]


def asked(problem: Problem) -> Problem:
    """The problem as kernels are asked for it: decoded scales in the dtype of 16-bit inputs."""
    if problem.scale_dtype == "fp32" and problem.x_dtype in ("fp16", "bf16"):
        return replace(problem, scale_dtype=problem.x_dtype)
    return problem


def round_scales(
    problem: Problem, parts: dict[str, torch.Tensor]
) -> tuple[dict[str, torch.Tensor], str]:
    """Parts with scales in the problem's dtype, and what was done, in words.

    Raises:
        ModelError: scales too small or too large for it, so that more than their last bit is lost.
    """
    roles = ["factors"] if problem.weights == "signs" else ["scale", "left_scale", "right_scale"]
    told, out = "", dict(parts)
    for role in roles:
        wide = parts.get(role)
        if wide is None or wide.dtype != torch.float32 or problem.scale_dtype == "fp32":
            continue
        out[role], told = _rounded(problem, wide), f"decoded scales in {problem.scale_dtype}"
    return out if told else parts, told


def _rounded(problem: Problem, wide: torch.Tensor) -> torch.Tensor:
    dtype = DTYPES[problem.scale_dtype]
    scale = wide.to(dtype)
    if bool(((scale.float() - wide).abs() > wide.abs() * torch.finfo(dtype).eps).any()):
        raise ModelError(f"expected decoded scales that {problem.scale_dtype} can hold, found some "
                         f"from {float(wide.abs().min()):.3g}")  # fmt: skip
    return scale
