"""Mixed precision: exact bytes, fused groups, predictions, what is tried, what comes out."""

from __future__ import annotations

import math

import pytest
import torch

from llmc.compiler.ir.errors import GateError, UsageError
from llmc.compiler.ir.interpret import run_nodes
from llmc.compiler.pipeline import impact, zoo
from llmc.compiler.pipeline.candidates import Option, planned, tabulate
from llmc.compiler.pipeline.compile import compile_plan
from llmc.compiler.pipeline.data import calibration, held_out
from llmc.compiler.pipeline.measure import Options, collect, logits_of, loss, model_inputs
from llmc.compiler.pipeline.mixing import Slices, mix
from llmc.compiler.pipeline.plan import make_plan
from llmc.compiler.pipeline.recipe import from_mapping, from_strings
from llmc.compiler.pipeline.reverse import value_gradients
from llmc.compiler.pipeline.target import read_target

OPTIONS = Options()


def windows(samples: int, length: int, seed: int) -> torch.Tensor:
    return torch.randint(0, 20, (samples, length), generator=torch.Generator().manual_seed(seed))


@pytest.fixture(scope="module")
def program():
    return zoo.decoder(hidden=16, inner=32)


def spoken(program, samples: int, length: int, seed: int) -> torch.Tensor:
    """Windows that the program itself continues, so that any change of it costs."""
    ids = windows(samples, 1, seed)
    nodes = [n for n in program.graph.nodes if n.op != "output"]
    while ids.shape[1] < length:
        env = {n: model_inputs(ids)[n.name] for n in program.inputs}
        logits = run_nodes(nodes, env, program.fetch)[logits_of(program)]
        ids = torch.cat([ids, logits[:, -1:].argmax(-1)], 1)
    return ids


@pytest.fixture(scope="module")
def slices(program):
    told = {"windows": 8, "from": "another seed"}
    return Slices(windows(6, 16, 1), spoken(program, 8, 16, 2), told)


def table_of(program, text: str = "w4:group=8", given: str | None = None, overrides=()):
    recipe = from_mapping({
        "version": 1, "overrides": list(overrides),
        "stages": [{c.name: {k: getattr(c.made, k) for k in c.made.given} for c in s}
                   for s in from_strings([text]).stages],
    })  # fmt: skip
    return tabulate(program, recipe, given, "--bits")


@pytest.mark.parametrize(
    ("text", "given"),
    [("w4:group=8", None), ("smooth,prune24,w4:group=8", None), ("nf3", None),
     ("w4", "w2,w4:group=16,nf4:group=8,dense"), ("prune24,w4:group=8,lorc:rank=2", "w3,dense")],
)  # fmt: skip
def test_bytes_are_those_of_the_plan_whatever_is_chosen(program, text, given):
    table = table_of(program, text, given)
    for seed in range(3):
        g = torch.Generator().manual_seed(seed)
        choice = [
            group.allowed[int(torch.randint(len(group.allowed), (1,), generator=g))]
            for group in table.groups
        ]
        plan = planned(program, table.recipe_of(choice))
        assert plan.program.weight_bytes() == table.rest + table.size(choice)


def test_linears_that_read_one_value_keep_one_scheme(program, slices):
    table = table_of(program, "w4:group=8", "w2,w4,dense")
    roles = [sorted(s.role for s in g.sites) for g in table.groups]
    assert ["k", "q", "v"] in roles
    assert ["gate", "up"] in roles
    found = mix(program, table, read_target(bits=5.0), slices, OPTIONS)
    plan = found.plan(program)
    schemes: dict[str, set[object]] = {}
    decided = {d.site.id for s in plan.stages for d in s.decisions.values()}
    for group in table.groups:
        for site in group.sites:
            codes = plan.schemes[site.param].codes if site.id in decided else None
            schemes.setdefault(group.id, set()).add(codes)
    assert {len(found) for found in schemes.values()} == {1}
    assert len(set().union(*schemes.values())) > 1


@pytest.fixture(scope="module")
def mixed(program, slices):
    """Between what uniform options store, which is 5, 7 and 32 bits."""
    table = table_of(program, "smooth,w3:group=8", "w3,w5,dense")
    return table, mix(program, table, read_target(bits=6.5), slices, OPTIONS)


def test_the_choice_fits_and_is_not_worse_than_one_option_everywhere(mixed):
    table, found = mixed
    record = found.record
    assert record["bytes"] <= math.floor(6.5 * table.weights / 8)
    tries = record["tries"]
    chosen = next(t for t in tries if t["chosen"])
    fits = [t for t in tries if t["fits"]]
    assert any(t["by"] == "w3:group=8 everywhere" for t in fits)
    assert all(chosen["loss"] <= t["loss"] for t in fits)
    assert {t["by"] for t in tries} >= {f"{o.text} everywhere" for o in table.options}
    assert sum(r["bytes"] for r in record["table"]) == record["bytes"]
    for measure in ("fisher", "proxy"):
        points = record["frontier"][measure]
        assert points["bytes"] == sorted(set(points["bytes"]))
        assert points["predicted"] == sorted(set(points["predicted"]), reverse=True)


