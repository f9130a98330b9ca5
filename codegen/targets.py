"""Lowering for a target: which implementation each node gets, and tensors laid out for it.

    reference   every op row's own reference in torch, the oracle
    cpu         torch's own int4 and int8 kernels where they realise the scheme, else the reference
    triton      the kernel rows; needs a CUDA device or the Triton interpreter

Kernel names are for reports only; an artefact never holds them, nor any packed tensor.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import asdict, dataclass, field
from functools import partial
from typing import Any, Literal

import torch
from torch import fx

from ..compiler.ir.errors import ModelError, ResourceError, UsageError, nearest
from ..compiler.ir.graph import Program
from ..compiler.ir.refusal import Refusal
from ..compiler.ir.segments import refresh_segments
from . import cpu, large, sparse
from .attention.lower import PlacedAttention, attention_implementations
from .device import interpreting, unavailable
from .device import machine as machine_of
from .fuse import Fused, fuse
from .fuse_nodes import refusal
from .gains import asked, in_range, round_scales
from .kernels import choose
from .kernels import row as row_named
from .mixture import lower as mixtures
from .mixture.place import MixtureCall
from .mixture.split import one
from .placed import Implementation, OwnCall
from .prepack import prepack
from .problem import DTYPES, Problem
from .put import Weights, put

Target = Literal["reference", "cpu", "triton"]
TARGETS: tuple[Target, ...] = ("reference", "cpu", "triton")
TOKENS = 8192  # kept ones, for the bytes of a cached attention in a report
BANDWIDTH = 4.3e12  # bytes per second of an H200 copy, read and written; the default of floors


@dataclass(frozen=True)
class Placed:
    """One lowered node: what was fused into it and which kernel runs it.

    Attributes:
        bytes: moved by one call at one token, every operand once.
        resident: bytes of the tensors made for it. stored: of the parameters that they replace.
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
        program: rewritten; a placed node reads x, what is added to it, and packed tensors, which
            are parameters of their own: its body says what it means, not what it reads now.
        implementations: callables by node name; other nodes run their row's reference.
        resident_bytes: by fused node, the bytes of the tensors that were made for it.
        attention: cached attention that runs on a kernel row. mixtures: layers of experts.
    """

    target: Target
    program: Program
    implementations: dict[str, Callable[..., Any]] = field(default_factory=dict)
    placed: list[Placed] = field(default_factory=list)
    refused: list[Refusal] = field(default_factory=list)
    resident_bytes: dict[str, int] = field(default_factory=dict)
    attention: list[PlacedAttention] = field(default_factory=list)
    mixtures: list[mixtures.PlacedMixture] = field(default_factory=list)


def lower(
    program: Program, target: str, *, device: torch.device | str = "cpu", compiled: bool = False,
    dense: bool = False,
) -> Lowered:  # fmt: skip
    """Lower a copy of `program`; the given one and its weights are not touched.

    `device` is where packed tensors go (triton: a CUDA device, or "cpu" under the interpreter).
    On the CPU, `compiled` compiles int4 products for this machine (cached; see `cpu.compiled`), and
    `dense` leaves weights beside floats to be decoded once, by whoever keeps constants.
    UsageError for an unknown target; ResourceError when this machine cannot run it.
    """
    if target == "reference":
        return Lowered("reference", program)
    if target == "cpu":
        return _lower_cpu(program.clone(), compiled, dense)
    if target == "triton":
        return _lower_triton(program.clone(), torch.device(device))
    hint = nearest(target, TARGETS)
    raise UsageError(f"expected a target of {', '.join(TARGETS)}, found {target!r}", hint=hint)


SPREAD = "its mask saves size on disk, not memory or time here"
# What the CPU's kernels are asked for: norms, sums and gates gain nothing there.
CPU_FEATURES = frozenset({
    "concat", "rank", "rounds", "outliers", "sparse", "table", "masked", "factors", "experts",
})  # fmt: skip


def _lower_cpu(program: Program, compiled: bool = False, dense: bool = False) -> Lowered:
    if compiled:
        from .cpu.compiled import attach

    def accept(problem: Problem) -> str | None:
        kernel, why = cpu.choose(one(problem) if problem.routed else problem)
        if dense and kernel is not None and not kernel.grid:
            return "resident=dense: decoded once and held"
        return why or None

    # The compiled product joins gate and up before it writes them.
    plan = fuse(program, accept, CPU_FEATURES | {"pairs"} if compiled else CPU_FEATURES)
    lowered = Lowered("cpu", program, refused=list(plan.refused))
    for fused in plan.fused:
        known = _input_grid(program, fused)
        problem = cpu.with_limit(fused.problem, known.get("limit", 0.0))
        kernel, _ = cpu.choose(problem)
        assert kernel is not None
        canonical = fused.canonical(program)
        if "unit" in known:
            canonical["in_scale"] = known["unit"]
        packed = cpu.pack(kernel, problem, canonical)
        choice = cpu.ways_by_tokens(kernel, problem)
        if compiled:
            kernel, packed, choice = attach(kernel, problem, packed, choice)
        note = f"{kernel.note}; {choice}" if len(kernel.ways) > 1 else kernel.note
        if problem.m and kernel.name != "aten::linear":  # whose own note says so
            note += f"; {problem.n}:{problem.m} spread to dense codes: {SPREAD}"
        traffic = sum(t.nbytes for t in packed.values())
        traffic += DTYPES[problem.x_dtype].itemsize * (problem.outputs + problem.K)
        _place(lowered, fused, problem, kernel.name, canonical, packed, traffic, note)
        if compiled and "compiled" in kernel.ways:
            made, own = lowered.implementations[fused.node], partial(_own, kernel, problem, choice)
            assert isinstance(made, Implementation)
            names = made.names
            lowered.implementations[fused.node] = OwnCall("cpu", kernel.name, problem, names, own)
    for mixture in plan.mixtures:
        _experts(lowered, mixture.node, partial(mixtures.on_cpu, program, mixture))
    refresh_segments(program)
    return _sides(lowered, torch.device("cpu"))


def _own(
    kernel: cpu.CpuKernel, problem: Problem, choice: cpu.Choice, x: torch.Tensor,
    residual: torch.Tensor | None, packed: dict[str, torch.Tensor],
) -> torch.Tensor:  # fmt: skip
    return cpu.call(kernel, problem, packed, x, residual, choice)


def cpu_accept(problem: Problem) -> str | None:
    """Why torch has no CPU kernel for a problem; None when it has one."""
    return cpu.choose(one(problem) if problem.routed else problem)[1] or None


def _lower_triton(program: Program, device: torch.device) -> Lowered:

    why = unavailable(device if device.type == "cuda" else None)
    if why is not None:
        raise ResourceError(
            f"cannot lower for triton: {why}", hint="use target cpu or reference on this machine"
        )
    if device.type == "cpu" and not interpreting():
        raise UsageError(
            "expected a CUDA device for target triton, found cpu", hint="pass device='cuda'"
        )
    machine = machine_of(device)
    plan = fuse(program, partial(triton_accept, machine=machine))
    lowered = Lowered("triton", program, refused=list(plan.refused))
    for fused in plan.fused:
        problem = asked(fused.problem)
        row, _ = choose(problem, machine)
        assert row is not None
        try:
            stored = fused.canonical(program, device)
            canonical, note = in_range(problem, stored)
            _keep_shared(program, fused, stored, canonical)
            canonical, more = round_scales(problem, canonical)
            packed = prepack(row, problem, **canonical)
        except ModelError as e:  # the node's body runs
            lowered.refused.append(refusal(program.node(fused.node), e.message, "tensors"))
            continue
        traffic, note = row.bytes_moved(problem, 1), "; ".join(n for n in (note, more) if n)
        tensors = packed.tensors | packed.sides
        _place(lowered, fused, packed.problem, row.name, canonical, tensors, traffic, note)
    for mixture in plan.mixtures:
        placing = partial(mixtures.on_triton, program, mixture, device, machine)
        _experts(lowered, mixture.node, placing)
    made, lowered.attention, refused = attention_implementations(program)
    lowered.implementations |= made
    lowered.refused += refused
    refresh_segments(program)
    return _sides(lowered, device)


def _keep_shared(
    program: Program, fused: Fused, stored: dict[str, torch.Tensor],
    canonical: dict[str, torch.Tensor],
) -> None:  # fmt: skip
    """ModelError where a weight that others read too, as a tied head does, would be held twice."""
    inputs = inputs_of(program, fused)
    refs = [r for p in fused.parts if p.role == "values" for r in p.refs if r and r[0] == "a"]
    shared = any(len(inputs[int(r[1:])].users) > 1 for r in refs)
    if shared and canonical["values"] is not stored["values"]:
        raise ModelError(
            "expected gains of at most 1 before a weight that others read too, found one beyond, "
            "for which the weight would be held twice", hint="run the model in bf16",
        )  # fmt: skip


def triton_accept(problem: Problem, machine: str = "") -> str | None:
    """Why no kernel row serves a problem, by the rows that come closest; None when one does.

    machine: "sm_80" or "sm_90", as some rows need what a machine has; "" for any.
    """
    chosen, misfits = choose(asked(problem), machine)
    if chosen is not None:
        return None
    by_row: dict[str, list[str]] = {}
    for m in misfits:
        by_row.setdefault(m.row, []).append(str(m))
    least = min(len(found) for found in by_row.values())
    return "; ".join(text for found in by_row.values() if len(found) == least for text in found)


def _sides(lowered: Lowered, device: torch.device) -> Lowered:
    """Sparse paths beside fused nodes run on torch's own sparse rows where it has them."""
    if sparse.available(device):
        for node in lowered.program.calls("llmc.csr_linear"):
            lowered.implementations[node.name] = sparse.csr_linear
    return lowered


