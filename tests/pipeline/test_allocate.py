"""allocate=global: each weight's sparsity from the whole model's loss, before the round begins."""

from __future__ import annotations

import pytest
import torch

from llmc.compiler.ir.errors import UsageError
from llmc.compiler.ir.graph import DictWeights
from llmc.compiler.ir.verifier import verify, verify_tensors
from llmc.compiler.pipeline import allocate, recipe, zoo
from llmc.compiler.pipeline.compile import compile_plan
from llmc.compiler.pipeline.plan import make_plan
from llmc.compiler.pipeline.reverse import fisher
from llmc.compiler.pipeline.statistics import Fisher
from llmc.compiler.report.planned import totals


def tokens(samples: int = 6, length: int = 16) -> torch.Tensor:
    g = torch.Generator().manual_seed(1)
    return torch.randint(0, 20, (samples, length), generator=g)


def program(seed=0):
    return zoo.decoder(hidden=16, inner=32, seed=seed)


def compiled(*strings, source=None):
    plan = make_plan(source or program(), recipe.from_strings(list(strings)))
    return compile_plan(plan, tokens())


def sizes(done):
    return {d.site.id: d.site.in_features * d.site.out_features
            for s in done.plan.stages for d in s.decisions.values()}  # fmt: skip


def zeros(done):
    """Zeros of each site, by what is stored."""
    out = {}
    for stage in done.plan.stages:
        for d in stage.decisions.values():
            kept = done.program.weights.load(f"{d.site.param}.values")
            out[d.site.id] = d.site.in_features * d.site.out_features - len(kept)
    return out


GLOBAL = "allocate=global,samples=6"


@pytest.mark.parametrize("solver", ["sparsegpt", "magnitude"])
@pytest.mark.parametrize("share", [0.5, 0.37])
def test_the_overall_share_is_exact_and_each_lies_in_the_band(solver, share):
    done = compiled(f"prune:sparsity={share},solver={solver},{GLOBAL},spread=0.2")
    verify(done.program)
    verify_tensors(done.program)
    total, found = sizes(done), zeros(done)
    assert sum(found.values()) == round(share * sum(total.values()))
    shares = {k: found[k] / total[k] for k in total}
    assert len({round(s, 3) for s in shares.values()}) > 3
    assert all(share - 0.2 - 0.01 < s < share + 0.2 + 0.01 for s in shares.values())
    uniform = compiled(f"prune:sparsity={share},solver={solver}")
    assert abs(done.program.weight_bytes() - uniform.program.weight_bytes()) <= 4 * len(total) / 2


def test_each_scheme_says_its_own_share_and_later_rounds_keep_it():
    text = f"prune:sparsity=0.5,{GLOBAL}"
    done, both = compiled(text), compiled(text, "w4:group=8")
    for found in (done, both):
        for stage in found.plan.stages:
            for d in stage.decisions.values():
                assert d.scheme.mask == found.plan.schemes[d.site.param].mask
    first = {d.site.id: d.scheme.mask for d in done.plan.stages[0].decisions.values()}
    for stage in both.plan.stages:
        assert {d.site.id: d.scheme.mask for d in stage.decisions.values()} == first
    assert {r["scheme"] for r in done.plan.rows()} == {"sparse by loss"}
    of = {r["site"]: r["zeros"] for r in done.records}
    assert all(first[k].sparsity == pytest.approx(of[k], abs=1e-6) for k in first)
    planned = make_plan(program(), recipe.from_strings([text]))
    assert {r["bytes_are"] for r in planned.rows()} == {"on average"}
    assert "-> about " in totals(planned.to_json())[0]