def test_the_outcome_is_a_recipe_that_gives_the_same_model(program, slices, mixed):
    _, found = mixed
    plan = found.plan(program)
    assert plan.to_json()["mixed"] == found.record
    again = make_plan(program, from_mapping(found.record["recipe"]))
    assert again.rows() == plan.rows()
    one, two = (compile_plan(p, slices.tokens, OPTIONS).program for p in (plan, again))
    assert one.params == two.params
    assert all(torch.equal(one.weights.load(n), two.weights.load(n)) for n in one.params)
    assert one.weight_bytes() == found.record["model_bytes"]


def test_what_the_recipe_fixes_stays(program, slices):
    fixed = [
        {"where": {"role": ["down"]}, "set": {"w4": {"group": 16}}},
        {"where": {"role": ["o"], "block": [0]}, "skip": ["w4"]},
    ]
    table = table_of(program, "w4:group=8", "w2,w3", overrides=fixed)
    assert Option(table.base) == table.options[-1]
    by_role = {s.role: g for g in table.groups for s in g.sites if s.segment == "block0"}
    assert "o" not in by_role
    assert by_role["down"].allowed == [2]
    assert by_role["q"].allowed == [0, 1]
    found = mix(program, table, read_target(bits=4.7), slices, OPTIONS)
    plan = found.plan(program)
    downs = [d.scheme.codes for s in plan.stages for d in s.decisions.values()
             if d.site.role == "down"]  # fmt: skip
    assert {(c.bits, c.group) for c in downs} == {(4, 16)}
    assert plan.program.weight_bytes() == found.record["model_bytes"]


def test_the_information_is_that_of_gradients_at_the_outputs(program):
    table, tokens = table_of(program), windows(3, 12, 5)
    sites = [s for g in table.groups for s in g.sites]
    found = impact.information(table.source, tokens, sites, OPTIONS)
    site = sites[-1]
    node = table.source.node(site.node)
    values = []
    gradients = [value_gradients(table.source, ids, [site.node])[site.node]
                 for ids in tokens.split(1)]  # fmt: skip
    for ids in tokens.split(1):
        env = {n: model_inputs(ids)[n.name] for n in table.source.inputs}
        run_nodes(
            [n for n in table.source.graph.nodes if n.op != "output"], env, table.source.fetch,
            observe=lambda n, v: values.append(v) if n is node else None,
        )  # fmt: skip
    g, y = (torch.cat(x).flatten(0, 1).double() for x in (gradients, values))
    # The gradient of a window's summed loss is 11 times that of its mean; per token of 11.
    wanted = (11 * g).square().mean(0) * y.square().mean(0) * 12 / (2 * 11)
    torch.testing.assert_close(found[site.node], wanted, rtol=1e-5, atol=0)


def test_rows_of_a_solve_add_up_to_its_loss(program, slices):
    noted = impact.Noted()
    plan = make_plan(program, from_strings(["w3:group=8"]))
    compile_plan(plan, slices.tokens, OPTIONS, noted)
    table = table_of(program)
    for group in table.groups[:1]:
        for site in group.sites:
            # Nothing is rounded before the first group: its inputs are those of the dense model.
            stats = collect(table.source, slices.tokens, {site.reads: ["gram"]}, OPTIONS)
            gram = stats.get(site.reads, "gram").value.double()
            w = table.source.fetch(site.param).double()
            energy = ((w @ gram) * w).sum(1)
            assert len(noted.rows[site.id]) == site.out_features
            whole = float(noted.rows[site.id] @ energy / energy.sum())
            assert whole == pytest.approx(noted.loss[site.id], rel=1e-4)


def test_the_loss_measure_is_the_loss_of_one_changed_group(program, slices):
    table = table_of(program, "w2:group=8,solver=rtn", "w2,w8,dense")
    found = mix(program, table, read_target(bits=12.0), slices, OPTIONS, "loss")
    dense = loss(table.source, slices.held, OPTIONS)
    rises = found.record["table"]
    for k, row in enumerate(rises):
        choice = [2] * len(table.groups)
        choice[k] = [o.text for o in table.options].index(row["option"])
        plan = planned(program, table.recipe_of(choice))
        done = compile_plan(plan, slices.tokens, OPTIONS).program
        alone = max(0.0, loss(done, slices.held, OPTIONS) - dense)
        assert row["predicted"]["loss"] == pytest.approx(alone, abs=1e-12)


def test_the_loss_measure_refuses_scales_that_move(program, slices):
    table = table_of(program, "smooth,w4:group=8")
    with pytest.raises(UsageError, match=r"--sensitivity loss: .*smooth,w4.*fisher"):
        mix(program, table, read_target(bits=4.0), slices, OPTIONS, "loss")


