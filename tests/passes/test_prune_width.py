"""prune_width end to end: sliced equals masked, repairs, targets, orders, artefacts, refusals."""

from __future__ import annotations

import itertools

import pytest
import torch
from torch import Tensor

import llmc
from llmc.compiler.analysis.blocks import apply_segments
from llmc.compiler.ir.errors import LlmcError, UsageError
from llmc.compiler.ir.graph import Program
from llmc.compiler.ir.interpret import run
from llmc.compiler.pipeline import recipe, zoo
from llmc.compiler.pipeline.analysis import Analysis
from llmc.compiler.pipeline.compile import compile_plan
from llmc.compiler.pipeline.importance import METHODS
from llmc.compiler.pipeline.measure import Options, loss, model_inputs
from llmc.compiler.pipeline.plan import make_plan
from llmc.compiler.runtime.cache import add_cache
from llmc.compiler.runtime.executor import Runner
from llmc.compiler.solvers.importance import ORDERS

OPTIONS = Options(batch=3)
UNREPAIRED = "compensate=none"


def tokens(samples: int = 6, length: int = 12, seed: int = 1) -> Tensor:
    g = torch.Generator().manual_seed(seed)
    return torch.randint(0, 20, (samples, length), generator=g)


def pruned(knobs: str, program: Program, ids: Tensor | None = None, options: Options = OPTIONS):
    plan = make_plan(program, recipe.from_strings([f"prune_width:{knobs}"]))
    return compile_plan(plan, tokens() if ids is None else ids, options)


def logits(program: Program, ids: Tensor | None = None, **how) -> Tensor:
    return run(program, model_inputs(tokens(3) if ids is None else ids), **how)


def kept(done) -> dict[str, list[int]]:
    return done.structure[0]["choice"]["keep"]


def rows(done) -> dict[str, dict]:
    return {r["site"]: r for r in done.structure[0]["records"]}


def masked(program: Program, keep: dict[str, list[int]], roles: tuple[str, ...]) -> Program:
    """The whole program with the cut units' entries of members of those roles set to zero."""
    out = program.clone()
    for group in Analysis(out).groups:
        if group.id not in keep:
            continue
        gone = torch.ones(group.units + 1, dtype=torch.bool)
        gone[keep[group.id]] = False
        gone[-1] = False
        for m in group.members:
            if m.role in roles:
                w = out.weights.load(m.param).clone()
                w.movedim(m.axis, 0)[gone[m.unit_of]] = 0
                out.set_tensor(m.param, w)
    return out


# ** sliced equals masked **


@pytest.mark.parametrize("knobs", ["neurons=11", "heads=1", "heads=1,neurons=5,units=head+neuron"])
@pytest.mark.parametrize("model", ["llama_gqa", "layer_norm", "with_bias", "one_plus_gain"])
def test_neurons_and_heads_equal_a_masked_reader(model, knobs):
    """What a matrix reads from a cut unit is what it would read from zeros."""
    program = zoo.build(model)
    done = pruned(f"{knobs},{UNREPAIRED},method=wanda", program)
    want = logits(masked(program, kept(done), ("reads",)))
    torch.testing.assert_close(logits(done.program), want, rtol=1e-5, atol=1e-5)
    assert not torch.allclose(want, logits(program), atol=1e-3)


@pytest.mark.parametrize("model", ["llama_gqa", "one_plus_gain", "tied_head", "moe"])
def test_hidden_channels_equal_a_masked_stream(model):
    """Norms keep their divisor, so a missing channel is one that is zero."""
    program = zoo.build(model)
    done = pruned("hidden=12,method=magnitude", program)
    want = logits(masked(program, kept(done), ("writes", "table")))
    torch.testing.assert_close(logits(done.program), want, rtol=1e-5, atol=1e-5)
    assert {p.shape for p in done.program.params.values()} & {(20, 12)}


