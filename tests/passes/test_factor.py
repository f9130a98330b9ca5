"""svd, fwsvd, asvd and svdllm end to end: the two linears, losses, ranks, orders, refusals."""

from __future__ import annotations

import json

import pytest
import torch
from torch import Tensor

import llmc
from llmc.compiler.analysis.linears import LinearSite
from llmc.compiler.analysis.ties import op_name
from llmc.compiler.ir.errors import GateError, ModelError, UsageError
from llmc.compiler.ir.graph import Program
from llmc.compiler.ir.interpret import run
from llmc.compiler.pipeline import recipe, zoo
from llmc.compiler.pipeline.analysis import Analysis
from llmc.compiler.pipeline.compile import compile_plan
from llmc.compiler.pipeline.measure import Options, collect, model_inputs
from llmc.compiler.pipeline.plan import make_plan
from llmc.compiler.report.difference import changes
from llmc.compiler.runtime.cache import add_cache
from llmc.compiler.runtime.executor import Runner
from llmc.compiler.solvers.factor import output_loss

NAMES = ("svd", "fwsvd", "asvd", "svdllm")
OPTIONS = Options(batch=3)


def tokens(samples: int = 6, length: int = 12, seed: int = 1) -> Tensor:
    g = torch.Generator().manual_seed(seed)
    return torch.randint(0, 20, (samples, length), generator=g)


def compiled(passes: str | list[str], program: Program, ids: Tensor | None = None):
    strings = [passes] if isinstance(passes, str) else passes
    plan = make_plan(program, recipe.from_strings(strings))
    return compile_plan(plan, tokens() if ids is None else ids, OPTIONS)


def logits(program: Program) -> Tensor:
    return run(program, model_inputs(tokens(3)))


def sites(program: Program) -> dict[str, LinearSite]:
    found = Analysis(program.clone()).linears
    return {s.id: s for s in found if isinstance(s, LinearSite)}


def products(done) -> dict[str, Tensor]:
    """A·B by site id of the dense program, read from the graph."""
    out = {}
    for name, site in sites(done.plan.captured).items():
        node = done.program.node(site.node)
        latent = node.args[0]
        if name in done.structure[0]["choice"]["ranks"]:
            assert op_name(latent) == "aten.linear.default"
            left, right = (done.program.fetch(n.target) for n in (node.args[1], latent.args[1]))
            out[name] = left @ right
    return out


def rows(done) -> dict[str, dict]:
    return {r["site"]: r for r in done.structure[0]["records"]}


# ** the rewrite **


@pytest.mark.parametrize("name", [*NAMES, "svdllm:share=true"])
@pytest.mark.parametrize("model", ["llama_gqa", "layer_norm", "one_plus_gain"])
def test_two_linears_compute_the_product_with_the_bias_behind_it(model, name):
    program = zoo.build(model)
    done = compiled(name, program)
    whole, made = program.clone(), products(done)
    assert len(made) == len(sites(program)) - 1  # all but the head
    for site, product in made.items():
        whole.set_tensor(sites(program)[site].param, product)
    torch.testing.assert_close(logits(done.program), logits(whole), rtol=1e-4, atol=1e-4)
    assert not torch.allclose(logits(whole), logits(program), atol=1e-3)


def test_factors_are_stored_as_the_weight_was_and_named_after_it():
    program = zoo.build("with_bias")
    for name in list(program.params):
        program.set_tensor(name, program.weights.load(name).to(torch.bfloat16))
    done = compiled("svdllm:rank=4", program)
    site = sites(program)["block0/linear0"]
    param = done.program.params[f"{site.param}_left"]
    assert param.dtype == torch.bfloat16
    assert param.shape == (16, 4)
    assert done.program.params[f"{site.param}_right"].shape == (4, 16)
    assert site.param not in done.program.params
    assert len(done.program.node(site.node).args) == 3
    assert done.program.weight_bytes() == done.plan.program.weight_bytes()


