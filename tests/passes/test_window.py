"""window: what each token reads is what a mask written out says, in one go and token by token."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

from llmc.compiler.ir.errors import GateError, UsageError, VerifierError
from llmc.compiler.ir.graph import Param, Program
from llmc.compiler.ir.interpret import run
from llmc.compiler.ir.serial import from_json, to_json
from llmc.compiler.ir.verifier import verify
from llmc.compiler.pipeline.compile import compile_plan
from llmc.compiler.pipeline.measure import model_inputs
from llmc.compiler.pipeline.plan import make_plan
from llmc.compiler.pipeline.recipe import from_strings
from llmc.compiler.pipeline.zoo import build, decoder
from llmc.compiler.report.difference import changes
from llmc.compiler.runtime.artefact import Contents, load, save
from llmc.compiler.runtime.lowering import runner_for

LENGTH = 24
KNOBS = ("size=5", "size=1", "size=3,dilation=2", "size=4,globals=2", "size=2,dilation=5,globals=1")


def ids(rows: int = 2) -> torch.Tensor:
    return torch.randint(0, 20, (rows, LENGTH), generator=torch.Generator().manual_seed(2))


def compiled(program: Program, *passes: str) -> Program:
    return compile_plan(make_plan(program, from_strings(list(passes))), ids(4)).program


def readable(size: int = 256, dilation: int = 1, globals: int = 0) -> torch.Tensor:
    """[LENGTH, LENGTH], 0 where the query of a row may read the key of a column, else -inf."""
    out = torch.full((LENGTH, LENGTH), float("-inf"))
    for p in range(LENGTH):
        near = {p - i * dilation for i in range(size)}
        for key in range(p + 1):
            if key in near or key < globals or p < globals:
                out[p, key] = 0
    return out


def masked(program: Program, bias: torch.Tensor) -> torch.Tensor:
    """Logits of the program whose scores get a bias."""
    made = program.clone()
    for node in list(made.calls("llmc.attention")):
        name = f"bias{node.name}"
        added = made.add_param(Param(name, (1, 1, *bias.shape), bias.dtype), bias[None, None],
                               before=node)  # fmt: skip
        node.args = (*node.args[:6], added)
    return run(made, model_inputs(ids()))


@pytest.mark.parametrize("knobs", KNOBS)
@pytest.mark.parametrize("model", ["with_rope", "shared_keys"])
def test_reads_what_the_mask_says(model: str, knobs: str) -> None:
    program = build(model)
    given = {k: int(v) for k, v in (pair.split("=") for pair in knobs.split(","))}
    want = masked(program, readable(**given))
    made = compiled(program, f"window:{knobs}")
    have = run(made, model_inputs(ids()))
    torch.testing.assert_close(have, want, rtol=1e-5, atol=1e-5)
    assert not torch.allclose(have, run(program, model_inputs(ids())))


def test_a_window_as_long_as_the_text_is_the_identity() -> None:
    program = build("llama_gqa")
    for knobs in (f"size={LENGTH}", f"size=1,globals={LENGTH}"):
        made = compiled(program, f"window:{knobs}")
        torch.testing.assert_close(
            run(made, model_inputs(ids())), run(program, model_inputs(ids())), rtol=0, atol=0
        )


@pytest.mark.parametrize("target", ["reference", "cpu"])
@pytest.mark.parametrize("knobs", KNOBS)
def test_token_by_token_is_in_one_go(knobs: str, target: str) -> None:
    made = compiled(build("with_rope"), f"window:{knobs}")
    want = runner_for(made).forward(ids())
    runner = runner_for(made, target, cached=True)
    for cuts in ([1] * LENGTH, [9, *[1] * (LENGTH - 9)]):
        cache = runner.start(2, 4)
        have = torch.cat([runner.forward(x, cache=cache) for x in ids().split(cuts, 1)], 1)
        torch.testing.assert_close(have, want, rtol=1e-4, atol=1e-5)
        assert cache.length == LENGTH


@pytest.mark.parametrize("kv", ["kv8", "kivi:bits=8,group=4,residual=4", "kvquant:bits=4"])
def test_caches_of_codes_are_read_through_the_window(kv: str) -> None:
    """Beside a brute-force window: the codes' own error and no more; old tokens are not read."""
    made = compiled(build("with_rope"), "window:size=3", kv)
    assert len(made.caches) == 2
    whole = runner_for(made).forward(ids())
    for target in ("reference", "cpu"):
        runner = runner_for(made, target, cached=True)
        cache = runner.start(2, 4)
        have = torch.cat([runner.forward(x, cache=cache) for x in ids().split(1, 1)], 1)
        off = (have - whole).abs().max() / whole.abs().max()
        assert 1e-6 < float(off) < (0.6 if "kvquant" in kv else 0.05)


