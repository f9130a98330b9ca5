"""tt_embed and lowrank_embed: planned bytes, what is lost, tied heads, decoding, what they meet."""

from __future__ import annotations

import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from llmc.compiler.analysis.blocks import apply_segments
from llmc.compiler.analysis.tables import TableSite, table_sites
from llmc.compiler.ir.errors import GateError, UsageError
from llmc.compiler.ir.graph import Program
from llmc.compiler.ir.interpret import run
from llmc.compiler.ir.refusal import Refusal
from llmc.compiler.pipeline.compile import Compiled, compile_plan
from llmc.compiler.pipeline.measure import Options, collect, model_inputs
from llmc.compiler.pipeline.plan import Plan, make_plan
from llmc.compiler.pipeline.recipe import from_strings
from llmc.compiler.pipeline.zoo import build, decoder
from llmc.compiler.runtime.artefact import Contents, load, save
from llmc.compiler.runtime.lowering import runner_for
from llmc.compiler.runtime.sizes import sizes
from llmc.compiler.runtime.verify import verify

sys.path.insert(0, str(Path(__file__).parents[1]))
from tiny_models import capture_tiny

VOCAB, WIDTH = 40, 32
MATRIX, ROW = "tt_embed:granularity=matrix", "tt_embed:granularity=row"
LOW = "lowrank_embed:multiple=1"
ALL = (
    MATRIX, f"{MATRIX},order=none", f"{MATRIX},order=frequency", f"{MATRIX},cores=2,head=untie",
    ROW, f"{ROW},cores=2", LOW, "lowrank_embed:frequency=no,logits=no",
)  # fmt: skip
Build = Callable[..., Program]


def ids(rows: int = 2, length: int = 16, seed: int = 0) -> Tensor:
    g = torch.Generator().manual_seed(seed)
    # Small tokens more often than large ones.
    return (VOCAB * torch.rand(rows, length, generator=g).square()).long()


@pytest.fixture(params=[True, False], ids=["tied", "untied"])
def program(request: pytest.FixtureRequest) -> Program:
    made = decoder(vocab=VOCAB, hidden=WIDTH, tied=request.param, rope=1.0)
    apply_segments(made)
    return made


def planned(program: Program, *passes: str) -> Plan:
    return make_plan(program, from_strings(list(passes)))


def compiled(program: Program, *passes: str) -> Compiled:
    return compile_plan(planned(program, *passes), ids(6, seed=1))


def logits(program: Program) -> Tensor:
    out: Tensor = run(program, model_inputs(ids()))
    return out


def table_of(program: Program) -> Tensor:
    """The table that the rewritten program computes, a row per token."""
    found: list[Tensor] = []

    def observe(node: Any, value: Any) -> None:
        called = node.op == "call_function" and isinstance(value, Tensor)
        if called and not found and tuple(value.shape) == (1, VOCAB, WIDTH):
            found.append(value[0])

    run(program, model_inputs(torch.arange(VOCAB)[None]), observe=observe)
    return found[0]


@pytest.mark.parametrize("passes", ALL)
def test_bytes_are_those_that_were_planned(program: Program, passes: str) -> None:
    plan = planned(program, passes)
    assert plan.exact
    done = compile_plan(plan, ids(6, seed=1))
    assert plan.program.weight_bytes() == done.program.weight_bytes()
    row = done.structure[0]["records"][0]
    saved = row["bytes_before"] - row["bytes_after"]
    assert program.weight_bytes() - done.program.weight_bytes() == saved
    tied = any(s.heads for s in table_sites(program) if isinstance(s, TableSite))
    if "untie" in passes and tied:
        assert row["head"] == "untie"
        assert saved < 0
    else:
        assert saved >= 0.3 * row["bytes_before"] - 1
        assert "p0" not in done.program.params
    assert 0 < row["loss"] < 0.7
    by_role = sizes(done.program).by_role
    assert "unused" not in by_role
    assert by_role["embedding"] > 0


@pytest.mark.parametrize("passes", [MATRIX, f"{MATRIX},cores=2,head=untie", ROW, LOW])
def test_token_by_token_is_in_one_go(program: Program, passes: str) -> None:
    made = compiled(program, passes).program
    want = runner_for(made).forward(ids())
    for target in ("reference", "cpu"):
        runner = runner_for(made, target, cached=True)
        cache = runner.start(2, 4)
        have = [runner.forward(x, cache=cache) for x in ids().split([5, *[1] * 11], 1)]
        torch.testing.assert_close(torch.cat(have, 1), want, rtol=1e-4, atol=1e-4)
    half = runner_for(made, dtype=torch.bfloat16).forward(ids())
    assert half.dtype == torch.bfloat16
    assert float((half - want).norm() / want.norm()) < 0.1


