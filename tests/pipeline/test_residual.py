"""Low rank beside codes and zeros from recipe to artefact: bytes, outputs, order, refusals."""

import pytest
import torch

from llmc.compiler.ir.errors import UsageError
from llmc.compiler.ir.interpret import run
from llmc.compiler.ir.verifier import verify, verify_tensors
from llmc.compiler.pipeline import recipe, zoo
from llmc.compiler.pipeline.compile import compile_plan
from llmc.compiler.pipeline.measure import model_inputs
from llmc.compiler.pipeline.plan import make_plan
from llmc.compiler.report.data import report, summary
from llmc.compiler.runtime.artefact import Contents, load, save
from llmc.compiler.runtime.lowering import runner_for


def tokens(samples=6, length=12):
    g = torch.Generator().manual_seed(1)
    return torch.randint(0, 20, (samples, length), generator=g)


def planned(*texts, **given):
    program = zoo.decoder(hidden=32, inner=32, heads=8, **given)
    return make_plan(program, recipe.from_strings(list(texts)))


def logits(program):
    return run(program, model_inputs(tokens()))


TEXTS = ["w3:group=8,lorc:rank=4", "nf4:group=8,lorc:rank=2", "prune24,lorc:rank=4",
         "prune24,w4:group=8,lorc:rank=4", "w8a8,lorc:rank=3", "int8_split:threshold=3,lorc:rank=3",
         "squeezellm:bits=3,lorc:rank=3", "smooth,w3:group=8,lorc:rank=4,form=weights",
         "w3:solver=rtn,lorc:rank=4"]  # fmt: skip


@pytest.mark.parametrize("text", TEXTS)
def test_it_composes(text):
    plan = planned(text, bias=True)
    done = compile_plan(plan, None if "rtn" in text else tokens())
    verify(done.program)
    verify_tensors(done.program)
    assert torch.isfinite(logits(done.program)).all()
    if plan.exact:
        assert plan.program.weight_bytes() == done.program.weight_bytes()
    assert all(r["loss"] <= r["without_rank"] for r in done.records)
    assert sum(r["loss"] for r in done.records) < sum(r["without_rank"] for r in done.records)
    k = done.records[0]["rank"]
    sizes = [32 + d.site.out_features for d in plan.stages[0].decisions.values()]
    parts = [p.bytes for p in done.program.params.values() if p.name[-5:] in (".left", "right")]
    assert sum(parts) == 2 * k * sum(sizes)


@pytest.mark.parametrize("text", ["w3:group=8", "prune24,w4:group=8", "int8_split:threshold=3"])
def test_factors_of_eight_bits(text, tmp_path):
    """Bytes to the last one, little lost against 16 bits, and every reader agrees."""
    wide = compile_plan(planned(f"{text},lorc:rank=8"), tokens())
    plan = planned(f"{text},lorc:rank=8,factor_bits=8")
    done = compile_plan(plan, tokens())
    verify_tensors(done.program)
    assert all("+rank 8 of 8 bits" in d.scheme.short for d in plan.stages[0].decisions.values())
    if plan.exact:
        assert plan.program.weight_bytes() == done.program.weight_bytes()
    sizes = [
        (32 + 2) * 8 + (8 + 2) * d.site.out_features for d in plan.stages[0].decisions.values()
    ]
    parts = [p for p in done.program.params.values() if "left_" in p.name or "right_" in p.name]
    assert sum(p.bytes for p in parts) == sum(sizes)
    a, b = (sum(r["loss"] for r in d.records) for d in (wide, done))
    assert b < 1.1 * a
    assert b < sum(r["without_rank"] for r in done.records)
    save(tmp_path / "out", Contents(done.program))
    again = load(tmp_path / "out", verify=True).program
    assert torch.equal(logits(again), logits(done.program))
    # Eight-bit products of rows that share a scale run on a kernel that rounds scales to bf16.
    got = runner_for(again, "cpu").forward(tokens()).float()
    assert float((got - logits(done.program)).norm() / logits(done.program).norm()) < 1e-2


def test_full_rank_gives_the_model_back():
    whole = compile_plan(planned("w2:group=8,lorc:rank=32,form=weights", kv=8), tokens())
    assert all(r["loss"] < 1e-5 for r in whole.records)
    exact = logits(planned("w4", kv=8).source)
    torch.testing.assert_close(logits(whole.program), exact, rtol=2e-2, atol=2e-2)


def test_the_working_copy_computes_what_the_graph_computes():
    plan = planned("w3:group=8,lorc:rank=4")
    d = next(iter(plan.stages[0].decisions.values()))
    done = compile_plan(plan, tokens()).program
    linear = done.node(d.site.node)
    total = next(u for u in linear.users)
    assert total.args[0] is linear
    few = total.args[1].args[0]
    assert few.args[0] is linear.args[0]
    assert done.param_of(few.args[1]).shape == (4, 32)
    assert done.param_of(total.args[1].args[1]).dtype == torch.float16


def test_reports_say_rank_and_what_was_left():
    done = compile_plan(planned("w3:group=8,lorc:rank=4"), tokens())
    told = report(done)
    assert all(s["rank"] == 4 and s["loss"] < s["without_rank"] for s in told["sites"])
    assert any("low rank lowered it" in line for line in summary(told))
    assert "+rank 4" in told["sites"][0]["scheme"]


def test_an_artefact_keeps_it(tmp_path):
    done = compile_plan(planned("w3:group=8,lorc:rank=4"), tokens())
    save(tmp_path / "out", Contents(done.program))
    assert torch.equal(logits(load(tmp_path / "out").program), logits(done.program))


@pytest.mark.parametrize("texts", [["lorc"], ["w4", "lorc"], ["smooth,lorc"], ["a8,lorc"]])
def test_it_needs_what_loses_in_its_string(texts):
    with pytest.raises(UsageError, match="expected a grid or a mask beside 'lorc'"):
        planned(*texts)


def test_nothing_is_coded_behind_it():
    with pytest.raises(UsageError, match="before 'lorc'"):
        planned("prune24,lorc", "w4")


def test_a_rank_that_does_not_fit():
    with pytest.raises(UsageError, match="lorc:factor_bits: expected 8 or 16, found 12"):
        planned("w4,lorc:factor_bits=12")
    with pytest.raises(UsageError, match="lorc:rank: expected at most 32, found 33"):
        planned("w4,lorc:rank=33", kv=4)
    sizes = {d.scheme.low_rank.rank for d in planned("w4,lorc").stages[0].decisions.values()}
    assert sizes == {8}
