"""The kernel page: every row at the shapes of an 8B model, microseconds against floors."""

from __future__ import annotations

import dataclasses
from collections.abc import Iterator
from typing import Any

import gpu_clock
import torch
from gpu_work import Task, told

from llmc.codegen.kernels import ROWS
from llmc.codegen.kernels import row as row_named
from llmc.codegen.launch import fused_linear
from llmc.codegen.prepack import Packed, prepack
from llmc.codegen.problem import DTYPES, Problem
from llmc.codegen.row import KernelRow
from llmc.codegen.samples import random_parts
from llmc.codegen.variants import typical, unsupported
from llmc.compiler.ir import packing

Shapes = list[tuple[int, int]]


def machine() -> str:
    """ "sm_90" or "sm_80" on a GPU; "" under the interpreter, which has every instruction."""
    if not gpu_clock.on_gpu():
        return ""
    return "sm_90" if torch.cuda.get_device_capability() >= (9, 0) else "sm_80"


def problems(row: KernelRow, N: int, K: int) -> Iterator[tuple[str, Problem]]:
    """What is timed of a row: its typical problem, and what stands beside four bits."""
    base = typical(row, "bf16") or typical(row)
    if base is None:
        return
    plain = dataclasses.replace(base, N=N, K=K)
    if plain.weights == "factors":
        plain = dataclasses.replace(plain, rank=min(N, K) // 4)
    yield row.name, plain
    if row.name == "w4a16":
        yield "w4a16 rank 64", dataclasses.replace(plain, rank=64)
        yield "w4a16 1% columns", dataclasses.replace(plain, sparse=True)


def _pages(shapes: Shapes, target: str) -> Iterator[tuple[str, str, Problem]]:
    for N, K in shapes:
        for row in ROWS:
            if not (target and unsupported(row, target)):
                for name, problem in problems(row, N, K):
                    if not row.misfits(problem):
                        yield name, row.name, problem


def missing(target: str) -> list[dict[str, Any]]:
    """Rows that this machine does not have, with the reason."""
    found = [(row.name, unsupported(row, target)) for row in ROWS if target]
    return [{"kernel": name, "unsupported": why} for name, why in found if why]


def warm_ups(shapes: Shapes, tokens: list[int], target: str) -> list[Task]:
    """One call of everything that is timed, so that its code lies in Triton's cache."""
    return [Task(f"warm {name} {p.N}x{p.K}", warm, (row, p, tokens), 90.0)
            for name, row, p in _pages(shapes, target)]  # fmt: skip


def timings(shapes: Shapes, tokens: list[int], target: str, limits: gpu_clock.Limits) -> list[Task]:
    """Every row at every shape, shape after shape."""
    return [Task(f"{name} {p.N}x{p.K}", page, (name, row, p, tokens, limits), 60.0,
                 (("kernel", name), ("N", p.N), ("K", p.K)))
            for name, row, p in _pages(shapes, target)]  # fmt: skip


def _made(row: KernelRow, problem: Problem) -> tuple[Packed, Problem]:
    """A random weight, and its problem as counted: how many weights a bitmap keeps."""
    parts = random_parts(problem, kept=0.3, entries=0.01, device=gpu_clock.device())
    packed = prepack(row, problem, **parts)
    if problem.bitmap:
        marks = packing.unpack(parts["bitmap"], 1, problem.K)
        problem = dataclasses.replace(problem, kept=int(marks.sum(dtype=torch.int64)))
    return packed, problem


def _tokens(problem: Problem, count: int) -> torch.Tensor:
    x = torch.randn(count, problem.K, device=gpu_clock.device())
    return x.to(DTYPES[problem.x_dtype])


def warm(name: str, problem: Problem, tokens: list[int]) -> None:
    """Each call once, untimed."""
    packed, _ = _made(row_named(name), problem)
    for m in tokens:
        fused_linear(packed, _tokens(problem, m))


def page(
    name: str, row_name: str, problem: Problem, tokens: list[int], limits: gpu_clock.Limits
) -> list[dict[str, Any]]:
    """One problem at all numbers of tokens; one that fails is a row with its error."""
    row = row_named(row_name)
    about = {"kernel": name, "N": problem.N, "K": problem.K}
    one, problem = _made(row, problem)
    packed = [one]
    for _ in range(gpu_clock.copies(one.bytes) - 1):
        copied = {n: t.clone() for n, t in one.tensors.items()}
        packed.append(dataclasses.replace(one, tensors=copied))
    found = []
    for m in tokens:
        x = _tokens(problem, m)
        try:
            us = gpu_clock.microseconds(lambda p, x=x: fused_linear(p, x), packed)
        except Exception as error:  # such as a tile that the device cannot launch: a finding
            found.append(about | {"tokens": m, "error": told(error)})
            continue
        here = {"tokens": m, "us": us, "bytes": row.bytes_moved(problem, m),
                "weight_bytes": one.bytes}  # fmt: skip
        found.append(about | here | shares(here, problem, limits))
    return found


def shares(here: dict[str, Any], p: Problem, limits: gpu_clock.Limits) -> dict[str, float]:
    """Of the measured copy bandwidth, and of the floor: bytes or operations, whichever is more."""
    if here["us"] is None or limits.copy is None or limits.flops is None:
        return {}
    seconds = here["us"] * 1e-6
    by_bytes = here["bytes"] / limits.copy
    floor = max(by_bytes, 2 * here["tokens"] * p.N * p.K / limits.flops)
    return {"share_of_copy": by_bytes / seconds, "share_of_floor": floor / seconds}
