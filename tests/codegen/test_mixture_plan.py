"""The planner on layers of experts: what becomes one call, what it means, and what is left out."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from lowering_programs import Weight, hidden
from mixture_programs import CHOSEN, COUNT, HIDDEN, INNER, Layers, layer, oracle
from torch import fx

from llmc.codegen.fuse import FEATURES, FusePlan, fuse
from llmc.codegen.problem import Problem
from llmc.compiler.ir.graph import Program
from llmc.compiler.ir.interpret import run

WEIGHTS: dict[str, dict[str, Any]] = {
    "codes": {}, "zero points": {"asym": True}, "one scale a row": {"group": 0},
    "2:4": {"sparse": True}, "eight bits": {"bits": 8}, "dense": {"dense": True},
}  # fmt: skip


def experts_only(problem: Problem) -> str | None:
    """A target that has kernels for mixtures and none for linears."""
    return None if problem.routed else "expected experts"


def fused(program: Program, accept: Callable[[Problem], str | None] = experts_only) -> FusePlan:
    return fuse(program, accept, FEATURES)


def value(program: Program, dtype: torch.dtype = torch.float64) -> Any:
    return run(program, {"h": hidden(dtype, HIDDEN)})


@pytest.mark.parametrize("kind", ["softmax", "softmax sum", "chosen"])
@pytest.mark.parametrize("weights", WEIGHTS)
def test_one_call_means_what_the_layer_meant(kind: str, weights: str) -> None:
    """The very same bits in fp64: its body spells the calls that it replaces."""
    program = layer(torch.float64, kind=kind, **WEIGHTS[weights])
    before = value(program)
    plan = fused(program)
    (one,) = plan.mixtures
    assert [r for r in plan.refused if r.predicate != "kernel"] == []
    assert torch.equal(value(program), before)
    assert [n.name for n in program.calls("llmc.fused")] == [one.node]
    for op in ("llmc.experts", "aten.topk.default", "llmc.rms_norm", "aten.reshape.default"):
        assert not list(program.calls(op))
    assert one.up.route == {"chosen": "softmax sum"}.get(kind, kind)
    shape = (one.up.experts, one.up.chosen, one.up.N, one.up.K, one.down.N, one.down.K)
    assert shape == (COUNT, CHOSEN, COUNT * 2 * INNER, HIDDEN, COUNT * HIDDEN, INNER)
    assert (one.up.norm, one.down.residual, one.residual) == (True, True, "a0")
    (segment,) = program.segments
    assert one.node in segment.nodes


@pytest.mark.parametrize("kind", ["softmax", "softmax sum", "chosen"])
@pytest.mark.parametrize("weights", WEIGHTS)
def test_two_problems_mean_what_the_body_means(kind: str, weights: str) -> None:
    """Canonical parts by the references of their rows, in fp64."""
    program = layer(torch.float64, kind=kind, **WEIGHTS[weights])
    before = value(program)
    (one,) = fused(program).mixtures
    up, down = one.canonical(program, wide=torch.float64)
    x = hidden(torch.float64, HIDDEN)
    torch.testing.assert_close(oracle(one, up, down, x, x), before, rtol=1e-12, atol=1e-12)


# ** what is left out **


def without(*names: str) -> Callable[[Problem], str | None]:
    """A target whose kernels for mixtures serve all but this."""

    def accept(problem: Problem) -> str | None:
        found = [n for n in names if getattr(problem, n)]
        if not problem.routed or found:
            return f"{found[0]} is there" if found else "expected experts"
        return None

    return accept


@pytest.mark.parametrize(
    ("names", "left", "told"),
    [
        (("residual",), ["residual"], 0),
        (("norm",), ["norm"], 0),
        (("norm", "residual"), ["residual", "norm"], 0),
        (("route",), ["norm", "route"], 2),
        (("route", "residual"), ["residual", "norm", "route"], 2),
    ],
)
def test_neighbours_are_left_out_one_by_one(
    names: tuple[str, ...], left: list[str], told: int
) -> None:
    """Each with the reason that the target gave; the value stays the same."""
    program = layer(torch.float64)
    before = value(program)
    plan = fused(program, without(*names))
    (one,) = plan.mixtures
    mine = [r for r in plan.refused if "with its experts" in r.reason]
    assert [r.reason.split()[1] for r in mine] == left
    assert all(f"{names[0]} is there" in r.reason or f"{names[-1]} is there" in r.reason
               for r in mine)  # fmt: skip
    assert (bool(one.up.route), len(one.told)) == (not told, told)
    assert one.up.norm is ("norm" not in left)
    assert one.down.residual is ("residual" not in left)
    torch.testing.assert_close(value(program), before, rtol=0, atol=0)


@pytest.mark.parametrize("field", ["pairs", "routed"])
def test_a_layer_that_no_kernel_serves_stays(field: str) -> None:
    """One refusal, with what the target said and of which product."""
    program = layer(torch.float64)
    before = value(program)
    plan = fused(program, without(field))
    assert plan.mixtures == ()
    (one,) = [r for r in plan.refused if "experts" in r.node]
    assert one.reason == f"gate and up of experts: {field} is there"
    assert one.predicate == "kernel"
    assert torch.equal(value(program), before)


def test_a_target_that_asks_for_no_mixtures_gets_none() -> None:
    program = layer(torch.float64)
    plan = fuse(program, experts_only, FEATURES - {"experts"})
    assert plan.mixtures == ()
    assert [r for r in plan.refused if "experts" in r.node] == []


def test_a_target_that_does_not_route_is_told() -> None:
    """As the CPU asks: nothing of the route is looked at, and nothing of it is refused."""
    program = layer(torch.float64)
    plan = fuse(program, experts_only, FEATURES - {"route"})
    (one,) = plan.mixtures
    assert len(one.told) == 2
    assert [r for r in plan.refused if r.predicate != "kernel"] == []


# ** near misses **


class Odd(Layers):
    """A layer with one thing that is unlike what a kernel knows."""

    def build(self, what: str) -> Program:
        h = self.input("h", HIDDEN)
        norm = self.normed(h)
        flat = self.flat(norm)
        index, weight = getattr(self, what, self.route)(flat)
        more: list[fx.Node] = []
        if what == "norm_read":
            more = [self.call("aten.sum.dim_IntList", norm, [-1], True)]
        if what == "logits_read":
            logits = next(iter(self.program.calls("aten.linear.default")))
            more = [logits]
        if what == "shared":
            up = self.param("few", (COUNT, 8, HIDDEN))
            down = self.stacked("down", HIDDEN, INNER, dense=False)
            left = self.param("left", (2 * INNER, 8))
            y = self.call("llmc.experts", flat, index, weight, up, down, left, act="silu")
        else:
            y = self.experts(flat, index, weight)
        if what == "twice":
            (one,) = self.program.calls("llmc.experts")
            again = self.call("llmc.experts", *one.args[:5], act="silu")
            y = self.call("aten.add.Tensor", y, again)
        if what == "result_read":
            more = [y]
        out = self.call("aten.add.Tensor", h, self.back(y, h))
        return self.output(out, *more) if more else self.output(out)

    def axis(self, flat: fx.Node) -> tuple[fx.Node, fx.Node]:
        found = self.call("aten.linear.default", flat, self.param("router", (COUNT, HIDDEN)))
        return self.picked(self.call("aten.softmax.int", found, 0))

    def tanh(self, flat: fx.Node) -> tuple[fx.Node, fx.Node]:
        found = self.call("aten.linear.default", flat, self.param("router", (COUNT, HIDDEN)))
        return self.picked(self.call("aten.tanh.default", found))

    def scaled(self, flat: fx.Node) -> tuple[fx.Node, fx.Node]:
        index, weight = self.route(flat)
        return index, self.call("aten.mul.Tensor", weight, self.param("by", (CHOSEN,)))

    def biased(self, flat: fx.Node) -> tuple[fx.Node, fx.Node]:
        router, bias = self.param("router", (COUNT, HIDDEN)), self.param("bias", (COUNT,))
        found = self.call("aten.linear.default", flat, router, bias)
        return self.picked(self.call("aten.softmax.int", found, -1))

    def smallest(self, flat: fx.Node) -> tuple[fx.Node, fx.Node]:
        found = self.call("aten.linear.default", flat, self.param("router", (COUNT, HIDDEN)))
        return self.picked(self.call("aten.softmax.int", found, -1), -1, False)

    def elsewhere(self, flat: fx.Node) -> tuple[fx.Node, fx.Node]:
        """The router reads another value than the experts."""
        return self.route(self.call("aten.mul.Tensor", flat, 2.0))

    def crossed(self, flat: fx.Node) -> tuple[fx.Node, fx.Node]:
        """Indices of one choice, weights of another."""
        index, _ = self.route(flat)
        found = self.call("aten.linear.default", flat, self.param("other", (COUNT, HIDDEN)))
        return index, self.picked(self.call("aten.softmax.int", found, -1))[1]

    def squared(self, flat: fx.Node) -> tuple[fx.Node, fx.Node]:
        """Divided by something that is not the sum of what was chosen."""
        index, weight = self.route(flat)
        total = self.call("aten.sum.dim_IntList", weight, [0], True)
        return index, self.call("aten.div.Tensor", weight, total)

    def picked(self, chances: fx.Node, *how: Any) -> tuple[fx.Node, fx.Node]:
        top = self.call("aten.topk.default", chances, CHOSEN, *how)
        weight, index = (self.call("operator.getitem", top, i) for i in (0, 1))
        return index, weight


ROUTES = {
    "axis": "goes over axis 0", "tanh": "chosen by aten.tanh.default", "biased": "a bias",
    "scaled": "from aten.mul.Tensor", "smallest": "others than the largest",
    "elsewhere": "between what experts read and their router",
    "crossed": "from different choices", "squared": "something but their sum",
}  # fmt: skip


@pytest.mark.parametrize("what", ROUTES)
def test_other_routes_stay_in_the_graph(what: str) -> None:
    """The kernels are told, and a sentence says what is unlike."""
    program = Odd(torch.float64).build(what)
    before = value(program)
    plan = fused(program)
    (one,) = plan.mixtures
    assert (one.up.route, len(one.told), one.down.residual) == ("", 2, True)
    (why,) = [r for r in plan.refused if r.predicate == "route"]
    assert ROUTES[what] in why.reason
    torch.testing.assert_close(value(program), before, rtol=0, atol=0)


def test_logits_that_somebody_reads_keep_the_router_outside() -> None:
    program = Odd(torch.float64).build("logits_read")
    plan = fused(program)
    (one,) = plan.mixtures
    assert one.up.route == ""
    (why,) = [r for r in plan.refused if r.predicate == "one_reader"]
    assert "of its router is also read by output" in why.reason


def test_a_norm_that_somebody_reads_stays_outside() -> None:
    """The router comes in all the same."""
    program = Odd(torch.float64).build("norm_read")
    before = value(program)
    plan = fused(program)
    (one,) = plan.mixtures
    assert (one.up.route, one.up.norm, one.down.residual) == ("softmax", False, True)
    (why,) = [r for r in plan.refused if r.predicate == "all_readers_fused"]
    assert "the norm is also read by sum" in why.reason
    for got, want in zip(value(program), before, strict=True):
        assert torch.equal(got, want)


def test_a_result_that_somebody_reads_keeps_the_sum_outside() -> None:
    program = Odd(torch.float64).build("result_read")
    before = value(program)
    (one,) = fused(program).mixtures
    assert (one.flat, one.residual, one.up.norm) == (True, "", True)
    for got, want in zip(value(program), before, strict=True):
        assert torch.equal(got, want)


@pytest.mark.parametrize(("what", "predicate"), [("shared", "shared"), ("twice", "one_reader")])
def test_weights_that_no_kernel_reads_are_refused(what: str, predicate: str) -> None:
    """A factor that all experts share; weights that two layers read."""
    program = Odd(torch.float64).build(what)
    before = value(program)
    plan = fused(program)
    assert plan.mixtures == ()
    assert {r.predicate for r in plan.refused if "experts" in r.node} == {predicate}
    assert torch.equal(value(program), before)


# ** beside an expert that all tokens go to **


@pytest.mark.parametrize("flat", [True, False])
def test_another_expert_of_all_tokens_takes_its_own_norm_and_sum(flat: bool) -> None:
    """(experts + shared) + h, where it is stored in another way, or is put in another shape within:
    each has one sum behind it and the norm before it, whichever shape of the norm the shared expert
    reads; nothing else is left."""
    m = Layers(torch.float64)
    h = m.input("h", HIDDEN)
    norm = m.normed(h)
    rows = m.flat(norm)
    y = m.back(m.experts(rows, *m.route(rows)), h)
    gate, up = (
        m.linear(rows if flat else norm, n, Weight(32, HIDDEN, bits=4 if flat else 8))
        for n in ("gate", "inner")
    )
    z = m.call("llmc.gated", gate, up, act="silu")
    shared = m.linear(m.back(z, h, 32) if flat else z, "outer", Weight(HIDDEN, 32))
    both = m.call("aten.add.Tensor", y, shared)
    program = m.output(m.call("aten.add.Tensor", h, both))
    before = value(program)
    plan = fused(program, lambda problem: None)
    (one,) = plan.mixtures
    first, last = plan.fused
    assert [r.predicate for r in plan.refused] == ([] if flat else ["shared"])
    assert (one.up.norm, one.down.residual, one.residual) == (True, True, "a0")
    assert (first.problem.norm, first.problem.pairs, last.problem.residual) == (True, "gate", True)
    assert not list(program.calls("llmc.rms_norm")) + list(program.calls("aten.add.Tensor"))
    torch.testing.assert_close(value(program), before, rtol=1e-12, atol=1e-12)
