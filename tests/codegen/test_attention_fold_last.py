"""Last channels that all heads of keys share become part of cached attention, and near misses."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import fx

from llmc.codegen.attention.fold import fold_inputs
from llmc.codegen.attention.lower import attention_implementations
from llmc.compiler.ir.dims import BATCH, SEQ
from llmc.compiler.ir.graph import Program
from llmc.compiler.pipeline.zoo import Builder
from llmc.compiler.runtime.attend import attention_implementations as by_torch
from llmc.compiler.runtime.cache import add_cache
from llmc.compiler.runtime.executor import Runner

H, D, E, R, HIDDEN = 3, 10, 6, 4, 16
FOLDED: list[dict[str, Any]] = [
    {},
    {"pairs": True},
    {"woven": True},
    {"factor": 0.5},
]
MISSES: list[tuple[dict[str, Any], str]] = [
    ({"k": {"angle": 1}}, "queries and keys are rotated by different angles"),
    ({"woven": True, "k": {"woven": False}}, "rotated by different angles"),
    ({"own": True}, "expected last channels [B, 1, S, R] of keys for all heads"),
    ({"mixed": True}, "the channels of queries that are rotated do not lie behind the others"),
    ({"read": True}, "something beside attention reads rotated queries or keys"),
]


def attending(**options: Any) -> Program:
    """One attention whose last channels alone are rotated, keys' of all heads at once.

    own: of each head; mixed: queries joined of other channels; read: by the model too.
    """
    b = Builder()
    ids, pos = (b.input(n, torch.int64, BATCH, SEQ) for n in ("input_ids", "position_ids"))
    b.input("attention_mask", torch.bool, BATCH, SEQ)
    length = [b.call("aten.sym_size.int", ids, d) for d in (0, 1)]
    x = b.call("aten.embedding.default", b.param(20, HIDDEN), ids)
    made: dict[int, list[fx.Node]] = {}

    def angles(which: int) -> list[fx.Node]:
        if which not in made:
            at = b.call("aten.unsqueeze.default", b.call("aten.unsqueeze.default", pos, 1), -1)
            angle = b.call("aten.mul.Tensor", at, b.param(R))
            made[which] = [b.call(f"aten.{n}.default", angle) for n in ("cos", "sin")]
        return made[which]

    def heads(count: int, width: int) -> fx.Node:
        y = b.call(
            "aten.reshape.default", b.linear(x, count * width, HIDDEN), [*length, count, width]
        )
        return b.call("aten.transpose.int", y, 1, 2)

    def turned(y: fx.Node, name: str) -> fx.Node:
        o = {**options, **options.get(name, {})}
        if o.get("woven"):
            ends = [b.call("aten.slice.Tensor", y, 3, i, 1 << 60, 2) for i in (0, 1)]
            y = b.call("aten.cat.default", ends, 3)
        pairs = o.get("pairs", False)
        return b.call("llmc.rope", y, *angles(o.get("angle", 0)), interleaved=pairs)

    q = heads(H, D)
    if "factor" in options:
        q = b.call("aten.mul.Tensor", q, options["factor"])
    ends = (R, D, 0, R) if options.get("mixed") else (0, D - R, D - R, D)
    stays, last = (b.call("aten.slice.Tensor", q, 3, *e) for e in (ends[:2], ends[2:]))
    q = b.call("aten.cat.default", [stays, turned(last, "q")], 3)
    kv = heads(H, D - R + E)
    k, v = (b.call("aten.slice.Tensor", kv, 3, *e) for e in ((0, D - R), (D - R, D - R + E)))
    shared = turned(heads(H if options.get("own") else 1, R), "k")
    if not options.get("own"):
        shared = b.call("aten.expand.default", shared, [-1, H, -1, -1])
    k = b.call("aten.cat.default", [k, shared], 3)
    y = b.call("llmc.attention", q, k, v, pos, pos, scale=0.5)
    y = b.linear(b.call("aten.reshape.default", y, [*length, H * E]), HIDDEN, H * E)
    if options.get("read"):
        beside = b.call(
            "aten.reshape.default", b.call("aten.transpose.int", q, 1, 2), [*length, -1]
        )
        y = b.call("aten.add.Tensor", y, b.linear(beside, HIDDEN, H * D))
    return add_cache(b.finish(b.linear(y, 20, HIDDEN)))


def said(program: Program, fast: bool = False) -> torch.Tensor:
    """Logits of a prompt of four tokens and of two more, one by one."""
    runner = Runner(program, by_torch(program) if fast else None)
    ids = torch.tensor([[3, 1, 4, 1, 5, 9], [2, 7, 1, 8, 2, 8]])
    cache = runner.start(2)
    parts = [runner.forward(ids[:, a:b], cache=cache) for a, b in ((0, 4), (4, 5), (5, 6))]
    return torch.cat(parts, 1)


@pytest.mark.parametrize("options", FOLDED, ids=str)
def test_last_channels_are_folded(options: dict[str, Any]) -> None:
    """Nothing but views is left between the linears and attention, which says the same."""
    program = attending(**options)
    folded = program.clone()
    assert fold_inputs(folded) == []
    assert not [n for op in ("llmc.rope", "aten.cat.default") for n in folded.calls(op)]
    _, (placed,), _ = attention_implementations(folded)
    problem = placed.problem
    assert (problem.last, problem.rotary, problem.D, problem.E) == (True, R, D, E)
    assert problem.turn == ("pairs" if options.get("pairs") else "half")
    assert problem.woven == options.get("woven", False)
    want = said(program)
    torch.testing.assert_close(said(folded), want, rtol=1e-5, atol=1e-6)
    torch.testing.assert_close(said(folded, fast=True), want, rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize(("options", "words"), MISSES, ids=str)
def test_what_just_misses_stays(options: dict[str, Any], words: str) -> None:
    program = attending(**options)
    folded = program.clone()
    refused = fold_inputs(folded)
    assert words in next(r.reason for r in refused if r.predicate == "last")
    assert not next(folded.calls("llmc.cached_attention")).kwargs.get("rotate")
    assert torch.equal(said(folded), said(program))


@pytest.mark.parametrize("name", ["deepseek_v3"])
def test_models_fold(name: str) -> None:
    from tiny_models import capture_tiny

    program = add_cache(capture_tiny(name))
    folded = program.clone()
    assert fold_inputs(folded) == []
    assert not list(folded.calls("llmc.rope"))
    assert [n.kwargs["woven"] for n in folded.calls("llmc.cached_attention")] == [True] * 2
    assert torch.equal(said(folded), said(program))
