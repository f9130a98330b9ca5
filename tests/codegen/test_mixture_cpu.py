"""Layers of experts on the CPU: who is not chosen is not read, and each expert is a linear."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import pytest
import torch
from lowering_programs import hidden
from mixture_programs import COUNT, HIDDEN, INNER, Layers, layer

from llmc.codegen import meaning
from llmc.codegen.mixture.place import MixtureCall
from llmc.codegen.mixture.split import one, part_of
from llmc.codegen.modules import as_module
from llmc.codegen.problem import Problem
from llmc.codegen.survey import survey
from llmc.codegen.targets import Lowered, describe, lower
from llmc.compiler.ir import packing
from llmc.compiler.ir.interpret import run
from llmc.compiler.ir.ops.sparse import csr

SCHEMES: dict[str, dict[str, Any]] = {
    "int4": {}, "int8": {"bits": 8, "group": 0}, "zero points": {"asym": True},
    "2:4": {"sparse": True}, "three bits": {"bits": 3},
}  # fmt: skip


def value(made: Lowered, x: torch.Tensor) -> torch.Tensor:
    out: torch.Tensor = run(made.program, {"h": x}, implementations=made.implementations)
    return out


@pytest.mark.parametrize("tokens", [1, 7])
@pytest.mark.parametrize("name", SCHEMES)
def test_a_layer_computes_what_its_reference_does(name: str, tokens: int) -> None:
    """Within what bf16 products of that many columns may differ by."""
    program = layer(**SCHEMES[name])
    x = torch.randn(1, tokens, HIDDEN, generator=torch.Generator().manual_seed(tokens))
    made = lower(program, "cpu")
    (placed,) = made.mixtures
    want = run(program, {"h": x})
    error = (value(made, x) - want).norm() / (want - x).norm()
    assert error < 0.02
    assert [r.predicate for r in made.refused] == ["decoded"]  # the router, stored dense
    held = {n for n in made.program.params if n.endswith(".codes") and "packed" not in n}
    assert held == set()
    assert made.resident_bytes == {placed.fused.node: placed.resident}


@pytest.mark.parametrize(
    "route", ["sigmoid added groups=2:1:two sum+1e-20 times=2.5", "softmax added sum>1e-12"]
)
def test_any_route_is_told(route: str) -> None:
    """The graph's own calls choose: nothing of a route is asked of the CPU, nor refused."""
    program = layer(kind=route)
    x = torch.randn(1, 7, HIDDEN, generator=torch.Generator().manual_seed(0))
    made = lower(program, "cpu")
    (placed,) = made.mixtures
    want = run(program, {"h": x})
    assert (placed.fused.up.route, len(placed.fused.told)) == ("", 2)
    assert (value(made, x) - want).norm() / (want - x).norm() < 0.02
    assert [r.predicate for r in made.refused] == ["decoded"]


def test_experts_that_no_token_chose_are_not_touched() -> None:
    """Their packed tensors may hold anything."""
    made = lower(layer(), "cpu")
    x = hidden(width=HIDDEN)[:1, :1]
    call = next(m for m in made.implementations.values() if isinstance(m, MixtureCall))
    before = value(made, x)
    (node,) = made.program.calls("llmc.fused")
    inputs = dict(zip(call.names, node.args[0], strict=True))  # type: ignore[arg-type]
    index = run_to(made, inputs["index"], x)
    idle = sorted(set(range(COUNT)) - set(index.flatten().tolist()))
    assert len(idle) == COUNT - 2
    for name, read in inputs.items():
        if name.startswith(("up.", "down.")):
            tensor = made.program.fetch(str(read.target)).clone()
            tensor[idle] = 77
            made.program.set_tensor(str(read.target), tensor)
    assert torch.equal(value(made, x), before)


def run_to(made: Lowered, node: Any, x: torch.Tensor) -> torch.Tensor:
    """The value of one node."""
    seen: dict[str, torch.Tensor] = {}
    run(made.program, {"h": x}, implementations=made.implementations,
        observe=lambda n, v: seen.update({n.name: v}))  # fmt: skip
    return seen[node.name]


def test_no_token_is_no_work() -> None:
    made = lower(layer(), "cpu")
    assert value(made, torch.zeros(1, 0, HIDDEN)).shape == (1, 0, HIDDEN)


@pytest.mark.parametrize("kind", ["softmax", "softmax sum"])
def test_an_exported_layer_is_one_op_of_the_same_value(kind: str) -> None:
    """And that op's fake kernel says of shape and strides what the call does."""
    made = lower(layer(kind=kind), "cpu")
    module = as_module(made)
    x = hidden(width=HIDDEN)
    assert torch.equal(module(x), value(made, x))
    exported = torch.export.export(module, (x,), dynamic_shapes=[{1: torch.export.Dim.AUTO}])
    found = [n for n in exported.graph.nodes if n.target is torch.ops.llmc.placed_mixture.default]
    assert len(found) == 1
    compiled = torch.compile(module, backend="aot_eager", fullgraph=True)
    assert torch.equal(compiled(x), value(made, x))
    longer = torch.cat([x, x], 1)
    assert torch.equal(exported.module()(longer), value(made, longer))


