"""Numerics of kernel rows: random canonical parts of any problem, and how far a kernel may be off.

All cases of a call run in one child process under the interpreter (this file as a script, cases as
JSON on stdin), because Triton reads TRITON_INTERPRET at import. The oracle is `codegen/meaning.py`
in fp64; the bound is K·2⁻²⁴·Σ|h||W| for the sums, one unit roundoff of x's dtype for each rounding
to it, and both carried through rounding grids, activations and gates by how much those may grow it.
Behind a norm that takes the mean away, h counts as it is before: kernels take it away behind the
product, so that |x * gain| / deviation is what is rounded and summed.
"""

from __future__ import annotations

import json
import os
import subprocess
import sys
from collections.abc import Sequence
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

import torch
from interpreter import QUICKLY
from numerics_grids import on_grid
from numerics_rows import mixed, mixed_back, normed

from llmc.codegen import meaning
from llmc.codegen.kernels import row as row_named
from llmc.codegen.normed import FEW
from llmc.codegen.problem import DTYPES, Problem
from llmc.codegen.render import makes
from llmc.codegen.samples import levels_of, loud, random_parts
from llmc.compiler.ir import packing
from llmc.compiler.ir.ops.semantic import activation

STRIDES = ("plain", "padded", "halves", "one row", "batched")
_SUM = 2.0**-24  # unit roundoff of the fp32 sums
_TINY = 2.0**-24  # half the least fp16 step, and room for a result that is 0


@dataclass(frozen=True)
class Case:
    """One call: fields of a `Problem`, tokens, how x lies in memory, a tile, what is spoiled."""

    row: str
    fields: dict[str, Any]
    M: int
    stride: str = "plain"
    tile: tuple[int, ...] | None = None
    spoil: str = ""
    seed: int = 0

    @property
    def problem(self) -> Problem:
        return Problem(**self.fields)

    @property
    def label(self) -> str:
        known = {"N": 0, "K": 0} | asdict(Problem(0, 0))
        told = [f"{k}={v}" for k, v in self.fields.items() if k in "NK" or v != known[k]]
        tile = ["x".join(map(str, self.tile))] if self.tile else []
        return " ".join([self.row, f"M={self.M}", *told, self.stride, *tile, f"seed={self.seed}"])


def parts_of(case: Case) -> dict[str, torch.Tensor]:
    """Random canonical parts of a problem: every feature that it has."""
    return random_parts(case.problem, case.seed)


def inputs_of(case: Case) -> tuple[torch.Tensor, torch.Tensor | None]:
    """x [..., K] and residual [..., outputs], laid out as the case says."""
    p, g = case.problem, torch.Generator().manual_seed(case.seed + 1)

    def laid(width: int) -> torch.Tensor:
        apart = {"padded": width + 3, "halves": 2 * width}.get(case.stride, width)
        rows = 1 if case.stride == "one row" else case.M
        value = torch.randn(rows, apart, generator=g)
        if width == p.K and not p.norm:
            value /= loud(p)
        if width == p.K and p.centred:
            value += 4 * torch.randn(rows, 1, generator=g)
        value = value.to(DTYPES[p.x_dtype])[:, :width]
        value = value.expand(case.M, width)
        return value.unflatten(0, (1, -1)) if case.stride == "batched" else value

    return laid(p.K), laid(p.outputs) if p.residual else None


