"""Launch a rendered kernel: source file in the user's cache -> jit function -> call.

Runs on CUDA tensors, or on CPU tensors when Triton was imported under TRITON_INTERPRET=1. Results
are the same bits each time: a program sums its columns in their order, and what several programs
found is added in the order of their columns by one of them, never in the order of their arrival.
"""

from __future__ import annotations

import dataclasses
import functools
import importlib.util
import os
import sys
import tempfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch

from ..compiler.ir.errors import ResourceError, UsageError
from . import large, normed, workspace
from .calls import ALIGNED, Call, Kind, kind
from .counters import counters
from .prepack import Packed
from .problem import DTYPES, Problem, dtype_name
from .render import Rendered, arguments, render, shares
from .row import MAX_REGISTERS, KernelRow, TileConfig
from .tuning.choices import tuned_config


def installed() -> bool:
    """Whether there is a Triton to import."""
    return importlib.util.find_spec("triton") is not None


def unavailable(device: torch.device | None = None) -> str | None:
    """Why kernels cannot be launched on a CUDA device, the current one when None; None when they
    can."""
    if not installed():
        return "triton is not installed"
    if interpreting():
        return None
    if not torch.cuda.is_available():
        return "no CUDA device, and TRITON_INTERPRET=1 is not set"
    found = torch.cuda.get_device_capability(device)
    if torch.version.hip is None and found >= (8, 0):
        return None
    what = "ROCm" if torch.version.hip else ".".join(map(str, found))
    return f"expected a CUDA device of compute capability 8.0 or more, found {what}"


def machine(device: torch.device) -> str:
    """The target of a CUDA device, "sm_80" or "sm_90"; "" where kernels are interpreted."""
    if device.type != "cuda":
        return ""
    return "sm_90" if torch.cuda.get_device_capability(device) >= (9, 0) else "sm_80"


def interpreting() -> bool:
    """Whether Triton is there and runs kernels on the CPU (its flag as it stands now)."""
    if not installed():
        return False
    import triton

    return bool(triton.knobs.runtime.interpret)


def cache_folder() -> Path:
    """`$XDG_CACHE_HOME/llmc/kernels` (or under ~/.cache), private to the user.

    ResourceError when it cannot be made, or belongs to somebody else or is writable by others:
    what lies there is executed.
    """
    base = os.environ.get("XDG_CACHE_HOME") or os.path.join(os.path.expanduser("~"), ".cache")
    folder = Path(base) / "llmc" / "kernels"
    try:
        folder.mkdir(parents=True, exist_ok=True, mode=0o700)
        status = folder.stat()
    except OSError as error:
        raise ResourceError(f"cannot make the kernel cache: {error}") from error
    if status.st_uid != os.getuid() or status.st_mode & 0o022:
        raise ResourceError(
            "expected a kernel cache owned and writable by you alone", where=str(folder)
        )
    return folder


def source_file(rendered: Rendered) -> Path:
    """The cache file that holds exactly this source; written when absent or different."""
    path = cache_folder() / f"{rendered.name}_{rendered.digest[:24]}.py"
    if path.is_file() and path.read_text() == rendered.source:
        return path
    handle, temporary = tempfile.mkstemp(dir=path.parent, suffix=".tmp")
    with os.fdopen(handle, "w") as file:
        file.write(rendered.source)
    os.replace(temporary, path)
    return path


@functools.cache
def function(rendered: Rendered) -> Any:
    """The jit function of a rendered kernel, imported from its cache file."""
    path = source_file(rendered)
    name = f"llmc_kernel_{rendered.digest[:24]}"
    spec = importlib.util.spec_from_file_location(name, path)
    if spec is None or spec.loader is None:
        raise ResourceError("cannot load a kernel source", where=str(path))
    module = importlib.util.module_from_spec(spec)
    sys.modules[name] = module
    spec.loader.exec_module(module)
    return getattr(module, rendered.name)


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
    key = (config, _look(x), *[(name, _look(t)) for name, t in sides.items()])
    run = ready.get(key)
    if run is None:
        if len(ready) >= MOST_READY:
            ready.clear()
        run = ready[key] = _ready(packed, x, config, sides)
    return run(x, sides)


MOST_READY = 256  # kinds of call that a weight remembers
Run = Callable[[torch.Tensor, dict[str, torch.Tensor]], torch.Tensor]