def test_a_shared_latent_is_computed_once_and_shows_in_the_diff():
    program = zoo.build("llama_gqa")
    done = compiled("svdllm:share=true,rank=4", program)
    found = sites(program)
    q, k, v = (done.program.node(found[f"block0/linear{i}"].node) for i in range(3))
    assert q.args[0] is k.args[0] is v.args[0]
    assert len(q.args[0].users) == 3
    units = done.structure[0]["choice"]["units"]
    assert units[0] == ["block0/linear0", "block0/linear1", "block0/linear2"]
    assert [len(u) for u in units] == [3, 1, 2, 1] * 2
    added = [c.after for c in changes(done.plan.captured, done.program) if c.kind == "added"]
    latents = [r["name"] for r in added if r["op"] != "param"]
    assert all(name.endswith("_latent") for name in latents)
    assert len(latents) == 8
    lone = compiled("svdllm:rank=4", program)
    assert done.program.weight_bytes() < lone.program.weight_bytes()


def test_joint_factors_are_the_best_for_all_who_read_them():
    program = zoo.build("llama_gqa")
    done = compiled("svdllm:share=true,rank=4", program)
    found = sites(program)
    value = found["block0/linear0"].reads
    x = collect(program_segmented(program), tokens(), {value: ["gram64"]}, OPTIONS)
    gram = x.get(value, "gram64").value
    three = [found[f"block0/linear{i}"] for i in range(3)]
    weight = torch.cat([program.weights.load(s.param) for s in three])
    made = torch.cat([products(done)[s.id] for s in three])
    root = torch.linalg.cholesky(gram)
    left = torch.linalg.svdvals(weight.double() @ root)[4:].square().sum()
    assert output_loss(weight, made, gram) == pytest.approx(float(left), rel=1e-5)


def program_segmented(program: Program) -> Program:
    clone = program.clone()
    Analysis(clone)
    return clone


# ** losses **


def test_the_told_loss_is_that_of_the_outputs_and_no_other_method_is_below():
    program = program_segmented(zoo.build("llama_gqa"))
    found = sites(program)
    stats = collect(program, tokens(), {s.reads: ["gram64"] for s in found.values()}, OPTIONS)
    losses: dict[str, dict[str, float]] = {}
    for name in NAMES:
        done = compiled(f"{name}:rank=4", program)
        for site, made in products(done).items():
            weight = program.weights.load(found[site].param)
            gram = stats.get(found[site].reads, "gram64").value
            whole = output_loss(weight, torch.zeros_like(weight), gram)
            losses.setdefault(site, {})[name] = output_loss(weight, made, gram) / whole
        if name == "svdllm":
            for site, loss in losses.items():
                assert rows(done)[site]["loss"] == pytest.approx(loss[name], rel=1e-4)
    for loss in losses.values():
        assert min(loss.values()) >= loss["svdllm"] * (1 - 1e-6)


@pytest.mark.parametrize("name", ["svdllm", "svd", "asvd", "fwsvd"])
def test_the_update_lowers_what_is_read(name):
    done = compiled(f"{name}:rank=4,update=closed", zoo.build("four_blocks"))
    told = [r for r in rows(done).values() if "rank" in r]
    assert all(r["read_after_update"] <= r["read_before_update"] * (1 + 1e-9) for r in told)
    # The first linears of the whitened model read what the dense ones read: nothing to gain.
    first = rows(done)["block0/linear0"]
    gain = first["read_before_update"] - first["read_after_update"]
    assert (gain < 1e-6) == (name == "svdllm")
    last = rows(done)["block3/linear6"]
    assert last["read_after_update"] < 0.99 * last["read_before_update"]


def test_sequential_metrics_are_of_what_the_factors_read():
    program = program_segmented(zoo.build("llama_gqa"))
    done = compiled("svdllm:rank=4,sequential=true", program)
    one = done.plan.captured.clone()
    for site, product in products(done).items():
        if site.startswith("block0"):
            one.set_tensor(sites(program)[site].param, product)
    site = sites(program)["block1/linear0"]
    stats = collect(one, tokens(), {site.reads: ["gram64"]}, OPTIONS)
    gram = stats.get(site.reads, "gram64").value
    weight = program.weights.load(site.param)
    whole = output_loss(weight, torch.zeros_like(weight), gram)
    want = output_loss(weight, products(done)[site.id], gram) / whole
    assert rows(done)[site.id]["loss"] == pytest.approx(want, rel=1e-3)