def exact_and_bound(
    case: Case, parts: dict[str, torch.Tensor], x: torch.Tensor, residual: torch.Tensor | None,
    device: str = "cpu",
) -> tuple[torch.Tensor, torch.Tensor]:  # fmt: skip
    """What the problem means in fp64 [M, outputs], and how far a kernel may be from it."""
    p = case.problem
    x = x.double().reshape(case.M, p.K)
    side = None if residual is None else residual.double().reshape(case.M, -1)
    exact = meaning.linear(p, parts, x, side)
    # The interpreter cuts bf16 off where a GPU rounds to nearest, which is one whole step.
    u = torch.finfo(DTYPES[p.x_dtype]).eps / (1 if p.x_dtype == "bf16" else 2)
    size, off = _read(p, parts, x, u, makes(row_named(case.row), p))
    w = meaning.weight(p, parts).abs()
    sums = p.K + p.rank + p.outliers + 16
    reach = size @ w.T
    # Factors have a product between their two sums, which is rounded to x's dtype.
    once = u * (p.weights == "table" or p.weights == "factors") * reach
    if device != "cpu":
        # Three products of 11 bits stand for one of fp32, and fp8 sums keep 14 bits for a while.
        once = once + 2.0**-20 * (p.x_dtype == "fp32") * reach
        once = once + 2.0**-12 * ("e4m3" in p.rounds) * reach
    beside = torch.zeros_like(reach)
    spread = w
    if p.rank:
        left, right = meaning.factors(p, parts)
        pair = left.abs() @ right.abs()
        reach_pair = size @ pair.T
        once = once + 2 * u * reach_pair
        beside, spread = beside + reach_pair, spread + pair
    if p.sparse:
        own = _csr_dense(p, parts).abs()
        beside, spread = beside + size @ own.T, spread + own
    if p.outliers:
        wide = _before_grid(p, parts, x).abs()[:, parts["columns"]]
        apart = wide @ parts["column_weights"].double().abs().T
        beside = beside + apart
        once = once + u * (p.norm + p.smooth) * apart
        if p.centred:
            wide = _unsettled(p, parts, x)[1][:, parts["columns"]]
            once = once + wide @ parts["column_weights"].double().abs().T
    if p.bias:
        beside = beside + parts["bias"].double().abs()
    err = sums * _SUM * (reach + beside) + once + off @ spread.T
    if p.out_mixed:
        err = mixed_back(p, parts, x, err, u * (case.tile is None and case.M > FEW))
    y, err = _after(p, parts, x, err)
    if p.out_norm:
        # For many tokens norm and sum are calls of their own, and what each reads is rounded.
        between = u * (case.tile is None and case.M > FEW)
        y, err = normed(p, parts, y, err + 1.01 * between * (y.abs() + err))
        err = err + 1.01 * between * (y.abs() + err)
    if side is not None:
        err = err + 2 * _SUM * (side.abs() + y.abs())
    return exact, err + 1.01 * u * (exact.abs() + err) + _TINY


def _before_grid(p: Problem, parts: dict[str, torch.Tensor], x: torch.Tensor) -> torch.Tensor:
    if p.norm:
        x = meaning.normed(p, parts, x)
    return x * parts["smooth"].double() if p.smooth else x


def _unsettled(
    p: Problem, parts: dict[str, torch.Tensor], x: torch.Tensor
) -> tuple[torch.Tensor, torch.Tensor]:
    """Of a centred norm [M, K]: how large what it is summed from is, and how far off its own sums.

    The mean is off by K roundings of |x|, the variance by K of x ** 2.
    """
    smooth = parts["smooth"].double().abs() if p.smooth else 1.0
    mean, square = (t.mean(-1, keepdim=True) for t in (x, x * x))
    spread = square - mean * mean + p.eps
    gain = parts["gain"].double().abs() * smooth * spread.rsqrt()
    shift = parts["shift"].double().abs() * smooth
    few = (p.K + 16) * _SUM
    off = few * (x.abs().mean(-1, keepdim=True) + (x - mean).abs() * square / spread) * gain
    return (x.abs() + mean.abs()) * gain + shift, off


def _read(
    p: Problem, parts: dict[str, torch.Tensor], x: torch.Tensor, u: float, made: bool
) -> tuple[torch.Tensor, torch.Tensor]:
    """The size of what the weight multiplies, [M, K], and how far each of it may be off.

    made: x is put on its grid in fp32, and then rounded to its own dtype.
    """
    h = _before_grid(p, parts, x)
    size, own = _unsettled(p, parts, x) if p.centred else (h.abs(), torch.zeros_like(h))
    if p.outliers:
        h, size, own = (t.index_fill(-1, parts["columns"], 0.0) for t in (h, size, own))
    if p.mixed:
        return mixed(p, h, own, u)
    slack = 1.01 * u * (p.norm + p.smooth)
    # Beside relative rounding, what lies below the least normal fp16; 1/rms multiplies it later.
    least = torch.full_like(x[:, :1], 2.0**-25 * (p.x_dtype == "fp16") * (p.norm or p.smooth))
    if p.norm:
        mean = x.mean(-1, keepdim=True) * p.centred
        least *= ((x * x).mean(-1, keepdim=True) - mean * mean + p.eps).rsqrt()
    if not p.rounds:
        return size, slack * size + least + own
    return on_grid(p, parts, h, slack * (not made), own + 8 * _SUM * size * p.centred, u * made)


