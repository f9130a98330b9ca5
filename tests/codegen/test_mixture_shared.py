"""An expert that all tokens go to, as more experts of the same two launches."""

from __future__ import annotations

from dataclasses import asdict, replace
from typing import Any

import pytest
import torch
from lowering_programs import Weight, hidden
from mixture_programs import CHOSEN, COUNT, HIDDEN, INNER, Layers, oracle
from torch import fx

from llmc.codegen.fuse import FEATURES, FusePlan, fuse
from llmc.codegen.kernels import choose as choose_row
from llmc.codegen.kernels import row
from llmc.codegen.mixture.choice import Choice, choose, read_choice
from llmc.codegen.problem import Problem
from llmc.compiler.cli.kernels import scheme_text
from llmc.compiler.ir.graph import Program
from llmc.compiler.ir.interpret import run

WEIGHTS: dict[str, dict[str, Any]] = {
    "codes": {}, "zero points": {"asym": True}, "one scale a row": {"group": 0},
    "groups of both parts": {"group": 64}, "2:4": {"sparse": True}, "eight bits": {"bits": 8},
    "dense": {"dense": True},
}  # fmt: skip


class Shared(Layers):
    """h + (experts(norm h) + one that all tokens go to)."""

    def one(self, read: fx.Node, width: int, like: dict[str, Any], how: str) -> fx.Node:
        """Of some width, stored as ``like``; "whole": gate and up are one matrix."""
        dense = like.get("dense", False)

        def linear(x: fx.Node, name: str, rows: int, columns: int) -> fx.Node:
            if dense:
                return self.call("aten.linear.default", x, self.param(name, (rows, columns)))
            return self.linear(x, name, Weight(rows, columns, **like))

        if how == "whole":
            both = linear(read, "both", 2 * width, HIDDEN)
            cuts = ((0, width), (width, 2 * width))
            halves = [self.call("aten.slice.Tensor", both, -1, *cut) for cut in cuts]
        else:
            halves = [linear(read, name, width, HIDDEN) for name in ("gate", "inner")]
        act = "relu" if how == "other act" else "silu"
        inner = self.call("llmc.gated", *halves, act=act)
        y = linear(inner, "outer", HIDDEN, width)
        if how in ("weighed", "weighed the other way"):
            gate = self.call("aten.linear.default", read, self.param("weigher", (1, HIDDEN)))
            gate = self.call("aten.sigmoid.default", gate)
            y = self.call("aten.mul.Tensor", *((gate, y) if how == "weighed" else (y, gate)))
        if how == "read twice":
            self.more.append(self.call("aten.sum.dim_IntList", inner, [-1]))
        return y

    def build(
        self, count: int, like: dict[str, Any], how: str = "", kind: str = "softmax sum",
        theirs: dict[str, Any] | None = None, width: int = 0,
    ) -> Program:  # fmt: skip
        self.more: list[fx.Node] = []
        h = self.input("h", HIDDEN)
        norm = self.normed(h)
        flat = self.flat(norm)
        y = self.experts(flat, *self.route(flat, kind), **(like if theirs is None else theirs))
        late = how == "norm itself"  # read before it is flat, added behind the reshape
        one = self.one(norm if late else flat, width or count * INNER, like, how)
        y = self.call("aten.add.Tensor", one, self.back(y, h) if late else y)
        y = y if late else self.back(y, h)
        return self.output(self.call("aten.add.Tensor", h, y), *self.more)


def fused(program: Program) -> FusePlan:
    """By a target that has kernels for mixtures and none for linears."""
    return fuse(program, lambda p: None if p.routed else "expected experts", FEATURES)


def value(program: Program) -> Any:
    return run(program, {"h": hidden(torch.float64, HIDDEN)})


@pytest.mark.parametrize("how", ["", "whole", "weighed", "weighed the other way", "norm itself"])
@pytest.mark.parametrize("count", [1, 2])
@pytest.mark.parametrize("weights", WEIGHTS)
def test_it_becomes_more_experts(weights: str, count: int, how: str) -> None:
    """One call, of the same bits in fp64, and two problems that mean it by canonical parts."""
    program = Shared(torch.float64).build(count, WEIGHTS[weights], how)
    before = value(program)
    plan = fused(program)
    (one,) = plan.mixtures
    assert plan.refused == ()
    assert plan.fused == ()
    assert [n.name for n in program.calls("llmc.fused")] == [one.node]
    assert torch.equal(value(program), before)
    sizes = (one.up.experts, one.up.chosen, one.up.always, one.down.always)
    assert sizes == (COUNT + count, CHOSEN + count, count, count)
    assert one.up.route == "softmax sum" + " gated" * how.startswith("weighed")
    assert (one.up.norm, one.down.residual, one.residual) == (True, True, "a0")
    assert (2 * INNER * (COUNT + count), HIDDEN * (COUNT + count)) == (one.up.N, one.down.N)
    up, down = one.canonical(program, wide=torch.float64)
    x = hidden(torch.float64, HIDDEN)
    torch.testing.assert_close(oracle(one, up, down, x, x), before, rtol=1e-12, atol=1e-12)


