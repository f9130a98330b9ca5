"""A bias of slopes times positions needs no layout of all keys: found, kept in steps, refused."""

from __future__ import annotations

import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import fx

from llmc.compiler.analysis.cacheable import cache_refusals
from llmc.compiler.analysis.slopes import Slopes, makers, slopes_of
from llmc.compiler.ir.dims import BATCH, SEQ
from llmc.compiler.ir.graph import Program
from llmc.compiler.pipeline.zoo import Builder
from llmc.compiler.runtime.cache import add_cache
from llmc.compiler.runtime.executor import Runner

sys.path.insert(0, str(Path(__file__).parents[1]))

from tiny_models import capture_tiny, make

H, D, HIDDEN = 4, 4, 12
FOUND: list[dict[str, Any]] = [
    {},
    {"positions": "given"},
    {"positions": "marked"},
    {"positions": "marked", "swapped": True},
    {"rank": 4},
    {"flat": True},
    {"layers": 2},
    {"kv": 2},
]
MISSES: list[tuple[dict[str, Any], str]] = [
    ({"positions": "twice"}, "makes the bias, no product of slopes and positions"),
    ({"positions": "other"}, "is no position of a key that attention knows"),
    ({"positions": "summed"}, "is no position of a key that attention knows"),
    ({"narrow": True}, "rounds the products of slopes and positions"),
    ({"shared": True}, "expected a bias [B, 4, 1, S], found f32[B, 1, 1, S]"),
    ({"wide": True}, "expected one slope for each of 4 heads"),
    ({"square": True}, "expand_default makes the bias, no product"),
    ({"valid": False}, "is no position of a key that attention knows"),
]


def attending(**o: Any) -> Program:
    """Attention whose scores have slopes times positions added.

    positions: "" counts real tokens, "marked" those times whether they are real, "given" are the
    call's own; "twice" squares them, "summed" adds ids up, "other" are another input. read: the
    model gives positions too.
    """
    b = Builder()
    ids, pos = (b.input(n, torch.int64, BATCH, SEQ) for n in ("input_ids", "position_ids"))
    valid = b.input("attention_mask", torch.bool, BATCH, SEQ)
    length = [b.call("aten.sym_size.int", ids, d) for d in (0, 1)]
    x = b.call("aten.embedding.default", b.param(20, HIDDEN), ids)
    kind = o.get("positions", "")

    def counted(what: fx.Node) -> fx.Node:
        total = b.call("aten.cumsum.default", what, -1)
        return b.call("aten.sub.Tensor", total, 1)

    at = {"given": pos, "other": ids}.get(kind)
    at = counted(ids if kind == "summed" else valid) if at is None else at
    if kind == "marked":
        at = b.call("aten.mul.Tensor", *((valid, at) if o.get("swapped") else (at, valid)))
    rank, heads = o.get("rank", 3), 1 if o.get("shared") else H
    at = b.call("aten.unsqueeze.default", at, 1)
    slopes = b.param(heads, 1, near=0.5, width=0.3)
    if rank == 4:
        at, slopes = b.call("aten.unsqueeze.default", at, 1), b.param(heads, 1, 1, near=0.5)
    if o.get("wide"):
        slopes = b.param(heads, HIDDEN)
        slopes = b.call("aten.sum.dim_IntList", slopes, [1], True)
    if o.get("narrow"):
        at, slopes = (b.call("aten.to.dtype", t, torch.float16) for t in (at, slopes))
    bias = b.call("aten.mul.Tensor", slopes, at)
    if kind == "twice":
        bias = b.call("aten.mul.Tensor", bias, 0.5)
    if o.get("narrow"):
        bias = b.call("aten.to.dtype", bias, torch.float32)
    if o.get("flat"):
        bias = b.call("aten.reshape.default", bias, [-1, 1, length[1]])
        bias = b.call("aten.reshape.default", bias, [length[0], H, 1, length[1]])
    elif rank == 3:
        bias = b.call("aten.unsqueeze.default", bias, 2)
    if o.get("square"):
        bias = b.call("aten.expand.default", bias, [-1, -1, length[1], -1])
    for _ in range(o.get("layers", 1)):
        kv = o.get("kv", H)
        q, k, v = (
            b.call(
                "aten.transpose.int",
                b.call("aten.reshape.default", b.linear(x, n * D, HIDDEN), [*length, n, D]), 1, 2,
            )
            for n in (H, kv, kv)
        )  # fmt: skip
        real = valid if o.get("valid", True) else None
        y = b.call("llmc.attention", q, k, v, pos, pos, real, bias, scale=0.5)
        y = b.linear(b.call("aten.reshape.default", y, [*length, H * D]), HIDDEN, H * D)
        x = b.call("aten.add.Tensor", x, y)
    return b.finish(b.linear(x, 20, HIDDEN))


