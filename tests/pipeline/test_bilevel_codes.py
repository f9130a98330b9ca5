"""spqr from recipe to artefact: stored bits, bounds, composition, broken tensors."""

import pytest
import torch

from llmc.compiler.ir.errors import UsageError, VerifierError
from llmc.compiler.ir.interpret import run
from llmc.compiler.ir.verifier import verify, verify_tensors
from llmc.compiler.pipeline import recipe, zoo
from llmc.compiler.pipeline.compile import compile_plan
from llmc.compiler.pipeline.measure import model_inputs
from llmc.compiler.pipeline.plan import make_plan
from llmc.compiler.report.data import report


def tokens(samples=6, length=12):
    g = torch.Generator().manual_seed(1)
    return torch.randint(0, 20, (samples, length), generator=g)


def planned(text, **given):
    return make_plan(zoo.decoder(hidden=64, inner=64, heads=16, kv=16), recipe.from_strings([text]))


def logits(program):
    return run(program, model_inputs(tokens()))


@pytest.mark.parametrize(("bits", "zeros"), [(3, True), (4, True), (3, False)])
def test_bits_are_those_of_the_formula(bits, zeros):
    plan = planned(f"spqr:bits={bits},threshold=none,symmetric={'false' if zeros else 'true'}")
    want = bits + (3 + bits * zeros) / 16 + 32 / (16 * 16)
    assert plan.exact
    assert plan.bits_per_weight() == want
    done = compile_plan(plan, tokens())
    assert done.program.weight_bytes() == plan.program.weight_bytes()
    assert {s["bits"] for s in report(done)["sites"]} == {want}


def test_the_plan_bounds_what_stays():
    plan = planned("spqr:threshold=0.05,most=0.02")
    done = compile_plan(plan, tokens())
    verify(done.program)
    verify_tensors(done.program)
    assert not plan.exact
    assert done.program.weight_bytes() <= plan.program.weight_bytes()
    shares = [r["outliers"] for r in done.records]
    assert all(0 <= s <= 0.0201 for s in shares)
    assert max(shares) > 0
    assert torch.isfinite(logits(done.program)).all()


def test_an_infinite_threshold_keeps_all_on_the_grid():
    a, b = (compile_plan(planned(f"spqr:threshold={t}"), tokens()) for t in ("1e30", "none"))
    assert torch.equal(logits(a.program), logits(b.program))
    assert all(r["outliers"] == 0 for r in a.records)


@pytest.mark.parametrize("text", ["prune24,spqr", "smooth,spqr", "spqr,lorc:rank=2", "a8,spqr"])
def test_it_composes(text):
    done = compile_plan(planned(text), tokens())
    verify(done.program)
    verify_tensors(done.program)
    assert torch.isfinite(logits(done.program)).all()
    assert all(0 <= r["loss"] < 1 for r in done.records)


def test_what_does_not_go_together():
    for text, why in (
        ("spqr:solver=rtn", "solver: expected gptq"),
        ("spqr:double=true", "neither double nor power"),
    ):
        with pytest.raises(UsageError, match=why):
            planned(text)
    compile_plan(planned("spqr:solver=rtn,threshold=none"), tokens())


@pytest.mark.parametrize("part", ["step", "low"])
def test_broken_scales_are_found(part):
    done = compile_plan(planned("spqr"), tokens()).program
    name = next(n for n in done.params if n.endswith(f".{part}"))
    done.set_tensor(name, torch.full_like(done.weights.load(name), torch.inf))
    with pytest.raises(VerifierError, match=f"finite {part}"):
        verify_tensors(done)
