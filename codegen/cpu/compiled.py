"""Int4 products compiled for this machine by Inductor, on request: a few tokens and many.

torch's int4 kernel has no matrix instructions; Inductor's template has (`CppMicroGemmWoQInt4Amx`).
It is compiled ahead of time, once per shape, group and number of tokens, into the user's cache, and
every weight of that shape is given to its own loaded copy: a frozen graph would hold one weight as
a constant, and serve it for all. The template reads blocks of 32 rows, so the weight is held twice.
"""

from __future__ import annotations

import hashlib
import os
import re
import shutil
import tempfile
import zipfile
from collections.abc import Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch

from ...compiler.ir.errors import ResourceError
from ..problem import Problem
from ..tuning.cache import folder as tuned
from .kernel import CpuKernel, Tensors, round_up, widen
from .nibbles import NIBBLES, ROWS, block_rows, unit
from .table import Choice, key_of, machine

TOKENS = (16, 32, 64, 128)  # numbers of tokens that are compiled for; others are padded or split
BLOCK = 32  # rows of the template's blocks


def unavailable() -> str | None:
    """Why nothing can be compiled here; None when it can."""
    compiler = os.environ.get("CXX") or next((c for c in ("g++", "clang++") if shutil.which(c)), "")
    if not compiler or shutil.which(compiler) is None:
        return f"expected a C++ compiler (g++ or clang++), found {compiler or 'none'}"
    if "amx_bf16" not in machine().name.split(", "):
        return "expected a processor with amx_bf16, found one without"
    if not block_rows():
        return "torch lays out int4 weights in no known way here"
    return None


def check_available() -> None:
    """ResourceError when nothing can be compiled here."""
    why = unavailable()
    if why is not None:
        raise ResourceError(f"cannot compile for cpu: {why}", hint="leave --compiled away")


def attach(
    kernel: CpuKernel, problem: Problem, packed: Tensors, choice: Choice
) -> tuple[CpuKernel, Tensors, Choice]:
    """The kernel with a compiled way over tensors with the blocks that it reads.

    Other kernels stay as they are. ResourceError when nothing can be compiled here.
    """
    check_available()
    if kernel is not NIBBLES:
        return kernel, packed, choice
    packed = packed | {"blocks": reblocked(packed["codes"])}
    shape = (packed["codes"].shape[0], round_up(problem.K, unit(problem)), unit(problem))
    way = CompiledWay({m: Loaded.of(package(*shape, m), packed) for m in TOKENS})
    kernel = replace(kernel, ways={**kernel.ways, "compiled": way})
    # Weights of one shape are alike: the first one's times serve for all.
    key = f"{key_of(kernel, problem)} {choice} {tuned()}"
    if key not in _TIMED:
        _TIMED[key] = _measured(kernel, problem, packed, choice)
    return kernel, packed, _TIMED[key]


_TIMED: dict[str, Choice] = {}


def _measured(kernel: CpuKernel, problem: Problem, packed: Tensors, choice: Choice) -> Choice:
    """From which numbers of tokens on the compiled way is the fastest, timed now."""
    from .tune import timed

    steps: list[tuple[int, str]] = []
    for tokens in (1, 4, 8, 16, 17, 32, 33, 64, 65, 128, 129, 256, 512, 1024):
        old = choice.at(tokens)
        x = torch.zeros(tokens, problem.K, dtype=torch.bfloat16)
        calls = {n: _Bound(kernel, n, problem, x, packed) for n in (old, "compiled")}
        found = timed(calls, turns=3, seconds=0.05)
        best = min(found, key=lambda n: found[n])
        if not steps or steps[-1][1] != best:
            steps.append((tokens, best))
    return Choice(tuple(steps), f"compiled, timed at lowering beside {choice.source}")


@dataclass(frozen=True)
class _Bound:
    kernel: CpuKernel
    way: str
    problem: Problem
    x: torch.Tensor
    packed: Tensors

    def __call__(self) -> torch.Tensor:
        return self.kernel.ways[self.way](self.problem, self.x, self.packed)


@dataclass(frozen=True)
class Loaded:
    """A compiled product with one weight in it; ``run`` takes x bf16 [tokens, K]."""

    runner: Any
    held: tuple[torch.Tensor, ...]

    @classmethod
    def of(cls, path: Path, packed: Mapping[str, torch.Tensor]) -> Loaded:
        """Load and hand over the tensors. ResourceError when a package cannot be loaded."""
        try:
            sizes = _constants(path)
            runner = torch._inductor.aoti_load_package(str(path))
        except (OSError, RuntimeError, KeyError, zipfile.BadZipFile) as error:
            raise ResourceError(
                f"cannot load a compiled kernel: {error}", where=str(path),
                hint="remove the file, it is compiled again",
            ) from error  # fmt: skip
        blocks, scale = packed["blocks"], packed["scale"]
        by_size = {blocks.nbytes: blocks, scale.nbytes: scale}
        group = torch.tensor(_group(packed))
        given = {name: by_size.get(size, group) for name, size in sizes.items()}
        if len(by_size) != 2 or sorted(t.nbytes for t in given.values()) != sorted(
            (blocks.nbytes, scale.nbytes, group.nbytes)
        ):
            raise ResourceError(
                f"expected a kernel that holds blocks, scales and a group, found {sizes}",
                where=str(path),
            )
        runner.load_constants(given, check_full_update=True, user_managed=True)
        return cls(runner, tuple(given.values()))


