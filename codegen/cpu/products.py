"""Integer inputs times integer weights: oneDNN's int8 linear, or torch's `_int_mm`.

Sums of products are exact 32-bit integers; scales of tokens and rows multiply them afterwards. The
input comes as floats and is put on its grid here (``rounds``), or is on it already (``rounded``):
then its codes are found again, the largest magnitude being 127 scales.
"""

from __future__ import annotations

import functools
from collections.abc import Callable, Mapping

import torch

from ...compiler.ir.ops.rounding import grid_top, scale_of
from ..grids import Grid, parse
from ..problem import Parts, Problem
from .bytes8 import middle_codes
from .kernel import CpuKernel, Tensors

QLINEAR = "onednn::qlinear_pointwise"
INT_MM = "aten::_int_mm"
Product = Callable[[torch.Tensor, Mapping[str, torch.Tensor]], torch.Tensor]


def grid(problem: Problem) -> tuple[Grid | None, bool]:
    """The input's grid, and whether this kernel is to put it there."""
    if problem.rounds:
        return parse(problem.rounds), True
    # A limit without its number only says that there is one.
    return parse(problem.rounded.removesuffix(" limit")) if problem.rounded else None, False


def misfit(problem: Problem) -> str | None:
    found, own = grid(problem)
    words = problem.rounds or problem.rounded or "none"
    if found is None or found.kind != "int" or found.group or found.per not in (
        "token", "tensor", "static",
    ):  # fmt: skip
        return f"inputs on grid {words}, expected int8 with one scale"
    if not own and (found.bits != 8 or found.power):
        return f"inputs on grid {words}, expected int8 with one scale"
    if not own and problem.x_dtype == "bf16":
        return "x_dtype=bf16, expected one that holds 8-bit codes times a scale"
    if problem.weights != "int" or problem.bitmap:
        return f"weights={problem.weights}{' bitmap' * problem.bitmap}, expected int codes"
    if problem.dense_group:
        return f"group={problem.dense_group}, expected one scale per row"
    if problem.K > 1 << 17:
        return f"K={problem.K}, expected at most {1 << 17} (sums of products are 32 bits)"
    return None


@functools.cache
def exact_onednn() -> bool:
    """Whether oneDNN's int8 linear is there and sums without saturating, as old processors do."""
    if not hasattr(torch.ops.onednn, "qlinear_prepack") or not torch.backends.mkldnn.is_available():
        return False
    x = torch.full((3, 96), 127, dtype=torch.int8)
    x[1, ::2] = -127
    w = torch.full((16, 96), -127, dtype=torch.int8)
    w[::3] = 127
    ones = torch.ones(len(w))
    packed = {"codes": torch.ops.onednn.qlinear_prepack(w, None), "scale": ones,
              "none": torch.zeros(len(w), dtype=torch.int32)}  # fmt: skip
    try:
        found = _onednn(x, packed)
    except RuntimeError:
        return False
    return torch.equal(found, (x.long() @ w.long().t()).float())


def _onednn_misfit(problem: Problem) -> str | None:
    return misfit(problem) or (None if exact_onednn() else "oneDNN's int8 linear is not exact here")


def _pack(problem: Problem, parts: Parts) -> Tensors:
    """int8 [N, K] of q - 2**(bits-1), fp32 scale [N] and what zero points move."""
    codes, moved = middle_codes(problem, parts)
    packed = {"codes": codes, "scale": parts["scale"][:, 0].float().contiguous()}
    if moved is not None:
        packed["moved"] = moved
    if "in_scale" in parts:
        packed["in_scale"] = parts["in_scale"].float().reshape(-1)
    return packed


def _pack_onednn(problem: Problem, parts: Parts) -> Tensors:
    packed = _pack(problem, parts)
    none = torch.zeros(problem.N, dtype=torch.int32)
    codes = torch.ops.onednn.qlinear_prepack(packed["codes"], None)
    return packed | {"codes": codes, "none": none}


def plain(value: torch.Tensor) -> torch.Tensor:
    """A tensor that can be saved: int8 [N, K] of a weight in oneDNN's own layout, others as is."""
    return value if value.layout == torch.strided else value.to_dense().t().contiguous()


def _onednn(x: torch.Tensor, packed: Mapping[str, torch.Tensor]) -> torch.Tensor:
    if packed["codes"].layout == torch.strided:  # as it comes out of an exported graph
        return _int_mm(x, packed)
    found: torch.Tensor = torch.ops.onednn.qlinear_pointwise(
        x, 1.0, 0, packed["codes"], packed["scale"], packed["none"], None, 1.0, 0, torch.float32,
        "none", [], "",
    )  # fmt: skip
    return found


