"""How far a kernel may be off where whole rows are mixed, before a product or back, or normed."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace

import torch

from llmc.codegen import meaning
from llmc.codegen.problem import Problem
from llmc.compiler.ir.ops.rotation import mix
from llmc.compiler.ir.ops.semantic import rms_norm

SUM = 2.0**-24  # unit roundoff of the fp32 sums


def mixed(
    p: Problem, h: torch.Tensor, own: torch.Tensor, u: float
) -> tuple[torch.Tensor, torch.Tensor]:
    """Size and error of h mixed, in sums of fp32 or of twice the digits of bf16, then rounded."""
    exact, reach = mix(h).abs(), _reach(h.abs(), (p.K,))
    off = _reach(own, (p.K,)) + ((p.K + 32) * SUM + 2.0**-15) * reach
    return exact, off + 1.01 * u * (exact + off) + 2.0**-25 * (p.x_dtype == "fp16")


def mixed_back(
    p: Problem, parts: dict[str, torch.Tensor], x: torch.Tensor, err: torch.Tensor, between: float
) -> torch.Tensor:
    """The error of what is mixed back, given that of the product; between: roundings of both where
    calls of their own follow it."""
    plain = replace(p, out_mixed="", bias=False, act="", pairs="", out_norm=False)
    y = meaning.linear(plain, parts, x).abs()
    err = err + 1.01 * between * (y + err)
    slack = (max(p.out_sections) + 32) * SUM + 2.0**-15
    turn, sections = parts["out_turn"].double().abs(), p.out_sections
    bias = parts["bias"].double().abs() if p.bias else 0.0
    reach = _reach(y, sections) / turn
    own = slack * reach + (4 * SUM + 2.02 * between) * (reach + bias)
    return _reach(err, sections) / turn + own


def _reach(size: torch.Tensor, sections: Sequence[int]) -> torch.Tensor:
    """How large sections may be once they are mixed: no entry of their matrix is beyond the root of
    2 / n, or of 1 / n where n is a power of two."""
    most = [(n & (n - 1) and 2) or 1 for n in sections]
    sums = [part.sum(-1, keepdim=True) for part in size.split(list(sections), -1)]
    grown = zip(sums, most, sections, strict=True)
    return torch.cat([(s * (m / n) ** 0.5).expand(-1, n) for s, m, n in grown], -1)


def normed(
    p: Problem, parts: dict[str, torch.Tensor], y: torch.Tensor, err: torch.Tensor
) -> tuple[torch.Tensor, torch.Tensor]:
    """The norm of y and its error, given y's: the rms moves no further than the rms of the error,
    and is never below the root of eps."""
    gain = parts["out_gain"].double().abs()
    rms = (y.square().mean(-1, keepdim=True) + p.out_eps).sqrt()
    moved = err.square().mean(-1, keepdim=True).sqrt()
    least = (rms - moved).clamp(min=p.out_eps**0.5)
    there = rms_norm(y, parts["out_gain"].double(), eps=p.out_eps)
    own = (p.outputs + 16) * SUM * there.abs()  # of the squares, and of the root
    return there, gain * (err + y.abs() * moved / rms) / least + own
