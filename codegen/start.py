"""Start one kernel of a row over tensors that go by the names of its arguments."""

from __future__ import annotations

import functools
from typing import Any

import torch

from ..compiler.ir.errors import UsageError
from . import workspace
from .calls import ALIGNED, Call, Kind, kind
from .device import interpreting, processor_count
from .problem import Problem
from .render import arguments, render, shares
from .row import MAX_REGISTERS, KernelRow, TileConfig
from .source import function


def launch_row(
    row: KernelRow,
    problem: Problem,
    config: TileConfig,
    M: int,
    given: dict[str, torch.Tensor],
    grid: tuple[int, ...] | None = None,
    strides: dict[str, int] | None = None,
) -> None:
    """Launch one kernel over tensors by name; ``grid`` and ``strides`` where they are others than
    the tile and the tensors say."""
    tensors = [given.get(a.name) for a in arguments(row, problem)]
    steps = strides_of(row, problem, given, strides or {})
    looks = tuple(kind(t) for t in tensors)
    row_call(row, problem, config, M, steps, grid, given["y"].device, looks)(tensors)


def strides_of(
    row: KernelRow, problem: Problem, given: dict[str, torch.Tensor], known: dict[str, int]
) -> tuple[int, ...]:
    """Strides of the rows of all strided arguments, in their order."""
    wanted = [a.name for a in arguments(row, problem) if a.strided]
    return tuple(known[n] if n in known else given[n].stride(0) for n in wanted)


@functools.lru_cache(4096)
def row_call(
    row: KernelRow,
    problem: Problem,
    config: TileConfig,
    M: int,
    strides: tuple[int, ...],
    grid: tuple[int, ...] | None,
    device: torch.device,
    looks: tuple[Kind, ...],
) -> Call:
    """What launches such tensors; ``looks`` only tells calls with other code apart."""
    rendered = render(row, problem, interpret=interpreting())
    constants: list[Any] = [problem.K, *([problem.eps] if problem.norm else [])]
    constants += [problem.out_eps] if problem.out_norm else []
    constants += [config.BM, config.BN, config.stages]
    if shares(row):
        processors = 1 if interpreting() else processor_count(device)
        constants += workspace.constants(problem, config, M, processors).values()
    grid = grid or (-(-problem.N // config.BN), -(-M // config.BM), config.split)
    options = {
        "num_warps": config.warps, "num_stages": config.stages, "maxnreg": MAX_REGISTERS
    }  # fmt: skip
    tail = (M, problem.outputs, *strides, *constants)
    return Call(function(rendered), grid, tail, options, device)


def look(t: torch.Tensor) -> tuple[Any, ...]:
    """All that a call's checks and code depend on."""
    return t.shape, t.stride(), t.dtype, t.device, t.data_ptr() % ALIGNED


def joined(sides: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    """The sides, with all vectors that multiply x as one: "gain"."""
    gains = [sides[name].float() for name in ("gain", "smooth") if name in sides]
    rest = {n: t for n, t in sides.items() if n not in ("gain", "smooth")}
    if "out_gain" in rest:
        rest["out_gain"] = rest["out_gain"].float()
    if gains:
        rest["gain"] = gains[0] * gains[1] if len(gains) > 1 else gains[0]
    return rest


def check_config(row: KernelRow, problem: Problem, config: TileConfig) -> None:
    """UsageError unless ``config`` is a tile that the row has for this problem."""
    tiles = {(c.BM, c.BN) for c in row.configs(problem)}
    if (config.BM, config.BN) not in tiles:
        raise UsageError(
            f"expected a tile of {row.name} for N={problem.N} {problem.x_dtype}: "
            f"{sorted(tiles)}, found {(config.BM, config.BN)}"
        )
