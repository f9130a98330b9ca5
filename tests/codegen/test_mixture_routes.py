"""Routes of other kinds: their words, how they are read from graphs, and what is just no such."""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import replace

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from lowering_programs import hidden
from mixture_programs import CHOSEN, COUNT, HIDDEN, Layers, layer, oracle
from torch import fx

from llmc.codegen.fuse import FEATURES, FusePlan, fuse
from llmc.codegen.kernels import row
from llmc.codegen.mixture.choice import Choice, choose, read_choice
from llmc.codegen.problem import Problem
from llmc.compiler.ir.graph import Program
from llmc.compiler.ir.interpret import run

WORDS = (
    "sigmoid", "sigmoid sum", "softmax times=2.5", "sigmoid added sum+1e-20",
    "sigmoid added times=0.5", "softmax added sum>1e-12", "softmax groups=2:1:max times=2.5",
    "sigmoid added groups=2:1:two sum+1e-20 times=2.5", "softmax added groups=4:3:max sum",
)  # fmt: skip


def fused(program: Program) -> FusePlan:
    return fuse(program, lambda p: None if p.routed else "expected experts", FEATURES)


def value(program: Program) -> torch.Tensor:
    out: torch.Tensor = run(program, {"h": hidden(torch.float64, HIDDEN)})
    return out


# ** words **


CHOICES = st.builds(
    Choice, score=st.sampled_from(["softmax", "sigmoid"]), added=st.booleans(),
    times=st.sampled_from([1.0, 2.5, 1e-3, 16.0]), sum=st.booleans(), wide=st.booleans(),
)  # fmt: skip


@given(
    CHOICES, st.sampled_from([(0, 0, ""), (8, 4, "two"), (4, 1, "max")]),
    st.sampled_from([(0.0, 0.0), (1e-20, 0.0), (0.0, 1e-12)]),
)  # fmt: skip
def test_words_say_a_choice(
    choice: Choice, groups: tuple[int, int, str], whole: tuple[float, float]
) -> None:
    """What is written is read again, and is one word for each thing that is done."""
    count, kept, by = groups
    eps, least = whole if choice.sum else (0.0, 0.0)
    choice = replace(choice, groups=count, kept=kept, by=by, eps=eps, least=least)
    assert read_choice(str(choice)) == choice
    done = [choice.added, count, choice.sum, choice.times != 1, choice.wide]
    assert len(str(choice).split()) == 1 + sum(map(bool, done))


@pytest.mark.parametrize(
    "text",
    ["relu", "softmax ", "sum", "softmax sum added", "sigmoid groups=8:4", "sigmoid groups=8:4:all",
     "softmax sum+", "softmax sum+x", "softmax sum>-1.0", "softmax sum+inf", "sigmoid times=nan",
     "sigmoid times=1.0", "sigmoid times=2.50", "softmax groups=08:4:max"],
)  # fmt: skip
def test_other_words_say_none(text: str) -> None:
    assert read_choice(text) is None


def test_none_is_said_by_no_word() -> None:
    assert read_choice("") == Choice()
    assert str(Choice()) == ""


UP = Problem(8 * 64, 128, routed="up", pairs="gate", act="silu", experts=8, chosen=2)


@pytest.mark.parametrize(
    ("route", "words"),
    [
        ("relu", "softmax or sigmoid"),
        ("sigmoid groups=3:1:max", "groups of one or more experts, as many in each, of 8"),
        ("sigmoid groups=8:4:two", "groups of two or more experts"),
        ("sigmoid groups=4:5:max", "groups kept among 4 that hold 2 experts"),
        ("sigmoid groups=8:1:max", "groups kept among 8 that hold 2 experts"),
        ("sigmoid groups=4:0:max", "groups kept among 4"),
    ],
)
def test_rows_refuse_routes_by_field(route: str, words: str) -> None:
    near = replace(UP, route="sigmoid groups=4:1:two")
    assert row("w4a16").misfits(near) == []
    found = row("w4a16").misfits(replace(UP, route=route))
    assert [m.field for m in found] == ["route"]
    assert words in str(found[0])


# ** meaning **