def test_the_op_keeps_its_promises() -> None:
    made = lower(layer(), "cpu")
    call = next(m for m in made.implementations.values() if isinstance(m, MixtureCall))
    (node,) = made.program.calls("llmc.fused")
    x = hidden(width=HIDDEN)
    given = [
        made.program.fetch(str(n.target)) if n.op == "get_attr" else run_to(made, n, x)
        for n in node.args[0]  # type: ignore[union-attr]
    ]
    args, kwargs = call.as_op(given)
    torch.library.opcheck(call.op, args, kwargs, test_utils=("test_schema", "test_faketensor"))
    assert torch.equal(call.op(*args, **kwargs), call(given))


def test_dense_experts_stay_as_they_are() -> None:
    """torch multiplies them as they are stored; the reason says so."""
    made = lower(layer(dense=True), "cpu")
    assert made.mixtures == []
    (why,) = [r for r in made.refused if "experts" in r.node]
    assert why.predicate == "decoded"


def test_constants_that_are_kept_decoded_need_no_kernel() -> None:
    made = lower(layer(), "cpu", dense=True)
    assert made.mixtures == []
    assert any("decoded once and held" in r.reason for r in made.refused)


def test_the_layer_is_in_the_report_and_in_the_survey() -> None:
    """Bytes are those of the chosen experts: half of the weights of four, two being chosen."""
    program = layer()
    (row,) = describe(lower(program, "cpu"))["fused"]
    page = survey(program, "cpu", 1, "fp32", 1e9)
    (told,) = page["fused"]
    assert row["kernel"] == told["kernel"] == "aten::_weight_int4pack_mm_for_cpu"
    assert row["bytes"] == told["bytes"]
    weights = 3 * COUNT * HIDDEN * INNER
    assert weights // 4 < told["bytes"] < weights // 2
    many = survey(program, "cpu", 64, "fp32", 1e9)["fused"][0]["bytes"]
    assert many > 2 * told["bytes"]
    assert (told["problem"]["experts"], told["down"]["routed"]) == (COUNT, "down")


# ** one expert of many **


def stacked(name: str) -> tuple[Problem, dict[str, torch.Tensor]]:
    """Four experts of 8 rows and 32 columns below each other, stored in some way."""
    g = torch.Generator().manual_seed(5)
    N, K = 32, 32
    problem = Problem(N, K, group=16, x_dtype="fp32", scale_dtype="fp32", experts=4, chosen=2,
                      routed="up")  # fmt: skip
    q = torch.randint(0, 16, (N, K), generator=g)
    parts = {"codes": packing.pack(q, 4), "scale": torch.rand(N, 2, generator=g)}
    values = torch.randn(N, K, generator=g)
    if name == "table a row":
        problem = replace(problem, weights="table", table="row")
        parts["table"] = torch.randn(N, 16, generator=g)
    if name == "bitmap":
        kept = torch.rand(N, K, generator=g) < 0.4
        problem = replace(problem, weights="dense", bits=32, scale_dtype="", bitmap=True)
        parts = {"bitmap": packing.pack(kept.int(), 1), "values": values[kept]}
    if name == "sparse beside":
        extra = torch.rand(N, K, generator=g) < 0.1
        index, starts = csr(extra)
        problem = replace(problem, sparse=True)
        parts |= {"csr_values": values[extra], "csr_index": index, "csr_starts": starts}
    return problem, parts


@pytest.mark.parametrize("name", ["codes", "table a row", "bitmap", "sparse beside"])
def test_parts_of_an_expert_are_its_rows(name: str) -> None:
    """Each expert's linear is those rows of the linear of all, in fp64."""
    problem, parts = stacked(name)
    x = torch.randn(5, problem.K, dtype=torch.float64)
    alike = replace(problem, experts=0, chosen=0, routed="")
    whole = meaning.linear(alike, parts, x)
    single = one(problem)
    assert (single.N, single.experts, single.routed) == (8, 0, "")
    for e in range(problem.experts):
        got = meaning.linear(single, part_of(problem, parts, e), x)
        assert torch.equal(got, whole[:, 8 * e : 8 * e + 8])


def test_sparse_entries_beside_experts_differ_in_size() -> None:
    """Stacked they would not fit: the body runs, and it is told."""
    m = Layers()
    h = m.input("h", HIDDEN)
    flat = m.flat(m.normed(h))
    y = m.experts(flat, *m.route(flat), sparse=True, side=0.1)
    program = m.output(m.call("aten.add.Tensor", h, m.back(y, h)))
    made = lower(program, "cpu")
    assert made.mixtures == []
    assert "expected experts of one size" in next(
        r.reason for r in made.refused if r.predicate == "tensors"
    )
    x = hidden(width=HIDDEN)
    assert torch.equal(value(made, x), run(program, {"h": x}))