def test_few_tokens_are_a_recorded_fallback():
    done = compiled("svdllm:rank=4", zoo.build("llama_gqa"), tokens(1, 6))
    told = rows(done)["block0/linear0"]
    assert "XᵀX has rank 6 of 16" in told["fallbacks"][0]
    assert torch.isfinite(logits(done.program)).all()


# ** ranks **


@pytest.mark.parametrize("weigh", ["fisher", "loss", "output", "none"])
def test_ranks_of_least_predicted_loss_never_lose_to_one_share(weigh):
    program = zoo.build("four_blocks")
    done = compiled(f"svdllm:alloc=global,weigh={weigh},samples=2", program)
    told = rows(done)["all"]
    assert told["predicted"] <= told["predicted_uniform"]
    assert told["bytes_of"] <= told["bytes_uniform"]
    one = compiled("svdllm", program)
    assert done.program.weight_bytes() <= one.program.weight_bytes()
    assert not done.plan.steps[0].choice.exact or done.plan.exact


def test_the_threshold_search_fits_and_leaves_what_hurts_dense():
    program = zoo.build("four_blocks")
    done = compiled("asvd:alloc=asvd,samples=2,remove=0.3", program)
    one = compiled("asvd:remove=0.3", program)
    assert done.program.weight_bytes() <= one.program.weight_bytes()
    assert rows(done)["all"]["threshold"] >= 0


