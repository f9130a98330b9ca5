"""What queries and keys go through becomes part of cached attention: structure and near misses."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import fx

from llmc.codegen.attention.fold import fold_inputs
from llmc.codegen.attention.lower import attention_implementations
from llmc.compiler.ir.dims import BATCH, SEQ
from llmc.compiler.ir.exits import Exits, set_exits
from llmc.compiler.ir.graph import Program
from llmc.compiler.ir.segments import refresh_segments
from llmc.compiler.pipeline.zoo import Builder
from llmc.compiler.runtime.cache import add_cache
from llmc.compiler.runtime.executor import Runner
from llmc.compiler.runtime.exits import ExitRunner

H, KV, D, HIDDEN = 4, 2, 8, 16
SAME = {"norm": "heads", "rope": D}
# Options of a program, and what its attention then says of norm, scale, rotation and R.
FOLDED: list[tuple[dict[str, Any], dict[str, Any]]] = [
    ({"norm": "heads"}, {"norm": "head"}),
    ({"norm": "flipped"}, {"norm": "head"}),
    ({"norm": "row"}, {"norm": "row"}),
    ({"norm": "row", "gain": False, "rope": D}, {"norm": "row", "turn": "half"}),
    ({"norm": "heads", "offset": 1.0, "rope": D}, {"norm": "head", "turn": "half"}),
    ({"norm": "flipped", "rope": 4, "pairs": True}, {"norm": "head", "turn": "pairs"}),
    ({"rope": D, "early": True, "pairs": True}, {"turn": "pairs"}),
    ({"rope": 4, "early": True, "norm": "heads"}, {"norm": "head", "turn": "half"}),
    ({"rope": 4, "early": True, "norm": "row"}, {"norm": "row", "turn": "half"}),
    ({"rope": D, "after": True}, {"norm": "behind", "turn": "half"}),
    ({"rope": 4, "after": True, "pairs": True, "gain": False}, {"norm": "behind", "turn": "pairs"}),
    ({"rope": 4, "early": True, "after": True, "offset": 1.0}, {"norm": "behind", "turn": "half"}),
    ({"factor": 0.25}, {"scale": 0.125}),
    ({"factor": 4.0, "by": "div", "rope": D}, {"scale": 0.125, "turn": "half"}),
    ({"factor": 0.25, "late": True, **SAME}, {"scale": 0.125, "norm": "head", "turn": "half"}),
]
MISSES: list[tuple[dict[str, Any], str, str]] = [
    ({**SAME, "after": True}, "norm", "normed before their rotation and behind it"),
    ({**SAME, "k": {"norm": ""}}, "norm", "queries are normed and keys are not"),
    ({**SAME, "q": {"norm": ""}}, "norm", "keys are normed and queries are not"),
    ({**SAME, "k": {"eps": 1e-3}}, "norm", "expected one kind, eps and offset of norms"),
    ({**SAME, "k": {"offset": 1.0}}, "norm", "('head', 1e-05, 0.0) and ('head', 1e-05, 1.0)"),
    ({**SAME, "k": {"norm": "row"}}, "norm", "found ('head', 1e-05, 0.0) and ('row'"),
    ({**SAME, "q": {"gain": False}}, "norm", "expected a norm with gains of queries and of keys"),
    ({**SAME, "kind": "llmc.layer_norm"}, "norm", "llmc.layer_norm makes queries"),
    ({**SAME, "count": 2 * D}, "norm", f"expected the mean square of {D} channels of queries"),
    ({"norm": "pairs"}, "norm", "queries are normed over something else than each head"),
    ({**SAME, "read": "norm"}, "norm", "something beside attention reads normed queries"),
    ({**SAME, "read": "rope"}, "rotation", "something beside attention reads rotated queries"),
    ({"factor": 0.25, "rope": D, "after": True}, "scale", "queries are scaled before their norm"),
    ({"factor": 0.25, "read": "factor"}, "scale", "something beside attention reads scaled"),
    ({"rope": D, "k": {"rope": 0}}, "rotation", "queries are rotated and keys are not"),
    ({"rope": D, "k": {"angle": 1}}, "rotation", "queries and keys are rotated by different"),
    ({"rope": D, "wide": True, "kv": H}, "rotation", "expected cosines [B, 1, S, R], found"),
    (
        {"rope": D, "wide": True, "early": True, "kv": H},
        "rotation",
        "expected cosines [B, S, 1, R]",
    ),
    (
        {"rope": D, "after": True, "kind": "llmc.layer_norm"},
        "rotation norm",
        "llmc.layer_norm makes what it reads, no rotation",
    ),
    (
        {"rope": D, "after": True, "q": {"after": False}},
        "rotation norm",
        "llmc.rms_norm makes what it",
    ),
]


def attending(**options: Any) -> Program:
    """One attention whose queries and keys go through what the options say, with a cache.

    norm: of what; early: rotated before heads and tokens change places; factor: queries times a
    number, ``late`` behind the norm; after: a norm behind the rotation; read: what the model reads
    beside attention; wide: angles of each head; kv: key heads. q, k: options of one of them.
    """
    b, beside = Builder(), list[fx.Node]()
    ids, pos = (b.input(n, torch.int64, BATCH, SEQ) for n in ("input_ids", "position_ids"))
    b.input("attention_mask", torch.bool, BATCH, SEQ)
    length = [b.call("aten.sym_size.int", ids, d) for d in (0, 1)]
    x = b.call("aten.embedding.default", b.param(20, HIDDEN), ids)

    def angles(o: dict[str, Any], heads: int) -> list[fx.Node]:
        early = o.get("early", False)
        at = b.call("aten.unsqueeze.default", pos, 2 if early else 1)
        at = b.call("aten.unsqueeze.default", at, -1)
        if o.get("wide"):
            at = b.call(
                "aten.expand.default", at, [-1, *((-1, heads) if early else (heads, -1)), -1]
            )
        angle = b.call("aten.mul.Tensor", at, b.param(o["rope"]))
        return [b.call(f"aten.{n}.default", angle) for n in ("cos", "sin")]

    def noted(value: fx.Node, what: str, name: str) -> fx.Node:
        if options.get("read") == what and name == "q":
            beside.append(value)
        return value

    made: dict[Any, list[fx.Node]] = {}

    def normed(y: fx.Node, o: dict[str, Any], width: int, name: str) -> fx.Node:
        kind = o.get("kind", "llmc.rms_norm")
        gain = b.param(width, near=1.0, width=0.1) if o.get("gain", True) else None
        more = {n: o[n] for n in ("offset", "count") if n in o}
        return noted(b.call(kind, y, gain, eps=o.get("eps", 1e-5), **more), "norm", name)

    def turned(y: fx.Node, o: dict[str, Any], heads: int, name: str) -> fx.Node:
        width = o.get("rope", 0)
        if not width:
            return y
        key = (o.get("angle", 0), heads if o.get("wide") else 0)
        if key not in made:
            made[key] = angles(o, heads)
        first = y if width == D else b.call("aten.slice.Tensor", y, 3, 0, width)
        z = b.call("llmc.rope", first, *made[key], interleaved=o.get("pairs", False))
        if width < D:
            z = b.call("aten.cat.default", [z, b.call("aten.slice.Tensor", y, 3, width, D)], 3)
        return noted(z, "rope", name)

    def scaled(y: fx.Node, o: dict[str, Any], name: str) -> fx.Node:
        if "factor" not in o or name != "q":
            return y
        return noted(b.call(f"aten.{o.get('by', 'mul')}.Tensor", y, o["factor"]), "factor", name)

    def side(name: str, heads: int) -> fx.Node:
        o = {**options, **options.get(name, {})}
        y, norm = b.linear(x, heads * D, HIDDEN), o.get("norm", "")
        if not o.get("late"):
            y = scaled(y, o, name)
        if norm == "row":
            y = normed(y, o, heads * D, name)
        if norm == "pairs":
            y = b.call("aten.reshape.default", y, [*length, heads // 2, 2 * D])
            y = normed(y, o, 2 * D, name)
        y = b.call("aten.reshape.default", y, [*length, heads, D])
        y = normed(y, o, D, name) if norm == "heads" else y
        y = scaled(y, o, name) if o.get("late") else y
        y = turned(y, o, heads, name) if o.get("early") else y
        y = b.call("aten.transpose.int", y, 1, 2)
        y = normed(y, o, D, name) if norm == "flipped" else y
        y = y if o.get("early") else turned(y, o, heads, name)
        return normed(y, o, D, name) if o.get("after") else y

    kv = options.get("kv", KV)
    q, k = side("q", H), side("k", kv)
    v = b.call("aten.reshape.default", b.linear(x, kv * D, HIDDEN), [*length, kv, D])
    v = b.call("aten.transpose.int", v, 1, 2)
    y = b.call("llmc.attention", q, k, v, pos, pos, scale=0.5)
    y = b.call("aten.reshape.default", y, [*length, H * D])
    for other in beside:
        first = other.meta["llmc"].type.shape
        if len(first) == 4 and first[1] == H:
            other = b.call("aten.transpose.int", other, 1, 2)
        y = b.call("aten.add.Tensor", y, b.call("aten.reshape.default", other, [*length, H * D]))
    return add_cache(b.finish(b.linear(y, 20, H * D)))


def said(program: Program) -> torch.Tensor:
    """Logits of a prompt of four tokens and of two more, one by one."""
    runner, ids = Runner(program), torch.tensor([[3, 1, 4, 1, 5, 9], [2, 7, 1, 8, 2, 8]])
    cache = runner.start(2)
    parts = [runner.forward(ids[:, a:b], cache=cache) for a, b in ((0, 4), (4, 5), (5, 6))]
    return torch.cat(parts, 1)


def attention_of(program: Program) -> fx.Node:
    return next(program.calls("llmc.cached_attention"))


@pytest.mark.parametrize(("options", "told"), FOLDED, ids=lambda o: "-".join(map(str, o)))
def test_what_queries_and_keys_go_through_is_folded(
    options: dict[str, Any], told: dict[str, Any]
) -> None:
    """Nothing but views is left between the linears and attention, which says the same."""
    program = attending(**options)
    folded = program.clone()
    assert fold_inputs(folded) == []
    left = {"llmc.rms_norm", "llmc.rope", "aten.cat.default", "aten.div.Tensor"}
    assert not [n for op in left for n in folded.calls(op)]
    muls = len(list(folded.calls("aten.mul.Tensor")))
    assert muls == ("rope" in options)
    node = attention_of(folded)
    assert node.kwargs["scale"] == told.get("scale", 0.5)
    _, (placed,), _ = attention_implementations(folded)
    problem = placed.problem
    assert (problem.norm, problem.turn) == (told.get("norm", ""), told.get("turn", ""))
    assert problem.rotary == options.get("rope", 0)
    if problem.norm:
        assert problem.gains == options.get("gain", True)
        assert (problem.eps, problem.offset) == (1e-5, options.get("offset", 0.0))
    if "factor" in options:
        torch.testing.assert_close(said(folded), said(program), rtol=1e-5, atol=1e-6)
    else:
        assert torch.equal(said(folded), said(program))


@pytest.mark.parametrize(("options", "predicate", "words"), MISSES, ids=lambda o: str(o)[:60])
def test_what_just_misses_stays(options: dict[str, Any], predicate: str, words: str) -> None:
    """With the reason; whatever was folded before it says the same."""
    program = attending(**options)
    folded = program.clone()
    refused = fold_inputs(folded)
    assert [r.predicate for r in refused] == predicate.split()
    assert words in refused[0].reason
    node = attention_of(folded)
    done = {"norm": "norm", "rotation": "rotate"}.get(predicate.split()[0], "")
    if "after" in options and predicate == "norm":  # the one behind is part of attention
        assert node.kwargs["norm"] == "behind"
    else:
        assert not node.kwargs.get(done)
    assert node.kwargs["scale"] == 0.5
    assert torch.equal(said(folded), said(program))


def test_numbers_that_are_no_constants_stay() -> None:
    """Keys are kept as they are read, and what multiplies by a tensor is no scale."""
    program = attending(rope=D)
    node = attention_of(program)
    for at, by in ((0, program.node("p0")), (1, 0.5)):
        value = node.args[at]
        assert isinstance(value, fx.Node)
        if isinstance(by, fx.Node):
            first = program.emit("aten.select.int", by, 0, 0, before=node, made_by="test")
            by = program.emit("aten.select.int", first, 0, 0, before=node, made_by="test")
        scaled = program.emit("aten.mul.Tensor", value, by, before=node, made_by="test")
        node.replace_input_with(value, scaled)
    before = said(program)
    refused = fold_inputs(program)
    assert [r.predicate for r in refused] == ["rotation"]
    assert attention_of(program).kwargs["scale"] == 0.5
    assert torch.equal(said(program), before)


@pytest.mark.parametrize("wide", [False, True])
@pytest.mark.parametrize("first", [False, True])
def test_a_number_of_each_query_is_folded(first: bool, wide: bool) -> None:
    """Behind its rotation, whichever factor it is; where heads have their own it stays."""
    program = attending(rope=D, norm="heads")
    node = attention_of(program)
    q, at = node.args[0], program.node("position_ids")
    assert isinstance(q, fx.Node)

    def call(op: str, *args: Any) -> fx.Node:
        return program.emit(op, *args, before=node, made_by="test")

    by = call("aten.cos.default", call("aten.to.dtype", at, torch.float32))
    by = call("aten.unsqueeze.default", call("aten.unsqueeze.default", by, 1), -1)
    if wide:
        by = call("aten.expand.default", by, [-1, H, -1, -1])
    node.replace_input_with(q, call("aten.mul.Tensor", *((by, q) if first else (q, by))))
    folded = program.clone()
    refused = fold_inputs(folded)
    (placed,) = attention_implementations(folded)[1]
    assert placed.problem.scaled == (not wide)
    if wide:
        assert [r.reason for r in refused] == ["aten.mul.Tensor makes what it reads, no rotation"]
    else:
        assert refused == []
        assert placed.problem.turn == "half"
        assert not list(folded.calls("llmc.rope"))
    assert torch.equal(said(folded), said(program))


@pytest.mark.parametrize(
    "name",
    [
        "gptj", "qwen3", "olmo2", "opt",
        *(pytest.param(n, marks=pytest.mark.slow)
          for n in ("cohere", "gpt2", "hunyuan_v1_dense", "gpt_neox", "gemma3_text", "olmoe")),
    ],
)  # fmt: skip
def test_models_fold(name: str) -> None:
    """Nothing is left of what stood between linears and attention, and the model says the same."""
    from tiny_models import capture_tiny

    program = add_cache(capture_tiny(name))
    folded = program.clone()
    assert fold_inputs(folded) == []
    nodes = list(folded.calls("llmc.cached_attention"))
    assert [n.kwargs.get("rotate", False) for n in nodes] == [name not in ("opt", "gpt2")] * 2
    assert not list(folded.calls("llmc.rope"))
    made, placed, _ = attention_implementations(folded)
    assert [p.row.name for p in placed] == ["attention_kv"] * len(made)
    problem = placed[0].problem
    assert problem.turn == {"cohere": "pairs", "gptj": "pairs", "opt": "", "gpt2": ""}.get(
        name, "half"
    )
    norms = {"qwen3": "head", "gemma3_text": "head", "olmo2": "row", "olmoe": "row",
             "hunyuan_v1_dense": "behind"}  # fmt: skip
    assert problem.norm == norms.get(name, "")
    assert problem.offset == (name == "gemma3_text")
    if name == "opt":
        assert nodes[0].kwargs["scale"] == pytest.approx(8**-0.5)
        torch.testing.assert_close(said(folded), said(program), rtol=1e-4, atol=1e-5)
    else:
        assert torch.equal(said(folded), said(program))


def test_tokens_that_left_are_kept_as_attention_reads_them() -> None:
    """Behind an exit a block only keeps keys: normed and rotated, as where nothing is folded."""
    from tiny_models import capture_tiny

    program = capture_tiny("qwen3")
    set_exits(program, Exits("softmax", ("block0",), 0.005))
    folded = add_cache(program)
    fold_inputs(folded)
    refresh_segments(folded)
    ids = torch.randint(3, 90, (3, 10), generator=torch.Generator().manual_seed(0))
    both = []
    for one in (add_cache(program), folded):
        runner, out = ExitRunner(one), []
        cache = runner.start(3)
        for t in range(10):
            out.append(runner.forward(ids[:, t : t + 1], cache=cache))
            both.append(list(runner.used))
        both.append(torch.cat(out, 1))
    used, logits, used_folded, logits_folded = both[:10], both[10], both[11:21], both[21]
    assert {1, 2} == {n for row in used for n in row}
    assert used == used_folded
    assert torch.equal(logits, logits_folded)