def test_experts_equal_a_router_that_never_chooses_them():
    program = zoo.build("moe")
    done = pruned("experts=3,method=taylor", program)
    keep = kept(done)
    never = {}
    for group in Analysis(program).groups:
        if group.kind == "expert":
            gone = [e for e in range(group.units) if e not in keep[group.id]]
            router = next(m for m in group.members if len(program.params[m.param].shape) == 2)

            def call(x: Tensor, w: Tensor, *b: Tensor, gone: list[int] = gone) -> Tensor:
                chosen = torch.nn.functional.linear(x, w, *b)
                return chosen.index_fill(-1, torch.tensor(gone), float("-inf"))

            never[router.node] = call
    want = logits(program, implementations=never)
    torch.testing.assert_close(logits(done.program), want, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("method", METHODS)
def test_a_zero_unit_goes_first_and_leaves_nothing_behind(method):
    """Zero-weight neurons score 0 by every method that looks, and removing them is lossless."""
    program = zoo.decoder(seed=3)
    dead = [2, 3, 11, 19]
    for group in Analysis(program).groups:
        if group.kind == "neuron":
            for m in group.members:
                w = program.weights.load(m.param).clone()
                w.movedim(m.axis, 0)[dead] = 0
                program.set_tensor(m.param, w)
    done = pruned(f"neurons=20,method={method},damp=0.001", program)
    if method == "random":
        assert all(row["units_after"] == 20 for row in rows(done).values() if "kind" in row)
        return
    for units in kept(done).values():
        assert sorted(set(range(24)) - set(units)) == dead
    torch.testing.assert_close(logits(done.program), logits(program), rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("order", ORDERS)
def test_every_taylor_order_and_reduction_runs(order):
    program = zoo.decoder()
    for reduction in ("sum", "max", "mean"):
        done = pruned(f"remove=0.2,method=taylor,taylor={order},reduce={reduction}", program)
        assert torch.isfinite(logits(done.program)).all()


# ** repairs **


def observed(program: Program, ids: Tensor, name: str) -> Tensor:
    seen: dict[str, Tensor] = {}
    run(program, model_inputs(ids), observe=lambda n, v: seen.setdefault(n.name, v))
    return seen[name]


@pytest.mark.parametrize("model", ["llama_gqa", "with_bias"])
def test_flap_keeps_the_mean_of_the_first_output_by_a_bias_in_the_graph(model):
    """Behind the first block everything has moved already; its own mean output is kept exactly."""
    program = zoo.build(model)
    done = pruned("heads=1,method=flap", program)
    row = done.structure[0]["choice"]["biases"][0]
    assert row["new"] == (model == "llama_gqa")
    reader = done.program.node(row["node"])
    assert str(reader.args[2].target) == row["param"]
    before, after = (observed(p, tokens(), row["node"]) for p in (program, done.program))
    torch.testing.assert_close(after.mean((0, 1)), before.mean((0, 1)), rtol=1e-4, atol=1e-5)
    bare = pruned(f"heads=1,method=flap,{UNREPAIRED}", program)
    lost = observed(bare.program, tokens(), row["node"]).mean((0, 1)) - before.mean((0, 1))
    assert float(lost.abs().max()) > 1e-3


def test_repairs_lower_the_error_of_the_first_output():
    """Against the whole output: nothing > a bias; nothing > moved weights > both."""
    program = zoo.decoder(inner=32, seed=2)
    ids = tokens(24, 16)
    error = {}
    for repair in ("none", "bias", "weights", "both"):
        done = pruned(f"neurons=16,method=flap,compensate={repair},damp=1e-6", program, ids)
        node = next(g for g in Analysis(program).groups if g.kind == "neuron").members[-1].node
        delta = observed(done.program, ids, node) - observed(program, ids, node)
        error[repair] = float(delta.square().mean())
    assert error["both"] < error["weights"] < error["none"]
    assert error["both"] < error["bias"] < error["none"]


def test_moved_weights_keep_a_plain_config():
    """obs moves weights and adds no parameter."""
    program = zoo.decoder()
    done = pruned("remove=0.3,method=obs", program)
    assert set(done.program.params) == set(program.params)
    assert not done.structure[0]["choice"]["biases"]


def test_a_repair_follows_a_cut_of_its_own_rows():
    """Hidden channels and neurons in one pass: the reader of neurons loses rows and columns."""
    program = zoo.decoder()
    done = pruned("hidden=12,neurons=20,method=wanda,compensate=both", program)
    assert torch.isfinite(logits(done.program)).all()
    down = [p for p in done.program.params.values() if p.shape == (12, 20)]
    assert len(down) == 2


# ** sizes **


@pytest.mark.parametrize("model", ["llama_gqa", "layer_norm", "with_bias"])
@pytest.mark.parametrize("method", ["flap", "obs", "magnitude"])
def test_the_plan_has_the_sizes_that_compiling_gives(model, method):
    plan = make_plan(zoo.build(model), recipe.from_strings([f"prune_width:method={method}"]))
    done = compile_plan(plan, tokens(), OPTIONS)
    want = {n: p.shape for n, p in plan.program.params.items()}
    assert {n: p.shape for n, p in done.program.params.items()} == want
    assert plan.steps[0].choice.exact
    assert plan.program.weight_bytes() == done.program.weight_bytes()


def test_a_global_ranking_is_a_bound_that_meets_the_share():
    program = zoo.decoder(inner=64, blocks=3, seed=7)
    plan = make_plan(
        program, recipe.from_strings(["prune_width:uniform=false,remove=0.3,multiple=1"])
    )
    assert not plan.steps[0].choice.exact
    done = compile_plan(plan, tokens(), OPTIONS)
    widths = {r["units_after"] for r in rows(done).values() if r.get("kind") == "neuron"}
    assert len(widths) > 1
    before, after = (done.structure[0][k]["parameters"] for k in ("before", "after"))
    blocks = sum(g.units * g.bytes_per_unit / 4 for g in Analysis(program).groups
                 if g.kind in ("neuron", "kv_group")) + 6 * 16  # fmt: skip
    new = sum(p.endswith("_bias") for p in done.program.params) * 16
    assert (before - after + new) / blocks == pytest.approx(0.3, abs=0.03)


def test_a_uniform_global_ranking_lets_kinds_compete_and_keeps_layers_equal():
    program = zoo.decoder(inner=64, blocks=3, heads=8, kv=4, seed=7)
    text = "ranking=global,uniform=true,remove=0.3,multiple=1,method=taylor"
    done = pruned(text, program)
    counts: dict[str, set[int]] = {}
    for row in rows(done).values():
        if "kind" in row:
            counts.setdefault(row["kind"], set()).add(row["units_after"])
    assert [len(c) for c in counts.values()] == [1, 1]
    one_share = pruned(text.replace("global", "local"), program)
    lost = [
        sum((1 - r["importance_kept"]) * r["importance"] for r in rows(d).values() if "kind" in r)
        for d in (done, one_share)
    ]
    assert lost[0] <= lost[1]


def test_protected_blocks_stay_whole_and_are_told():
    program = zoo.build("four_blocks")
    plan = make_plan(program, recipe.from_strings(
        ["prune_width:remove=0.1,protect_first=1,protect_last=1,method=magnitude"]
    ))  # fmt: skip
    done = compile_plan(plan, None, OPTIONS)
    assert {name.split("/")[0] for name in kept(done)} == {"block1", "block2"}
    told = {r.predicate for r in plan.refusals if r.by == "prune_width"}
    assert told == {"protected"}


def test_records_tell_sizes_scores_and_the_loss():
    program = zoo.decoder()
    done = pruned("remove=0.2,method=taylor", program)
    found = rows(done)
    whole = found.pop("model")
    ids = tokens()
    apply_segments(program)
    assert whole["loss_before"] == pytest.approx(loss(program, ids, OPTIONS), rel=1e-6)
    assert whole["loss_after"] == pytest.approx(loss(done.program, ids, OPTIONS), rel=1e-6)
    for row in found.values():
        assert row["units_after"] <= row["units_before"]
        assert 0 < row["importance_kept"] <= 1
        assert row["score_quantiles"] == sorted(row["score_quantiles"])


def test_the_budget_changes_memory_and_not_the_answer():
    program = zoo.decoder()
    tight = Options(batch=3, budget=1)
    for knobs in ("method=obs", "method=taylor", "method=michel", "method=flap,compensate=both"):
        first, second = pruned(knobs, program), pruned(knobs, program, options=tight)
        assert kept(first) == kept(second)
        for name in first.program.params:
            a, b = (d.program.weights.load(name) for d in (first, second))
            torch.testing.assert_close(a, b, rtol=1e-5, atol=1e-6)


# ** with other passes **


def test_all_orders_of_four_passes_make_one_artefact(tmp_path):
    parts = ["prune_width:neurons=16,heads=1,units=neuron+head", "smooth", "w4:group=8", "prune24"]
    hashes = set()
    for i, order in enumerate(itertools.permutations(parts)):
        made = llmc.compile(
            zoo.decoder(inner=32, blocks=1, seed=5), ",".join(order), calibration=tokens()
        )
        hashes.add(made.save(tmp_path / str(i)).content_hash)
    assert len(hashes) == 1


@pytest.mark.parametrize("early", ["w4", "smooth", "prune24"])
def test_cutting_behind_codes_scales_or_zeros_is_refused(early):
    with pytest.raises(UsageError, match="expected 'prune_width' before"):
        recipe.from_strings([early, "prune_width"])


def test_the_artefact_loads_and_generates_with_a_cache(tmp_path):
    made = llmc.compile(zoo.decoder(seed=4), "prune_width:remove=0.3", calibration=tokens())
    made.save(tmp_path / "out")
    back = llmc.load(tmp_path / "out")
    ids = tokens(2)
    torch.testing.assert_close(back(ids), made(ids))
    cached = Runner(add_cache(made.program))
    cache = cached.start(2, 12)
    steps = [cached.forward(ids[:, i : i + 1], cache=cache) for i in range(12)]
    torch.testing.assert_close(torch.cat(steps, 1), made(ids), rtol=1e-4, atol=1e-4)
    assert back.generate(ids, max_new_tokens=4) == made.generate(ids, max_new_tokens=4)


# ** refusals **


@pytest.mark.parametrize(
    ("knobs", "match"),
    [
        ("remove=1", "share above 0 and below 1, found 1"),
        ("remove=1.5", "share above 0 and below 1, found 1.5"),
        ("remove=0", "share above 0 and below 1, found 0"),
        ("remove=0.2,params=100", "one target, found remove and params"),
        ("remove=0.2,neurons=8", "one target, found remove and neurons"),
        ("neurons=0", "neurons: expected 1"),
        ("units=neurons", "units: expected neuron, head, hidden, expert"),
        ("units=head,neurons=4", "expected the unit of neurons="),
        ("method=best", "method: expected one of"),
        ("ranking=global,neurons=8", "ranking=local beside neurons="),
        ("uniform=true,protect_first=1", "no protected blocks beside uniform=true"),
    ],
)
def test_wrong_knobs_are_one_line(knobs, match):
    with pytest.raises(UsageError, match=match) as caught:
        recipe.from_strings([f"prune_width:{knobs}"])
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize(
    ("model", "knobs", "match"),
    [
        ("llama_gqa", "remove=0.95", "a layer would be empty"),
        ("llama_gqa", "neurons=25", "neurons: expected 1 to 24 kept, found 25"),
        ("llama_gqa", "heads=3", "heads: expected 1 to 2 kept, found 3"),
        ("llama_gqa", "experts=3", "expected a place for prune_width"),
        ("llama_gqa", "params=10", "params: expected"),
        ("moe", "experts=1,method=magnitude", "experts: expected 2 to 4 kept, found 1"),
        ("llama_gqa", "remove=0.001", r"remove: expected at least 0\.\d+, half a step"),
        ("llama_gqa", "params=4559", r"params: expected at most \d+, half a step"),
        ("moe", "remove=0.02,units=expert,method=magnitude", "nothing would go"),
        ("moe", "remove=0.2,method=obs", "over the neurons of all experts"),
        ("llama_gqa", "remove=0.2,units=hidden+neuron,ranking=global", "costs add"),
    ],
)
def test_targets_out_of_reach_are_refused_at_plan_time(model, knobs, match):
    with pytest.raises(LlmcError, match=match) as caught:
        make_plan(zoo.build(model), recipe.from_strings([f"prune_width:{knobs}"]))
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize("method", ["taylor", "michel"])
def test_gradients_of_packed_weights_are_refused(method):
    packed = compile_plan(make_plan(zoo.decoder(), recipe.from_strings(["w8"])), tokens(), OPTIONS)
    with pytest.raises(UsageError, match="expected a dense graph"):
        make_plan(packed.program, recipe.from_strings([f"prune_width:method={method}"]))


def test_a_blocked_group_names_its_culprit():
    program = zoo.build("softmax_between")
    plan = make_plan(
        program, recipe.from_strings(["prune_width:heads=1,units=neuron+head,method=magnitude"])
    )
    told = [r for r in plan.refusals if r.predicate == "group_is_free"]
    assert {r.node for r in told} == {"softmax_int", "softmax_int_1"}
    assert all("compete" in r.reason for r in told)
