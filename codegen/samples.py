"""Random canonical parts of any problem: what tests check, the tuner times and benchmarks run."""

from __future__ import annotations

from typing import Any

import torch

from ..compiler.ir import packing
from ..compiler.ir.levels import levels as named_levels
from ..compiler.ir.ops.pairs import pair_codes, round_pairs
from ..compiler.ir.ops.rounding import grid_top
from ..compiler.ir.ops.sparse import csr
from .coded import by_rows
from .grids import parse
from .mixture.fit import among, router_rows
from .problem import DTYPES, Problem


def random_parts(
    problem: Problem, seed: int = 0, *, kept: float | None = None, entries: float = 0.03,
    device: torch.device | str = "cpu",
) -> dict[str, torch.Tensor]:  # fmt: skip
    """Every part that a problem has (see `problem.PARTS`), with weights of about 0.1.

    Args:
        kept: share of weights that a bitmap keeps; drawn from 0.05 to 0.4 when None.
        entries: share of weights that have an entry beside the codes.
        device: where they are made; numbers differ from device to device.
    """
    p, g = problem, torch.Generator(device).manual_seed(seed)
    how: Any = {"generator": g, "device": g.device}
    dtype = DTYPES[p.x_dtype]
    parts: dict[str, torch.Tensor] = {}
    if p.weights in ("int", "table"):
        parts["codes"] = packing.pack(_codes(p, g), p.bits)
    if p.weights == "paired":
        values = torch.randn(p.N, p.K, **how) * _top(p) / 2
        parts["codes"] = packing.pack(pair_codes(round_pairs(values, p.bits), p.bits), p.bits)
    if p.weights == "signs":
        bits = torch.randint(0, 2, (p.bits, p.N, p.K), **how)
        parts["signs"] = packing.pack(bits, 1)
        factors = (torch.rand(p.bits, p.N, p.groups, **how) * 0.75 + 0.25) * 0.1
        parts["factors"] = factors.to(DTYPES[p.scale_dtype])
    elif p.scale_dtype and not p.coded:
        scale = (torch.rand(p.N, p.groups, **how) * 0.75 + 0.25) * 0.3 / _top(p)
        parts["scale"] = scale.to(DTYPES[p.scale_dtype])
    if p.asym and not p.coded:
        parts["zero"] = torch.randint(0, 1 << p.bits, (p.N, p.groups), **how).to(torch.uint8)
    if p.table:
        rows = p.N if p.table == "row" else 1
        parts["table"] = torch.randn(rows, 1 << p.bits, **how).to(dtype)
    if p.m:
        order = torch.rand(p.N, p.K // p.m, p.m, **how).argsort(-1)
        where = order[..., : p.n].sort(-1).values.flatten(1)
        parts["meta"] = packing.pack(where, packing.nm_bits(p.m))
    if p.weights == "dense":
        parts["values"] = (torch.randn(p.N, p.columns, **how) * 0.1).to(dtype)
    if p.bitmap:
        share = 0.05 + 0.35 * float(torch.rand(1, **how)) if kept is None else kept
        mask = torch.rand(p.N, p.K, **how) < share
        parts["bitmap"] = packing.pack(mask.to(torch.int64), 1)
        if p.weights == "dense":
            parts["values"] = parts["values"][mask]
    if p.coded:
        parts |= _coded(p, g)
    elif p.rank:
        lefts = [torch.randn(rows, rank, **how) * 0.2 for rows, rank in p.sections]
        parts["left"] = torch.block_diag(*lefts).to(dtype)
        parts["right"] = (torch.randn(p.rank, p.K, **how) * 0.1).to(dtype)
    if p.sparse:
        support = torch.rand(p.N, p.K, **how) < entries
        support[0, 0] = True
        parts["csr_index"], parts["csr_starts"] = csr(support)
        parts["csr_values"] = torch.randn(int(support.sum()), **how).to(dtype)
    if p.outliers:
        parts["columns"] = torch.randperm(p.K, **how)[: p.outliers].sort().values
        parts["column_weights"] = torch.randn(p.N, p.outliers, **how).to(dtype)
    if p.out_mixed:
        signs = torch.randint(0, 2, (p.N,), **how) * 2 - 1
        parts["out_turn"] = signs * (torch.rand(p.N, **how) + 0.5)
    for name in [n for n, has in (("gain", p.norm), ("smooth", p.smooth)) if has]:
        parts[name] = (torch.rand(p.K, **how) + 0.5) / (loud(p) if name == "gain" else 1.0)
    if p.centred:
        parts["shift"] = torch.randn(p.K, **how) * 0.3 / loud(p)
    if p.out_norm:
        parts["out_gain"] = torch.rand(p.outputs, **how) + 0.5
    if "static" in p.rounds:
        grid = parse(p.rounds)
        assert grid is not None
        unit = 4.0 / grid_top(grid.kind, grid.bits)
        groups = -(-p.K // (grid.group or p.K))
        parts["in_scale"] = torch.full((groups,), unit, device=g.device)
        parts["in_scale"][1:] *= torch.rand(groups - 1, **how) + 0.5
    if p.route:
        router = torch.randn(router_rows(p), p.K, **how)
        parts["router"] = router if p.wide_router else router.to(dtype)
    if p.corrected:
        parts["correction"] = torch.rand(among(p), **how) - 0.5
    if p.bias:
        parts["bias"] = torch.randn(p.N, **how).to(dtype)
    return parts


def _coded(p: Problem, g: torch.Generator) -> dict[str, torch.Tensor]:
    """Both factors of codes, of left each section by itself."""
    how: Any = {"generator": g, "device": g.device}
    shapes = {"right": [(p.rank, p.K)], "left": list(p.sections)}
    parts: dict[str, list[torch.Tensor]] = {}
    for side, sizes in shapes.items():
        for rows, columns in sizes:
            groups = -(-columns // p.dense_group) if p.dense_group else 1
            q = torch.randint(0, 1 << p.bits, (rows, columns), **how)
            scale = (torch.rand(rows, groups, **how) * 0.75 + 0.25) * 0.3 / _top(p)
            made = {"codes": packing.pack(q, p.bits), "scale": scale.to(DTYPES[p.scale_dtype])}
            if p.asym:
                zero = torch.randint(0, 1 << p.bits, (rows, groups), **how)
                made["zero"] = zero.to(torch.uint8)
            for role, tensor in made.items():
                parts.setdefault(f"{side}_{role}", []).append(tensor)
    return {role: by_rows(tensors) for role, tensors in parts.items()}


def loud(problem: Problem) -> float:
    """By how much inputs are to be smaller, as levels without scales reach far beyond 1."""
    return _top(problem) if problem.levels and not problem.scale_dtype else 1.0


def _top(p: Problem) -> float:
    """The largest magnitude that a code stands for, in units of its scale."""
    if p.weights == "table":
        return float(levels_of(p).nan_to_num().abs().max()) if p.levels else 1.0
    return float(1 << (p.bits - 1))


def levels_of(problem: Problem) -> torch.Tensor:
    """What each code stands for; NaN where it stands for nothing."""
    return named_levels(problem.levels, problem.bits)


def _codes(p: Problem, g: torch.Generator) -> torch.Tensor:
    """Codes [N, columns]; of levels only those that stand for a number."""
    q = torch.randint(0, 1 << p.bits, (p.N, p.columns), generator=g, device=g.device)
    if not p.levels:
        return q
    known = levels_of(p).isfinite().nonzero().flatten().to(g.device)
    return known[q % len(known)]
