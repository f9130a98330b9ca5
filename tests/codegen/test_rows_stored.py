"""Dense weights in a kernel: numbers with every side, the planner's choices, and what is held.

Triton reads TRITON_INTERPRET at import, so child processes run kernels (this file as a script for
whole programs) and the tests judge their answers.
"""

from __future__ import annotations

import json
import sys
from dataclasses import replace
from typing import Any

import pytest
import torch
from interpreter import interpreted
from lowering_programs import Maker, Weight, hidden, law
from numerics import Case, judge, parts_of, run_cases

from llmc.codegen import aot, large
from llmc.codegen.fuse import FusePlan, fuse
from llmc.codegen.kernels import choose, row
from llmc.codegen.prepack import prepack
from llmc.codegen.problem import Problem
from llmc.codegen.row import TileConfig
from llmc.codegen.rows.stored import W16
from llmc.codegen.targets import triton_accept
from llmc.compiler.ir.errors import ModelError
from llmc.compiler.ir.graph import Program
from llmc.compiler.ir.interpret import run
from llmc.compiler.pipeline import zoo

PLAIN: dict[str, Any] = {"bits": 16, "group": 0, "scale_dtype": "", "weights": "dense"}
GATE = {"pairs": "gate", "act": "silu"}
LAYER = {"norm": True, "centred": True, "eps": 1e-5}


def case(M: int, N: int, K: int, **other: Any) -> Case:
    """A case of a dense weight; "tile", "stride" and "spoil" go beside the problem's fields."""
    own = {k: other.pop(k) for k in ("stride", "tile", "spoil") if k in other}
    return Case("w16", {"N": N, "K": K, **PLAIN, **other}, M, **own)


CASES = [
    case(3, 42, 128, bias=True, **LAYER, **GATE, spoil="shift"),
    case(2, 50, 136, bias=True, rank=4, sparse=True, **GATE, spoil="left"),
    case(2, 33, 72, out_norm=True, out_eps=1e-5, residual=True, spoil="out_gain"),
    case(9, 70, 264, bias=True, act="gelu", x_dtype="bf16", tile=(16, 32), spoil="bias"),
    case(5, 33, 1032, norm=True, eps=1e-5, tile=(8, 64, 3, 4, 2), stride="padded", spoil="gain"),
    # many tokens: torch's product of the very weight, and the same sides
    case(70, 42, 72, bias=True, **LAYER, **GATE, spoil="bias"),
    case(70, 42, 72, bias=True, rank=4, norm=True, eps=1e-5, **GATE, spoil="left"),
    case(70, 33, 72, residual=True, smooth=True, x_dtype="fp32", spoil="values"),
]


@pytest.fixture(scope="module")
def answers(tmp_path_factory: pytest.TempPathFactory) -> list[dict[str, Any]]:
    """One child process for all cases."""
    return run_cases(CASES, tmp_path_factory.mktemp("kernels"))


@pytest.mark.parametrize("at", range(len(CASES)), ids=lambda i: CASES[i].label)
def test_a_dense_weight_is_what_it_means(at: int, answers: list[dict[str, Any]]) -> None:
    """Against the oracle in fp64; the same bits twice; a spoiled part goes beyond the bound."""
    assert judge(CASES[at], answers[at]) == ""


# ** what is packed **


def test_a_weight_stays_the_tensor_that_it_was() -> None:
    """Rows of pairs too, which a kernel finds where they are; what lies in columns is copied."""
    for made in (case(1, 40, 64), case(1, 40, 64, norm=True, eps=1e-5, **GATE)):
        parts = parts_of(made)
        packed = prepack(W16, made.problem, **parts)
        assert packed["values"] is parts["values"]
        turned = parts["values"].T.contiguous().T
        again = prepack(W16, made.problem, **parts | {"values": turned})
        assert again["values"].is_contiguous()
        assert torch.equal(again["values"], turned)
    with pytest.raises(ModelError, match=r"float16 values, found torch\.float32"):
        prepack(W16, made.problem, **parts | {"values": turned.float()})
    with pytest.raises(ModelError, match=r"values of shape \[40, 64\], found \[40, 63\]"):
        prepack(W16, made.problem, **parts | {"values": turned[:, :63]})


def test_bytes_are_the_weight_once() -> None:
    """A megabyte of 16 bits, x, y, and the gain; twice that in 32 bits but for the gain."""
    problem = Problem(1024, 512, **PLAIN, norm=True, eps=1e-5)
    assert choose(problem) == (W16, [])
    assert W16.bytes_moved(problem, 1) == 2 * (1024 * 512 + 512 + 1024) + 4 * 512
    wide = replace(problem, x_dtype="fp32", bits=32)
    assert W16.bytes_moved(wide, 1) == 4 * (1024 * 512 + 512 + 1024) + 4 * 512
    assert (large.least(W16, problem), large.better(W16, problem, 64)) == (65, False)
    assert large.better(W16, problem, 65)


