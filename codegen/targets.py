"""Lowering for a target: which implementation each node gets, and tensors laid out for it.

    reference   every op row's own reference in torch, the oracle
    cpu         torch's own int4 and int8 kernels where they realise the scheme, else the reference
    triton      the kernel rows; needs a CUDA device or the Triton interpreter

Kernel names are for reports only; an artefact never holds them, nor any packed tensor.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import asdict, dataclass, field, replace
from typing import Any, Literal

import torch

from ..compiler.ir.errors import ResourceError, UsageError, nearest
from ..compiler.ir.graph import Program
from ..compiler.ir.refusal import Refusal
from . import cpu, sparse
from .attention.lower import PlacedAttention, attention_implementations
from .fuse import Fused, FusePlan, fuse
from .kernels import choose
from .prepack import Packed, prepack
from .problem import Problem
from .row import KernelRow

Canonical = tuple[torch.Tensor, torch.Tensor, torch.Tensor | None, torch.Tensor | None]
Target = Literal["reference", "cpu", "triton"]
TARGETS: tuple[Target, ...] = ("reference", "cpu", "triton")
TOKENS = 8192  # kept ones, for the bytes of a cached attention in a report
BANDWIDTH = 4.3e12  # bytes per second of an H200 copy, read and written; the default of floors


@dataclass(frozen=True)
class Placed:
    """One lowered node: what was fused into it and which kernel runs it.

    Attributes:
        bytes: moved by one call at one token, every operand once.
        resident: bytes of its weight in the kernel's layout. stored: of its canonical tensors.
        note: what the kernel does differently from the reference.
    """

    fused: Fused
    kernel: str
    bytes: int
    resident: int
    stored: int
    note: str = ""


@dataclass
class Lowered:
    """A program ready for a runner.

    Attributes:
        program: rewritten; fused nodes keep the types of canonical storage while the tensors behind
            their codes and scales are laid out for the target (those of zero and meta are empty).
        implementations: callables by node name; other nodes run their row's reference.
        resident_bytes: by name of the codes parameter, the bytes of the packed weight.
        attention: cached attention that runs on a kernel row.
    """

    target: Target
    program: Program
    implementations: dict[str, Callable[..., Any]] = field(default_factory=dict)
    placed: list[Placed] = field(default_factory=list)
    refused: list[Refusal] = field(default_factory=list)
    resident_bytes: dict[str, int] = field(default_factory=dict)
    attention: list[PlacedAttention] = field(default_factory=list)


def lower(program: Program, target: str, *, device: torch.device | str = "cpu") -> Lowered:
    """Lower a copy of `program`; the given one and its weights are not touched.

    `device` is where packed tensors go (triton: a CUDA device, or "cpu" under the interpreter).
    UsageError for an unknown target; ResourceError when this machine cannot run it.
    """
    if target == "reference":
        return Lowered("reference", program)
    if target == "cpu":
        return _lower_cpu(program.clone())
    if target == "triton":
        return _lower_triton(program.clone(), torch.device(device))
    hint = nearest(target, TARGETS)
    raise UsageError(f"expected a target of {', '.join(TARGETS)}, found {target!r}", hint=hint)


def _lower_cpu(program: Program) -> Lowered:
    plan = fuse(program, lambda p: cpu.choose(p)[1] or None, norm=False, residual=False)
    lowered = _start("cpu", program, plan)
    for fused in plan.fused:
        known = _input_grid(program, fused)
        problem = cpu.with_limit(fused.problem, known.get("limit", 0.0))
        kernel, _ = cpu.choose(problem)
        assert kernel is not None
        names = ("codes", "scale", "zero", "meta")
        canonical = zip(names, _load(program, fused, torch.device("cpu")), strict=True)
        parts = {n: t for n, t in canonical if t is not None}
        if "unit" in known:
            parts["in_scale"] = known["unit"]
        packed = cpu.pack(kernel, problem, parts)
        codes, scale = packed["codes"], packed["scale"]
        choice = cpu.ways_by_tokens(kernel, problem)
        note = f"{kernel.note}; {choice}" if len(kernel.ways) > 1 else kernel.note
        if problem.m:
            note += f"; {problem.n}:{problem.m} spread to dense codes"
        traffic = codes.nbytes + scale.nbytes + 2 * (problem.N + problem.K) * (1 + problem.rank)
        _place(lowered, fused, kernel.name, codes, scale, traffic, note)
        lowered.implementations[fused.node] = _cpu_implementation(kernel, problem, packed, choice)
    return _sides(lowered, torch.device("cpu"))


def _cpu_implementation(
    kernel: cpu.CpuKernel, problem: Problem, packed: dict[str, torch.Tensor], choice: cpu.Choice
) -> Callable[..., torch.Tensor]:
    """`llmc.fused_linear` over packed tensors; what a call does not bring stays as packed."""
    rest = {n: t for n, t in packed.items() if n not in ("codes", "scale")}

    def call(
        x: torch.Tensor,
        codes: torch.Tensor,
        scale: torch.Tensor,
        zero: torch.Tensor | None = None,
        meta: torch.Tensor | None = None,
        bias: torch.Tensor | None = None,
        residual: torch.Tensor | None = None,
        gain: torch.Tensor | None = None,
        left: torch.Tensor | None = None,
        right: torch.Tensor | None = None,
        **attrs: Any,
    ) -> torch.Tensor:
        sides = {"bias": bias, "gain": gain, "left": left, "right": right}
        given = {n: t for n, t in sides.items() if t is not None}
        given |= rest | {"codes": codes, "scale": scale}
        return cpu.call(kernel, problem, given, x, residual, choice)

    return call


def _lower_triton(program: Program, device: torch.device) -> Lowered:
    from . import launch

    why = launch.unavailable()
    if why is not None:
        raise ResourceError(
            f"cannot lower for triton: {why}", hint="use target cpu or reference on this machine"
        )
    if device.type == "cpu" and not launch.interpreting():
        raise UsageError(
            "expected a CUDA device for target triton, found cpu", hint="pass device='cuda'"
        )

    def accept(problem: Problem) -> str | None:
        chosen, misfits = choose(problem)
        return None if chosen else "; ".join(str(m) for m in misfits)

    plan = fuse(program, accept)
    lowered = _start("triton", program, plan)
    for fused in plan.fused:
        row, _ = choose(fused.problem)
        assert row is not None
        names = ("codes", "scale", "zero", "meta")
        parts = dict(zip(names, _load(program, fused, device), strict=True))
        packed = prepack(row, fused.problem, **parts)
        traffic = row.bytes_moved(fused.problem, 1)
        _place(lowered, fused, row.name, packed["codes"], packed["scale"], traffic, "")
        lowered.implementations[fused.node] = _triton_implementation(row, fused.problem)
    made, lowered.attention, refused = attention_implementations(program)
    lowered.implementations |= made
    lowered.refused += refused
    return _sides(lowered, device)


def _triton_implementation(row: KernelRow, problem: Problem) -> Callable[..., torch.Tensor]:
    """`llmc.fused_linear` over prepacked tensors; columns of x and residual are made contiguous."""
    from . import launch

    def call(
        x: torch.Tensor,
        codes: torch.Tensor,
        scale: torch.Tensor,
        zero: torch.Tensor | None = None,
        meta: torch.Tensor | None = None,
        bias: torch.Tensor | None = None,
        residual: torch.Tensor | None = None,
        gain: torch.Tensor | None = None,
        **attrs: Any,
    ) -> torch.Tensor:
        sides = {"bias": bias, "residual": residual, "gain": gain}
        given = {
            n: t if n != "residual" else _columns(t) for n, t in sides.items() if t is not None
        }
        packed = Packed(row, problem, {"codes": codes, "scale": scale}, {})
        return launch.fused_linear(packed, _columns(x), **given)

    return call


def _columns(x: torch.Tensor) -> torch.Tensor:
    return x if x.stride(-1) == 1 else x.contiguous()


def _start(target: Target, program: Program, plan: FusePlan) -> Lowered:
    return Lowered(target, program, refused=list(plan.refused))


def _sides(lowered: Lowered, device: torch.device) -> Lowered:
    """Sparse paths beside fused nodes run on torch's own sparse rows where it has them."""
    if sparse.available(device):
        for node in lowered.program.calls("llmc.csr_linear"):
            lowered.implementations[node.name] = sparse.csr_linear
    return lowered


