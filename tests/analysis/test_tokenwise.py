"""The token-wise proof: what passes it is token-wise, what mixes tokens is named."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
from analysis_build import H, Stack, inputs, stack
from torch import fx

from llmc.compiler.analysis.blocks import apply_segments
from llmc.compiler.analysis.tokenwise import prove_tokenwise
from llmc.compiler.ir.graph import Program
from llmc.compiler.ir.interpret import run


@pytest.mark.parametrize(
    "program",
    [
        stack(["silu"] * 2),
        stack(["gelu"], norm="layer", bias=True),
        stack(["moe"]),
        stack(["relu"], tied=True, window=2),
        stack(["silu"], causal=False),
    ],
    ids=["gated", "layer", "moe", "window", "both ways"],
)
def test_proved_programs_are_tokenwise(program: Program) -> None:
    """No refusals; and a permutation of the tokens (with positions) permutes the logits."""
    apply_segments(program)
    assert prove_tokenwise(program) == []
    values = inputs(program, length=6)
    order = torch.tensor([3, 0, 5, 1, 4, 2])
    moved = {k: v[:, order] for k, v in values.items()}
    torch.testing.assert_close(run(program, moved), run(program, values)[:, order])


def soften(s: Stack, x: fx.Node) -> fx.Node:
    return s.call("aten.softmax.int", x, 1)


def running_sum(s: Stack, x: fx.Node) -> fx.Node:
    return s.call("aten.cumsum.default", x, 1)


def shifted(s: Stack, x: fx.Node) -> fx.Node:
    return s.call("aten.roll.default", x, [1], [1])


def backwards(s: Stack, x: fx.Node) -> fx.Node:
    return s.call("aten.flip.default", x, [1])


def mean_added(s: Stack, x: fx.Node) -> fx.Node:
    return s.add(x, s.call("aten.mean.dim", x, [1], True))


def pairwise(s: Stack, x: fx.Node) -> fx.Node:
    scores = s.call("aten.matmul.default", x, s.call("aten.transpose.int", x, 1, 2))
    return s.call("aten.matmul.default", scores, x)


def counted(s: Stack, x: fx.Node) -> fx.Node:
    steps = s.call("aten.arange.default", s.length[1])
    return s.add(x, s.call("aten.embedding.default", s.param(20, H), steps))


def shuffled(s: Stack, x: fx.Node) -> fx.Node:
    """A reshape that pushes channels into the token axis."""
    y = s.call("aten.reshape.default", x, [s.length[0], -1])
    return s.call("aten.reshape.default", y, [s.length[0], s.length[1], H])


CULPRITS: dict[Callable[[Stack, fx.Node], fx.Node], tuple[str, str]] = {
    soften: ("softmax_int", "point_wise"),
    running_sum: ("cumsum_default", "point_wise"),
    shifted: ("roll_default", "point_wise"),
    backwards: ("flip_default", "point_wise"),
    mean_added: ("mean_dim", "point_wise"),
    pairwise: ("matmul_default", "one_sequence_axis"),
    counted: ("arange_default", "sequence_given"),
    shuffled: ("reshape_default_4", "point_wise"),
}


@pytest.mark.parametrize("mix", list(CULPRITS), ids=lambda f: f.__name__)
def test_the_culprit_is_named(mix: Callable[[Stack, fx.Node], fx.Node]) -> None:
    s = Stack()
    s.block()
    s.x = mix(s, s.x)
    refusals = prove_tokenwise(s.done())
    assert (refusals[0].node, refusals[0].predicate) == CULPRITS[mix]
    assert all(r.by == "tokenwise" for r in refusals)


def test_a_bias_along_the_sequence_is_refused() -> None:
    s = Stack()
    n = s.norm(s.x)
    q, k, v = (s.heads(s.linear(n, 16, H), 4) for _ in range(3))
    row = s.call("aten._to_copy.default", s.pos, dtype=torch.float32)
    bias = s.call("aten.reshape.default", row, [s.length[0], 1, 1, s.length[1]])
    a = s.call("llmc.attention", q, k, v, s.pos, s.pos, s.valid, bias, scale=0.5)
    s.x = s.add(s.x, s.reshape(a, 16))
    assert [r.predicate for r in prove_tokenwise(s.done())] == ["bias_free_of_sequence"]


def test_attention_without_positions_is_tokenwise_in_its_query() -> None:
    s = Stack()
    n = s.norm(s.x)
    q, k, v = (s.heads(s.linear(n, 16, H), 4) for _ in range(3))
    s.x = s.add(s.x, s.reshape(s.call("llmc.attention", q, k, v, scale=0.5), 16))
    assert prove_tokenwise(s.done()) == []