def _input_grid(program: Program, fused: Fused) -> dict[str, Any]:
    """What stands in the call that rounded a fused node's input: static scale and limit."""
    if not fused.problem.rounded:
        return {}
    rounded = inputs_of(program, fused)[0]
    scale = program.param_of(rounded.args[1]) if len(rounded.args) > 1 else None
    given: dict[str, Any] = {"limit": rounded.kwargs.get("limit", 0.0)}
    return given if scale is None else given | {"unit": program.weights.load(scale.name)}


def _place(
    lowered: Lowered, fused: Fused, problem: Problem, kernel: str,
    canonical: dict[str, torch.Tensor], tensors: dict[str, torch.Tensor], traffic: int, note: str,
) -> Implementation:  # fmt: skip
    """Let a node read packed tensors as parameters of their own; the canonical ones are let go.

    problem: as the kernel was packed for it. A part that stays as it is stays the parameter that
    it was.
    """
    kept = {"x": "a0"} | ({"residual": fused.residual} if fused.residual else {})
    weights = [Weights(fused.parts, canonical, tensors)]
    done = put(lowered.program, lowered.program.node(fused.node), kept, weights)
    lowered.resident_bytes[fused.node] = done.resident
    lowered.placed.append(Placed(fused, kernel, traffic, done.resident, done.stored, note))
    made = Implementation(lowered.target, kernel, problem, done.names)
    lowered.implementations[fused.node] = made
    return made


