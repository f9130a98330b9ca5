"""Int4 products in C++ for this machine's matrix instructions, compiled on request.

torch's int4 kernel has no matrix instructions, and decoding by torch's elementwise ops takes longer
than the product that follows. The template `int4_amx.cpp.j2` decodes a block of torch's own layout
into the pairs that AMX tiles read, where it stays in the cache for all tokens, so that nothing is
held twice; gate and up are multiplied before they are written. One library serves all shapes,
groups and numbers of tokens; it is compiled once in seconds and kept in the user's cache.
"""

from __future__ import annotations

import ctypes
import functools
import hashlib
import os
import shutil
import subprocess
import tempfile
from collections.abc import Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch

from ...compiler.ir.errors import ResourceError
from ..problem import Problem
from ..render import environment
from ..tuning.cache import folder as tuned
from .kernel import CpuKernel, Tensors, round_up
from .nibbles import NIBBLES, PLANES, ROWS, block_rows, unit
from .serve import call
from .table import Choice, key_of, machine

TEMPLATE = "int4_amx.cpp.j2"
# Columns and tokens that one decoding serves, bytes of sums that are kept meanwhile, bytes of y
# from which on it is written past the cache: measured with 48 KB of first and 2 MB of second cache.
BLOCKING = {"columns": 256, "rows": 512, "sums": 1 << 19, "stream": 1 << 20}
FLAGS = (
    "-O3", "-std=c++17", "-fopenmp", "-shared", "-fPIC", "-mavx512f", "-mavx512bw", "-mavx512vl",
    "-mavx512bf16", "-mamx-tile", "-mamx-bf16",
)  # fmt: skip
TOKENS = (1, 2, 4, 8, 16, 32, 64, 128, 256, 512, 1024)  # timed at lowering


def _compiler() -> str:
    """g++ or clang++, or what CXX names; "" for none."""
    named = os.environ.get("CXX")
    return next((c for c in ([named] if named else ["g++", "clang++"]) if shutil.which(c)), "")


def unavailable() -> str | None:
    """Why nothing can be compiled here; None when it can."""
    if not _compiler():
        return f"expected a C++ compiler (g++ or clang++), found {os.environ.get('CXX') or 'none'}"
    if "amx_bf16" not in machine().name.split(", "):
        return "expected a processor with amx_bf16, found one without"
    if block_rows() != ROWS:
        return f"expected torch's int4 weights in blocks of {ROWS} rows, found another layout"
    return None


def check_available() -> None:
    """ResourceError when nothing can be compiled here."""
    why = unavailable()
    if why is not None:
        raise ResourceError(f"cannot compile for cpu: {why}", hint="leave --compiled away")


def attach(
    kernel: CpuKernel, problem: Problem, packed: Tensors, choice: Choice
) -> tuple[CpuKernel, Tensors, Choice]:
    """The kernel with a compiled way over the same tensors, and from when on it is taken.

    Other kernels than those of int4 planes stay as they are. ResourceError when nothing can be
    compiled here.
    """
    check_available()
    if kernel not in (NIBBLES, PLANES):
        return kernel, packed, choice
    kernel = replace(kernel, ways={**kernel.ways, "compiled": CompiledWay(_loaded(library()))})
    # Weights of one shape are alike: the first one's times serve for all.
    key = f"{key_of(kernel, problem)} {problem} {choice} {tuned()} {torch.get_num_threads()}"
    if key not in _TIMED:
        _TIMED[key] = _measured(kernel, problem, packed, choice)
    return kernel, packed, _TIMED[key]


_TIMED: dict[str, Choice] = {}


def _measured(kernel: CpuKernel, problem: Problem, packed: Tensors, choice: Choice) -> Choice:
    """From which numbers of tokens on the compiled way is the fastest, timed now."""
    from .tune import timed

    steps: list[tuple[int, str]] = []
    for tokens in TOKENS:
        old = choice.at(tokens)
        x = torch.zeros(tokens, problem.K, dtype=torch.bfloat16)
        calls = {
            n: functools.partial(call, kernel, problem, packed, x, None, Choice(((1, n),), ""))
            for n in (old, "compiled")
        }
        found = timed(calls, turns=5, seconds=0.05)
        best = min(found, key=lambda n: found[n])
        if not steps or steps[-1][1] != best:
            steps.append((tokens, best))
    return Choice(tuple(steps), f"compiled, timed at lowering beside {choice.source}")


