"""One fused linear over tensors of a call: checked, tiled and launched.

Runs on CUDA tensors, or on CPU tensors when Triton was imported under TRITON_INTERPRET=1. Results
are the same bits each time: a program sums its columns in their order, and what several programs
found is added in the order of their columns by one of them, never in the order of their arrival.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable
from typing import Any

import torch

from ..compiler.ir.errors import ResourceError, UsageError
from . import large, made, normed, turned, workspace
from .calls import kind
from .counters import counters
from .device import machine, processor_count, unavailable
from .prepack import Packed
from .problem import DTYPES, Problem, dtype_name
from .render import arguments, makes, shares
from .row import TileConfig
from .start import check_config, joined, launch_row, look, row_call, strides_of
from .tuning.choices import tuned_config


def fused_linear(
    packed: Packed,
    x: torch.Tensor,
    *,
    config: TileConfig | None = None,
    **sides: torch.Tensor,
) -> torch.Tensor:
    """y [..., N] of x [..., K], in x's dtype: what `Problem` says, over a prepacked weight.

    `sides` are the tensors of a call (residual [..., N]) and those that were not packed (bias [N],
    gain [K] of the norm of x, unless it is centred). Rows of x may be strided, columns not.
    UsageError when an argument does not fit the row or a tile configuration does not fit the
    weight; ResourceError when there is neither a CUDA device nor the interpreter.
    """
    ready = packed.kept.setdefault("ready", {})
    key = (config, look(x), *[(name, look(t)) for name, t in sides.items()])
    run = ready.get(key)
    if run is None:
        if len(ready) >= MOST_READY:
            ready.clear()
        run = ready[key] = _ready(packed, x, config, sides)
    return run(x, sides)


MOST_READY = 256  # kinds of call that a weight remembers
Run = Callable[[torch.Tensor, dict[str, torch.Tensor]], torch.Tensor]


def _ready(
    packed: Packed, x: torch.Tensor, config: TileConfig | None, sides: dict[str, torch.Tensor]
) -> Run:
    """Everything of a call that its looks decide, done once; errors as `fused_linear` says."""
    row = packed.row
    why = unavailable(x.device if x.device.type == "cuda" else None)
    if why:
        raise ResourceError(f"cannot launch {row.name}: {why}")
    target = machine(x.device)
    if target and target not in row.targets:
        raise ResourceError(f"expected {' or '.join(row.targets)} for {row.name}, found {target}")
    if packed.problem.routed:
        found = f"{packed.problem.experts} experts"
        raise UsageError(
            f"expected one linear for {row.name}, found {found}", hint="call fused_mixture"
        )
    problem = problem_of_call(packed, {"x": x, **packed.sides, **sides})
    M, shape = x.numel() // problem.K, (*x.shape[:-1], problem.outputs)
    if problem.out_norm and config is None and M > normed.FEW:
        return normed.apart(_ready, packed, problem, x, sides)
    if config is None and turned.goes_apart(problem, M):
        return turned.apart(_ready, packed, problem, x, sides)
    if config is None and made.goes_before(row, problem, M):
        return made.apart(_ready, packed, problem, x, sides)
    many = config is None and large.better(row, problem, M)
    tile = config or tuned_config(row, problem, M)
    if tile is None:
        processors = processor_count(x.device) if x.device.type == "cuda" else 132
        tile = row.default_config(problem, M, processors)
    check_config(row, problem, tile)
    kept = {**packed.tensors, **joined(packed.sides)}

    def gather(x: torch.Tensor, sides: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
        rows = {n: t.reshape(M, -1) if n in _ROWS else t for n, t in sides.items()}
        if not sides.keys().isdisjoint(_VECTORS):
            rows = joined({**packed.sides, **rows})
        return {**kept, **rows, "x": x.reshape(M, -1), "y": x.new_empty(M, problem.outputs)}

    def empty(x: torch.Tensor, sides: dict[str, torch.Tensor]) -> torch.Tensor:
        return x.new_empty(shape)

    def dense(x: torch.Tensor, sides: dict[str, torch.Tensor]) -> torch.Tensor:
        given = gather(x, sides)
        del given["y"]
        return large.linear(launch_row, packed, problem, M, given).reshape(shape)

    def several(x: torch.Tensor, sides: dict[str, torch.Tensor]) -> torch.Tensor:
        given = gather(x, sides)
        assert row.call is not None
        row.call(launch_row, row, problem, tile, M, given | _workspace(packed, problem, tile, M))
        return given["y"].reshape(shape)

    if M == 0:
        return empty
    if many:
        return dense
    if row.call:
        return several
    names = [a.name for a in arguments(row, problem)]
    shared = problem.gathered or (shares(row) and workspace.needed(problem, tile))
    shared |= makes(row, problem)
    first = gather(x, sides)
    looks = tuple(kind(first.get(name)) for name in names)
    strides = strides_of(row, problem, first, {})
    call = row_call(row, problem, tile, M, strides, None, first["y"].device, looks)

    def one(x: torch.Tensor, sides: dict[str, torch.Tensor]) -> torch.Tensor:
        given = gather(x, sides)
        if shared:
            given |= _workspace(packed, problem, tile, M)
        call([given.get(name) for name in names])
        return given["y"].reshape(shape)

    return one


_ROWS = ("x", "residual")
_VECTORS = ("gain", "smooth", "out_gain")
# Side tensor -> the field of the problem that says it is there.
_FLAGS = {
    "bias": "bias", "residual": "residual", "gain": "norm", "smooth": "smooth",
    "out_gain": "out_norm",
}  # fmt: skip


def _workspace(
    packed: Packed, problem: Problem, config: TileConfig, M: int
) -> dict[str, torch.Tensor]:
    """Scratch for one launch, and its counters."""
    found: dict[str, torch.Tensor] = {}
    device = next(iter(packed.tensors.values())).device
    if shares(packed.row) and workspace.needed(problem, config):
        scratch, count = workspace.sizes(problem, config, M)
        found["scratch"] = torch.empty(scratch, device=device)
        found["counts"] = counters("counts", count, device)
    if problem.gathered:
        whole, count = workspace.whole_sizes(problem, config, M)
        found["whole"] = torch.empty(whole, device=device)
        found["arrived"] = counters("arrived", count, device)
    if makes(packed.row, problem):
        size, count = workspace.made_sizes(problem, config, M)
        found["made"] = torch.empty(size, dtype=DTYPES[problem.x_dtype], device=device)
        found["makers"] = counters("makers", count, device)
        if problem.mixed_twice:
            found["between"] = torch.empty(M, problem.K, device=device)
    return found


def problem_of_call(packed: Packed, given: dict[str, torch.Tensor]) -> Problem:
    """The problem with this call's dtype and side inputs; UsageError naming a misfit."""
    base, where = packed.problem, f"kernel row {packed.row.name}"
    x = given["x"]
    shapes: dict[str, tuple[int, ...]] = {
        "x": (*x.shape[:-1], base.K),
        "bias": (base.N,) if "bias" not in packed.sides else tuple(packed.sides["bias"].shape),
        "residual": (*x.shape[:-1], base.outputs),
        "gain": (base.K,),
        "smooth": (base.K,),
        "out_gain": (base.outputs,),
    }
    for name, tensor in given.items():
        shape = shapes.get(name)
        if shape is None or (name == "bias" and base.pairs and name not in packed.sides):
            raise UsageError(f"expected tensors of {', '.join(shapes)}, found {name}", where=where)
        if tuple(tensor.shape) != shape:
            raise UsageError(
                f"expected {name} {list(shape)}, found {list(tensor.shape)}", where=where
            )
        if tensor.stride(-1) != 1 and tensor.shape[-1] > 1:
            raise UsageError(
                f"expected {name} with contiguous columns, found stride {tensor.stride(-1)}",
                where=where,
                hint=f"call {name}.contiguous()",
            )
        if tensor.device != next(iter(packed.tensors.values())).device:
            device = next(iter(packed.tensors.values())).device
            raise UsageError(f"expected {name} on {device}, found {tensor.device}", where=where)
        if tensor.dtype not in DTYPES.values():
            raise UsageError(f"expected {name} in a float dtype, found {tensor.dtype}", where=where)
    missing = [n for n, f in _FLAGS.items() if getattr(base, f) and n not in given]
    if missing:
        told = ", ".join(missing)
        raise UsageError(f"expected {told} as the problem says, found none", where=where)
    late = [n for n in ("gain", "smooth") if given.get(n) is not packed.sides.get(n)]
    if base.centred and late:
        raise UsageError(
            f"expected {late[0]} packed with the weight that takes a mean away, found it in a call",
            where=where,
        )
    flags: Any = {flag: name in given for name, flag in _FLAGS.items()}
    if base.weights == "dense" and x.dtype != DTYPES[base.x_dtype]:
        raise UsageError(
            f"expected x in {base.x_dtype} as the values, found {x.dtype}", where=where
        )
    return dataclasses.replace(base, x_dtype=dtype_name(x.dtype), **flags)