def test_a_choice_by_hand() -> None:
    """Two groups of three: the second has the two best together, the first the best alone; what is
    added chooses, and does not weigh."""
    scores = torch.tensor([[0.9, 0.1, 0.2, 0.6, 0.7, 0.3]], dtype=torch.float64)
    products = scores.logit()
    by: Callable[..., tuple[torch.Tensor, torch.Tensor]] = choose
    two = Choice("sigmoid", groups=2, kept=1, by="two", sum=True, eps=0.7, times=2.0)
    index, weight = by(two, products, 2)
    assert index.tolist() == [[4, 3]]
    torch.testing.assert_close(weight, torch.tensor([[0.7, 0.6]]).double())
    most = replace(two, by="max", eps=0.0, times=1.0)
    index, weight = by(most, products, 2)
    assert index.tolist() == [[0, 2]]
    torch.testing.assert_close(weight, torch.tensor([[9 / 11, 2 / 11]]).double())
    added = Choice("sigmoid", added=True, sum=True, least=4.0)
    index, weight = by(added, products, 2, torch.tensor([-1.0, 0, 0, 0, 0, 1.0]))
    assert index.tolist() == [[5, 4]]
    torch.testing.assert_close(weight, torch.tensor([[0.3 / 4, 0.7 / 4]]).double())


# ** read from graphs **


@pytest.mark.parametrize("words", WORDS)
def test_a_route_is_read_by_what_it_does(words: str) -> None:
    """One call in place of all, which says the words; they mean the same in fp64."""
    program = layer(torch.float64, kind=words)
    before = value(program)
    plan = fused(program)
    (one,) = plan.mixtures
    assert [r for r in plan.refused if r.predicate != "kernel"] == []
    assert (one.up.route, one.up.norm, one.told) == (words, True, ())
    assert torch.equal(value(program), before)
    for op in ("aten.topk.default", "aten.gather.default", "aten.scatter.value"):
        assert not list(program.calls(op))
    up, down = one.canonical(program, wide=torch.float64)
    assert ("correction" in up) is (" added" in words)
    x = hidden(torch.float64, HIDDEN)
    torch.testing.assert_close(oracle(one, up, down, x, x), before, rtol=1e-12, atol=1e-12)


@pytest.mark.parametrize(("stored", "wide"), [(torch.bfloat16, False), (torch.float32, True)])
def test_a_router_in_fp32_is_read_through_casts(stored: torch.dtype, wide: bool) -> None:
    """Of a layer in bf16: what is cast before it and behind it comes in too. A router in bf16 that
    is only cast is kept as it is; one in fp32 is not rounded."""
    m = Layers(torch.bfloat16)
    h = m.input("h", HIDDEN)
    flat = m.flat(m.normed(h))
    cast = m.call("aten.to.dtype", flat, torch.float32)
    values = torch.randn(COUNT, HIDDEN, generator=m.generator).to(stored)
    router = m.param("router", values, keep=wide)
    router = router if wide else m.call("aten.to.dtype", router, torch.float32)
    scores = m.call("aten.sigmoid.default", m.call("aten.linear.default", cast, router))
    top = m.call("aten.topk.default", scores, CHOSEN)
    weight, index = (m.call("operator.getitem", top, i) for i in (0, 1))
    y = m.experts(flat, index, m.call("aten.to.dtype", weight, torch.bfloat16))
    program = m.output(m.call("aten.add.Tensor", h, m.back(y, h)))
    x = hidden(torch.bfloat16, HIDDEN)
    before = run(program, {"h": x})
    (one,) = fused(program).mixtures
    assert (one.up.route, one.up.norm) == ("sigmoid wide" if wide else "sigmoid", True)
    assert torch.equal(run(program, {"h": x}), before)
    assert one.canonical(program)[0]["router"].dtype == stored


