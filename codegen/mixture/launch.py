"""A layer of experts in two launches: gate and up of the chosen, then down and their weighted sum.

For up to `routing.MOST` pairs the first launch also norms and chooses; for more, torch and the
norm's own kernel do that before. Results are the same bits each time, as `launch` says.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable

import torch

from ...compiler.ir.errors import ResourceError, UsageError
from .. import workspace
from ..calls import Call, kind
from ..counters import counters
from ..device import machine, processor_count, unavailable
from ..prepack import Packed
from ..problem import DTYPES, Problem, dtype_name
from ..render import arguments
from ..row import KernelRow, TileConfig
from ..rows.rounded import NORM_INPUT, round_config
from ..start import check_config, joined, launch_row, look, row_call
from . import fit, routing

MOST_READY = 64  # kinds of call that a layer remembers
Sides = dict[str, torch.Tensor]
Run = Callable[[torch.Tensor, Sides], torch.Tensor]


def fused_mixture(
    up: Packed,
    down: Packed,
    x: torch.Tensor,
    *,
    residual: torch.Tensor | None = None,
    index: torch.Tensor | None = None,
    weight: torch.Tensor | None = None,
    configs: tuple[TileConfig, TileConfig] | None = None,
) -> torch.Tensor:
    """y [..., O] of x [..., H], in x's dtype: what two problems of one layer say, see `Problem`.

    Args:
        residual: [..., O], where ``down`` adds one.
        index, weight: int [T, k] and float [T, k] of T tokens, where ``up`` does not choose.
        configs: the tiles of both; None: untuned choices.

    Raises:
        UsageError: an argument does not fit, or the two problems are not of one layer.
        ResourceError: there is neither a CUDA device nor the interpreter.
    """
    every = {"residual": residual, "index": index, "weight": weight}
    sides = {n: t for n, t in every.items() if t is not None}
    ready = up.kept.setdefault("mixture", {})
    key = (configs, look(x), *[(name, look(t)) for name, t in sides.items()])
    held = ready.get(key)
    if held is None or held[0] is not down:
        if len(ready) >= MOST_READY:
            ready.clear()
        held = ready[key] = down, _ready(up, down, x, sides, configs)
    run: Run = held[1]
    return run(x, sides)


def _ready(
    up: Packed, down: Packed, x: torch.Tensor, sides: Sides,
    configs: tuple[TileConfig, TileConfig] | None,
) -> Run:  # fmt: skip
    """Everything of a call that its looks decide, done once; errors as `fused_mixture` says."""
    target = machine(x.device)
    for row in (up.row, down.row):
        why = unavailable(x.device if target else None)
        if why:
            raise ResourceError(f"cannot launch {row.name}: {why}")
        if target and target not in row.targets:
            wanted = " or ".join(row.targets)
            raise ResourceError(f"expected {wanted} for {row.name}, found {target}")
    _check(up, down, x, sides)
    dtype = dtype_name(x.dtype)
    first, last = (dataclasses.replace(p.problem, x_dtype=dtype) for p in (up, down))
    T = x.numel() // first.K
    shape = (*x.shape[:-1], last.outputs)
    if T == 0:
        return lambda x, sides: x.new_empty(shape)
    itself = bool(first.route) and T * first.chosen <= routing.MOST
    plain = first if itself else dataclasses.replace(first, route="", norm=False, eps=0.0)
    processors = processor_count(x.device) if target else 132
    tiles = configs or (
        up.row.default_config(plain, T, processors), down.row.default_config(last, T, processors)
    )  # fmt: skip
    for row, problem, tile in zip((up.row, down.row), (plain, last), tiles, strict=True):
        check_config(row, problem, tile)
    makes, sums = (
        _Launch(row, problem, tile, T)
        for row, problem, tile in zip((up.row, down.row), (plain, last), tiles, strict=True)
    )
    gains = joined(up.sides)

    def run(x: torch.Tensor, sides: Sides) -> torch.Tensor:
        x = x.reshape(T, first.K)
        if itself:
            found = routing.empty(first, T, x.device)
        elif first.route:
            x = _normed(first, x, gains) if first.norm else x
            found = routing.told(first, *routing.choose(first, x, up.tensors))
        else:
            found = routing.told(first, sides["index"], sides["weight"])
        inner = x.new_empty(T * first.chosen, first.outputs)
        makes({**up.tensors, **gains, **found.tensors, "x": x, "y": inner})
        y = x.new_empty(T, last.outputs)
        given = {**down.tensors, **found.tensors, "x": inner, "y": y}
        if last.residual:
            given["residual"] = sides["residual"].reshape(T, -1)
        sums(given)
        return y.reshape(shape)

    return run


class _Launch:
    """One of the two, made when its tensors are first seen: all others of this call look alike."""

    def __init__(self, row: KernelRow, problem: Problem, tile: TileConfig, T: int) -> None:
        self.row, self.problem, self.tile, self.T = row, problem, tile, T
        self.given = arguments(row, problem)
        self.size = workspace.sizes(problem, tile, T)
        columns = fit.rows_of(problem) // tile.BN
        self.grid = (columns, fit.tiles(problem, T, tile.BM), 1)
        self.call: Call | None = None

    def __call__(self, given: Sides) -> None:
        device = given["y"].device
        if workspace.needed(self.problem, self.tile):
            given["scratch"] = torch.empty(self.size[0], device=device)
            given["counts"] = counters("counts", self.size[1], device)
        tensors = [given.get(a.name) for a in self.given]
        if self.call is None:
            strides = tuple(given[a.name].stride(0) for a in self.given if a.strided)
            looks = tuple(kind(t) for t in tensors)
            how = (self.row, self.problem, self.tile, self.T, strides, self.grid, device, looks)
            self.call = row_call(*how)
        self.call(tensors)


def _normed(problem: Problem, x: torch.Tensor, gains: Sides) -> torch.Tensor:
    """x [T, K] behind the layer's norm, in x's dtype."""
    plain = Problem(1, problem.K, x_dtype=problem.x_dtype, norm=True, eps=problem.eps)
    made, M = torch.empty_like(x, memory_format=torch.contiguous_format), len(x)
    given = {**gains, "x": x, "y": made}
    launch_row(NORM_INPUT, plain, round_config(problem.K), M, given, grid=(1, M))
    return made


def _check(up: Packed, down: Packed, x: torch.Tensor, sides: Sides) -> None:
    """UsageError unless both weights, x and its sides are of one layer."""
    first, last, where = up.problem, down.problem, f"kernel rows {up.row.name}, {down.row.name}"
    if (first.routed, last.routed) != ("up", "down"):
        raise UsageError(
            f"expected weights routed up and down, found {first.routed or 'none'} and "
            f"{last.routed or 'none'}", where=where,
        )  # fmt: skip
    for name in ("experts", "chosen"):
        if getattr(first, name) != getattr(last, name):
            raise UsageError(
                f"expected as many {name} in both, found {getattr(first, name)} and "
                f"{getattr(last, name)}", where=where,
            )  # fmt: skip
    if first.outputs != last.K:
        raise UsageError(f"expected down of {first.outputs} columns, found {last.K}", where=where)
    T = x.numel() // max(x.shape[-1], 1)
    wanted: dict[str, tuple[int, ...]] = {}
    if last.residual:
        wanted["residual"] = (*x.shape[:-1], last.outputs)
    if not first.route:
        wanted |= {"index": (T, first.chosen), "weight": (T, first.chosen)}
    if sides.keys() != wanted.keys():
        raise UsageError(
            f"expected {', '.join(wanted) or 'nothing'} beside x, found "
            f"{', '.join(sides) or 'nothing'}", where=where,
        )  # fmt: skip
    device = next(iter(up.tensors.values())).device
    wanted["x"] = (*x.shape[:-1], first.K)
    for name, tensor in {"x": x, **sides}.items():
        if tuple(tensor.shape) != wanted[name]:
            raise UsageError(
                f"expected {name} {list(wanted[name])}, found {list(tensor.shape)}", where=where
            )
        if tensor.device != device:
            raise UsageError(f"expected {name} on {device}, found {tensor.device}", where=where)
        if name in ("x", "residual") and tensor.stride(-1) != 1 and tensor.shape[-1] > 1:
            raise UsageError(
                f"expected {name} with contiguous columns, found stride {tensor.stride(-1)}",
                where=where, hint=f"call {name}.contiguous()",
            )  # fmt: skip
        what, known = "a float dtype", tuple(DTYPES.values())
        if name == "index":
            what, known = "int32 or int64", (torch.int32, torch.int64)
        if tensor.dtype not in known:
            raise UsageError(f"expected {name} in {what}, found {tensor.dtype}", where=where)
    for problem in (first, last):
        if problem.weights == "dense" and x.dtype != DTYPES[problem.x_dtype]:
            raise UsageError(
                f"expected x in {problem.x_dtype} as the values, found {x.dtype}", where=where
            )