def test_early_exits_read_through_the_window() -> None:
    made = compiled(
        decoder(blocks=4, rope=1.0), "window:size=4,dilation=2,globals=1",
        "early_exit:agreement=0.05,error=0.5",
    )  # fmt: skip
    assert made.exits is not None
    results = []
    for target in ("reference", "cpu"):
        runner = runner_for(made, target, cached=True)
        cache = runner.start(2, 4)
        results.append(torch.cat([runner.forward(x, cache=cache) for x in ids().split(1, 1)], 1))
    torch.testing.assert_close(*results, rtol=1e-4, atol=1e-5)


def test_protected_and_listed_blocks() -> None:
    def windows(program: Program) -> list[object]:
        return [n.kwargs.get("window") for n in program.calls("llmc.attention")]

    four = build("four_blocks")
    first = compiled(four, "window:size=4,protect_first=1,protect_last=2")
    assert windows(first) == [None, 4, None, None]
    assert windows(compiled(four, "window:size=4,blocks=0+-1")) == [4, None, None, 4]
    refused = make_plan(four, from_strings(["window:size=4,blocks=1"])).refusals
    assert [r.predicate for r in refused] == ["listed"] * 3
    narrower = compiled(build("has_window"), "window:size=2")
    assert windows(narrower) == [2, 2]


@pytest.mark.parametrize(
    ("text", "error", "told"),
    [
        ("window:size=0", UsageError, "window:size: expected 1.."),
        ("window:dilation=0", UsageError, "window:dilation: expected 1.."),
        ("window:globals=-1", UsageError, "window:globals: expected 0.."),
        ("window:size=1,dilation=3", UsageError, "neighbours that can be 3 apart"),
        ("window:blocks=1+x", UsageError, "window:blocks: expected numbers as in 3"),
        ("window:blocks=4", UsageError, "expected blocks -2..1, found 4"),
        ("window:protect_first=2", GateError, "block 0 of 2 is protected"),
    ],
)
def test_bad_knobs(text: str, error: type[Exception], told: str) -> None:
    with pytest.raises(error, match=told.replace("(", r"\(")):
        make_plan(build("llama_gqa"), from_strings([text]))


def test_windows_that_are_there() -> None:
    for model, knobs, told in (
        ("has_window", "size=4", "a window of 4 already, no wider than 4"),
        ("has_window", "size=2,globals=1", "first tokens outside of it were never read"),
        ("has_window", "size=3,dilation=2", "no wider than 5"),
        ("has_pattern", "size=2", "two patterns together are no window"),
    ):
        with pytest.raises(GateError, match=told):
            make_plan(build(model), from_strings([f"window:{knobs}"]))


def test_orders_without_meaning() -> None:
    for first, then in (("w4", "window"), ("prune24", "window"), ("window", "window")):
        with pytest.raises(UsageError, match="expected 'window' before"):
            make_plan(build("llama_gqa"), from_strings([first, then]))


def test_the_diff_shows_it() -> None:
    program = build("llama_gqa")
    made = compiled(program, "window:size=4,dilation=3,globals=2")
    found = changes(program, made)
    assert [c.kind for c in found] == ["changed"] * 2
    assert all("window=4, dilation=3, first=2" in c.after["text"] for c in found if c.after)


@pytest.mark.parametrize(
    "attrs",
    [
        {"window": 0}, {"window": -3}, {"window": 4, "dilation": 0}, {"window": 4, "first": -1},
        {"dilation": 2}, {"first": 1}, {"window": 1 << 62, "dilation": 4}, {"window": True},
        {"window": 4, "dilation": 1 << 40},
    ],
)  # fmt: skip
def test_hostile_attributes(attrs: dict[str, int]) -> None:
    data = to_json(build("has_pattern"))
    for node in data["nodes"]:
        if "window" in node.get("kwargs", {}):
            for key in ("window", "dilation", "first"):
                node["kwargs"].pop(key)
            node["kwargs"].update(attrs)
    with pytest.raises(VerifierError, match=r"window|dilation|first"):
        verify(from_json(data, build("has_pattern").weights))


def test_in_an_artefact(tmp_path: Path) -> None:
    made = compiled(build("llama_gqa"), "window:size=2,dilation=2,globals=1")
    save(tmp_path / "out", Contents(made))
    again = load(tmp_path / "out").program
    assert torch.equal(run(again, model_inputs(ids())), run(made, model_inputs(ids())))