def test_a_bound_on_the_models_parameters_holds():
    program = zoo.build("four_blocks")
    whole = sum(torch.Size(p.shape).numel() for p in program.params.values())
    for target in (whole - 100, whole // 4 * 3):
        done = compiled(f"svd:params={target}", program)
        left = sum(torch.Size(p.shape).numel() for p in done.program.params.values())
        assert target - 100 < left <= target or left == compiled(
            "svd:remove=0.001", program).plan.steps[0].after["parameters"]  # fmt: skip
    with pytest.raises(UsageError, match="svd:params: expected"):
        compiled("svd:params=100", program)


def test_protected_blocks_and_skipped_sites_stay_dense():
    program = zoo.build("four_blocks")
    done = compiled("svd:protect_first=1,protect_last=2", program)
    assert {s.partition("/")[0] for s in done.structure[0]["choice"]["ranks"]} == {"block1"}


# ** beside others **


@pytest.mark.parametrize(
    "passes",
    [
        "svdllm:remove=0.2,w4",
        "w8,svd",
        "svdllm:multiple=4,prune24",
        "smooth,svdllm,w4",
        "awq,asvd,w4",
        "svdllm,share_heads",
        "prune_width,svdllm",
        "drop_layers:n=1,svd",
        "svdllm,lorc:rank=1,w3",
        "svdllm:alloc=global,samples=2,w8",
    ],
)
def test_what_comes_after_meets_plain_linears(passes):
    program = zoo.decoder(hidden=32, inner=48, size=8, blocks=3)
    done = compiled(passes, program)
    assert torch.isfinite(logits(done.program)).all()
    assert json.loads(json.dumps(done.structure)) == done.structure
    if any(p in passes for p in ("w4", "w8", "prune24")):
        assert any(r["site"].startswith("block") for r in done.records)
    for planned, step in zip(done.plan.steps, done.structure, strict=True):
        assert planned.after["bytes"] <= planned.before["bytes"]
        assert step["before"]["blocks"] >= step["after"]["blocks"]


def test_a_cached_decode_of_the_factors_is_the_whole_forward():
    done = compiled("svdllm:share=true", zoo.build("with_rope"))
    ids = tokens(2, 8)
    want = run(done.program, model_inputs(ids))
    runner = Runner(add_cache(done.program))
    cache = runner.start(2, 8)
    found = [runner.forward(ids[:, i : i + 1], cache=cache)[:, -1] for i in range(8)]
    torch.testing.assert_close(torch.stack(found, 1), want, rtol=1e-4, atol=1e-4)


def test_an_artefact_keeps_the_factors(tmp_path):
    done = llmc.compile(zoo.build("llama_gqa"), "svdllm,w8", calibration=tokens())
    done.save(tmp_path / "a")
    again = llmc.load(tmp_path / "a").program
    torch.testing.assert_close(logits(again), logits(done.program))


# ** refusals **


@pytest.mark.parametrize(
    ("strings", "words"),
    [
        (["prune24", "svdllm"], "makes the scales, zeros and codes that are there stale"),
        (["w4", "svd"], "'svd' before 'w4'"),
        (["svd", "prune_width"], "'prune_width' before 'svd'"),
        (["svd,svdllm"], "expected one pass that writes ranks"),
        (["svd:remove=0"], "svd:remove: expected a share above 0"),
        (["svd:remove=1.5"], "found 1.5"),
        (["svd:remove=0.2,rank=3"], "expected one target, found remove and rank"),
        (["svd:rank=4096"], "svd:rank: expected at most 16"),
        (["svd:alpha=1"], "svd:alpha"),
        (["svd:weigh=loss"], "svd:weigh"),
        (["svd:alloc=global,rank=4"], "svd:alloc"),
        (["svd:remove=0.999"], "svd:remove: expected a share of at most"),
        (["svd:metric=gram"], "expected a knob"),
    ],
)  # fmt: skip
def test_knobs_and_orders_without_meaning_are_one_line(strings, words):
    with pytest.raises(UsageError) as e:
        make_plan(zoo.build("llama_gqa"), recipe.from_strings(strings))
    assert words in str(e.value)


def test_a_rank_that_saves_nothing_is_said():
    with pytest.raises(GateError) as e:
        make_plan(zoo.decoder(inner=16), recipe.from_strings(["svd:rank=8"]))
    assert "rank 8 of 16x16 saves nothing: 256 numbers instead of 256" in str(e.value)
    # The MLP of 24 saves at that rank, attention stays dense.
    plan = make_plan(zoo.build("llama_gqa"), recipe.from_strings(["svd:rank=8"]))
    assert {r.predicate for r in plan.refusals} >= {"saves", "not_head"}
    assert plan.steps[0].sites == 6


def test_a_weight_that_is_not_finite_is_named():
    program = zoo.build("llama_gqa")
    name = sites(program)["block0/linear0"].param
    program.set_tensor(name, torch.full((16, 16), torch.nan))
    with pytest.raises(ModelError, match="finite"):
        compiled("svd", program)
    with pytest.raises(ModelError, match="finite"):
        compiled("svdllm", program)


def test_calibration_is_asked_for_where_it_is_read():
    plan = make_plan(zoo.build("llama_gqa"), recipe.from_strings(["svdllm"]))
    with pytest.raises(UsageError, match="calibration data for svdllm"):
        compile_plan(plan, None)
    for text in ("svd", "svd:alloc=global,weigh=output"):
        plan = make_plan(zoo.build("llama_gqa"), recipe.from_strings([text]))
        assert compile_plan(plan, None).structure[0]["records"]


def test_factors_may_be_factored_again():
    """Two linears are plain linears: a second compile finds them, and names stay apart."""
    once = compiled("svd:rank=6", zoo.decoder(hidden=32, inner=48, size=8)).program
    twice = compiled("svd:rank=2", once)
    assert len(twice.structure[0]["choice"]["ranks"]) > 14
    assert torch.isfinite(logits(twice.program)).all()
    assert twice.program.weight_bytes() < once.weight_bytes()


def test_the_planned_memory_counts_what_factoring_holds():
    program = zoo.build("llama_gqa")
    bounds = [
        make_plan(program, recipe.from_strings([text])).predictions(72, 12)["ram_bound"]
        for text in ("svd", "svdllm", "svdllm:update=closed")
    ]
    # Grams of 16, 16, 16 and 24 inputs in one block, three more of each for the update.
    gram = 8 * (3 * 16**2 + 24**2)
    assert bounds[2] - bounds[1] == 3 * gram
    assert bounds[1] >= bounds[0] + gram
