"""kv_rank: lossless where heads have the rank that is kept; the cache keeps what it says."""

from __future__ import annotations

import sys
from functools import cache
from pathlib import Path
from typing import Any

import pytest
import torch

import llmc
from llmc.compiler import api
from llmc.compiler.analysis.depth import leave_out
from llmc.compiler.analysis.heads import found_sites
from llmc.compiler.analysis.latents import check_latents, latent_of
from llmc.compiler.ir.caches import CacheScheme
from llmc.compiler.ir.errors import GateError, ModelError, UsageError
from llmc.compiler.ir.exits import Exits, set_exits
from llmc.compiler.ir.graph import Program
from llmc.compiler.ir.verifier import verify
from llmc.compiler.runtime.cache import add_cache
from llmc.compiler.runtime.executor import Runner
from llmc.compiler.runtime.lowering import runner_for

sys.path.insert(0, str(Path(__file__).parents[1]))

from tiny_models import make

TOKENS = torch.randint(0, 30, (3, 12), generator=torch.Generator().manual_seed(0))
# With rotation and without, with biases, a fused projection, several query heads per key head.
FAMILIES = ("llama", "gpt2", "opt", "phi3")


@cache
def captured(kind: str) -> Program:
    """A tiny model's program."""
    return api.capture(make(kind))


def planted(kind: str, rank: int) -> Program:
    """A tiny model whose heads all say only ``rank`` things."""
    from llmc.compiler.analysis.blocks import apply_segments

    program = captured(kind).clone()
    apply_segments(program)
    g = torch.Generator().manual_seed(1)
    for site in found_sites(program).values():
        for rows in (site.k, site.v):
            weight = program.weights.load(rows.param).clone()
            bias = None if rows.bias is None else program.weights.load(rows.bias).clone()
            size = rows.index.shape[1]
            joint = rows is site.k and len(site.pairs) > 0
            runs = [rows.index.flatten()] if joint else list(rows.index)
            for index in runs:
                r = rank * len(rows.index) if joint else rank
                a = torch.randn(len(index), r, generator=g)
                weight[index] = a @ torch.randn(r, weight.shape[1], generator=g) / size
                if bias is not None:
                    bias[index] = a @ torch.randn(r, generator=g) / size
            program.set_tensor(rows.param, weight)
            if bias is not None:
                program.set_tensor(rows.bias, bias)
    return program


def logits(program: Program, ids: torch.Tensor) -> torch.Tensor:
    return Runner(program).forward(ids)


@pytest.mark.parametrize("kind", FAMILIES)
def test_heads_of_that_rank_lose_nothing(kind: str) -> None:
    program = planted(kind, 2)
    size = next(iter(found_sites(program).values())).v.index.shape[1]
    made = api.compile(
        program, f"kv_rank:keep={2 / size},multiple=1", calibration=TOKENS
    ).program  # fmt: skip
    verify(made)
    want = logits(program, TOKENS)
    torch.testing.assert_close(logits(made, TOKENS), want, rtol=2e-3, atol=2e-4)
    assert float((want - want.mean()).abs().max()) > 0.01
    for node in made.calls("llmc.attention"):
        assert node.args[2].meta["llmc"].type.shape[3] == 2


@pytest.mark.parametrize("kind", FAMILIES)
@pytest.mark.parametrize("cuts", [[1] * 12, [5, 1, 6]])
def test_a_cache_of_latents_gives_what_the_whole_text_gives(kind: str, cuts: list[int]) -> None:
    made = api.compile(
        captured(kind), "kv_rank:multiple=1,metric=weights,keep=0.5"
    ).program  # fmt: skip
    whole = logits(made, TOKENS)
    cached = Runner(add_cache(made))
    cache = cached.start(3, 2)
    pieces = [cached.forward(part, cache=cache) for part in TOKENS.split(cuts, 1)]
    torch.testing.assert_close(torch.cat(pieces, 1), whole, rtol=1e-4, atol=1e-4)
    cache.rewind(3)
    again = cached.forward(TOKENS[:, 9:], cache=cache)
    torch.testing.assert_close(again, whole[:, 9:], rtol=1e-4, atol=1e-4)


def test_states_hold_as_many_numbers_as_the_record_says() -> None:
    compiled = api.compile(
        captured("llama"), "kv_rank:multiple=1,keep_keys=0.75,keep_values=0.5,"
        "metric=weights",
    )  # fmt: skip
    records = compiled.solved.structure[0]["records"]
    cached = add_cache(compiled.program)
    for record, state in zip(records, cached.states.values(), strict=True):
        k, v = state.types
        assert state.kind == "latent"
        held = k.shape[1] * k.shape[3] + v.shape[1] * v.shape[3]
        assert held == record["numbers_per_token"] < record["before"]
        assert record["flops_per_read_token"] == 2 * k.shape[3] * v.shape[1] * 2 * v.shape[3]
    for scheme in compiled.program.caches.values():
        assert scheme.kind == "latent"
        assert scheme.turned