def joins(problem: Problem) -> bool:
    """Whether the product itself multiplies silu(gate) by up: in whole blocks, with no addend."""
    addends = problem.bias or problem.rank or problem.sparse or problem.outliers
    gate = problem.pairs == "gate" and problem.act == "silu"
    return gate and not addends and problem.N % (2 * ROWS) == 0


@dataclass(frozen=True)
class CompiledWay:
    """x · Wᵀ by the compiled product, over the tensors of `NIBBLES` or `PLANES`.

    [M, outputs] with its pairs joined where `joins`, else [M, N].
    """

    product: Any

    def __call__(
        self, problem: Problem, x: torch.Tensor, packed: Mapping[str, torch.Tensor]
    ) -> torch.Tensor:
        x = x.to(torch.bfloat16)
        x = x if x.stride(1) == 1 else x.contiguous()
        codes, scale = packed["codes"], packed["scale"]
        joined = joins(problem)
        upper, lower = (None, codes) if codes.dim() == 2 else (codes[0].data_ptr(), codes[1])
        scale = scale if codes.dim() == 2 else scale[1]
        y = x.new_empty(len(x), problem.outputs if joined else problem.N)
        group = unit(problem)
        failed = self.product(
            x.data_ptr(), len(x), problem.K, x.stride(0), lower.data_ptr(), upper,
            scale.data_ptr(), problem.N, lower.shape[0], round_up(problem.K, group), group,
            joined, y.data_ptr(), torch.get_num_threads(),
        )  # fmt: skip
        if failed:
            raise ResourceError(
                f"cannot hold the scratch of a product {problem.N}x{problem.K} of {len(x)} tokens",
                hint="leave --compiled away",
            )
        return y


@functools.cache
def _loaded(path: Path) -> Any:
    """The product of a compiled library. ResourceError when it cannot be loaded or run here."""
    try:
        found = ctypes.CDLL(str(path))
        product, allow = found.product, found.allow
    except (OSError, AttributeError) as error:
        raise ResourceError(
            f"cannot load a compiled kernel: {error}", where=str(path),
            hint="remove the file, it is compiled again",
        ) from error  # fmt: skip
    if allow():
        raise ResourceError("cannot compile for cpu: the system lets no process use AMX tiles")
    pointer, count = ctypes.c_void_p, ctypes.c_int64
    product.argtypes = [pointer, count, count, count, pointer, pointer, pointer, count, count,
                        count, count, ctypes.c_int, pointer, ctypes.c_int]  # fmt: skip
    product.restype = ctypes.c_int
    return product


def library() -> Path:
    """The compiled template, from the cache or compiled now (seconds).

    ResourceError when it cannot be compiled or kept.
    """
    source = environment().get_template(TEMPLATE).render(BLOCKING)
    told = f"{machine()} {_compiler()} {' '.join(FLAGS)}\n{source}"
    path = _folder() / f"int4-amx-{hashlib.sha256(told.encode()).hexdigest()[:24]}.so"
    if not path.is_file():
        handle, temporary = tempfile.mkstemp(dir=path.parent, suffix=".so")
        os.close(handle)
        try:
            _compile(source, temporary)
            os.replace(temporary, path)
        finally:
            Path(temporary).unlink(missing_ok=True)
    return path


def _folder() -> Path:
    """Private to the user: what lies there is executed."""
    folder = tuned().with_name("compiled")
    try:
        folder.mkdir(parents=True, exist_ok=True, mode=0o700)
        status = folder.stat()
    except OSError as error:
        raise ResourceError(f"cannot make the cache of compiled kernels: {error}") from error
    if status.st_uid != os.getuid() or status.st_mode & 0o022:
        raise ResourceError(
            "expected a cache of compiled kernels owned and writable by you alone",
            where=str(folder),
        )
    return folder


def _compile(source: str, path: str) -> None:
    command = [_compiler(), *FLAGS, "-x", "c++", "-", "-o", path]
    try:
        done = subprocess.run(command, input=source, capture_output=True, text=True, timeout=300)
    except (OSError, subprocess.TimeoutExpired) as error:
        raise ResourceError(f"cannot run {command[0]}: {error}", hint="set CXX") from error
    if done.returncode:
        lines = [n for n in done.stderr.splitlines() if "error" in n] or [f"exit {done.returncode}"]
        raise ResourceError(
            f"cannot compile int4 products: {command[0]}: {lines[0]}",
            hint="set CXX to another compiler, or leave --compiled away",
        )