def _int_mm(x: torch.Tensor, packed: Mapping[str, torch.Tensor]) -> torch.Tensor:
    return torch._int_mm(x, packed["codes"].t()).float().mul_(packed["scale"])


def _size(x: torch.Tensor) -> torch.Tensor:
    """max |x| of each token, fp32 [M, 1]."""
    if x.dtype in (torch.bfloat16, torch.float16):
        # Bits of 16-bit floats without their sign are ordered as the floats are.
        bits = (x.view(torch.int16) & 0x7FFF).amax(-1, keepdim=True)
        return bits.view(x.dtype).float()
    return x.abs().amax(-1, keepdim=True).float()


def units(
    problem: Problem, x: torch.Tensor, packed: Mapping[str, torch.Tensor]
) -> torch.Tensor | None:
    """The one scale of all tokens [1, 1]; None where each has its own."""
    found, _ = grid(problem)
    assert found is not None
    if "in_scale" in packed:
        return packed["in_scale"].reshape(1, 1)
    if found.per == "token":
        return None
    return scale_of(_size(x).amax().reshape(1, 1), "int", found.bits, found.power)


def codes_of(
    problem: Problem, x: torch.Tensor, unit: torch.Tensor | None
) -> tuple[torch.Tensor, torch.Tensor]:
    """int8 codes [M, K] and their scale, [M, 1] or the one that is given."""
    found, _ = grid(problem)
    assert found is not None
    own = unit is None
    if unit is None:
        unit = scale_of(_size(x), "int", found.bits, found.power)
    top, rows = grid_top("int", found.bits), max(1, _SCRATCH // problem.K)
    codes = torch.empty(x.shape, dtype=torch.int8)
    scratch = torch.empty(min(rows, len(x)), problem.K)
    for at in range(0, len(x), rows):
        now = slice(at, at + rows)
        part = scratch[: len(x[now])].copy_(x[now])
        # Dividing, as the reference does: the reciprocal would move codes that lie half way.
        part.div_(unit[now] if len(unit) > 1 else unit).round_()
        if not own:
            part.clamp_(-top, top)
        codes[now].copy_(part)
    return codes, unit


_SCRATCH = 1 << 17  # floats that are rounded together
_AT_ONCE = 1 << 20  # floats of a block of tokens that stay in the cache


def _by(product: Product) -> Callable[..., torch.Tensor]:
    def call(problem: Problem, x: torch.Tensor, packed: Mapping[str, torch.Tensor]) -> torch.Tensor:
        """A block of tokens at a time, so that what lies between stays in the cache."""
        unit, step = units(problem, x, packed), max(16, _AT_ONCE // max(problem.N, problem.K))
        if len(x) <= step:
            return _block(product, problem, x, unit, packed)
        y = x.new_empty(len(x), problem.N)
        for part, given in zip(y.split(step), x.split(step), strict=True):
            part.copy_(_block(product, problem, given, unit, packed))
        return y

    return call


def _block(
    product: Product, problem: Problem, x: torch.Tensor, unit: torch.Tensor | None,
    packed: Mapping[str, torch.Tensor],
) -> torch.Tensor:  # fmt: skip
    """y fp32; tokens beyond the limit were not rounded and take products of floats."""
    codes, unit = codes_of(problem, x, unit)
    y = product(codes, packed)
    moved = packed.get("moved")
    if moved is not None:
        y = torch.addr(y, codes.sum(-1).float(), moved)
    y.mul_(unit)
    found, _ = grid(problem)
    if found is not None and found.limit:
        x = x.float()
        loose = (x.abs() > found.limit).any(-1)
        if bool(loose.any()):
            y[loose] = x[loose] @ _floats(problem, packed).t()
    return y


def _floats(problem: Problem, packed: Mapping[str, torch.Tensor]) -> torch.Tensor:
    """W [N, K]: of an opaque packing by its products with the unit vectors."""
    codes = packed["codes"]
    if codes.is_mkldnn:
        eye = torch.eye(problem.K, dtype=torch.int8)
        weight = _onednn(eye, packed).t()
    else:
        weight = codes.float() * packed["scale"][:, None]
    moved = packed.get("moved")
    return weight if moved is None else weight + moved[:, None]


def _key(problem: Problem) -> str:
    found, own = grid(problem)
    assert found is not None
    return f"int8x8 {found.per}{' own' * own}"


_NOTE = "sums of products are integers"
ONEDNN = CpuKernel(
    QLINEAR, _onednn_misfit, _pack_onednn, {"qlinear": _by(_onednn)}, ((1, "qlinear"),), _key,
    grid=True, note=_NOTE,
)  # fmt: skip
PRODUCTS = CpuKernel(
    INT_MM, misfit, _pack, {"int_mm": _by(_int_mm)}, ((1, "int_mm"),), _key, grid=True, note=_NOTE,
)  # fmt: skip