@pytest.mark.parametrize(
    ("how", "like", "theirs", "width", "words"),
    [
        ("", {}, {}, INNER + INNER // 2, "no multiple of the 32 of an expert"),
        ("", {"bits": 8}, {}, 0, "its bits is 8, theirs 4"),
        ("", {"group": 16}, {}, 0, "its group is 16, theirs 32"),
        ("", {"asym": True}, {}, 0, "its asym is True, theirs none"),
        ("", {"dense": True}, {}, 0, "its weights is dense, theirs int"),
        ("other act", {}, {}, 0, "its activation is relu, theirs silu"),
        ("read twice", {}, {}, 0, "is also read by"),
    ],
)
def test_another_expert_stays_apart(
    how: str, like: dict[str, Any], theirs: dict[str, Any], width: int, words: str
) -> None:
    """With the reason; the mixture is what it is without."""
    program = Shared(torch.float64).build(2, like, how, theirs=theirs, width=width)
    before = value(program)
    plan = fused(program)
    (one,) = plan.mixtures
    (why,) = [r for r in plan.refused if r.predicate == "shared"]
    assert words in why.reason
    assert (one.up.experts, one.up.chosen, one.up.always) == (COUNT, CHOSEN, 0)
    after = value(program)
    pairs = zip(after, before, strict=True) if isinstance(after, tuple) else [(after, before)]
    for got, want in pairs:
        torch.testing.assert_close(got, want, rtol=1e-12, atol=1e-12)


def test_where_the_graph_chooses_it_stays_apart() -> None:
    """A kernel that is told its experts is told of those that were chosen."""
    program = Shared(torch.float64).build(1, {}, kind="tanh")
    plan = fused(program)
    assert [m.up.always for m in plan.mixtures] == [0]
    assert "route" in {r.predicate for r in plan.refused}
    (why,) = [r for r in plan.refused if r.predicate == "shared"]
    assert "the router of the others stays in the graph" in why.reason


def test_experts_of_all_tokens_stand_behind_those_chosen() -> None:
    """Weighed by 1, or by the sigmoid of the last product, whatever weighs the others."""
    products = torch.tensor([[1.0, 3.0, 2.0, -1.0], [0.0, -1.0, 5.0, 2.0]], dtype=torch.float64)
    for gated in (False, True):
        choice = Choice("softmax", sum=True, times=2.0, gated=gated)
        index, weight = choose(choice, products, 2, always=2)
        among = 3 if gated else 4
        plain = choose(Choice("softmax", sum=True, times=2.0), products[:, :among], 2)
        assert index[:, 2:].tolist() == [[among, among + 1]] * 2
        assert torch.equal(index[:, :2], plain[0])
        assert torch.equal(weight[:, :2], plain[1])
        last = products[:, 3:].sigmoid() if gated else torch.ones(2, 1, dtype=torch.float64)
        assert torch.equal(weight[:, 2:], last.expand(-1, 2))
        assert read_choice(str(choice)) == choice


UP = Problem(
    6 * 128, 256, routed="up", experts=6, chosen=4, always=2, route="softmax sum gated",
    pairs="gate", act="silu",
)  # fmt: skip


def test_a_listing_tells_those_chosen_from_those_of_all_tokens() -> None:
    assert scheme_text(asdict(UP)) == "w4 g128 2 of 4 experts + 2 for all tokens"
    assert scheme_text(asdict(replace(UP, always=0))).endswith("4 of 6 experts")


@pytest.mark.parametrize(
    ("change", "field"),
    [
        ({"always": 4}, "always"),
        ({"always": 0}, "always"),
        ({"always": -1}, "always"),
        ({"chosen": 7}, "chosen"),
        ({"route": "softmax groups=3:1:max gated"}, "route"),
        ({"experts": 0, "routed": "", "chosen": 0, "route": ""}, "always"),
    ],
)
def test_what_is_just_missed_is_refused_by_field(change: dict[str, Any], field: str) -> None:
    assert choose_row(UP)[0] is row("w4a16")
    found = row("w4a16").misfits(replace(UP, **change))
    assert field in [m.field for m in found]


def test_bytes_are_of_those_chosen_and_of_all_tokens() -> None:
    """The experts that all tokens go to are read once, however many tokens there are."""
    plain = Problem(64 * 512, 1024, routed="up", experts=64, chosen=2, pairs="gate", act="silu")
    more = Problem(
        66 * 512, 1024, routed="up", experts=66, chosen=4, always=2, pairs="gate", act="silu"
    )
    each = row("w4a16").bytes_moved(plain, 1) / 2
    assert row("w4a16").bytes_moved(more, 1) == pytest.approx(4 * each, rel=0.01)
    assert row("w4a16").bytes_moved(more, 8) == pytest.approx(18 * each, rel=0.02)