def test_a_budget_takes_the_fewest_bytes_that_reach_it(program, slices):
    table = table_of(program, "w4:group=8", "w2,w4,w8,dense")
    found = mix(program, table, read_target(budget="ppl+3%"), slices, OPTIONS).record
    wanted = found["dense"]["loss"] + math.log(1.03)
    tries = found["tries"]
    chosen = next(t for t in tries if t["chosen"])
    assert chosen["loss"] <= wanted
    assert all(t["bytes"] >= chosen["bytes"] for t in tries if t["loss"] <= wanted)
    assert len(tries) > len(table.options)
    assert found["budget_bytes"] is None


def test_a_budget_out_of_reach_names_the_best(program, slices):
    table = table_of(program, "prune24,w2:group=8", "w2,w3,dense")
    words = r"--budget: expected perplexity .* reached .* bits"
    with pytest.raises(GateError, match=words) as found:
        mix(program, table, read_target(budget="ppl+0%"), slices, OPTIONS)
    assert found.value.exit_code == 4


def test_experts_are_chosen_for_too(slices):
    program = zoo.decoder(hidden=16, inner=32, mlp="moe")
    table = table_of(program, "w4:group=8", "w2,w8")
    stacked = [s for g in table.groups for s in g.sites if s.stacked]
    assert stacked
    found = mix(program, table, read_target(bits=6.0), slices, OPTIONS)
    rises = [r["predicted"]["fisher"] for r in found.record["table"]]
    assert all(r > 0 for r in rises)


@pytest.mark.parametrize(
    ("text", "given", "words"),
    [
        ("smooth", None, "writes codes in the recipe, found smooth"),
        ("drop_layers,w4", None, "keep every shape, found 'drop_layers'"),
        ("fp4", None, "several widths, found 'fp4'"),
        ("w4", "w4", "at least two"),
        ("w4", "w3,prune24", "writes? codes, or dense, found 'prune24'"),
        ("w4", "w3,w3", "'w3' once"),
        ("w4", "w3:group=7,w4", "group"),
    ],
)
def test_candidates_that_have_no_meaning(program, text, given, words):
    with pytest.raises(UsageError, match=words):
        table_of(program, text, given)


def test_targets_out_of_range_name_the_range(program):
    table = table_of(program, "w4:group=8", "w2,w8")
    for given in ({"bits": 3.9}, {"bits": 11.0}, {"size": "1%"}, {"size": "99.9%"}):
        with pytest.raises(UsageError, match=r"expected \S+\.\.\S+"):
            read_target(**given).bytes(table)
    assert read_target(bits=4.0).bytes(table) == table.weights // 2
    low = table.rest + sum(g.size(0) for g in table.groups)
    share = 100 * low / table.whole
    assert read_target(size=f"{share + 0.01:.4f}%").bytes(table) >= low - table.rest


@pytest.mark.parametrize(
    "given",
    [{"bits": 0.0}, {"bits": float("nan")}, {"size": "60"}, {"size": "-3%"}, {"budget": "ppl2%"},
     {"budget": "2%"}, {"budget": "ppl+%"}, {"bits": 4.0, "size": "60%"}],
)  # fmt: skip
def test_targets_that_cannot_be_read(given):
    with pytest.raises(UsageError, match=r"--(bits|size|budget)"):
        read_target(**given)


def test_targets_that_can():
    assert read_target() is None
    assert read_target(size="62.5%").value == 0.625
    assert read_target(budget="ppl+2%").loss(2.0) == pytest.approx(2.0 + math.log(1.02))
    assert read_target(budget="ppl+0.5").loss(2.0) == pytest.approx(math.log(math.exp(2.0) + 0.5))


def test_held_out_windows_share_no_token_with_calibration():
    stream = torch.arange(4000)
    drawn = calibration(stream, None, 12, 50, seed=3)
    tokens, held = held_out(stream, None, drawn, 10)
    assert torch.equal(tokens, drawn.tokens)
    assert held.tokens.shape == (10, 50)
    assert (held.tokens.diff(dim=1) == 1).all()
    assert not set(held.tokens.flatten().tolist()) & set(tokens.flatten().tolist())
    assert held.tokens.unique().numel() == held.tokens.numel()


def test_a_short_text_gives_up_calibration_windows_instead():
    drawn = calibration(torch.arange(60), None, 8, 50)
    tokens, held = held_out(torch.arange(60), None, drawn, 4)
    assert (len(tokens), len(held.tokens)) == (6, 2)
    assert "left out of choosing" in held.record["from"]
    with pytest.raises(UsageError, match="at least 2 calibration windows"):
        held_out(torch.arange(50), None, calibration(torch.arange(50), None, 1, 50), 4)