class Near(Layers):
    """Routes with one thing that is unlike what a kernel knows."""

    def scores(self, flat: fx.Node, name: str = "router") -> fx.Node:
        found = self.call("aten.linear.default", flat, self.param(name, (COUNT, HIDDEN)))
        return self.call("aten.sigmoid.default", found)

    def added(self, scores: fx.Node, shape: tuple[int, ...] = (COUNT,)) -> fx.Node:
        return self.call("aten.add.Tensor", scores, self.param("correction", shape))

    def picked(self, wanted: fx.Node, scores: fx.Node) -> tuple[fx.Node, fx.Node]:
        top = self.call("aten.topk.default", wanted, CHOSEN)
        index = self.call("operator.getitem", top, 1)
        return index, self.call("aten.gather.default", scores, 1, index)

    def weighed(self, flat: fx.Node) -> tuple[fx.Node, fx.Node]:
        wanted = self.added(self.scores(flat))
        return self.picked(wanted, wanted)

    def largest(self, flat: fx.Node) -> tuple[fx.Node, fx.Node]:
        top = self.call("aten.topk.default", self.added(self.scores(flat)), CHOSEN)
        weight, index = (self.call("operator.getitem", top, i) for i in (0, 1))
        return index, weight

    def another(self, flat: fx.Node) -> tuple[fx.Node, fx.Node]:
        return self.picked(self.added(self.scores(flat)), self.scores(flat, "other"))

    def computed(self, flat: fx.Node) -> tuple[fx.Node, fx.Node]:
        scores = self.scores(flat)
        more = self.call("aten.linear.default", flat, self.param("more", (COUNT, HIDDEN)))
        return self.picked(self.call("aten.add.Tensor", scores, more), scores)

    def one_number(self, flat: fx.Node) -> tuple[fx.Node, fx.Node]:
        scores = self.scores(flat)
        return self.picked(self.added(scores, (1,)), scores)

    def filled(self, flat: fx.Node) -> tuple[fx.Node, fx.Node]:
        scores = self.scores(flat)
        how = Choice("sigmoid", groups=2, kept=1, by="two")
        return self.picked(self.grouped(self.added(scores), how, 0.0), scores)

    def few(self, flat: fx.Node) -> tuple[fx.Node, fx.Node]:
        scores = self.scores(flat)
        how = Choice("sigmoid", groups=4, kept=1, by="max")
        return self.picked(self.grouped(scores, how), scores)

    def whole(self, flat: fx.Node) -> tuple[fx.Node, fx.Node]:
        """Groups by the sum of all their scores."""
        scores = self.scores(flat)
        index, weight = self.picked(self.grouped(scores, Choice("sigmoid", False, 2, 1, "two")),
                                    scores)  # fmt: skip
        (total,) = self.program.calls("aten.sum.dim_IntList")
        (parts,) = (n for n in self.program.calls("aten.reshape.default")
                    if n.args[1] == [-1, 2, 2] and n.args[0] is scores)  # fmt: skip
        total.replace_input_with(total.args[0], parts)  # type: ignore[arg-type]
        return index, weight

    def unlike(self, flat: fx.Node) -> tuple[fx.Node, fx.Node]:
        """Groups that are kept by something else than a mask of ones."""
        scores = self.scores(flat)
        found = self.picked(self.grouped(scores, Choice("sigmoid", False, 2, 1, "max")), scores)
        (call,) = self.program.calls("aten.scatter.value")
        call.args = (*call.args[:3], 2)
        return found

    def negative(self, flat: fx.Node) -> tuple[fx.Node, fx.Node]:
        index, weight = self.picked(scores := self.scores(flat), scores)
        total = self.call("aten.sum.dim_IntList", weight, [-1], True)
        total = self.call("aten.add.Tensor", total, -0.5)
        return index, self.call("aten.div.Tensor", weight, total)

    def at_most(self, flat: fx.Node) -> tuple[fx.Node, fx.Node]:
        index, weight = self.picked(scores := self.scores(flat), scores)
        total = self.call("aten.sum.dim_IntList", weight, [-1], True)
        total = self.call("aten.clamp.default", total, 0.5, 1.0)
        return index, self.call("aten.div.Tensor", weight, total)

    def softened(self, flat: fx.Node) -> tuple[fx.Node, fx.Node]:
        """A softmax over sigmoids that were chosen."""
        top = self.call("aten.topk.default", self.added(self.scores(flat)), CHOSEN)
        weight, index = (self.call("operator.getitem", top, i) for i in (0, 1))
        return index, self.call("aten.softmax.int", weight, -1)


NEAR = {
    "weighed": "weighed by other scores than they are chosen by",
    "largest": "weighed by other scores than they are chosen by",
    "another": "weighed by other scores than they are chosen by",
    "computed": "not a number stored for each", "one_number": "not a number stored for each",
    "filled": "filled with 0", "few": "groups kept among 4 that hold 2 experts",
    "whole": "neither scored by their largest nor by their two",
    "unlike": "leaves experts out in a way that no kernel knows",
    "negative": "divided by something but their sum",
    "at_most": "divided by something but their sum",
    "softened": "weighed by other scores than they are chosen by",
}  # fmt: skip


@pytest.mark.parametrize("what", NEAR)
def test_routes_that_are_just_no_such_stay_in_the_graph(what: str) -> None:
    """The kernels are told, and a sentence says what is unlike."""
    m = Near(torch.float64)
    h = m.input("h", HIDDEN)
    flat = m.flat(m.normed(h))
    y = m.experts(flat, *getattr(m, what)(flat))
    program = m.output(m.call("aten.add.Tensor", h, m.back(y, h)))
    before = value(program)
    assert math.isfinite(float(before.sum()))
    plan = fused(program)
    (one,) = plan.mixtures
    assert (one.up.route, len(one.told), one.down.residual) == ("", 2, True)
    (why,) = [r for r in plan.refused if r.predicate == "route"]
    assert NEAR[what] in why.reason
    torch.testing.assert_close(value(program), before, rtol=0, atol=0)