def rows() -> tuple[torch.Tensor, torch.Tensor]:
    """Ids and validity of a row and one that begins with two that are not real."""
    ids = torch.tensor([[3, 1, 4, 1, 5, 9, 2], [2, 7, 1, 8, 2, 8, 1]])
    real = torch.ones_like(ids, dtype=torch.bool)
    real[1, :2] = False
    return ids, real


@pytest.mark.parametrize("options", FOUND, ids=str)
def test_slopes_are_kept_apart_from_keys(options: dict[str, Any]) -> None:
    """Steps say what the whole says; nothing that lays out all keys is left."""
    program = attending(**options)
    assert all(isinstance(slopes_of(n), Slopes) for n in program.calls("llmc.attention"))
    assert cache_refusals(program) == []
    cached = add_cache(program)
    assert not list(cached.calls("aten.cumsum.default"))
    ids, real = rows()
    want = Runner(program).forward(ids, real)
    runner = Runner(cached)
    cache = runner.start(2)
    pieces = [runner.forward(ids[:, :4], real[:, :4], cache=cache)]
    pieces += [runner.forward(ids[:, i : i + 1], cache=cache) for i in range(4, 7)]
    torch.testing.assert_close(torch.cat(pieces, 1)[real], want[real], rtol=1e-4, atol=1e-5)
    # Without them the last token would say something else.
    for node in cached.calls("llmc.cached_attention"):
        node.args = node.args[:13]
    other = Runner(cached).forward(ids, real, cache=Runner(cached).start(2))
    assert float((other - want)[real].abs().max()) > 1e-2


@pytest.mark.parametrize(("options", "words"), MISSES, ids=str)
def test_what_just_misses_is_refused(options: dict[str, Any], words: str) -> None:
    program = attending(**options)
    refused = [r for r in cache_refusals(program) if r.predicate == "no_bias"]
    assert len(refused) == 1
    assert words in refused[0].reason
    assert makers(program) == frozenset()


def test_what_something_else_reads_stays() -> None:
    """A count of tokens that the model reads itself is still a mix of tokens."""
    program = attending()
    count = next(program.calls("aten.cumsum.default"))
    assert count in makers(program)
    last = program.output.args[0]
    assert isinstance(last, fx.Node)
    for op, args in (("aten.unsqueeze.default", (2,)), ("aten.add.Tensor", (last,))):
        count = program.emit(op, count, *args, before=program.output, made_by="test")
    program.output.args = (count,)
    assert "cumsum" in str(cache_refusals(program)[0])


def test_a_captured_model_goes_token_by_token() -> None:
    cached = Runner(add_cache(capture_tiny("bloom")))
    ids, real = rows()
    with torch.no_grad():
        want = make("bloom")(ids, attention_mask=real.long()).logits
    cache = cached.start(2)
    pieces = [cached.forward(ids[:, :4], real[:, :4], cache=cache)]
    pieces += [cached.forward(ids[:, i : i + 1], cache=cache) for i in range(4, 7)]
    torch.testing.assert_close(torch.cat(pieces, 1)[real], want[real], rtol=1e-4, atol=1e-5)