def _csr_dense(p: Problem, parts: dict[str, torch.Tensor]) -> torch.Tensor:
    plain = replace(p, weights="dense", m=0, bitmap=False, rank=0, outliers=0, rounds="", act="",
                    pairs="", norm=False, centred=False, smooth=False, mixed=False, out_mixed="",
                    bias=False, out_norm=False)  # fmt: skip
    none = {**parts, "values": torch.zeros(p.N, p.K, dtype=torch.float64)}
    return meaning.linear(plain, none, torch.eye(p.K, dtype=torch.float64)).T


def _after(
    p: Problem, parts: dict[str, torch.Tensor], x: torch.Tensor, err: torch.Tensor
) -> tuple[torch.Tensor, torch.Tensor]:
    """The epilogue's result and its error, given the error of what it reads."""
    y = meaning.linear(replace(p, act="", pairs="", out_norm=False), parts, x)
    if not p.act:
        return y, err

    def act(value: torch.Tensor, e: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        there = activation(value, act=p.act)
        ends = [(activation(value + s * e, act=p.act) - there).abs() for s in (-1, 1)]
        # The kernel's own exponentials, and the bend of the curve inside e.
        return there, 1.1 * torch.maximum(*ends) + e * e + 2.0**-20 * (value.abs() + 1)

    if not p.pairs:
        return act(y, err)
    gate, up = y.split(p.outputs, -1)
    e_gate, e_up = err.split(p.outputs, -1)
    there, e_there = act(gate, e_gate)
    return there * up, e_there * up.abs() + there.abs() * e_up + e_there * e_up


def spoiled(case: Case, parts: dict[str, torch.Tensor], x: torch.Tensor) -> dict[str, torch.Tensor]:
    """The parts with one part of them changed: codes by half their range, floats beyond doubt."""
    p, out = case.problem, dict(parts)
    reads = x.reshape(case.M, p.K).float().abs().amax(0)
    if p.outliers:
        reads = reads.index_fill(0, parts["columns"], 0.0)
    column = int(reads.argmax())
    value = parts[case.spoil].clone()
    match case.spoil:
        case "codes" if p.weights == "paired":
            q = packing.unpack(value, p.bits, p.columns).to(torch.int64).unflatten(1, (-1, 2))
            high = (q[:, column // 2] == 7).all(1, keepdim=True)  # then low, and high otherwise
            q[:, column // 2] = torch.where(high, 9, 7)
            value = packing.pack(q.flatten(1), p.bits)
        case "codes":
            q = packing.unpack(value, p.bits, p.columns).to(torch.int64)
            at = column * p.n // p.m if p.m else column
            q[:, at] = _other_codes(p, q[:, at])
            value = packing.pack(q, p.bits)
        case "signs":
            value = ~value
        case "zero":
            value ^= 1 << (p.bits - 1)
        case "meta":
            where = packing.unpack(value, packing.nm_bits(p.m), p.columns).to(torch.int64)
            where = (p.m - 1 - where).unflatten(1, (-1, p.n)).flip(-1).flatten(1)
            value = packing.pack(where, packing.nm_bits(p.m))
        case "bitmap":
            value = packing.pack(packing.unpack(value, 1, p.K).to(torch.int64).flip(1), 1)
        case "left" if p.spans:
            value += value != 0
        case "out_turn" | "scale" | "factors" | "in_scale" | "gain" | "smooth" | "out_gain":
            value *= 4
        case "left_codes" | "right_codes":
            value = ~value
        case "left_zero" | "right_zero":
            value ^= 1 << (p.bits - 1)
        case "right" if value.dim() == 2:
            value[:, column] += 1
        case "columns":
            value = torch.tensor([c for c in range(p.K) if c not in set(value.tolist())])
            value = value[: p.outliers]
        case "csr_index" | "csr_starts":
            raise ValueError(f"expected a part that holds values, found indices: {case.spoil}")
        case _:
            value += 1
    return {**out, case.spoil: value}


def _other_codes(p: Problem, q: torch.Tensor) -> torch.Tensor:
    if not p.levels:
        return q ^ (1 << (p.bits - 1))
    known = levels_of(p).isfinite().nonzero().flatten()
    place = torch.searchsorted(known, q.contiguous())
    return known[(place + len(known) // 2) % len(known)]


def answer(case: Case, device: str = "cpu") -> dict[str, Any]:
    """The case's worst error over its bound; where it spoils, the same for what that gives."""
    from llmc.codegen.launch import fused_linear
    from llmc.codegen.prepack import Packed, prepack
    from llmc.codegen.row import TileConfig

    row, p = row_named(case.row), case.problem
    parts = parts_of(case)
    x, residual = inputs_of(case)
    sides = {} if residual is None else {"residual": residual}
    config = TileConfig(*case.tile) if case.tile else None

    def pack(given: dict[str, torch.Tensor]) -> Packed:
        return prepack(row, p, **{n: t.to(device) for n, t in given.items()})

    def launch(packed: Packed) -> torch.Tensor:
        beside = {n: _moved(t, device) for n, t in sides.items()}
        y = fused_linear(packed, _moved(x, device), config=config, **beside)
        assert y.shape == (*x.shape[:-1], p.outputs)
        return y.reshape(case.M, p.outputs).cpu()

    packed = pack(parts)
    y = launch(packed)
    exact, bound = exact_and_bound(case, parts, x, residual, device)
    found = {"finite": bool(y.isfinite().all()), "ratio": _worst(y, exact, bound)}
    if case.spoil:
        other = spoiled(case, parts, x)
        off = launch(pack(other))
        exact_off, bound_off = exact_and_bound(case, other, x, residual, device)
        found |= {
            # One of three, as each launch takes a tenth of a second; the second one finds the
            # counters that the first has left.
            "same_twice": case.seed % 3 > 0 or bool(torch.equal(y, launch(packed))),
            "spoiled_ratio": _worst(off, exact, bound),
            "spoiled_exact": _worst(exact_off, exact, bound),
            "spoiled_own": _worst(off, exact_off, bound_off),
        }
    return found


def _moved(x: torch.Tensor, device: str) -> torch.Tensor:
    """x elsewhere, with the strides that it has."""
    if device == "cpu":
        return x
    room = 1 + sum((n - 1) * s for n, s in zip(x.shape, x.stride(), strict=True))
    storage = x.as_strided((room,), (1,)).to(device)
    return storage.as_strided(x.shape, x.stride())


def _worst(y: torch.Tensor, exact: torch.Tensor, bound: torch.Tensor) -> float:
    return float(((y.double() - exact).abs() / bound).max())


def run_cases(cases: Sequence[Case], cache: Path) -> list[dict[str, Any]]:
    """The answers of all cases, from one child process; RuntimeError with what it said if it died.

    A case that raised answers {"error": its text}. cache: where rendered sources are kept.
    """
    environment = {**os.environ, "TRITON_INTERPRET": "1", "XDG_CACHE_HOME": str(cache)}
    told = json.dumps([asdict(c) for c in cases])
    run = subprocess.run(
        [sys.executable, QUICKLY, __file__], input=told, env=environment, capture_output=True,
        text=True, check=False,
    )  # fmt: skip
    if run.returncode:
        raise RuntimeError(run.stderr[-3000:])
    found: list[dict[str, Any]] = json.loads(run.stdout)
    return found


def judge(case: Case, found: dict[str, Any]) -> str:
    """What is wrong with an answer; empty when nothing is."""
    if "error" in found:
        return found["error"]
    if not found["finite"]:
        return "a result is not finite"
    if not found["ratio"] <= 1.0:
        return f"error is {found['ratio']:.2f} of its bound"
    if case.spoil:
        if not found["same_twice"]:
            return "two launches gave different bits"
        if not found["spoiled_own"] <= 1.0:
            return f"with other {case.spoil}, error is {found['spoiled_own']:.2f} of its bound"
        if found["spoiled_exact"] > 2.0 and not found["spoiled_ratio"] > 1.0:
            return f"the bound does not see other {case.spoil}"
    return ""


def answered(case: Case, device: str = "cpu") -> dict[str, Any]:
    """The answer, or {"error": what was raised}."""
    try:
        return answer(case, device)
    except Exception as error:  # a case that raises is a finding, and the others still count
        return {"error": f"{type(error).__name__}: {error}"}


def main() -> None:
    """Answer the cases on stdin."""
    torch.set_num_threads(1)
    told = [Case(**{**c, "tile": c["tile"] and tuple(c["tile"])}) for c in json.load(sys.stdin)]
    print(json.dumps([answered(c) for c in told]))


if __name__ == "__main__":
    main()
