"""The machine code of both kernels of a layer of experts, compiled without a GPU."""

from __future__ import annotations

from dataclasses import replace

import pytest

from llmc.codegen.aot import compile_variant
from llmc.codegen.kernels import row
from llmc.codegen.variants import SHARED, TARGETS, variants


@pytest.mark.parametrize("target", TARGETS)
@pytest.mark.parametrize(
    ("name", "what", "slots"),
    [
        ("w4a16", "experts", 4.2), ("w4a16", "experts summed", 3.0),
        ("w4a16", "experts of groups", 4.2), ("w8a16", "experts told", 3.9),
    ],
)  # fmt: skip
def test_no_variant_of_experts_spills(name: str, what: str, slots: float, target: str) -> None:
    """No stack, no local memory, tensor cores; the main loop is that of one linear."""
    (found,) = [v for v in variants([row(name)], [target]) if v.what == what]
    facts = compile_variant(row(name), found.problem, found.config, target)
    expected = row(name).matrix_instruction(target, found.problem.x_dtype, found.config)
    assert (facts.stack, facts.local_memory) == (0, 0), facts
    assert facts.matrix == (expected,), facts
    assert facts.shared <= SHARED[target], facts
    assert 1.0 < facts.slots <= slots, facts


def test_experts_are_no_more_work_per_weight() -> None:
    """Only what stands before and behind the loop is another."""
    (found,) = [v for v in variants([row("w8a16")], ["sm_80"]) if v.what == "experts told"]
    plain = replace(found.problem, experts=0, chosen=0, routed="")
    both = [compile_variant(row("w8a16"), p, found.config, "sm_80") for p in (found.problem, plain)]
    assert both[0].slots <= both[1].slots + 0.2
    assert both[0].loop_stores == both[1].loop_stores