@pytest.mark.parametrize("passes", [MATRIX, ROW, LOW])
def test_in_an_artefact(program: Program, passes: str, tmp_path: Path) -> None:
    made = compiled(program, passes).program
    save(tmp_path / "out", Contents(made))
    assert verify(tmp_path / "out") == []
    assert torch.equal(logits(load(tmp_path / "out").program), logits(made))


def test_the_error_of_trains_is_what_was_dropped(program: Program) -> None:
    whole = program.weights.load("p0").double()
    norms = whole.norm(dim=1, keepdim=True)
    for passes in (MATRIX, f"{MATRIX},order=none", ROW, f"{ROW},rank=2"):
        done = compiled(program, passes)
        row = done.structure[0]["records"][0]
        lost = (table_of(done.program).double() - whole) / norms
        assert float(lost.square().sum()) / VOCAB == pytest.approx(row["loss"], rel=1e-4)
        if "loss_by_norm" in row:
            off = (lost * norms).square().sum() / norms.square().sum()
            assert float(off) == pytest.approx(row["loss_by_norm"], rel=1e-4)


def test_tied_head_and_lookup_read_one_table() -> None:
    """The rewritten model is the dense one with its table replaced."""
    program = decoder(vocab=VOCAB, hidden=WIDTH, tied=True)
    apply_segments(program)
    for passes in (MATRIX, f"{MATRIX},order=none", ROW, LOW):
        made = compiled(program, passes).program
        dense = program.clone()
        dense.set_tensor("p0", table_of(made))
        torch.testing.assert_close(logits(made), logits(dense), rtol=1e-4, atol=1e-4)


def test_structured_tables_are_lossless(program: Program) -> None:
    """Rows that are Kronecker products, and a table of low rank, lose nothing."""
    g = torch.Generator().manual_seed(5)
    a, b = (torch.randn(VOCAB, n, generator=g) for n in (4, 8))
    kron = program.clone()
    kron.set_tensor("p0", torch.einsum("va,vb->vab", a, b).flatten(1))
    made = compiled(kron, "tt_embed:granularity=row,shape=4x8,rank=1").program
    torch.testing.assert_close(logits(made), logits(kron), rtol=1e-4, atol=1e-4)
    low = program.clone()
    low.set_tensor("p0", torch.randn(VOCAB, 6, generator=g) @ torch.randn(6, WIDTH, generator=g))
    made = compiled(low, "lowrank_embed:rank=6").program
    torch.testing.assert_close(logits(made), logits(low), rtol=1e-3, atol=1e-3)
    zero = program.clone()
    zero.set_tensor("p0", torch.zeros(VOCAB, WIDTH))
    for passes in (MATRIX, ROW, LOW):
        assert torch.isfinite(logits(compiled(zero, passes).program)).all()


def test_each_factor_is_stored_once(program: Program) -> None:
    """Tied: L by lookup and head, R by both; untied: R is an ordinary linear's weight."""
    done = compiled(program, "lowrank_embed:rank=8")
    made = done.program
    tied = done.structure[0]["records"][0]["tied"]
    left, right = (made.params[f"p0_{end}"] for end in ("left", "right"))
    assert left.shape == (VOCAB, 8)
    assert right.shape == ((8, WIDTH) if tied else (WIDTH, 8))
    users = [len(made.param_node(f"p0_{end}").users) for end in ("left", "right")]
    assert users == ([2, 2] if tied else [1, 1])
    assert program.weight_bytes() - made.weight_bytes() == 4 * (VOCAB * WIDTH - 8 * (VOCAB + WIDTH))


def test_factors_are_best_where_it_counts(program: Program) -> None:
    """Weighed by frequency and by what a tied head reads, the measured metric is never worse."""
    whole = program.weights.load("p0").double()
    plain = compiled(program, "lowrank_embed:rank=8,frequency=no,logits=no")
    often = compiled(program, "lowrank_embed:rank=8,logits=no")
    both = compiled(program, "lowrank_embed:rank=8")
    errors = [table_of(c.program).double() - whole for c in (plain, often, both)]
    assert errors[0].norm() <= min(e.norm() for e in errors[1:]) * (1 + 1e-6)
    tokens = ids(6, seed=1)
    d = (torch.bincount(tokens.flatten(), minlength=VOCAB).double() + 0.5).sqrt()[:, None]
    assert (d * errors[1]).norm() <= min((d * e).norm() for e in errors) * (1 + 1e-6)
    site = next(s for s in table_sites(program) if isinstance(s, TableSite))
    if site.heads:
        reads = str(program.node(site.heads[0]).args[0])
        gram: Any = collect(program, tokens, {reads: ("gram",)}, Options()).get(reads, "gram")
        h = gram.value.double()
        root = torch.linalg.cholesky(h / h.diagonal().mean() + torch.eye(WIDTH).double())
        found = [float((d * e @ root).norm()) for e in errors]
        assert found[2] <= min(found) * (1 + 1e-5)
        row = both.structure[0]["records"][0]
        share = found[2] ** 2 / float((d * whole @ root).square().sum())
        assert share == pytest.approx(row["loss"], rel=1e-3)