def _names(program: Program, fused: Fused) -> list[str | None]:
    """Names of the parameters behind codes, scale, zero and meta."""
    node = program.node(fused.node)
    params = [program.param_of(a) for a in node.args[1:5]]
    return [None if p is None else p.name for p in params]


def _input_grid(program: Program, fused: Fused) -> dict[str, Any]:
    """What stands in the call that rounded a fused node's input: static scale and limit."""
    if not fused.problem.rounded:
        return {}
    rounded = program.node(fused.node).all_input_nodes[0]
    scale = program.param_of(rounded.args[1]) if len(rounded.args) > 1 else None
    given: dict[str, Any] = {"limit": rounded.kwargs.get("limit", 0.0)}
    return given if scale is None else given | {"unit": program.weights.load(scale.name)}


def _load(program: Program, fused: Fused, device: torch.device) -> Canonical:
    """Canonical codes, scale, zero and meta on `device`."""
    codes, scale, zero, meta = (
        None if name is None else program.weights.load(name).to(device)
        for name in _names(program, fused)
    )
    assert codes is not None
    assert scale is not None
    return codes, scale, zero, meta


def _place(
    lowered: Lowered,
    fused: Fused,
    kernel: str,
    codes: torch.Tensor,
    scale: torch.Tensor,
    traffic: int,
    note: str,
) -> None:
    """Put packed tensors behind a fused node's parameters; the canonical ones are let go."""
    program = lowered.program
    names = _names(program, fused)
    stored = sum(program.params[n].bytes for n in names if n is not None)
    empty = torch.empty(0, dtype=torch.uint8, device=codes.device)
    for name, tensor in zip(names, (codes, scale, empty, empty.to(torch.int32)), strict=True):
        if name is not None:
            program.set_tensor(name, tensor)
            program.params[name] = replace(program.params[name], keep=True)
    resident = codes.nbytes + scale.nbytes
    lowered.resident_bytes[str(names[0])] = resident
    lowered.placed.append(Placed(fused, kernel, traffic, resident, stored, note))


def describe(lowered: Lowered, *, bandwidth: float = BANDWIDTH) -> dict[str, Any]:
    """The lowering as plain values, for `llmc kernels`.

    Per fused node: kernel, parts, shape, scheme, bytes of a one-token call and its floor in
    microseconds at `bandwidth` bytes per second; then what was not fused, with node and reason.
    """
    rows = []
    for p in lowered.placed:
        scheme = asdict(p.fused.problem)
        rows.append({
            "node": p.fused.node, "path": p.fused.path, "kernel": p.kernel,
            "parts": list(p.fused.parts), "problem": scheme, "bytes": p.bytes,
            "floor_us": round(1e6 * p.bytes / bandwidth, 3), "resident_bytes": p.resident,
            "stored_bytes": p.stored, "note": p.note,
        })  # fmt: skip
    return {
        "target": lowered.target,
        "fused": rows,
        "attention": [p.json(batch=1, tokens=TOKENS, speed=bandwidth) for p in lowered.attention],
        "not_fused": [r.to_json() for r in lowered.refused],
        "resident_bytes": sum(lowered.resident_bytes.values()),
    }
