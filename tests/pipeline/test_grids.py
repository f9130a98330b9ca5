"""Every grid from recipe to artefact: planned bytes, laws, knobs, and combinations that refuse."""

from __future__ import annotations

import functools

import pytest
import torch

from llmc.compiler.ir.errors import UsageError
from llmc.compiler.ir.interpret import run
from llmc.compiler.ir.scheme import Codes
from llmc.compiler.ir.verifier import verify, verify_tensors
from llmc.compiler.pipeline import recipe, zoo
from llmc.compiler.pipeline.coding import halvings
from llmc.compiler.pipeline.compile import compile_plan
from llmc.compiler.pipeline.granularity import chosen_group
from llmc.compiler.pipeline.measure import model_inputs
from llmc.compiler.pipeline.plan import make_plan
from llmc.compiler.report.data import report
from llmc.compiler.runtime import artefact
from llmc.compiler.runtime.lowering import runner_for


def tokens(samples: int = 8, length: int = 16) -> torch.Tensor:
    g = torch.Generator().manual_seed(1)
    return torch.randint(0, 20, (samples, length), generator=g)


def program():
    return zoo.decoder(hidden=32, inner=64, heads=4)


@functools.cache
def planned(text):
    return make_plan(program(), recipe.from_strings([text]))


@functools.cache
def solved(text):
    return compile_plan(make_plan(program(), recipe.from_strings([text])), tokens())


EXACT = [
    "nf4:group=16",
    "nf3:solver=rtn,group=row",
    "nf4:group=8,double=true",
    "w4:group=16,double=true,symmetric=false",
    "fp4:power=true,sweeps=1",
    "fp8w",
    "fp8w:format=e5m2,group=32",
    "ternary:group=32",
    "binary:group=16,solver=rtn",
    "quantile:bits=3,group=16",
    "bcq:bits=2,group=16",
    "squeezellm:bits=3,outliers=0.02",
    "squeezellm:weigh=gram,solver=gptq,outliers=0,sensitive=0",
    "w4:group=16,clip=percentile,percentile=97",
    "prune24,nf4:group=16",
    "prune24,binary:group=32",
    "prune:sparsity=0.5,ternary:group=32",
    "smooth,fp4",
]


@pytest.mark.parametrize("text", [*EXACT, "gobo:most=0.05"])
def test_planned_bytes_are_found_bytes_and_the_laws_hold(text):
    done = solved(text)
    verify(done.program)
    verify_tensors(done.program)
    plan = planned(text)
    free = "prune:" in text or "gobo" in text
    assert plan.exact == ("gobo" not in text)
    if free:
        assert done.program.weight_bytes() <= plan.program.weight_bytes() + 64
    else:
        assert done.program.weight_bytes() == plan.program.weight_bytes()
    out = run(done.program, model_inputs(tokens(2)))
    assert bool(torch.isfinite(out).all())
    assert all(0 <= r["loss"] < 1 for r in done.records)
    # An unstructured mask is kept or left as a whole, and this model hears only noise.
    assert "prune:" in text or all(not r["fallbacks"] for r in done.records)


def test_zeros_stay_zero_beside_levels():
    for text in ("prune24,nf4:group=16", "prune24,binary:group=32", "prune:sparsity=0.5,ternary"):
        done = solved(text)
        assert all(abs(r["zeros"] - 0.5) < 0.05 for r in done.records)
        seen: dict[str, torch.Tensor] = {}
        run(done.program, model_inputs(tokens(1)), observe=lambda n, v: seen.setdefault(n.name, v))  # noqa: B023
        for node in done.program.calls("aten.linear.default"):
            weight = node.args[1]
            if weight.op == "call_function":
                assert int((seen[weight.name] == 0).sum()) >= 0.45 * seen[weight.name].numel()


