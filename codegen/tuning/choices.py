"""The tile that was measured fastest here: `tuned_config`, asked by every launch without a tile.

The user's table (`llmc tune --target triton`) comes first, then one that is shipped for the GPU by
name; a GPU that nobody measured has neither, and takes the row's untuned choice.
"""

from __future__ import annotations

import functools
import importlib.util
from pathlib import Path

import torch

from ...compiler.ir.errors import ModelError
from ..problem import Problem
from ..row import KernelRow, TileConfig
from .cache import Found, Machine, parse, read
from .grid import bucket, config_of, key_of

SHIPPED = Path(__file__).with_name("shipped")
"""A JSON file per GPU that was measured; a GPU that nobody had has none."""


@functools.cache
def gpu() -> Machine | None:
    """The GPU and the versions of torch, llmc and Triton; None without either of both."""
    if not torch.cuda.is_available() or importlib.util.find_spec("triton") is None:
        return None
    import triton

    return Machine("triton", torch.cuda.get_device_name(), compiler=f"triton {triton.__version__}")


@functools.lru_cache(8)
def measured(machine: Machine) -> Found:
    """What was measured on a machine, by the user or for the package, or why nothing is used.

    Read once: a launch has no time to look at files. `forget` reads again.
    """
    found = read(machine)
    if found.table is not None:
        return found
    for path in sorted(SHIPPED.glob("*.json")):
        try:
            table = parse(path.read_text(), str(path), "shipped")
        except ModelError as error:
            return Found(path, None, f"{found.reason}; {error}")
        if machine.differs(table.machine) is None:
            return Found(path, table)
    return found


def tuned_config(
    row: KernelRow, problem: Problem, M: int, machine: Machine | None = None
) -> TileConfig | None:
    """The tile measured fastest for a call; None where none was measured, or it is no tile of the
    row any more. ``machine``: this one's GPU when None."""
    machine = machine or gpu()
    if machine is None:
        return None
    return _config(row, problem, bucket(M), machine)


@functools.lru_cache(4096)
def _config(row: KernelRow, problem: Problem, tokens: int, machine: Machine) -> TileConfig | None:
    table = measured(machine).table
    for entry in table.of(key_of(row, problem)) if table else ():
        if entry.tokens == tokens:
            config = config_of(entry.best)
            return config if config in row.configs(problem) else None
    return None


def forget() -> None:
    """Read tables again at the next launch."""
    measured.cache_clear()
    _config.cache_clear()


def reason(machine: Machine | None = None) -> str:
    """Where tiles come from, as the plan words it: "measured here", "shipped" or "untuned: why"."""
    machine = machine or gpu()
    if machine is None:
        return "untuned: no CUDA device, or no Triton, to have been measured"
    found = measured(machine)
    if found.table is None:
        return f"untuned: {found.reason}"
    return "measured here" if found.table.source == "measured" else "shipped"
