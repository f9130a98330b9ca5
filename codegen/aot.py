"""Compile a rendered kernel for sm_80 and sm_90 without a GPU and read the machine code.

The facts come from the cubin through the cuobjdump and nvdisasm that ship with Triton: registers,
stack, shared memory, matrix instructions, and issue slots per weight in the main loop (the one with
most matrix instructions). They bound speed; they do not measure it.
"""

from __future__ import annotations

import dataclasses
import functools
import os
import re
import subprocess
import tempfile
from collections import Counter
from dataclasses import dataclass
from typing import Any

from ..compiler.ir.errors import ResourceError
from . import workspace
from .device import interpreting
from .problem import Problem
from .render import arguments, render, shares
from .row import MAX_REGISTERS, KernelRow, TileConfig
from .source import function

PROCESSORS = 132  # of an H100 or H200: the one fact of a device that a kernel compiles in
CAPABILITY = {"sm_80": 80, "sm_90": 90}


@dataclass(frozen=True)
class AotFacts:
    """What the machine code of one variant shows.

    Attributes:
        registers: per thread. stack: bytes per thread. shared: bytes per block.
        matrix: mnemonics of the matrix instructions. local_memory: LDL and STL instructions.
        loop_stores: stores to shared memory in the main loop. slots: issue slots per weight there.
        conversions: int/float conversions per weight there.
    """

    row: str
    variant: str
    target: str
    config: TileConfig
    registers: int
    stack: int
    shared: int
    matrix: tuple[str, ...]
    local_memory: int
    loop_stores: int
    slots: float
    conversions: float

    def json(self) -> dict[str, Any]:
        """The facts as plain values."""
        return dataclasses.asdict(self)


def compile_variant(row: KernelRow, problem: Problem, config: TileConfig, target: str) -> AotFacts:
    """Compile `row` for `problem` and read its code; problem.K is compiled in.

    ResourceError under the interpreter (which never compiles), or when ptxas or a tool fails.
    """
    if interpreting():
        raise ResourceError(
            "cannot compile ahead of time under TRITON_INTERPRET=1", hint="unset it and start again"
        )
    import triton
    from triton.backends.compiler import GPUTarget
    from triton.compiler import ASTSource

    if row.inner:
        row, problem = row.inner(row, problem, config)
    rendered = render(row, problem)
    jit = function(rendered)
    signature, constants = _signature(row, problem, config, jit.arg_names)
    aligned = {
        (i,): [["tt.divisibility", 16]]
        for i, name in enumerate(jit.arg_names)
        if signature[name] != "constexpr" and name != "M"
    }
    kernel = triton.compile(
        ASTSource(fn=jit, signature=signature, constexprs=constants, attrs=aligned),
        target=GPUTarget("cuda", CAPABILITY[target], 32),
        options={
            "num_warps": config.warps,
            "num_stages": config.stages,
            "maxnreg": MAX_REGISTERS,
        },
    )
    usage, code = disassemble(kernel.asm["cubin"])
    mnemonics, loop = instructions(code)
    weights = config.BN * row.step / (32 * config.warps)
    if row.product != "none" and not any("MMA." in m for m in loop):
        # A short loop that was unrolled whole: all its steps, from the first product to the last.
        loop = straight(mnemonics)
        weights *= max(1, -(-problem.K // row.step // max(1, config.split)))
    in_loop = Counter(m.split(".")[0] for m in loop)
    return AotFacts(
        row=row.name,
        variant=rendered.name,
        target=target,
        config=config,
        registers=usage["REG"],
        stack=usage["STACK"],
        shared=int(kernel.metadata.shared),
        matrix=tuple(sorted({m for m in mnemonics if "MMA." in m})),
        local_memory=sum(m.split(".")[0] in ("LDL", "STL") for m in mnemonics),
        loop_stores=in_loop["STS"],
        slots=round(len(loop) / weights, 2),
        conversions=round(sum(in_loop[c] for c in ("I2F", "I2FP", "F2F", "F2FP")) / weights, 2),
    )


def _signature(
    row: KernelRow, problem: Problem, config: TileConfig, names: list[str]
) -> tuple[dict[str, str], dict[str, Any]]:
    """Triton types of all arguments, and the values of the compile-time ones."""
    known: dict[str, Any] = {
        "K": problem.K, "EPS": 1e-6, "OUT_EPS": 1e-6, "BM": config.BM, "BN": config.BN,
        "STAGES": config.stages,
    }  # fmt: skip
    if shares(row):
        known |= workspace.constants(problem, config, config.BM, PROCESSORS)
        if not workspace.needed(problem, config):
            known |= {"scratch_ptr": None, "counts_ptr": None}
    constants = {n: known[n] for n in names if n in known}
    pointers = {f"{a.name}_ptr": f"*{a.dtype or problem.x_dtype}" for a in arguments(row, problem)}
    types = {n: pointers.get(n, "i32") for n in names}
    return {n: "constexpr" if n in constants else t for n, t in types.items()}, constants


@functools.cache
def _tools() -> str:
    import triton

    return os.path.join(os.path.dirname(triton.__file__), "backends", "nvidia", "bin")


def disassemble(cubin: bytes) -> tuple[dict[str, int], str]:
    with tempfile.TemporaryDirectory() as folder:
        path = os.path.join(folder, "kernel.cubin")
        with open(path, "wb") as file:
            file.write(cubin)
        usage = _run("cuobjdump", "--dump-resource-usage", path)
        code = _run("nvdisasm", "-c", path)
    return {k: int(v) for k, v in re.findall(r"(REG|STACK|LOCAL):(\d+)", usage)}, code


def _run(tool: str, *arguments: str) -> str:
    try:
        command = [os.path.join(_tools(), tool), *arguments]
        return subprocess.run(command, capture_output=True, text=True, check=True).stdout
    except (OSError, subprocess.CalledProcessError) as error:
        raise ResourceError(f"{tool} of the triton package failed: {error}") from error


def straight(mnemonics: list[str]) -> list[str]:
    """From the first matrix instruction to the last."""
    at = [i for i, name in enumerate(mnemonics) if "MMA." in name]
    return mnemonics[at[0] : at[-1] + 1] if at else []


def instructions(code: str) -> tuple[list[str], list[str]]:
    """All mnemonics, and those of the main loop: the one with most matrix instructions."""
    lines: list[str] = []
    labels: dict[str, int] = {}
    for line in code.splitlines():
        label = re.match(r"(\.L_x_\d+):", line)
        if label:
            labels[label[1]] = len(lines)
            continue
        instruction = re.match(r"\s+/\*[0-9a-f]+\*/\s+(.*?);", line)
        if instruction:
            lines.append(instruction[1])
    loops = [(0, 0)]
    for at, text in enumerate(lines):
        jump = re.search(r"\bBRA\b.*(\.L_x_\d+)", text)
        if jump and labels.get(jump[1], at) < at:
            loops.append((labels[jump[1]], at))
    products = [sum("MMA." in text for text in lines[a : b + 1]) for a, b in loops]
    # Of nested loops with the same products the inner one, of loops apart the longest.
    held = [loop for loop, found in zip(loops, products, strict=True) if found == max(products)]
    inner = [
        (a, b) for a, b in held
        if not any(a <= c and d <= b and (a, b) != (c, d) for c, d in held if max(products))
    ]  # fmt: skip
    start, end = max(inner, key=lambda loop: loop[1] - loop[0])
    mnemonics = [re.sub(r"^@!?U?P\w+\s+", "", text).split()[0] for text in lines]
    return mnemonics, mnemonics[start : end + 1]
