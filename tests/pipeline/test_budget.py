"""The budget of Hessians: folds and solves are parted until it holds, and nothing else changes."""

from __future__ import annotations

import pytest
import torch

from llmc.compiler.pipeline import recipe, rounds, zoo
from llmc.compiler.pipeline.compile import compile_plan
from llmc.compiler.pipeline.measure import Options
from llmc.compiler.pipeline.plan import make_plan

ONE = 4 * 32 * 32
"""fp32 bytes of the Hessian of 32 inputs; that of 64 takes four times as many."""


def held(monkeypatch, text, budget=None, **given):
    """Bytes of XᵀX in each collection of a compile that has any, and what it made."""
    sizes = []
    collect = rounds._Round._collect

    def seen(self, segment, stats, fetch):
        collect(self, segment, stats, fetch)
        grams = [s.value for (_, name), s in stats.data.items() if name.startswith("gram")]
        sizes.append(sum(g.numel() * g.element_size() for g in grams))

    program = zoo.decoder(hidden=32, inner=64, heads=8, blocks=1)
    plan = make_plan(program, recipe.from_strings([text]))
    ids = torch.randint(0, 20, (6, 12), generator=torch.Generator().manual_seed(1))
    options = Options(**given) if budget is None else Options(budget=budget, **given)
    with monkeypatch.context() as patch:
        patch.setattr(rounds._Round, "_collect", seen)
        done = compile_plan(plan, ids, options)
    return [size for size in sizes if size], done


@pytest.mark.parametrize("text", ["awq", "awq,w4:group=8,solver=rtn", "awq,w4:group=8"])
def test_folds_are_counted_and_parted(monkeypatch, text):
    whole, first = held(monkeypatch, text)
    assert whole == [7 * ONE, ONE]  # the block; the last norm, before the head
    for budget in (4 * ONE, 5 * ONE):
        parts, done = held(monkeypatch, text, budget)
        assert len(parts) > 2
        assert max(parts) <= budget
        assert [f["site"] for f in done.folds] == [f["site"] for f in first.folds]
        for a, b in zip(done.folds, first.folds, strict=True):
            assert a["alpha"] == b["alpha"]
            assert a["loss"] == pytest.approx(b["loss"], rel=1e-4)
        for a, b in zip(done.records, first.records, strict=True):
            assert a["site"] == b["site"]
            assert a["loss"] == pytest.approx(b["loss"], rel=1e-2)


def test_a_budget_that_holds_one_part_changes_nothing(monkeypatch):
    text = "awq,w4:group=8,prune24"
    whole, first = held(monkeypatch, text)
    again, same = held(monkeypatch, text, max(whole))
    assert again == whole
    for name in first.program.params:
        assert torch.equal(first.program.weights.load(name), same.program.weights.load(name))


def test_solves_leave_the_part_of_the_folds_where_both_do_not_fit(monkeypatch):
    """smooth reads no Hessian; awq's own are those of its readers, counted once."""
    parts, _ = held(monkeypatch, "smooth,w4:group=8", 4 * ONE)
    assert sorted(parts) == [3 * ONE, 4 * ONE]
    parts, _ = held(monkeypatch, "awq,w4:group=8", 7 * ONE)
    assert parts == [7 * ONE, ONE]


def test_waves_in_sequence_fold_with_the_first(monkeypatch):
    _, first = held(monkeypatch, "awq,w4:group=8", true_sequential=True)
    parts, done = held(monkeypatch, "awq,w4:group=8", 4 * ONE, true_sequential=True)
    assert max(parts) <= 4 * ONE
    assert [r["site"] for r in done.records] == [r["site"] for r in first.records]
