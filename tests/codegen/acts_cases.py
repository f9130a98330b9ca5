"""Cases of kernels whose inputs are rounded, and what they must give, in fp64 over exact codes.

Grids are those of `round_input` in fp32, so codes are the kernel's own and sums of products of
codes are exact; what is left is the few roundings behind the sums.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch


@dataclass(frozen=True)
class Case:
    """One call: shape, scheme, grid of x, side inputs, tile; group 0 is one scale per row."""

    row: str
    M: int
    N: int
    K: int
    group: int = 0
    rounds: str = "int8 token"
    dtype: str = "fp16"
    bits: int = 8
    outliers: int = 0
    tile: tuple[int, int] | None = None
    bias: bool = False
    residual: bool = False
    norm: bool = False
    smooth: bool = False
    act: str = ""
    pairs: str = ""
    strided: bool = False
    spike: bool = False

    @property
    def label(self) -> str:
        names = ("bias", "residual", "norm", "smooth", "act", "pairs", "strided", "spike")
        flags = [n for n in names if getattr(self, n)]
        tile = [f"{self.tile[0]}x{self.tile[1]}"] if self.tile else []
        shape = f"{self.M}x{self.N}x{self.K}-g{self.group}-{self.dtype}-b{self.bits}"
        apart = [f"c{self.outliers}"] if self.outliers else []
        return "-".join([self.row, shape, self.rounds.replace(" ", "_"), *apart, *flags, *tile])


def problem_of(case: Case) -> Any:
    from llmc.codegen.problem import Problem

    floats = case.rounds.startswith("e")
    return Problem(
        case.N, case.K, bits=case.bits, group=case.group or case.K, x_dtype=case.dtype,
        scale_dtype="fp16", bias=case.bias, residual=case.residual, norm=case.norm,
        smooth=case.smooth, outliers=case.outliers, act=case.act, pairs=case.pairs,
        rounds=case.rounds, eps=1e-5 if case.norm else 0.0,
        weights="table" if floats else "int", levels=case.rounds.split(" ")[0] if floats else "",
    )  # fmt: skip


def parts_of(case: Case) -> dict[str, torch.Tensor]:
    """Canonical tensors of the weight and of what stays beside it."""
    from llmc.codegen.problem import DTYPES
    from llmc.compiler.ir import packing

    g = torch.Generator().manual_seed(len(case.label) + case.N)
    problem, dtype = problem_of(case), DTYPES[case.dtype]
    q = torch.randint(1, 1 << case.bits, (case.N, case.K), generator=g)
    if problem.levels:
        q = torch.where(q % 128 == 127, q - 1, q)  # which stands for no number
    parts = {"codes": packing.pack(q, case.bits)}
    parts["scale"] = (torch.rand(case.N, problem.groups, generator=g) * 0.05 + 0.01).half()
    if case.bias:
        parts["bias"] = torch.randn(case.N, generator=g).to(dtype)
    if case.norm:
        parts["gain"] = torch.rand(case.K, generator=g) + 0.5
    if case.smooth:
        parts["smooth"] = torch.rand(case.K, generator=g) + 0.5
    if "static" in case.rounds:
        parts["in_scale"] = torch.tensor([0.03 if problem.weights == "int" else 0.01])
    if case.outliers:
        columns = torch.randperm(case.K, generator=g)[: case.outliers].sort().values
        parts["columns"] = columns
        parts["column_weights"] = torch.randn(case.N, case.outliers, generator=g).to(dtype)
    return parts


def inputs_of(case: Case, parts: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    """x [M, K], large in the columns kept apart, and the residual."""
    from llmc.codegen.problem import DTYPES

    g = torch.Generator().manual_seed(case.M)
    dtype, stretch = DTYPES[case.dtype], 2 if case.strided else 1
    x = torch.randn(case.M, case.K * stretch, generator=g)
    if case.outliers:
        x[:, parts["columns"]] *= 20.0
    if case.spike:
        x[case.M // 2, 3] = 30.0
    given = {"x": x.to(dtype)[:, : case.K]}
    if case.residual:
        outputs = problem_of(case).outputs
        residual = torch.randn(case.M, outputs * stretch, generator=g).to(dtype)
        given["residual"] = residual[:, :outputs]
    return given


def grid_of(case: Case, parts: dict[str, torch.Tensor], x: torch.Tensor) -> tuple[Any, Any]:
    """x on its grid in fp64, and which tokens are beyond the limit."""
    from llmc.codegen.grids import parse
    from llmc.compiler.ir.ops.rounding import scale_of, snap

    grid = parse(case.rounds)
    assert grid is not None
    v, rms = x.float(), torch.ones(len(x), 1, dtype=torch.float64)
    if case.norm:
        rms = torch.rsqrt(v.double().square().mean(-1, keepdim=True) + 1e-5)
    gains = [parts[name] for name in ("gain", "smooth") if name in parts]
    if gains:
        v = v * (gains[0] * gains[1] if len(gains) > 1 else gains[0])
    kept = v.index_fill(-1, parts["columns"], 0.0) if case.outliers else v
    wide = kept.double() * rms
    if "static" in case.rounds or grid.power:
        # A scale that is no multiple of 1/rms sees the values behind the norm.
        top = wide.float().abs().amax(-1, keepdim=True)
        unit = parts["in_scale"] if "in_scale" in parts else scale_of(top, grid.kind, 8, True)
        made = snap(wide.float() / unit, grid.kind, 8).double() * unit
    else:
        unit = scale_of(kept.abs().amax(-1, keepdim=True), grid.kind, 8, grid.power)
        made = snap(kept / unit, grid.kind, 8).double() * unit * rms
    beyond = (wide.abs() > (grid.limit or float("inf"))).any(-1, keepdim=True)
    apart = v.double()[:, parts["columns"]] * rms if case.outliers else None
    return (torch.where(beyond, wide, made), apart), beyond


def expected(
    case: Case, parts: dict[str, torch.Tensor], given: dict[str, torch.Tensor]
) -> tuple[torch.Tensor, torch.Tensor]:
    """What the call gives in fp64, and how far off it may be."""
    import dataclasses

    from llmc.codegen import meaning

    problem, x = problem_of(case), given["x"]
    (made, apart), beyond = grid_of(case, parts, x)
    plain = dataclasses.replace(problem, rounds="", norm=False, smooth=False, outliers=0)
    residual = given["residual"].double() if "residual" in given else None
    w = meaning.weight(problem, parts)
    if apart is not None:
        made = torch.cat([made, apart], 1)
        w = torch.cat([w, parts["column_weights"].double()], 1)
    wide = dataclasses.replace(plain, K=w.shape[1], weights="dense", levels="")
    bias = {"bias": parts["bias"]} if case.bias else {}
    exact = meaning.linear(wide, {"values": w, **bias}, made, residual)
    products = made.abs() @ w.abs().T
    if case.pairs:
        products = products.split(problem.outputs, -1)
        products = products[0] * products[1] + products[0] + products[1]
    beside = [t for t in (bias.get("bias"), residual) if t is not None]
    sides = sum(float(t.abs().max()) for t in beside)
    half = torch.finfo(x.dtype).eps / 2
    # Scales and sums behind exact products; floats where a token is not rounded or kept apart.
    floats = torch.where(beyond, float(case.K), float(case.outliers))
    steps = problem.groups + 12 + floats + (case.K if problem.levels else 0)
    bound = steps * 2.0**-24 * (products + sides) + 2 * half * exact.abs() + 1e-12
    if (case.norm or case.smooth) and (case.outliers or case.spike):
        bound = bound + 2 * half * products
    return exact, bound