def test_calibration_keeps_what_the_data_says() -> None:
    """On its own data the measured choice loses no more of the outputs than that by weights."""
    program = captured("llama")
    want = logits(program, TOKENS)
    lost = {}
    for metric in ("activations", "weights"):
        made = api.compile(
            program, f"kv_rank:multiple=1,keep=0.5,keep_keys=1,metric={metric}", calibration=TOKENS
        )
        errors = [r["values_error"] for r in made.solved.structure[0]["records"]]
        assert all(0 < e < 1 for e in errors)
        lost[metric] = float((logits(made.program, TOKENS) - want).square().mean())
    assert lost["activations"] < lost["weights"]


def test_meets_other_passes_and_the_artefact(tmp_path: Path) -> None:
    program = captured("llama")
    made = api.compile(program, "kv_rank:multiple=1,smooth,w8", calibration=TOKENS)
    want = logits(made.program, TOKENS)
    made.save(tmp_path / "a")
    back = llmc.load(tmp_path / "a")
    torch.testing.assert_close(logits(back.program, TOKENS), want)
    cached = Runner(add_cache(back.program))
    cache = cached.start(3)
    pieces = [cached.forward(t, cache=cache) for t in TOKENS.split(4, 1)]
    torch.testing.assert_close(torch.cat(pieces, 1), want, rtol=1e-4, atol=1e-4)
    with pytest.raises(GateError, match="kept as latent already"):
        api.compile(program, "kv_rank:multiple=1,kv8", calibration=TOKENS)


@pytest.mark.parametrize("then", ["prune_width", "svdllm", "quip:sides=in"])
def test_latents_that_later_passes_narrow_are_read_back(then: str, tmp_path: Path) -> None:
    """The record follows the graph: the artefact loads, and its cache gives what it gave."""
    made = api.compile(captured("llama"), f"kv_rank:multiple=1,{then}", calibration=TOKENS)
    check_latents(made.program)
    made.save(tmp_path / "a")
    back = llmc.load(tmp_path / "a").program
    want = logits(made.program, TOKENS)
    assert torch.equal(logits(back, TOKENS), want)
    cached = Runner(add_cache(back))
    cache = cached.start(3)
    pieces = [cached.forward(t, cache=cache) for t in TOKENS.split(4, 1)]
    torch.testing.assert_close(torch.cat(pieces, 1), want, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("then", ["quip", "w4:group=8,lorc:rank=2"])
def test_what_adds_to_keys_behind_a_latent_is_refused(then: str) -> None:
    with pytest.raises(UsageError, match="leave the matrix that makes keys of kept latents"):
        api.plan(captured("llama"), f"kv_rank:multiple=1,{then}")


def test_a_token_that_leaves_early_keeps_latents() -> None:
    """All leave behind the first block: logits are those of a model without the second."""
    made = api.compile(captured("llama"), "kv_rank:multiple=1,metric=weights").program
    short = made.clone()
    leave_out(short, ["block1"])
    set_exits(made, Exits("softmax", ("block0",), -1.0))
    runner = runner_for(made, cached=True)
    cache = runner.start(3)
    steps = [runner.forward(t, cache=cache) for t in TOKENS.split(1, 1)]
    want = logits(short, TOKENS)[:, 1:]
    torch.testing.assert_close(torch.cat(steps, 1)[:, 1:], want, rtol=1e-4, atol=1e-4)
    assert {s.length for s in cache.states.values()} == {TOKENS.shape[1]}


def test_refuses_what_it_cannot_narrow() -> None:
    with pytest.raises(GateError, match="keys: a fused projection lays"):
        api.compile(captured("gpt_neox"), "kv_rank", calibration=TOKENS)
    with pytest.raises(UsageError, match="expected shares that take numbers away"):
        api.compile(captured("llama"), "kv_rank:keep=1", calibration=TOKENS)
    with pytest.raises(UsageError, match="expected 'kv_rank' before 'w8'"):
        api.compile(captured("llama"), ["w8", "kv_rank"], calibration=TOKENS)


def test_a_record_must_say_what_the_graph_does() -> None:
    made: Any = api.compile(captured("llama"), "kv_rank:multiple=1,metric=weights").program
    name, scheme = next(iter(made.caches.items()))
    found = latent_of(made.node(name))
    assert not isinstance(found, str)
    assert found.rank == scheme.rank
    made.caches[name] = CacheScheme(
        "latent", 16, turned=True, slot=scheme.slot, rank=scheme.rank + 1
    )
    with pytest.raises(ModelError, match="the record"):
        check_latents(made)
    for bad in (0, -1, 1 << 30):
        with pytest.raises(ModelError, match="rank"):
            CacheScheme("latent", 16, rank=bad)
    with pytest.raises(ModelError, match="rank of latents alone"):
        CacheScheme("int8", 8, rank=4)
