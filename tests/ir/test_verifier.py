"""Hand-broken programs, each refused by the rule that it breaks."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from typing import Any

import pytest
import torch

from llmc.compiler.ir.caches import CacheScheme
from llmc.compiler.ir.dims import BATCH, SEQ, symbol
from llmc.compiler.ir.errors import VerifierError
from llmc.compiler.ir.exits import Exits
from llmc.compiler.ir.graph import Info, Param, Program, State, info
from llmc.compiler.ir.types import TensorType
from llmc.compiler.ir.verifier import RULES, verify

Break = Callable[[Program], None]
BROKEN: dict[str, tuple[str, Break]] = {}


def breaks(rule: str) -> Callable[[Break], Break]:
    def add(f: Break) -> Break:
        BROKEN[f.__name__] = (rule, f)
        return f

    return add


def first(p: Program, op: str) -> Any:
    return next(p.calls(op))


def retype(node: Any, t: Any) -> None:
    node.meta["llmc"] = replace(info(node), type=t)


@breaks("lint")
def use_before_definition(p: Program) -> None:
    p.output.prepend(first(p, "aten.embedding.default"))


@breaks("lint")
def value_of_another_graph(p: Program) -> None:
    other = p.clone()
    first(p, "aten.embedding.default").args = (other.param_node("embed"), p.inputs[0])


@breaks("lint")
def two_nodes_of_one_name(p: Program) -> None:
    first(p, "llmc.gated").name = p.inputs[0].name


@breaks("lint")
def module_call(p: Program) -> None:
    with p.graph.inserting_before(p.output):
        p.graph.create_node("call_module", "model.norm1")


@breaks("lint")
def input_with_default(p: Program) -> None:
    p.inputs[1].args = (0,)


@breaks("users")
def stale_user(p: Program) -> None:
    p.inputs[0].users[p.output] = None


@breaks("users")
def missing_user(p: Program) -> None:
    p.param_node("gate").users.clear()


@breaks("record")
def node_without_record(p: Program) -> None:
    del first(p, "llmc.gated").meta["llmc"]


@breaks("record")
def node_without_type(p: Program) -> None:
    retype(first(p, "llmc.gated"), None)


@breaks("row")
def unknown_op(p: Program) -> None:
    first(p, "llmc.gated").target = torch.ops.aten.fft_fft.default


@breaks("output")
def no_output(p: Program) -> None:
    p.graph.erase_node(p.output)


@breaks("output")
def two_outputs(p: Program) -> None:
    p.graph.output(p.inputs[0]).meta["llmc"] = Info(None)


@breaks("output")
def literal_result(p: Program) -> None:
    p.output.args = (3,)


@breaks("output")
def wrong_result_type(p: Program) -> None:
    retype(p.output, TensorType((BATCH, SEQ, 12), torch.float32))


@breaks("params")
def parameter_without_node(p: Program) -> None:
    p.params["loose"] = Param("loose", (2,), torch.float32)


@breaks("params")
def node_without_parameter(p: Program) -> None:
    del p.params["gate"]


@breaks("params")
def two_nodes_of_one_parameter(p: Program) -> None:
    node = p.param_node("gate")
    with p.graph.inserting_after(node):
        again = p.graph.create_node("get_attr", "gate")
    again.meta["llmc"] = info(node)


@breaks("params")
def parameter_of_another_shape(p: Program) -> None:
    p.params["gate"] = replace(p.params["gate"], shape=(6, 7))


@breaks("params")
def parameter_kept_in_another_dtype(p: Program) -> None:
    p.params["gate"] = replace(p.params["gate"], dtype=torch.bfloat16, keep=True)


@breaks("params")
def parameter_under_another_name(p: Program) -> None:
    p.params["gate"] = replace(p.params["gate"], name="up")


@breaks("params")
def parameter_of_symbolic_shape(p: Program) -> None:
    p.params["gate"] = replace(p.params["gate"], shape=(6, symbol("S")))
    retype(p.param_node("gate"), TensorType((6, symbol("S")), torch.float32))


@breaks("tie")
def one_storage_twice(p: Program) -> None:
    p.set_tensor("up", p.weights.load("gate"))


@breaks("tie")
def one_source_name_twice(p: Program) -> None:
    p.params["up"] = replace(p.params["up"], names=p.params["gate"].names)


@breaks("dtype")
def computing_in_integers(p: Program) -> None:
    p.dtype = torch.int32
    for name in p.params:
        retype(p.param_node(name), p.param_type(p.params[name]))


@breaks("dtype")
def input_that_is_a_tuple(p: Program) -> None:
    retype(p.inputs[1], (info(p.inputs[1]).type,))


@breaks("type")
def wrong_dtype(p: Program) -> None:
    retype(first(p, "llmc.gated"), TensorType((BATCH, SEQ, 6), torch.float16))


@breaks("type")
def wrong_size(p: Program) -> None:
    retype(first(p, "llmc.gated"), TensorType((BATCH, SEQ, 7), torch.float32))


@breaks("type")
def batch_and_sequence_swapped(p: Program) -> None:
    retype(first(p, "llmc.gated"), TensorType((SEQ, BATCH, 6), torch.float32))


@breaks("type")
def weights_that_do_not_fit(p: Program) -> None:
    gate = next(u for u in p.param_node("gate").users)
    gate.args = (gate.args[0], p.param_node("norm1"))


@breaks("type")
def literal_that_does_not_divide(p: Program) -> None:
    node = first(p, "aten.reshape.default")
    node.args = (node.args[0], [*node.args[1][:2], 3, 4])


@breaks("type")
def heads_that_do_not_divide(p: Program) -> None:
    node = first(p, "llmc.attention")
    q, k, _, *rest = node.args
    node.args = (k, q, q, *rest)


@breaks("symbols")
def size_that_depends_on_data(p: Program) -> None:
    retype(p.inputs[1], TensorType((BATCH, symbol("S") + symbol("U")), torch.int64))
    first(p, "llmc.attention").args = first(p, "llmc.attention").args[:3]


@breaks("segments")
def node_outside_segments(p: Program) -> None:
    last = p.segments[-1]
    p.segments[-1] = replace(last, nodes=last.nodes[1:])


@breaks("segments")
def node_in_two_segments(p: Program) -> None:
    a, b = p.segments[:2]
    p.segments[1] = replace(b, nodes=(a.nodes[-1], *b.nodes))


@breaks("segments")
def stale_segments(p: Program) -> None:
    node = first(p, "llmc.gated")
    node.name = "gated_of_another_pass"


@breaks("segments")
def wrong_live_in(p: Program) -> None:
    p.segments[1] = replace(p.segments[1], live_in=p.segments[1].live_in[1:])


@breaks("segments")
def wrong_live_out(p: Program) -> None:
    p.segments[1] = replace(p.segments[1], live_out=())


@breaks("segments")
def segments_of_one_name(p: Program) -> None:
    p.segments[1] = replace(p.segments[1], name="prologue")


@breaks("states")
def state_without_node(p: Program) -> None:
    p.states["kv9"] = State("kv9", "kv", ())


@breaks("exits")
def exit_behind_no_segment(p: Program) -> None:
    p.exits = Exits("softmax", ("block9",), 0.5)


@breaks("caches")
def record_of_no_attention(p: Program) -> None:
    p.caches = {"nobody": CacheScheme("int8", 8)}


@pytest.mark.parametrize("name", BROKEN)
def test_broken_graph_is_refused_by_name(name: str, toy: Callable[..., Program]) -> None:
    rule, harm = BROKEN[name]
    program = toy()
    verify(program)
    harm(program)
    with pytest.raises(VerifierError) as e:
        verify(program)
    assert e.value.rule == rule


# ** state **


def another_state(p: Program) -> None:
    node = first(p, "llmc.cached_attention")
    node.kwargs = {**node.kwargs, "state": "kv1"}


def undeclared_state(p: Program) -> None:
    p.states.clear()


def shared_state(p: Program) -> None:
    node = first(p, "llmc.cached_attention")
    p.emit("llmc.cached_attention", *node.args, before=node, made_by="test", **node.kwargs)
    p.segments = []


def state_of_another_head_size(p: Program) -> None:
    t = TensorType((BATCH, 1, symbol("P"), 5), torch.float32)
    p.states["kv0"] = State("kv0", "kv", (t, t))


def state_without_past(p: Program) -> None:
    t = TensorType((BATCH, 1, SEQ, 4), torch.float32)
    p.states["kv0"] = State("kv0", "kv", (t, t))


@pytest.mark.parametrize(
    "harm",
    [another_state, undeclared_state, shared_state, state_of_another_head_size, state_without_past],
)
def test_broken_state_is_refused(harm: Break, toy: Callable[..., Program]) -> None:
    program = toy(cached=True)
    verify(program)
    harm(program)
    with pytest.raises(VerifierError) as e:
        verify(program)
    assert e.value.rule == "states"


def test_every_rule_has_a_broken_graph() -> None:
    assert {rule for rule, _ in BROKEN.values()} == {name for name, _ in RULES}
