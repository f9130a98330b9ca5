"""Outliers beside codes and a mask, from recipe to artefact: counts, bytes, exactness, rounds."""

from __future__ import annotations

import pytest
import torch

from llmc.compiler.ir import packing
from llmc.compiler.ir.errors import UsageError
from llmc.compiler.ir.interpret import run
from llmc.compiler.ir.verifier import verify, verify_tensors
from llmc.compiler.pipeline import recipe, zoo
from llmc.compiler.pipeline.compile import compile_plan
from llmc.compiler.pipeline.measure import model_inputs
from llmc.compiler.pipeline.plan import make_plan
from llmc.compiler.runtime.artefact import Contents, load, save
from llmc.compiler.runtime.lowering import runner_for

CODES = ["squeezellm:outliers=0.05,weigh=gram", "gobo:most=0.05", "spqr:threshold=0.01",
         "int8_split:threshold=2"]  # fmt: skip
MASKS = ["prune24", "prune48:solver=wanda", "prune:sparsity=0.6,solver=magnitude"]


def tokens(samples=4, length=10):
    g = torch.Generator().manual_seed(1)
    return torch.randint(0, 20, (samples, length), generator=g)


def planned(*texts):
    return make_plan(
        zoo.decoder(hidden=32, inner=32, heads=8, blocks=1), recipe.from_strings(list(texts))
    )


def read_weights(program):
    """What each linear of a block multiplies by, by the name of its own parameter: [out, in]."""
    seen, found = {}, {}
    run(program, model_inputs(tokens(1)), observe=lambda n, v: seen.setdefault(n.name, v))
    for node in program.calls("aten.linear.default"):
        source = node.args[1]
        while source.op == "call_function":
            source = source.all_input_nodes[0]
        found[str(source.target)] = seen[node.args[1].name]
    return found


@pytest.mark.parametrize("codes", CODES)
@pytest.mark.parametrize("mask", MASKS)
def test_all_three_in_one_string(codes, mask, tmp_path):
    plan = planned(f"{mask},{codes}")
    done = compile_plan(plan, tokens())
    verify(done.program)
    verify_tensors(done.program)
    before, after = plan.program.weight_bytes(), done.program.weight_bytes()
    assert before == after if plan.exact else before >= after
    found = {d.site.param: d for d in plan.stages[0].decisions.values()}
    share = 0.6 if "0.6" in mask else 0.5
    for record, d in zip(done.records, found.values(), strict=True):
        total = d.site.in_features * d.site.out_features
        zeros, beside = (round(record[k] * total) for k in ("zeros", "outliers"))
        if "sparsity" in mask:
            assert zeros == int(share * total)
        else:
            assert total // 2 - beside <= zeros <= total // 2
    for name, weight in read_weights(done.program).items():
        if name.endswith(".codes") and "sparsity" not in mask:
            base, (n, m) = name.removesuffix(".codes"), (4, 8) if "48" in mask else (2, 4)
            meta = done.program.weights.load(f"{base}.meta")
            kept = torch.ones(len(meta), weight.shape[1] // m * n, dtype=torch.bool)
            wide = packing.expand_nm(kept, meta, n, m, weight.shape[1])
            assert bool((wide.view(len(wide), -1, m).sum(-1) == n).all())
    save(tmp_path / "out", Contents(done.program))
    again = load(tmp_path / "out", verify=True).program
    want = run(done.program, model_inputs(tokens()))
    assert torch.equal(run(again, model_inputs(tokens())), want)
    torch.testing.assert_close(
        runner_for(again, "cpu").forward(tokens()).float(), want, rtol=1e-4, atol=1e-4
    )


@pytest.mark.parametrize("mask", ["prune24:solver=wanda", "prune:sparsity=0.5,solver=magnitude"])
def test_outlier_columns_are_exact_and_have_no_code_that_counts(mask):
    plan = planned(f"{mask},int8_split:threshold=2,solver=rtn")
    done = compile_plan(plan, tokens())
    read = read_weights(done.program)
    some = 0
    for d in plan.stages[0].decisions.values():
        linear = done.program.node(d.site.node)
        columns = done.program.fetch(str(linear.args[0].args[2].target)).long()
        base = d.site.param
        dense = plan.source.fetch(base)
        assert torch.equal(done.program.weights.load(f"{base}.beside"), dense[:, columns])
        assert not bool(read[f"{base}.codes"][:, columns].any())
        some += len(columns)
    assert some > 0


@pytest.mark.parametrize("codes", CODES)
@pytest.mark.parametrize("mask", ["prune24", "prune:sparsity=0.6"])
def test_what_an_earlier_round_dropped_stays_dropped(mask, codes):
    """No outlier brings a zero back, though errors are pushed onto it and columns are whole."""
    plan = planned(mask, codes)
    done = compile_plan(plan, tokens())
    verify_tensors(done.program)
    assert plan.program.weight_bytes() >= done.program.weight_bytes()
    first = compile_plan(planned(mask), tokens()).program
    zeros = {k.rpartition(".")[0]: v == 0 for k, v in read_weights(first).items() if "." in k}
    read, beside = read_weights(done.program), 0
    for base, dropped in zeros.items():
        if f"{base}.codes" not in read:
            continue
        weight = read[f"{base}.codes"]
        assert not bool(weight[dropped].any())
        if "split" in codes:
            part = done.program.weights.load(f"{base}.beside")
            linear = done.program.node(next(
                d.site.node for d in plan.stages[1].decisions.values() if d.site.param == base
            ))  # fmt: skip
            columns = done.program.fetch(str(linear.args[0].args[2].target)).long()
            assert not bool(part[dropped[:, columns]].any())
            beside += part.numel()
    assert beside or "split" not in codes
    rounds = [[r["zeros"] for r in done.records if r["round"] == i] for i in (0, 1)]
    assert rounds[0] == rounds[1]


def test_what_the_mask_drops_of_each_row_and_what_is_beside_it_have_one_place():
    with pytest.raises(UsageError, match="expected one sparse per weight"):
        planned("prune24:recover=0.05,squeezellm")
    with pytest.raises(UsageError, match="expected pairs of neighbours"):
        planned("prune24,olive")