def test_the_predicted_loss_is_never_above_that_of_one_share():
    """Summed over what each weight gives up of its own lowest scores."""
    source = program()
    done = compiled(f"prune:sparsity=0.5,{GLOBAL},spread=1", source=source)
    params = [d.site.param for d in done.plan.stages[0].decisions.values()]
    information = fisher(done.plan.source, tokens(), params)
    lost = {"global": 0.0, "uniform": 0.0}
    for d in done.plan.stages[0].decisions.values():
        w = source.fetch(d.site.param).double()
        score = (w.square() * information[d.site.param].value.double()).flatten().sort().values
        lost["global"] += float(score[: round(d.scheme.mask.sparsity * len(score))].sum())
        lost["uniform"] += float(score[: len(score) // 2].sum())
    assert lost["global"] < 0.9 * lost["uniform"]


def test_a_sensitive_weight_keeps_more_and_equal_ones_the_same(monkeypatch):
    source = program()
    weights = dict(source.weights.tensors)
    shapes: dict[tuple[int, ...], torch.Tensor] = {}
    for name, tensor in weights.items():
        weights[name] = shapes.setdefault(tuple(tensor.shape), tensor).clone()
    source.weights = DictWeights(weights)
    plan = make_plan(source, recipe.from_strings([f"prune:sparsity=0.5,solver=magnitude,{GLOBAL}"]))
    decisions = list(plan.stages[0].decisions.values())
    loud = decisions[3].site.param

    def information(program, ids, params, fetch):
        assert ids.shape == (6, 16)
        flat = {n: torch.ones(program.params[n].shape) for n in params}
        return {n: Fisher(16 * f if n == loud else f, 1) for n, f in flat.items()}

    monkeypatch.setattr(allocate, "fisher", information)
    done = compile_plan(plan, tokens())
    found = {d.site.param: d.scheme.mask.sparsity for d in done.plan.stages[0].decisions.values()}
    twins = [p for p in found if source.params[p].shape == source.params[loud].shape and p != loud]
    assert len(twins) > 1
    assert max(found[p] for p in twins) - min(found[p] for p in twins) <= 1 / 256
    assert found[loud] < min(found[p] for p in twins)


def test_a_scale_that_is_folded_in_the_same_round_changes_no_share():
    """w·s reads x / s, so its gradient falls as the weight grows."""
    text = f"prune:sparsity=0.5,{GLOBAL}"
    assert zeros(compiled(text)) == zeros(compiled(f"smooth,{text}"))


def test_gradients_follow_what_an_earlier_round_changed():
    """Codes cannot come first, folds can: the sweep reads the working copy."""
    seen = {}
    text = f"prune:sparsity=0.5,{GLOBAL}"
    for name, strings in (("folded", ["smooth", text]), ("plain", [text])):
        done = compiled(*strings)
        seen[name] = zeros(done)
    assert all(abs(seen["folded"][k] - n) <= 2 for k, n in seen["plain"].items())


def test_overrides_make_pools_of_their_own():
    source = program()
    knobs = {"sparsity": 0.5, "allocate": "global", "samples": 6}
    own = {"where": {"role": ["q"]}, "set": {"prune": {"sparsity": 0.25}}}
    given = recipe.from_mapping({"version": 1, "stages": [{"prune": knobs}], "overrides": [own]})
    done = compile_plan(make_plan(source, given), tokens())
    of = {d.site.id: d.site.role for d in done.plan.stages[0].decisions.values()}
    total, found = sizes(done), zeros(done)
    for share, inside in ((0.25, True), (0.5, False)):
        pool = [k for k, role in of.items() if (role == "q") is inside]
        assert sum(found[k] for k in pool) == round(share * sum(total[k] for k in pool))


def test_it_needs_calibration_data_even_for_magnitude():
    plan = make_plan(program(), recipe.from_strings([f"prune:solver=magnitude,{GLOBAL}"]))
    assert plan.needing == ["prune"]
    with pytest.raises(UsageError, match="expected calibration data for prune"):
        compile_plan(plan, None)
    plain = make_plan(program(), recipe.from_strings(["prune:solver=magnitude"]))
    cost = [p.predictions(96, 16) for p in (plain, plan)]
    assert cost[0]["calibration_flops"] < cost[1]["calibration_flops"]
    assert cost[0]["ram_bound"] < cost[1]["ram_bound"]


@pytest.mark.parametrize(
    ("text", "words"),
    [
        ("prune24:allocate=global", "expected unstructured zeros to share out, found 2:4"),
        ("prune:spread=0.1", "prune:spread: expected allocate=global"),
        ("prune:samples=4", "prune:samples: expected allocate=global"),
        ("prune:allocate=golbal", "expected one of uniform, global"),
    ],
)
def test_what_cannot_be_shared_out_is_refused(text, words):
    with pytest.raises(UsageError, match=words):
        recipe.from_strings([text])