def test_what_comes_after_meets_plain_calls(program: Program) -> None:
    tied = len(program.param_node("p0").users) > 1
    for first in ("lowrank_embed:rank=8", f"{MATRIX}", f"{ROW}"):
        done = compiled(program, first, "w4:group=none", "kv8")
        assert torch.isfinite(logits(done.program)).all()
        found = [r["site"] for r in done.records]
        assert ("prologue/linear0" in found) == ("lowrank" in first and not tied)
    exits = compiled(program, MATRIX, "early_exit:agreement=0.05,error=0.5").program
    runner = runner_for(exits, "cpu", cached=True)
    cache = runner.start(2, 4)
    made = [runner.forward(x, cache=cache) for x in ids().split(1, 1)]
    assert torch.isfinite(torch.cat(made, 1)).all()


@pytest.mark.parametrize(
    ("text", "told"),
    [
        ("tt_embed:shape=4x9", r"expected factors of 32, found 4x9 = 36 .*; shape=4x8"),
        ("tt_embed:shape=5x5x5x5x5x5", r"expected factors of 32"),
        ("tt_embed:shape=32", "two to eight factors as in 4x8x8"),
        ("tt_embed:shape=axb", "two to eight factors"),
        ("tt_embed:shape=1x32", "two to eight factors"),
        ("tt_embed:cores=6", r"a width of 6 factors above 1, found 32 .*; cores=5"),
        ("tt_embed:rows=2x3x4", r"factors of 40 or more, found 2x3x4 = 24 .*; rows=\d+x\d+x\d+"),
        ("tt_embed:rows=4x4x4,shape=4x8", "expected 2 factors as in shape=4x8"),
        ("tt_embed:rows=8x8,granularity=row", "granularity=matrix beside it"),
        ("tt_embed:order=none,granularity=row", "granularity=matrix beside it"),
        ("tt_embed:rank=2,remove=0.5", "one of remove and rank"),
        ("tt_embed:rank=1000", "expected at most"),
        ("tt_embed:rank=32,cores=2", "rank 32 of shape 4x8 to save bytes, found"),
        ("tt_embed:remove=0.99", r"expected at most 0\.\d+, which ranks of 1 give"),
        ("lowrank_embed:rank=33", "expected at most 32, found 33"),
        ("lowrank_embed:rank=18", "rank 18 to save bytes, found 5,184 for the table's 5,120"),
        ("lowrank_embed:rank=4,remove=0.2", "one of remove and rank"),
        ("lowrank_embed:remove=0.99", "a share of at most"),
    ],
)
def test_bad_knobs(text: str, told: str) -> None:
    program = decoder(vocab=VOCAB, hidden=WIDTH)
    with pytest.raises(UsageError, match=told) as caught:
        planned(program, text)
    assert "\n" not in str(caught.value)


def test_a_width_without_factors() -> None:
    program = decoder(vocab=VOCAB, hidden=13)
    with pytest.raises(UsageError, match=r"found 13 .*; lowrank_embed takes any width"):
        planned(program, "tt_embed")
    assert planned(program, "lowrank_embed").exact


def test_one_form_of_a_table_at_a_time(program: Program) -> None:
    with pytest.raises(UsageError, match="one pass that writes embedding tables"):
        planned(program, "tt_embed,lowrank_embed")
    with pytest.raises(UsageError, match="expected 'lowrank_embed' before"):
        planned(program, "w4:group=none", "lowrank_embed")


def test_tables_of_positions_stay() -> None:
    """GPT-2's table of positions is looked up by positions, its table of tokens is tied."""
    program = capture_tiny("gpt2")
    apply_segments(program)
    found = table_sites(program)
    assert [f.predicate for f in found if isinstance(f, Refusal)] == ["looked_up_by_tokens"]
    (site,) = (f for f in found if isinstance(f, TableSite))
    assert len(site.heads) == 1
    inputs = model_inputs(ids(2, 8) % site.vocab)
    names = {n.name for n in program.inputs}
    for passes in ("tt_embed:cores=2,remove=0.1", "lowrank_embed:frequency=no,logits=no"):
        made = compile_plan(make_plan(program, from_strings([passes])), None).program
        assert torch.isfinite(run(made, {k: v for k, v in inputs.items() if k in names})).all()


def test_a_table_that_something_else_reads() -> None:
    for passes in ("tt_embed", "lowrank_embed"):
        with pytest.raises(GateError, match=r"aten\.mean\.dim \(\w+\) reads the table as well"):
            planned(build("reads_table"), passes)
