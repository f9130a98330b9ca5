"""Whole decoders on the triton target: a prompt, then token by token through a cache.

Triton reads TRITON_INTERPRET at import, so one child process runs them all (this file as a script)
and the tests judge its answers.
"""

from __future__ import annotations

import json
import sys
from typing import Any

import pytest
import torch
from interpreter import interpreted

# Passes, dtype, and what each block's linears run on: q, k and v; o; gate and up; down. The head is
# dense in all of them.
CASES = {
    "w4:group=32": ("float32", ["w4a16"] * 4),
    "prune24,w4:group=64": ("float16", ["w4a16_24"] * 4),
    "w4:double=true,group=32,lorc:rank=4": ("float16", ["w4a16"] * 4),
    "w8:group=row": ("float16", ["w8a16"] * 4),
    "svd:rank=4": ("float16", ["factors"] * 4),
    "svd:rank=16,w4:group=16": ("float16", ["w4_factors"] * 4),
    "kv8": ("float16", ["w16"] * 4),
    "spqr": ("float16", ["w3a16"] * 4),
    "quip": ("float16", ["w2_lut"] * 4),
    "w6:group=32": ("float16", ["w6a16"] * 4),
    "bcq": ("float16", ["w_signs"] * 4),
    # Half a step of an input grid, rounded either way in 16 bits, is more than a kernel is off by.
    "a8": ("float32", ["w16"] * 4),
    "olive": ("float32", ["w4_pairs"] * 4),
}
# Layer norms, attention and MLP side by side; up alone, then its activation.
OTHERS: dict[str, dict[str, Any]] = {
    "w8:group=row": {"norm": "layer", "mlp": "gelu", "parallel": True, "bias": True},
}


@pytest.fixture(scope="module")
def answers(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Any]:
    """What the child process found."""
    found: dict[str, Any] = interpreted(__file__, tmp_path_factory.mktemp("kernel_cache"))
    return found


@pytest.mark.parametrize("text", CASES)
def test_a_decoder_computes_what_its_reference_does(text: str, answers: dict[str, Any]) -> None:
    """No further from the reference in fp32 than the reference in its own dtype is, or twice."""
    found = answers[text]
    assert found["kernels"] == [*CASES[text][1] * 2, "w16"]
    assert found["error"] < 2 * found["noise"] + 2e-6 < 0.01
    assert found["sections"] == [*([3, 1, 1, 1] if text in OTHERS else [3, 1, 2, 1]) * 2, 1]
    assert found["left out"] == []
    assert found["attention"] == 2


@pytest.mark.parametrize("text", CASES)
def test_nothing_is_held_twice(text: str, answers: dict[str, Any]) -> None:
    """What is resident is what was stored, less what was replaced, plus what replaced it."""
    found = answers[text]
    assert found["after"] == found["before"] - found["replaced"] + found["resident"]
    assert found["held"] == found["after"]
    assert found["left"] == [], "canonical codes that nothing reads"


def test_gains_beyond_one_are_told_in_fp16(answers: dict[str, Any]) -> None:
    """With which linears: those behind a norm; what is done to decoded scales is told as well."""
    plain, double = (answers[t]["notes"] for t in list(CASES)[1:3])
    assert all("x * gain stays in fp16" in n for n in plain[::2])
    assert plain[1::2] == [""] * 4
    assert all("decoded scales in fp16" in n for n in double[:-1])
    assert answers["w4:group=32"]["notes"] == [""] * 9


def test_tensors_that_no_kernel_can_take_run_as_their_body(answers: dict[str, Any]) -> None:
    """A scale that 2**k takes out of fp16: the node is told of, and computes all the same."""
    found = answers["out of range"]
    assert found["placed"] == 0
    assert found["predicates"] == ["tensors"]
    assert found["finite"]
    assert found["error"] == 0.0


# ** the child process **


def _decoder(text: str, dtype: torch.dtype) -> dict[str, Any]:
    from llmc.codegen.targets import lower
    from llmc.compiler.pipeline import recipe, zoo
    from llmc.compiler.pipeline.compile import compile_plan
    from llmc.compiler.pipeline.plan import make_plan
    from llmc.compiler.runtime.cache import add_cache
    from llmc.compiler.runtime.lowering import recast, runner_for, runner_of

    tokens = torch.randint(0, 20, (4, 8), generator=torch.Generator().manual_seed(0))
    program = zoo.decoder(
        hidden=64, inner=64, heads=4, kv=2, size=16, rope=1.0, **OTHERS.get(text, {})
    )
    for node in (*program.calls("llmc.rms_norm"), *program.calls("llmc.layer_norm")):
        gain = str(node.args[1].target)  # type: ignore[union-attr]
        program.set_tensor(gain, program.weights.load(gain) * 3)
    wide = compile_plan(make_plan(program, recipe.from_strings([text])), tokens).program
    program = recast(wide, dtype) if dtype != wide.dtype else wide
    cached = add_cache(program)
    made = lower(cached, "triton")
    fast = runner_of(made, device="cpu")
    outs = []
    for runner in (*(runner_for(p, cached=True) for p in (wide, program)), fast):
        cache = runner.start(2, 32)
        steps = [tokens[:2, :4], *(tokens[:2, i : i + 1] for i in range(4, 6))]
        outs.append(torch.cat([runner.forward(s, cache=cache) for s in steps], 1).double())
    noise, error = (float((o - outs[0]).norm() / outs[0].norm()) for o in outs[1:])
    return {
        "error": error,
        "noise": noise,
        "kernels": [p.kernel for p in made.placed],
        "sections": [len(p.fused.sections) for p in made.placed],
        "attention": len(made.attention),
        "left out": [r.predicate for r in made.refused],
        "notes": [p.note for p in made.placed],
        "before": cached.weight_bytes(),
        "after": made.program.weight_bytes(),
        "held": sum(p.bytes for p in made.program.params.values()),
        "replaced": sum(p.stored for p in made.placed),
        "resident": sum(made.resident_bytes.values()),
        "left": [n for n in made.program.params if n.endswith(".codes") and "packed" not in n],
    }


def _out_of_range() -> dict[str, Any]:
    from lowering_programs import Maker, Weight, hidden

    from llmc.codegen.targets import lower
    from llmc.compiler.ir.interpret import run

    m = Maker(torch.float16)
    h = m.input("h", 64)
    gain = torch.full((64,), 1e-3)
    gain[0] = 900.0
    n = m.call("llmc.rms_norm", h, m.param("gain", gain), eps=1e-6)
    program = m.output(m.linear(n, "w", Weight(64, 64)))
    scale = program.weights.load("w.scale")
    scale[0] = 300.0
    program.set_tensor("w.scale", scale)
    made = lower(program, "triton")
    x = hidden(torch.float16)
    x[..., 0] = 0
    want = run(program, {"h": x})
    got = run(made.program, {"h": x}, implementations=made.implementations)
    return {
        "placed": len(made.placed), "predicates": [r.predicate for r in made.refused],
        "finite": bool(got.isfinite().all()), "error": float((got - want).abs().max()),
    }  # fmt: skip


if __name__ == "__main__":
    from pathlib import Path

    sys.path.insert(0, str(Path(__file__).parent))
    given = {t: _decoder(t, getattr(torch, dtype)) for t, (dtype, _) in CASES.items()}
    print(json.dumps({**given, "out of range": _out_of_range()}))