def _look(t: torch.Tensor) -> tuple[Any, ...]:
    """All that a call's checks and code depend on."""
    return t.shape, t.stride(), t.dtype, t.device, t.data_ptr() % ALIGNED


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
    problem = _problem_of_call(packed, {"x": x, **packed.sides, **sides})
    M, shape = x.numel() // problem.K, (*x.shape[:-1], problem.outputs)
    if problem.out_norm and config is None and M > normed.FEW:
        return normed.apart(_ready, packed, problem, x, sides)
    many = config is None and large.better(row, problem, M)
    tile = config or tuned_config(row, problem, M)
    if tile is None:
        processors = _processors(x.device) if x.device.type == "cuda" else 132
        tile = row.default_config(problem, M, processors)
    _check_config(row, problem, tile)
    kept = {**packed.tensors, **_joined(packed.sides)}

    def gather(x: torch.Tensor, sides: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
        rows = {n: t.reshape(M, -1) if n in _ROWS else t for n, t in sides.items()}
        if not sides.keys().isdisjoint(_VECTORS):
            rows = _joined({**packed.sides, **rows})
        return {**kept, **rows, "x": x.reshape(M, -1), "y": x.new_empty(M, problem.outputs)}

    def empty(x: torch.Tensor, sides: dict[str, torch.Tensor]) -> torch.Tensor:
        return x.new_empty(shape)

    def dense(x: torch.Tensor, sides: dict[str, torch.Tensor]) -> torch.Tensor:
        given = gather(x, sides)
        del given["y"]
        return large.linear(_launch, packed, problem, M, given).reshape(shape)

    def several(x: torch.Tensor, sides: dict[str, torch.Tensor]) -> torch.Tensor:
        given = gather(x, sides)
        assert row.call is not None
        row.call(_launch, row, problem, tile, M, given | _workspace(packed, problem, tile, M))
        return given["y"].reshape(shape)

    if M == 0:
        return empty
    if many:
        return dense
    if row.call:
        return several
    names = [a.name for a in arguments(row, problem)]
    shared = problem.out_norm or (shares(row) and workspace.needed(problem, tile))
    first = gather(x, sides)
    looks = tuple(kind(first.get(name)) for name in names)
    strides = _strides(row, problem, first, {})
    call = _call(row, problem, tile, M, strides, None, first["y"].device, looks)

    def one(x: torch.Tensor, sides: dict[str, torch.Tensor]) -> torch.Tensor:
        given = gather(x, sides)
        if shared:
            given |= _workspace(packed, problem, tile, M)
        call([given.get(name) for name in names])
        return given["y"].reshape(shape)

    return one


def _joined(sides: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    """The sides, with all vectors that multiply x as one: "gain"."""
    gains = [sides[name].float() for name in ("gain", "smooth") if name in sides]
    rest = {n: t for n, t in sides.items() if n not in ("gain", "smooth")}
    if "out_gain" in rest:
        rest["out_gain"] = rest["out_gain"].float()
    if gains:
        rest["gain"] = gains[0] * gains[1] if len(gains) > 1 else gains[0]
    return rest


_ROWS = ("x", "residual")
_VECTORS = ("gain", "smooth", "out_gain")
# Side tensor -> the field of the problem that says it is there.
_FLAGS = {
    "bias": "bias", "residual": "residual", "gain": "norm", "smooth": "smooth",
    "out_gain": "out_norm",
}  # fmt: skip


def _launch(
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
    steps = _strides(row, problem, given, strides or {})
    looks = tuple(kind(t) for t in tensors)
    _call(row, problem, config, M, steps, grid, given["y"].device, looks)(tensors)


def _strides(
    row: KernelRow, problem: Problem, given: dict[str, torch.Tensor], known: dict[str, int]
) -> tuple[int, ...]:
    wanted = [a.name for a in arguments(row, problem) if a.strided]
    return tuple(known[n] if n in known else given[n].stride(0) for n in wanted)


@functools.lru_cache(4096)
def _call(
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
        processors = 1 if interpreting() else _processors(device)
        constants += workspace.constants(problem, config, M, processors).values()
    grid = grid or (-(-problem.N // config.BN), -(-M // config.BM), config.split)
    options = {
        "num_warps": config.warps, "num_stages": config.stages, "maxnreg": MAX_REGISTERS
    }  # fmt: skip
    tail = (M, problem.outputs, *strides, *constants)
    return Call(function(rendered), grid, tail, options, device)


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
    if problem.out_norm:
        whole, count = workspace.whole_sizes(problem, config, M)
        found["whole"] = torch.empty(whole, device=device)
        found["arrived"] = counters("arrived", count, device)
    return found


@functools.cache
def _processors(device: torch.device) -> int:
    return int(torch.cuda.get_device_properties(device).multi_processor_count)


def _problem_of_call(packed: Packed, given: dict[str, torch.Tensor]) -> Problem:
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


def _check_config(row: KernelRow, problem: Problem, config: TileConfig) -> None:
    tiles = {(c.BM, c.BN) for c in row.configs(problem)}
    if (config.BM, config.BN) not in tiles:
        raise UsageError(
            f"expected a tile of {row.name} for N={problem.N} {problem.x_dtype}: "
            f"{sorted(tiles)}, found {(config.BM, config.BN)}"
        )