def test_bits_of_a_weight_count_everything_beside_it():
    """4 + 16/16; 4 + 8/8 + 32/(8·256) and a mean per matrix; 3 + outliers + a table per row."""
    assert planned("nf4:group=16").bits_per_weight() == pytest.approx(5.0)
    sizes = [r["shape"][0] * r["shape"][1] for r in planned("nf4:group=8,double=true").rows()]
    steps = sum(-(-(n // 8) // 256) for n in sizes)
    want = 4 + 1 + 32 * (steps + len(sizes)) / sum(sizes)
    assert planned("nf4:group=8,double=true").bits_per_weight() == pytest.approx(want)
    assert planned("fp8w").bits_per_weight() == pytest.approx(
        8 + 16 * sum(r["shape"][0] for r in planned("fp8w").rows()) / sum(sizes)
    )
    for row in planned("bcq:bits=2,group=16").rows():
        m, n = row["shape"]
        assert row["bytes_after"] == 2 * m * (-(-n // 32) * 4 + n // 16 * 2)
    done = solved("squeezellm:bits=3,outliers=0.02")
    rows = {r["site"]: r for r in report(done)["sites"]}
    for row in rows.values():
        m, n = row["shape"]
        count = round(0.0205 * m * n)
        words = -(-3 * n // 32)
        assert row["bytes_after"] == m * words * 4 + m * 8 * 2 + count * (4 + 2) + (m + 1) * 4
        assert row["outliers"] == pytest.approx(count / (m * n))


def test_fisher_and_gram_choose_different_levels():
    fisher, gram = solved("squeezellm"), solved("squeezellm:weigh=gram")
    for name in fisher.program.params:
        if name.endswith(".table"):
            assert not torch.equal(
                fisher.program.weights.load(name), gram.program.weights.load(name)
            )
    assert planned("squeezellm").needing == ["squeezellm"]
    assert planned("nf4:solver=rtn").needing == []


@pytest.mark.parametrize(
    "text", ["nf4:group=16,double=true", "squeezellm:bits=3,outliers=0.02", "bcq:bits=2,group=16"]
)
def test_artefact_gives_the_same_logits(text, tmp_path):
    done = solved(text)
    ids = tokens(2)
    want = run(done.program, model_inputs(ids))
    artefact.save(tmp_path / "out", artefact.Contents(done.program))
    loaded = artefact.load(tmp_path / "out", verify=True).program
    assert torch.equal(run(loaded, model_inputs(ids)), want)
    half = runner_for(loaded, "cpu", dtype=torch.bfloat16)
    assert bool(torch.isfinite(half.forward(ids).float()).all())


def test_groups_are_halved_while_that_pays():
    """Rows of one range keep one scale; rows whose ranges differ from part to part do not."""
    flat = torch.randn(8, 256, generator=torch.Generator().manual_seed(0)).clamp(-1, 1)
    ranges = torch.tensor([1.0, 16.0]).repeat_interleave(128)
    codes = Codes(4, None)
    assert halvings(256) == [256, 128, 64, 32]
    assert halvings(96) == [96, 48]
    assert halvings(40, 3) == [40]
    assert chosen_group(flat, codes, 0.2) == 256
    assert chosen_group(flat * ranges, codes, 0.2) == 128
    assert chosen_group(flat, codes, 0.99) == 256


@pytest.mark.parametrize(
    "text",
    ["w4:group=auto", "prune24,nf4:group=auto,double=true,fall=0.02", "w2:group=auto"],
)
def test_chosen_groups_stand_in_plan_and_graph(text):
    plan = make_plan(zoo.decoder(hidden=128, inner=256, heads=4), recipe.from_strings([text]))
    most = plan.program.weight_bytes()
    assert not plan.exact
    done = compile_plan(plan, tokens(4))
    verify(done.program)
    verify_tensors(done.program)
    assert done.program.weight_bytes() <= most
    stated = {s.codes.group for s in done.plan.schemes.values()}
    assert stated <= {None, 128, 64, 32}
    kept = 2 if "prune24" in text else 1
    steps = [*done.program.calls("llmc.dequantize"), *done.program.calls("llmc.lookup")]
    found = {int(n.kwargs["group"]) * kept for n in steps}
    assert stated - {None} <= found
    assert bool(torch.isfinite(run(done.program, model_inputs(tokens(1)))).all())


@pytest.mark.parametrize(
    ("text", "word"),
    [
        ("w4:fall=0.2", "group=auto"),
        ("w4:group=some", "a whole number or auto"),
        ("nf4:group=24", "nearest is group=16"),
        ("bcq:group=28", "nearest is group=32"),
        ("fp8w:group=12", "fp8w:group"),
        ("fp4:bits=3", "knob"),
        ("squeezellm:group=64", "knob"),
        ("bcq:bits=6", "1..5"),
        ("nf4:bits=3", "knob"),
        ("ternary:clip=percentile", "absmean"),
        ("w4:percentile=99", "clip=percentile"),
        ("nf4:double=true,power=true", "one of double and power"),
        ("squeezellm:weigh=gram,samples=3", "weigh=fisher"),
        ("prune:sparsity=0.5,binary", "holds 0"),
        ("prune:sparsity=0.5,bcq", "holds 0"),
        ("prune24:recover=0.1,squeezellm", "expected one sparse per weight"),
        ("nf4,w4", "one pass"),
    ],
)
def test_combinations_without_meaning_are_refused(text, word):
    with pytest.raises(UsageError) as e:
        make_plan(program(), recipe.from_strings([text]))
    assert word in f"{e.value} {e.value.hint}"
    assert e.value.exit_code == 2
