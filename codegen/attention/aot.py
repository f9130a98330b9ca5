"""Compile a row of cached attention for sm_80 and sm_90 without a GPU and read the machine code."""

from __future__ import annotations

import dataclasses
import re
from collections import Counter
from dataclasses import dataclass
from typing import Any

from ...compiler.ir.errors import ResourceError
from ..aot import CAPABILITY, disassemble
from ..device import interpreting
from ..render import Rendered
from ..row import MAX_REGISTERS
from ..source import function
from .launch import sizes
from .problem import AttentionProblem
from .render import render
from .row import AttentionRow, SplitConfig
from .write import render_write, write_sizes, write_warps

_UNALIGNED = {
    "END", "K_DUE", "V_DUE", "BASE", "RING", "CHUNK", "SPLITS", "S", "KV", "scale", "START", "SLOT",
}  # fmt: skip


@dataclass(frozen=True)
class CodeFacts:
    """What the machine code of one variant shows.

    Attributes:
        registers: per thread. stack: bytes per thread. shared: bytes per block.
        matrix: mnemonics of the matrix instructions. local_memory: LDL and STL instructions.
        loop: issue slots of the longest loop, of which ``conversions`` convert a number and
            ``stores`` write to shared memory. slots: of the loop per kept number that it reads.
    """

    variant: str
    target: str
    config: Any
    registers: int
    stack: int
    shared: int
    matrix: tuple[str, ...]
    local_memory: int
    loop: int
    conversions: int
    stores: int
    slots: float

    def json(self) -> dict[str, Any]:
        """The facts as plain values."""
        return dataclasses.asdict(self)


def compile_source(
    rendered: Rendered, types: dict[str, str], constants: dict[str, Any], target: str,
    *, warps: int, stages: int, numbers: int, config: Any = None,
) -> CodeFacts:  # fmt: skip
    """Compile a rendered kernel and read its code; strides are taken as multiples of 16.

    ``types`` are Triton's of the pointers, by name; other arguments are i32, ``scale`` fp32.
    ``numbers`` are those that a program reads in one turn of its longest loop.
    ResourceError under the interpreter (which never compiles), or when ptxas or a tool fails.
    """
    if interpreting():
        raise ResourceError(
            "cannot compile ahead of time under TRITON_INTERPRET=1", hint="unset it and start again"
        )
    import triton
    from triton.backends.compiler import GPUTarget
    from triton.compiler import ASTSource

    jit = function(rendered)
    names = jit.arg_names
    signature = {
        n: "constexpr" if n in constants else types.get(n, "fp32" if n == "scale" else "i32")
        for n in names
    }
    aligned = {
        (i,): [["tt.divisibility", 16]]
        for i, n in enumerate(names)
        if signature[n] != "constexpr" and n not in _UNALIGNED
    }
    kernel = triton.compile(
        ASTSource(
            fn=jit, signature=signature, attrs=aligned,
            constexprs={n: constants[n] for n in names if n in constants},
        ),
        target=GPUTarget("cuda", CAPABILITY[target], 32),
        options={"num_warps": warps, "num_stages": stages, "maxnreg": MAX_REGISTERS},
    )  # fmt: skip
    usage, code = disassemble(kernel.asm["cubin"])
    mnemonics, loop = _instructions(code)
    inside = Counter(m.split(".")[0] for m in loop)
    return CodeFacts(
        variant=rendered.name,
        target=target,
        config=config,
        registers=usage["REG"],
        stack=usage["STACK"],
        shared=int(kernel.metadata.shared),
        matrix=tuple(sorted({m for m in mnemonics if "MMA." in m})),
        local_memory=sum(m.split(".")[0] in ("LDL", "STL") for m in mnemonics),
        loop=len(loop),
        conversions=sum(inside[c] for c in ("I2F", "I2FP", "F2F", "F2FP", "I2I")),
        stores=inside["STS"],
        slots=round(len(loop) * 32 * warps / numbers, 2),
    )


def _instructions(code: str) -> tuple[list[str], list[str]]:
    """All mnemonics, and those of the main loop: the one with most copies into shared memory.

    Only the loop over kept tokens is pipelined, so that the loops over the newest have none.
    """
    names: list[str] = []
    labels: dict[str, int] = {}
    loops = [(0, 0)]
    for line in code.splitlines():
        label = re.match(r"(\.L_x_\d+):", line)
        if label:
            labels[label[1]] = len(names)
            continue
        found = re.match(r"\s+/\*[0-9a-f]+\*/\s+(?:@!?U?P\w+\s+)?(\S+?)(?:\s(.*))?;", line)
        if found is None:
            continue
        jump = re.search(r"(\.L_x_\d+)", found[2] or "")
        if found[1].startswith("BRA") and jump and jump[1] in labels:
            loops.append((labels[jump[1]], len(names)))
        names.append(found[1])
    parts = [names[a : b + 1] for a, b in loops]
    return names, max(parts, key=lambda p: (sum(n.startswith("LDGSTS") for n in p), len(p)))


def compile_attention(
    row: AttentionRow, problem: AttentionProblem, config: SplitConfig, target: str
) -> CodeFacts:
    """Compile a row of cached attention; see :func:`compile_source`."""
    codes = "*i32" if problem.cache != "kv" else f"*{problem.x_dtype}"
    scales = "*fp32" if problem.keys == "channel" else "*fp16"
    own = ("q_ptr", "k_tail_ptr", "v_tail_ptr", "sinks_ptr", "y_ptr")
    types = {
        "k_ptr": codes, "v_ptr": codes, "k_scale_ptr": scales, "k_low_ptr": "*fp16",
        "v_scale_ptr": "*fp16", "v_low_ptr": "*fp16", "q_pos_ptr": "*i64", "k_pos_ptr": "*i64",
        "valid_ptr": "*u8", "start_ptr": "*i32", "part_ptr": "*fp32", "count_ptr": "*i32",
        "slopes_ptr": "*fp32", **dict.fromkeys(own, f"*{problem.x_dtype}"),
    }  # fmt: skip
    return compile_source(
        render(row, problem), types, sizes(problem, config), target, warps=config.warps,
        stages=config.stages, numbers=config.BT * (problem.D + problem.E), config=config,
    )  # fmt: skip


def compile_write(problem: AttentionProblem, target: str, *, valid: bool = False) -> CodeFacts:
    """Compile the write of new tokens; no loop is pipelined, so that `slots` is of all its code."""
    stored = {"int8": "*i8", "fp8": "*u8"}.get(problem.cache, f"*{problem.x_dtype}")
    own = ("q_ptr", "q_out_ptr", "q_gain_ptr", "k_ptr", "v_ptr", "k_out_ptr", "k_gain_ptr",
           "k_last_ptr")  # fmt: skip
    types = {
        **dict.fromkeys(own, f"*{problem.x_dtype}"), "cos_ptr": "*fp32", "sin_ptr": "*fp32",
        "k_to_ptr": stored, "v_to_ptr": stored, "q_pos_ptr": "*i64", "pos_to_ptr": "*i64",
        "k_scale_ptr": "*fp32" if problem.keys == "channel" else "*fp16", "v_scale_ptr": "*fp16",
        "by_ptr": "*fp32", "real_ptr": "*u8", "real_to_ptr": "*u8", "start_ptr": "*i32",
    }  # fmt: skip
    sizes = write_sizes(problem)
    return compile_source(
        render_write(problem, valid), types, sizes, target, warps=write_warps(problem), stages=1,
        numbers=int(sizes["BD"]),
    )  # fmt: skip