def _experts(
    lowered: Lowered, node: str,
    placing: Callable[[], tuple[MixtureCall, mixtures.PlacedMixture]],
) -> None:  # fmt: skip
    """Place a layer of experts; where its tensors do not fit the kernels, its body runs."""
    try:
        made, placed = placing()
    except ModelError as e:
        lowered.refused.append(refusal(lowered.program.node(node), e.message, "tensors"))
        return
    lowered.implementations[node] = made
    lowered.mixtures.append(placed)
    lowered.resident_bytes[node] = placed.resident


def inputs_of(program: Program, fused: Fused) -> list[fx.Node]:
    """The nodes that a fused node reads, in the order of its body's inputs."""
    return list(program.node(fused.node).args[0])  # type: ignore[arg-type]


def describe(lowered: Lowered, *, bandwidth: float = BANDWIDTH) -> dict[str, Any]:
    """The lowering as plain values, for `llmc kernels`.

    Per fused node: kernel, parts, shape, scheme, bytes of a one-token call and its floor in
    microseconds at `bandwidth` bytes per second; from how many tokens its weight is decoded once
    and the bytes that this takes; then what was not fused, with node and reason.
    """
    rows = []
    for p in lowered.placed:
        scheme = asdict(p.fused.problem)
        rows.append({
            "node": p.fused.node, "path": p.fused.path, "kernel": p.kernel,
            "parts": list(p.fused.ops), "problem": scheme, "bytes": p.bytes,
            "floor_us": round(1e6 * p.bytes / bandwidth, 3), "resident_bytes": p.resident,
            "stored_bytes": p.stored, "note": p.note, **_dense(lowered.target, p),
        })  # fmt: skip
    rows += [p.json(bandwidth) for p in lowered.mixtures]
    order = {node.name: i for i, node in enumerate(lowered.program.graph.nodes)}
    rows.sort(key=lambda r: order[str(r["node"])])
    return {
        "target": lowered.target,
        "fused": rows,
        "attention": [p.json(batch=1, tokens=TOKENS, speed=bandwidth) for p in lowered.attention],
        "not_fused": [r.to_json() for r in lowered.refused],
        "resident_bytes": sum(lowered.resident_bytes.values()),
        "workspace_bytes": max((int(str(r.get("workspace_bytes", 0))) for r in rows), default=0),
    }


def _dense(target: str, placed: Placed) -> dict[str, int]:
    """From how many tokens a weight is decoded once, and the bytes that this takes meanwhile."""
    problem = asked(placed.fused.problem)
    if target != "triton" or not large.serves(row_named(placed.kernel), problem):
        return {}
    row = row_named(placed.kernel)
    held = 0 if row.as_stored else large.workspace_bytes(problem, row.step)
    return {"dense_from": large.least(row, problem), "workspace_bytes": held}
