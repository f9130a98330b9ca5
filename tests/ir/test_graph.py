"""Programs: emitting, parameters, pruning, cloning, running, and llmc ops under torch's tracers."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.utils._pytree import tree_map_only

from llmc.compiler.ir.dims import BATCH, SEQ, same
from llmc.compiler.ir.errors import ModelError
from llmc.compiler.ir.graph import DictWeights, Param, Program, info, sizes, tensor_type
from llmc.compiler.ir.interpret import run, run_nodes
from llmc.compiler.ir.names import set_name
from llmc.compiler.ir.ops import ROWS, cost, row_of
from llmc.compiler.ir.ops.base import OpRow, infer, register, row_for
from llmc.compiler.ir.segments import refresh_segments
from llmc.compiler.ir.types import SymType, TensorType
from llmc.compiler.ir.verifier import verify

IDS = {"input_ids": torch.tensor([[1, 5, 2], [3, 0, 7]]),
       "position_ids": torch.arange(3).expand(2, 3)}  # fmt: skip


def first(p: Program, op: str) -> Any:
    return next(p.calls(op))


def test_emit_types_the_node_and_remembers_its_origin(toy: Callable[..., Program]) -> None:
    p = toy()
    gated = first(p, "llmc.gated")
    new = p.emit("aten.neg.default", gated, before=p.output, made_by="negate", like=p.node("o"))
    assert str(info(new).type) == "f32[B, S, 6]"
    assert info(new).made_by == "negate"
    refresh_segments(p)
    assert new.name in p.segments[-1].nodes
    verify(p)


def test_emit_refuses_what_the_shape_rule_refuses(toy: Callable[..., Program]) -> None:
    p = toy()
    with pytest.raises(ModelError, match="inner size"):
        p.emit("aten.linear.default", p.node("gate"), p.node("down"), before=p.output, made_by="t")
    with pytest.raises(ModelError, match="an op that llmc knows"):
        p.emit("aten.neg.defaults", p.node("gate"), before=p.output, made_by="t")


def test_parameters_come_and_go(toy: Callable[..., Program]) -> None:
    p = toy()
    before = p.weight_bytes()
    param = Param("extra", (3,), torch.bfloat16)
    node = p.add_param(param, torch.ones(3, dtype=torch.bfloat16), before=p.output)
    assert str(info(node).type) == "f32[3]"
    assert p.fetch("extra").dtype == torch.float32
    assert p.weight_bytes() == before + 6
    with pytest.raises(ModelError, match="twice"):
        p.add_param(param, None, before=p.output)
    assert p.prune() == ["extra"]
    assert "extra" not in p.params
    assert p.weight_bytes() == before


def test_pruning_follows_chains(toy: Callable[..., Program]) -> None:
    p = toy()
    p.output.args = (first(p, "aten.embedding.default"),)
    gone = p.prune()
    assert {"gate", "up", "down", "norm1"} <= set(gone)
    assert list(p.params) == ["embed"]


def test_pruning_from_a_node_leaves_the_rest(toy: Callable[..., Program]) -> None:
    p = toy()
    spare = p.add_param(Param("spare", (3,), torch.float32), torch.ones(3), before=p.output)
    unread = p.emit("aten.relu.default", p.node("up"), before=p.output, made_by="test")
    assert p.prune(unread) == [unread.name]
    assert {"spare", "up"} <= set(p.params)
    assert p.prune(spare) == ["spare"]
    assert "spare" not in p.params
    verify(p)


def test_nodes_are_found_after_a_rename_and_an_erasure(toy: Callable[..., Program]) -> None:
    p = toy()
    gated = first(p, "llmc.gated")
    old = gated.name
    assert p.node(old) is gated
    set_name(gated, "other")
    assert p.node("other") is gated
    with pytest.raises(ModelError, match=old):
        p.node(old)
    spare = p.emit("aten.relu.default", p.node("other"), before=p.output, made_by="test")
    name = spare.name
    assert p.node(name) is spare
    p.prune(spare)
    with pytest.raises(ModelError, match=name):
        p.node(name)
    assert p.clone().node("other") is not gated


def test_clone_is_independent(toy: Callable[..., Program]) -> None:
    p = toy()
    want = run(p, IDS)
    q = p.clone()
    q.set_tensor("gate", torch.zeros(6, 8))
    q.graph.erase_node(q.output)
    q.facts["rope"]["base"] = 1.0
    verify(p)
    assert torch.equal(run(p, IDS), want)
    assert p.facts["rope"] == {"base": 1e4}


def test_overlay_leaves_the_source_alone(toy: Callable[..., Program]) -> None:
    source = toy().weights
    p = toy()
    p.weights = DictWeights({}, source)
    p.set_tensor("gate", torch.zeros(4, 8))
    assert p.params["gate"].shape == (4, 8)
    assert source.load("gate").shape == (6, 8)


def test_missing_names_say_so(toy: Callable[..., Program]) -> None:
    p = toy()
    for ask in (p.node, p.param_node, p.weights.load):
        with pytest.raises(ModelError, match="nobody"):
            ask("nobody")
    with pytest.raises(ModelError, match="tensor value"):
        tensor_type(first(p, "aten.sym_size.int"))


def test_sizes_are_read_off_the_inputs(toy: Callable[..., Program]) -> None:
    assert sizes(toy(), IDS) == {"B": 2, "S": 3}


def test_inputs_are_named(toy: Callable[..., Program]) -> None:
    p = toy()
    with pytest.raises(ModelError, match="input_idz"):
        run(p, {"input_idz": IDS["input_ids"]})
    with pytest.raises(ModelError, match="position_ids"):
        run(p, {"input_ids": IDS["input_ids"]})


def test_values_are_dropped_after_their_last_use(toy: Callable[..., Program]) -> None:
    p = toy()
    nodes = [n for n in p.graph.nodes if n.op != "output"]
    env: dict[Any, Any] = {p.node(k): v for k, v in IDS.items()}
    run_nodes(nodes, env, p.fetch, keep=[nodes[-1]])
    assert set(env) == {nodes[-1], *p.inputs}


def test_a_target_may_replace_a_node(toy: Callable[..., Program]) -> None:
    p = toy()
    gated = first(p, "llmc.gated")
    seen: list[str] = []
    zero = run(
        p, IDS, implementations={gated.name: lambda g, u, *, act: g * 0},
        observe=lambda n, v: seen.append(n.name),
    )  # fmt: skip
    assert gated.name in seen
    assert not torch.equal(zero, run(p, IDS))


def test_gradients_flow_to_every_parameter(toy: Callable[..., Program]) -> None:
    p = toy()
    leaves = {n: p.fetch(n).clone().requires_grad_() for n in p.params}
    run(p, IDS, fetch=leaves.__getitem__).square().sum().backward()
    assert all(t.grad is not None and bool(t.grad.abs().sum() > 0) for t in leaves.values())


def test_cost_of_a_linear(toy: Callable[..., Program]) -> None:
    p = toy()
    head = p.output.args[0]
    flops, moved = cost(head)  # type: ignore[arg-type]
    assert same(flops, 2 * 8 * 11 * BATCH * SEQ)
    assert same(moved, 4 * (8 * BATCH * SEQ + 11 * BATCH * SEQ + 88))


# ** rows **


def test_one_row_per_op() -> None:
    with pytest.raises(ModelError, match="second one"):
        register(ROWS["aten.add.Tensor"])
    assert row_for(torch.ops.aten.from_file.default) is None


def test_an_op_without_a_row_is_refused(toy: Callable[..., Program]) -> None:
    p = toy()
    node = first(p, "llmc.gated")
    node.target = torch.ops.aten.fft_fft.default
    with pytest.raises(ModelError, match="fft"):
        row_of(node)


def test_arguments_that_fit_no_rule_are_refused_with_the_node(toy: Callable[..., Program]) -> None:
    p = toy()
    node = first(p, "llmc.gated")
    node.args = (3,)
    with pytest.raises(ModelError, match=f"node {node.name}"):
        infer(node)


@pytest.mark.parametrize("name", [n for n in ROWS if n.startswith(("aten.", "llmc."))])
def test_no_row_writes_into_its_arguments(name: str) -> None:
    assert not ROWS[name].target._schema.is_mutable  # type: ignore[attr-defined]


LLMC = [
    pytest.param(r, a, k, id=f"{r.name}-{i}")
    for r in ROWS.values()
    if r.name.startswith("llmc.") and r.samples is not None
    for i, (a, k) in enumerate(r.samples())
]


@pytest.mark.parametrize(("row", "args", "kwargs"), LLMC)
def test_fake_kernel_gives_the_shape_of_the_real_one(row: OpRow, args: Any, kwargs: Any) -> None:
    real = row.target(*args, **kwargs)
    with FakeTensorMode() as mode:
        fakes = tree_map_only(torch.Tensor, mode.from_tensor, list(args))
        fake = row.target(*fakes, **kwargs)
    assert (fake.shape, fake.dtype) == (real.shape, real.dtype)


def test_llmc_ops_export_with_symbolic_sizes() -> None:
    class Toy(torch.nn.Module):
        def forward(self, x: torch.Tensor) -> torch.Tensor:
            q = torch.ops.llmc.rms_norm(x, None, eps=1e-5).unflatten(-1, (2, 4)).transpose(1, 2)
            return torch.ops.llmc.attention(q, q, q, scale=0.5).flatten(2)

    dims = {0: torch.export.Dim("B", min=1, max=64), 1: torch.export.Dim("S", min=2, max=64)}
    x = torch.randn(2, 5, 8)
    ep = torch.export.export(Toy(), (x,), dynamic_shapes=(dims,), strict=False)
    calls = [n for n in ep.graph.nodes if n.op == "call_function" and row_for(n.target) is not None]
    assert {row_of(n).name for n in calls} >= {"llmc.rms_norm", "llmc.attention"}
    y = torch.randn(3, 7, 8)
    torch.testing.assert_close(ep.module()(y), Toy()(y))


def test_types_print_short() -> None:
    assert str(TensorType((BATCH, 3), torch.bfloat16)) == "bf16[B, 3]"
    assert str(SymType(SEQ)) == "int(S)"