@dataclass(frozen=True)
class CompiledWay:
    """x · Wᵀ by the compiled products: the smaller where it holds all tokens, else by blocks."""

    by_tokens: Mapping[int, Loaded]

    def __call__(
        self, problem: Problem, x: torch.Tensor, packed: Mapping[str, torch.Tensor]
    ) -> torch.Tensor:
        wide = widen(x, round_up(problem.K, unit(problem)))
        size = min((m for m in self.by_tokens if m >= len(wide)), default=max(self.by_tokens))
        run = self.by_tokens[size].runner
        short = -len(wide) % size
        if short:
            wide = torch.nn.functional.pad(wide, (0, 0, 0, short))
        parts = [run(part) for part in wide.split(size)]
        y = parts[0] if len(parts) == 1 else torch.cat(parts)
        return y[: len(x), : problem.N]


def _group(packed: Mapping[str, torch.Tensor]) -> int:
    return 2 * packed["codes"].shape[1] // packed["scale"].shape[0]


def reblocked(codes: torch.Tensor) -> torch.Tensor:
    """Torch's int4 weight uint8 [N, K/2] in blocks of 32 rows, as the template reads it."""
    rows, (N, half) = block_rows(), codes.shape
    blocks = codes.view(N // rows, 2 * half, rows // 2)
    whole = torch.cat([blocks & 15, blocks >> 4], -1)
    parts = whole.view(N // rows, 2 * half, rows // BLOCK, 2, BLOCK // 2)
    joined = parts[..., 0, :] | (parts[..., 1, :] << 4)
    return joined.permute(0, 2, 1, 3).reshape(N, half).contiguous()


def package(N: int, K: int, group: int, tokens: int) -> Path:
    """The compiled product of a shape, from the cache or compiled now (seconds to a minute).

    ResourceError when it cannot be compiled or kept.
    """
    told = f"{machine()} int4 {N} {K} {group} {tokens}"
    name = hashlib.sha256(told.encode()).hexdigest()[:24]
    path = _folder() / f"int4-{N}x{K}-g{group}-m{tokens}-{name}.pt2"
    if not path.is_file():
        handle, temporary = tempfile.mkstemp(dir=path.parent, suffix=".pt2")
        os.close(handle)
        try:
            _compile(N, K, group, tokens, temporary)
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


class _Product(torch.nn.Module):
    """Torch's int4 product of a weight whose values do not matter: they are replaced."""

    def __init__(self, N: int, K: int, group: int) -> None:
        super().__init__()
        self.group = group
        # Not all alike, or constants of one value may be folded.
        self.register_buffer("codes", torch.arange(N * K // 2).view(N, K // 2).to(torch.uint8))
        scale = torch.arange(N * K // group * 2).remainder(64).view(K // group, N, 2)
        self.register_buffer("scale", scale.to(torch.bfloat16) / 64)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return torch.ops.aten._weight_int4pack_mm_for_cpu(x, self.codes, self.group, self.scale)


def _compile(N: int, K: int, group: int, tokens: int, path: str) -> None:
    import torch._inductor.config as config

    # One choice only: the template. Nothing is timed then, which takes most of the time.
    settings: dict[str, Any] = {
        "freezing": True, "max_autotune": True, "max_autotune_gemm_backends": "CPP",
        "aot_inductor.package_constants_in_so": False,
    }  # fmt: skip
    x = torch.zeros(tokens, K, dtype=torch.bfloat16)
    try:
        with torch.no_grad(), config.patch(settings):
            exported = torch.export.export(_Product(N, K, group), (x,))
            torch._inductor.aoti_compile_and_package(exported, package_path=path)
    except Exception as error:
        text = str(error).strip().splitlines() or [""]
        raise ResourceError(
            f"cannot compile an int4 product {N}x{K}: {type(error).__name__}: {text[0]}",
            hint="leave --compiled away",
        ) from error
    if ROWS % BLOCK or len(_constants(Path(path))) != 3:
        raise ResourceError(f"Inductor made no int4 product of its template for {N}x{K}")


def _constants(path: Path) -> dict[str, int]:
    """Bytes of each constant of a package, by name."""
    with zipfile.ZipFile(path) as file:
        name = next(n for n in file.namelist() if n.endswith("wrapper.cpp"))
        source = file.read(name).decode()
    names = re.findall(r'constants_info_\[\d+\]\.name = "(.*?)"', source)
    sizes = re.findall(r"constants_info_\[\d+\]\.data_size = (\d+)", source)
    return dict(zip(names, map(int, sizes), strict=True))