@pytest.mark.parametrize(
    ("change", "name"),
    [
        ({"n": 2, "m": 4}, "w16_24"),
        ({"n": 4, "m": 8}, "w16_bitmap"),
        ({"bitmap": True}, "w16_bitmap"),
        ({"weights": "factors", "rank": 8}, "factors"),
    ],
)
def test_rows_of_fewer_bytes_come_first(change: dict[str, Any], name: str) -> None:
    """This one is for what no other row reads."""
    found, _ = choose(replace(Problem(256, 512, **PLAIN), **change))
    assert found is row(name)


# ** machine code **


@pytest.mark.parametrize("K", [4096, 4104])
@pytest.mark.parametrize("target", ["sm_80", "sm_90"])
def test_weights_are_copied_sixteen_bytes_at_a_time(
    K: int, target: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Asynchronously, a tail of the columns too: 64 rows of 128 columns are 8 of each thread."""
    read: list[str] = []
    code_of = aot.disassemble

    def disassemble(cubin: bytes) -> tuple[dict[str, int], str]:
        usage, code = code_of(cubin)
        read.append(code)
        return usage, code

    monkeypatch.setattr(aot, "disassemble", disassemble)
    facts = aot.compile_variant(W16, Problem(4096, K, **PLAIN), TileConfig(8, 64, split=4), target)
    copies = [m for m in aot.instructions(read[0])[1] if m.startswith("LDGSTS")]
    assert len([m for m in copies if m.endswith(".128")]) == 8
    assert 0.8 < facts.slots < 2.0
    assert (facts.stack, facts.local_memory, facts.loop_stores, facts.conversions) == (0, 0, 0, 0)


def test_a_loop_that_was_unrolled_whole_has_slots_too() -> None:
    """32 steps of a narrow tile stand in one line on sm_80; slots are counted over all of them."""
    facts = aot.compile_variant(W16, Problem(4096, 4096, **PLAIN), TileConfig(8, 64), "sm_80")
    assert 0.5 < facts.slots < 1.5
    assert aot.straight(["LDG", "HMMA.16816", "IADD3", "HMMA.16816", "EXIT"]) == [
        "HMMA.16816", "IADD3", "HMMA.16816"
    ]  # fmt: skip
    assert aot.straight(["LDG", "EXIT"]) == []


# ** what is planned **


def planned(program: Program) -> FusePlan:
    """Fuse for the kernel rows; the program computes the same, and the problems are true."""
    inputs = {n.name: hidden(program.dtype, 64) for n in program.inputs}
    before = run(program, inputs)
    plan = fuse(program, triton_accept)
    torch.testing.assert_close(run(program, inputs), before, rtol=1e-5, atol=1e-5)
    law(program, plan)
    return plan


def dense(m: Maker, x: Any, name: str, N: int, K: int = 64) -> Any:
    return m.call("aten.linear.default", x, m.param(name, (N, K)))


def normed(m: Maker) -> Any:
    return m.call("llmc.rms_norm", m.input("h", 64), m.param("gain", (64,)), eps=1e-5)


def test_everything_around_dense_linears_is_taken_in() -> None:
    """Norm, both linears and their product in one call; the sum in the other."""
    m = Maker()
    n = normed(m)
    gate, up = (dense(m, n, name, 96) for name in ("gate", "up"))
    z = m.call("llmc.gated", gate, up, act="silu")
    plan = planned(m.output(m.call("aten.add.Tensor", n.args[0], dense(m, z, "down", 64, 96))))
    assert plan.refused == ()
    one, two = (f.problem for f in plan.fused)
    assert (one.N, one.norm, one.pairs, two.residual) == (192, True, "gate", True)


def test_a_linear_with_nothing_around_it_is_torch_s() -> None:
    """Its bias is no reason; a value that others read too cannot be taken in."""
    m = Maker()
    n = normed(m)
    y = m.call("aten.linear.default", n, m.param("w", (64, 64)), m.param("b", (64,)))
    plan = planned(m.output(n, y))
    assert not plan.fused
    told = {r.predicate: r.reason for r in plan.refused}
    assert told.keys() == {"around", "all_readers_fused"}
    assert "torch's own product serves" in told["around"]


def test_a_width_just_missed_is_refused_by_its_field() -> None:
    """60 columns are no whole 16 bytes of a row."""
    m = Maker()
    n = m.call("llmc.rms_norm", m.input("h", 60), m.param("gain", (60,)), eps=1e-5)
    plan = fuse(m.output(dense(m, n, "w", 64, 60)), triton_accept)
    assert not plan.fused
    (reason,) = (r.reason for r in plan.refused if r.predicate == "kernel")
    assert "w16: K=60, expected at least 16, a multiple of 8" in reason


def test_dense_and_coded_linears_of_one_input_are_not_joined() -> None:
    """Both take the norm in, and the plan says that they are stored in two ways."""
    m = Maker()
    n = normed(m)
    plan = planned(m.output(dense(m, n, "w", 64), m.linear(n, "q", Weight(64, 64))))
    kinds = [(f.problem.weights, f.problem.norm) for f in plan.fused]
    assert sorted(kinds) == [("dense", True), ("int", True)]
    assert [r.predicate for r in plan.refused] == ["concat"]


def test_a_weight_that_others_read_is_not_joined() -> None:
    """Joined rows are a tensor of their own, so a shared one would be held twice."""
    m = Maker()
    n = normed(m)
    w = m.param("w", (64, 64))
    shared, own = m.call("aten.linear.default", n, w), dense(m, n, "v", 64)
    plan = planned(m.output(shared, own, m.call("aten.linear.default", m.input("g", 64), w)))
    assert [len(f.sections) for f in plan.fused] == [1, 1]
    assert {r.predicate for r in plan.refused} == {"concat", "around"}


# ** what is held **


@pytest.fixture(scope="module")
def tied(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Any]:
    """What the child process found of a decoder whose head is its embedding."""
    found: dict[str, Any] = interpreted(__file__, tmp_path_factory.mktemp("kernel_cache"))
    return found


@pytest.mark.parametrize("name", ["fp32", "fp16"])
def test_a_tied_head_stays_one_tensor(name: str, tied: dict[str, Any]) -> None:
    """It is fused with the norm before it, and nothing is resident for it."""
    found = tied[name]
    assert found["kernels"] == ["w16"] * 9
    assert found["head"] == {"fp32": 0, "fp16": 4 * 64}[name], "the gain, in fp32"
    assert found["table"], "the embedding is read by its own call and by the head's"
    assert found["after"] == found["before"] - found["replaced"] + found["resident"]
    assert found["error"] < found["bound"]


def test_a_tied_head_that_would_be_scaled_runs_as_its_body(tied: dict[str, Any]) -> None:
    """A gain beyond 1 in fp16 makes another weight of it, so norm and product are torch's."""
    found = tied["loud"]
    assert found["kernels"] == ["w16"] * 8
    assert found["refused"] == ["tensors"]
    assert "held twice" in found["reason"]
    assert found["error"] < found["bound"]


# ** the child process **


def _tied(dtype: torch.dtype, gain: float) -> dict[str, Any]:
    from llmc.codegen.targets import lower
    from llmc.compiler.runtime.cache import add_cache
    from llmc.compiler.runtime.lowering import recast, runner_for, runner_of

    wide = zoo.decoder(hidden=64, inner=64, heads=4, kv=2, size=16, rope=1.0, tied=True)
    for node in wide.calls("llmc.rms_norm"):
        name = str(node.args[1].target)  # type: ignore[union-attr]
        wide.set_tensor(name, wide.weights.load(name) * gain)
    program = recast(wide, dtype) if dtype != wide.dtype else wide
    cached = add_cache(program)
    made = lower(cached, "triton")
    tokens = torch.randint(0, 20, (2, 6), generator=torch.Generator().manual_seed(0))
    outs = []
    for runner in (*(runner_for(p, cached=True) for p in (wide, program)),
                   runner_of(made, device="cpu")):  # fmt: skip
        cache = runner.start(2, 32)
        steps = [tokens[:, :4], *(tokens[:, i : i + 1] for i in range(4, 6))]
        outs.append(torch.cat([runner.forward(s, cache=cache) for s in steps], 1).double())
    noise, error = (float((o - outs[0]).norm() / outs[0].norm()) for o in outs[1:])
    (table,) = (str(n.args[0].target) for n in made.program.calls("aten.embedding.default"))
    readers = [n for n in made.program.graph.nodes if n.op == "get_attr" and n.target == table]
    return {
        "kernels": [p.kernel for p in made.placed],
        "head": made.placed[-1].resident,
        "table": {u.op for n in readers for u in n.users} == {"call_function"}
        and sum(len(n.users) for n in readers) == 2,
        "before": cached.weight_bytes(), "after": made.program.weight_bytes(),
        "replaced": sum(p.stored for p in made.placed),
        "resident": sum(made.resident_bytes.values()),
        "refused": [r.predicate for r in made.refused],
        "reason": "; ".join(r.reason for r in made.refused),
        "error": error, "bound": 2 * noise + 2e-6,
    }  # fmt: skip


if __name__ == "__main__":
    torch.set_num_threads(1)
    print(json.dumps({
        "fp32": _tied(torch.float32, 1.0), "fp16": _tied(torch.float16, 0.5),
        "loud": _tied(torch.float16, 3.0),
    }))  # fmt: skip
    sys.exit(0)
