"""The machine code of cached attention, compiled without a GPU: no spills, tensor cores."""

from __future__ import annotations

import dataclasses
import itertools
from typing import Any

import pytest

from llmc.codegen.attention.aot import CodeFacts, compile_attention, compile_write
from llmc.codegen.attention.problem import AttentionProblem
from llmc.codegen.attention.rows import choose

TARGETS = ("sm_80", "sm_90")
# Shared memory that a block may take, bytes.
SHARED = {"sm_80": 163 * 1024, "sm_90": 227 * 1024}
KV: dict[str, Any] = {"cache": "kv"}
INT8: dict[str, Any] = {"cache": "int8", "bits": 8, "keys": "channel"}
FP8: dict[str, Any] = {"cache": "fp8", "bits": 8, "keys": "token"}
KIVI: dict[str, Any] = {"cache": "kivi", "bits": 4, "keys": "group", "group": 64, "residual": 128}
INT2: dict[str, Any] = {**KIVI, "bits": 2, "group": 32}
# What is kept, dtype, and the most issue slots per kept number that the loop may take. At full
# bandwidth an H200 has 15.6 slots for a number of 16 bits, 7.8 for one of 8.
COUNTED: dict[str, Any] = {"counted": True}
MAIN = [
    ("sm_90", KV, "bf16", 4.0),
    ("sm_80", {**KV, **COUNTED}, "bf16", 4.0),
    ("sm_90", INT8, "bf16", 7.2),
    ("sm_80", FP8, "bf16", 7.2),
    ("sm_90", KIVI, "bf16", 9.5),
    ("sm_90", {**KV, **COUNTED, "slopes": True}, "bf16", 4.0),
    pytest.param("sm_90", {**INT8, **COUNTED}, "bf16", 7.2, marks=pytest.mark.slow),
    pytest.param("sm_90", {**FP8, **COUNTED}, "fp16", 7.2, marks=pytest.mark.slow),
    pytest.param("sm_80", KV, "fp16", 4.0, marks=pytest.mark.slow),
    pytest.param("sm_90", INT2, "bf16", 11.5, marks=pytest.mark.slow),
]


def problem_of(dtype: str, kept: dict[str, Any], **more: Any) -> AttentionProblem:
    """Llama-3.1-8B's heads."""
    return AttentionProblem(32, 8, 128, 128, 16, dtype, **{**kept, **more})


def check(problem: AttentionProblem, target: str, queries: int = 1) -> CodeFacts:
    """Compile at 8192 tokens, and hold the laws that every variant keeps."""
    row, misfits = choose(problem)
    assert row is not None, misfits
    facts = compile_attention(row, problem, row.config(problem, 1, 8192, queries), target)
    assert facts.stack == 0, facts
    assert facts.local_memory == 0, facts
    assert facts.shared <= SHARED[target], facts
    assert facts.matrix, "no matrix instruction"
    tail = {"fp16": "F32", "bf16": "F32.BF16", "fp32": "F32.TF32"}[problem.x_dtype]
    assert any(m.endswith(tail) for m in facts.matrix), facts
    if problem.cache != "kv" and problem.x_dtype != "fp32":
        assert "HMMA.16816.F32" in facts.matrix, "codes meet fp16"
    return facts


@pytest.mark.parametrize(("target", "kept", "dtype", "slots"), MAIN)
def test_main_variants(target: str, kept: dict[str, Any], dtype: str, slots: float) -> None:
    facts = check(problem_of(dtype, kept), target)
    assert 1.0 < facts.slots <= slots, facts
    # Weights of the softmax alone become 16-bit numbers; nothing is converted per kept number.
    assert facts.conversions <= 8, facts


# What is kept, what queries and keys go through, and whether a recorded step writes.
WRITES = [
    ("sm_90", INT8, {}),
    ("sm_80", FP8, {}),
    ("sm_90", KV, {"norm": "head", "gains": True, **COUNTED}),
    ("sm_80", INT8, {"norm": "row", "gains": True, "offset": 1.0}),
    ("sm_90", FP8, COUNTED),
    ("sm_90", INT8, {"norm": "behind", "gains": True, **COUNTED}),
    ("sm_90", KV, {"scaled": True}),
    ("sm_80", KV, {"last": True, "woven": True, **COUNTED}),
]


@pytest.mark.parametrize(("target", "kept", "more"), WRITES)
def test_writes_compile(target: str, kept: dict[str, Any], more: dict[str, Any]) -> None:
    """fp8 codes are made by bit operations, so that sm_80 has them too; norms spill nothing."""
    width = 64 if "last" in more else 128
    facts = compile_write(problem_of("bf16", kept, turn="half", rotary=width, **more), target)
    assert (facts.stack, facts.local_memory, facts.matrix) == (0, 0, ())
    assert facts.registers <= 64


@pytest.mark.slow
@pytest.mark.parametrize("target", TARGETS)
@pytest.mark.parametrize("dtype", ["fp16", "bf16", "fp32"])
def test_every_variant_compiles_without_spills(dtype: str, target: str) -> None:
    """Caches, masks, head sizes, and tiles of more rows."""
    masked = {"window": 4096, "valid": True, "softcap": 50.0, "sinks": True}
    for kept in (KV, INT8, {**INT8, "keys": "token"}, FP8, {**FP8, "keys": "channel"}, KIVI, INT2,
                 {**KIVI, "bits": 8, "group": 32}):  # fmt: skip
        check(problem_of(dtype, kept), target)
        check(problem_of(dtype, kept, **masked), target)
        if kept["cache"] != "kivi":  # whose codes a host makes, so that no step is recorded
            check(problem_of(dtype, kept, **masked, **COUNTED), target)
    check(problem_of(dtype, KV, window=64, dilation=2, first=4, causal=False), target)
    for kept in (KV, INT8, KIVI, INT2):
        check(problem_of(dtype, kept), target, 16)
    for sizes in ((8, 8, 64, 64), (16, 8, 256, 256), (16, 1, 80, 64)):
        for kept in (KV, INT8, KIVI):
            problem = AttentionProblem(*sizes, 16, dtype, **kept)
            if sizes[2] + sizes[3] <= 256 or dtype != "fp32":
                check(problem, target)
            else:
                assert [m.field for m in choose(problem)[1]] == ["D"]
    for turn, norm in itertools.product(("half", "pairs", ""), ("", "head", "row")):
        for kept in (KV, INT8, FP8, KIVI):
            more: dict[str, Any] = {"turn": turn, "rotary": 64 if turn else 0, "norm": norm}
            problem = problem_of(dtype, kept, **more, gains=bool(norm), eps=1e-6)
            facts = compile_write(problem, target, valid=True)
            assert (facts.stack, facts.local_memory) == (0, 0), facts
            if kept is not KIVI and turn == "half":
                facts = compile_write(dataclasses.replace(problem, counted=True), target)
                assert (facts.stack, facts.local_memory) == (0, 0), facts
    for heads, size in ((128, 64), (64, 128), (16, 256), (71, 80)):
        how: dict[str, Any] = {"turn": "half", "rotary": size, "norm": "row", "gains": True}
        facts = compile_write(AttentionProblem(heads, heads, size, size, 16, dtype, **how), target)
        assert (facts.stack, facts.local_memory) == (0, 0), facts
