"""tucker end to end: cores and shared factors in the graph, sizes, what comes behind, refusals."""

from __future__ import annotations

import sys
from math import prod
from pathlib import Path

import pytest
import torch
from torch import Tensor

import llmc
from llmc.compiler.analysis.linears import ExpertSite, LinearSite
from llmc.compiler.analysis.tokenwise import prove_tokenwise
from llmc.compiler.capture import capture
from llmc.compiler.ir.dims import evaluate
from llmc.compiler.ir.errors import GateError, ModelError, UsageError, VerifierError
from llmc.compiler.ir.graph import Program
from llmc.compiler.ir.interpret import run
from llmc.compiler.ir.ops import cost
from llmc.compiler.ir.ops.semantic import experts
from llmc.compiler.ir.refusal import Refusal
from llmc.compiler.ir.verifier import verify
from llmc.compiler.pipeline import recipe, zoo
from llmc.compiler.pipeline.analysis import Analysis
from llmc.compiler.pipeline.compile import compile_plan
from llmc.compiler.pipeline.measure import Options, model_inputs
from llmc.compiler.pipeline.plan import make_plan
from llmc.compiler.pipeline.stacks import roots, stacks
from llmc.compiler.runtime.cache import add_cache
from llmc.compiler.runtime.executor import Runner
from llmc.compiler.runtime.lowering import runner_for
from llmc.compiler.runtime.sizes import sizes

sys.path.insert(0, str(Path(__file__).parents[1]))

from tiny_models import make, random_tokens

KNOBS = (
    "", "metric=weights,alloc=even,remove=0.5", "ranks=12x7", "ranks=48x7", "ranks=12x24",
    "experts_rank=2,remove=0.5", "experts_rank=3,ranks=20x10",
)  # fmt: skip


def tokens(samples: int = 6, length: int = 12, seed: int = 1) -> Tensor:
    g = torch.Generator().manual_seed(seed)
    return torch.randint(0, 20, (samples, length), generator=g)


def compiled(passes: str | list[str], program: Program):
    strings = [passes] if isinstance(passes, str) else passes
    return compile_plan(
        make_plan(program, recipe.from_strings(strings)), tokens(), Options(batch=3)
    )


def named(knobs: str) -> str:
    return f"tucker:{knobs}" if knobs else "tucker"


def calls(program: Program) -> list[ExpertSite]:
    found = Analysis(program.clone()).linears
    return [s for s in found if isinstance(s, ExpertSite)]


def rows(done) -> dict[str, dict]:
    return {r["site"]: r for step in done.structure for r in step["records"]}


def product(done, param: str, shape: tuple[int, ...], ranks: list[int]) -> Tensor:
    """The stack that stored parts stand for."""
    part = {
        end: done.program.fetch(f"{param}_{end}").double()
        for end in ("core", "mix", "left", "right") if f"{param}_{end}" in done.program.params
    }  # fmt: skip
    whole = [k == n for k, n in zip(ranks, shape, strict=True)]
    assert [end not in part for end in ("mix", "left", "right")] == whole
    out = part["core"]
    if "mix" in part:
        out = (part["mix"] @ out).reshape(shape[0], *ranks[1:])
    out = out if "left" not in part else part["left"] @ out
    return out if "right" not in part else out @ part["right"]


def expanded(done) -> Program:
    """The dense program with what the stored parts stand for."""
    whole = done.plan.captured.clone()
    told = done.structure[0]["choice"]["stacks"]
    for site in calls(whole):
        for name, (param, shape) in stacks(site).items():
            if name in told.get(site.id, {}):
                whole.set_tensor(param, product(done, param, shape, told[site.id][name]).float())
    return whole


# ** the rewrite **


@pytest.mark.parametrize("knobs", KNOBS)
def test_the_model_with_the_products_gives_the_same_logits(knobs: str) -> None:
    program = zoo.build("moe")
    done = compiled(named(knobs), program)
    verify(done.program)
    given = model_inputs(tokens(3))
    want = run(expanded(done), given)
    torch.testing.assert_close(run(done.program, given), want, rtol=1e-4, atol=1e-4)
    assert not torch.allclose(want, run(program, given), atol=1e-3)
    assert not prove_tokenwise(done.program)
    step = done.structure[0]
    assert step["after"]["bytes"] == done.program.weight_bytes()
    told = make_plan(program, recipe.from_strings([named(knobs)])).steps[0]
    assert told.choice.exact == ("ranks" in knobs or "even" in knobs)
    if told.choice.exact:
        assert step["after"] == told.after
    assert all(step["after"][k] <= told.after[k] for k in told.after)
    saved = sum(r["bytes_before"] - r["bytes_after"] for r in step["records"] if "stack" in r)
    assert program.weight_bytes() - done.program.weight_bytes() == saved > 0


def test_outer_factors_are_linears_of_their_own_and_inner_ones_are_named() -> None:
    done = compiled("tucker:ranks=12x7", zoo.build("moe"))
    found = Analysis(done.program.clone())
    site = calls(done.program)[0]
    assert (site.into, site.back) == ((12, 7), (12, 7))
    assert len(site.shared) == 2
    # router, gate_up's right factor, down's left one; q, k, v, o stand before them
    mine = [s for s in found.linears if isinstance(s, LinearSite) and s.segment == "block0"]
    assert [s.out_features for s in mine[-3:]] == [4, 7, 16]
    assert [s.router for s in mine[-3:]] == [True, False, False]
    inside = [r for r in found.linears if isinstance(r, Refusal)]
    told = [r for r in inside if r.predicate == "weight_of_linear"]
    assert len(told) == 4
    assert all("inside of their call" in r.reason for r in told)


def test_fewer_operations_and_fewer_numbers() -> None:
    program = zoo.build("moe")
    done = compiled("tucker:ranks=12x7", program)
    dense, made = (
        sum(evaluate(cost(n)[0], {"B": 1, "S": 5}) for n in p.calls())
        for p in (program, done.program)
    )
    assert made < dense
    assert sizes(done.program).linear_weights < sizes(program).linear_weights


def test_whitening_is_by_what_all_experts_read() -> None:
    """Σ_e X_eᵀX_e, of what the op's reference says that each expert reads."""
    program = zoo.build("moe")
    Analysis(program)
    site, seen = calls(program)[0], dict[str, Tensor]()

    def observe(node, value) -> None:
        seen[node.name] = value

    run(program, model_inputs(tokens()), observe=observe)
    want = {"gate_up": torch.zeros(16, 16).double(), "down": torch.zeros(24, 24).double()}

    def reads(expert, x, inner) -> None:
        for name, value in (("gate_up", x.double()), ("down", inner.double())):
            want[name] += value.t() @ value

    chosen = (seen[n] for n in (site.reads, site.index, site.weight))
    experts(*chosen, *map(program.fetch, (site.gate_up, site.down)), act="silu", seen=reads)
    (_, found), *_ = roots(program, [site], tokens(), Options(batch=3))
    for name, gram in want.items():
        s = found[name].value
        torch.testing.assert_close(s @ s.t(), gram, rtol=1e-4, atol=1e-4)
    x = seen[site.reads].double()
    torch.testing.assert_close(want["gate_up"], 2 * x.t() @ x)  # two experts for each token


def test_records_tell_what_was_lost() -> None:
    program = zoo.build("moe")
    aware, blind = (
        rows(compiled(f"tucker:ranks=12x7,metric={m}", program)) for m in ("activations", "weights")
    )
    for row in (r for r in [*aware.values(), *blind.values()] if "stack" in r):
        assert 0 < row["loss"] <= row["loss_hosvd"] * (1 + 1e-9) < 1
        assert row["sweeps"] >= 1
    assert rows(compiled("tucker:sweeps=0", program))["block0/experts0.gate_up"]["sweeps"] == 0
    by_error, evenly = (
        rows(compiled(f"tucker:alloc={a},remove=0.5,sweeps=0", program)) for a in ("error", "even")
    )
    for name in (n for n, r in by_error.items() if "stack" in r):
        assert by_error[name]["loss_hosvd"] <= evenly[name]["loss_hosvd"] * (1 + 1e-9)
        assert by_error[name]["bytes_after"] <= evenly[name]["bytes_after"]


def test_experts_that_are_one_up_to_a_core_are_kept_exactly() -> None:
    program = zoo.build("moe")
    g = torch.Generator().manual_seed(5)
    for site in calls(program):
        for param, (e, r, c) in stacks(site).values():
            left, core, right = (torch.randn(*s, generator=g) for s in ((r, 4), (e, 4, 3), (3, c)))
            program.set_tensor(param, left @ core @ right / r)
    done = compiled("tucker:ranks=4x3", program)
    given = model_inputs(tokens(3))
    torch.testing.assert_close(run(done.program, given), run(program, given), rtol=1e-4, atol=1e-4)
    assert max(r["loss"] for r in rows(done).values() if "stack" in r) < 1e-10


# ** what comes behind **


@pytest.mark.parametrize(
    ("name", "passes"), [("mixtral", "smooth,tucker,w4"), ("qwen3_moe", "tucker:experts_rank=2,w4")]
)
def test_routed_models_are_stored_and_decoded_step_by_step(name, passes, tmp_path) -> None:
    ids = random_tokens(6, 16)["input_ids"]
    made = llmc.compile(make(name, num_hidden_layers=1), passes=passes, calibration=ids)
    sites = {s["site"]: s for s in made.report["sites"]}
    assert all(s["bits"] < 6 for s in sites.values())
    assert ("block0/experts0.gate_up" in sites) == ("experts_rank" not in passes)
    given = random_tokens(2, 8, seed=7)
    want = made(**given)
    made.save(tmp_path / "a")
    loaded = llmc.load(tmp_path / "a")
    assert torch.equal(loaded(**given), want)
    runner = Runner(add_cache(loaded.program))
    cache = runner.start(2, 8)
    steps = [
        runner.forward(given["input_ids"][:, i : i + 1], cache=cache)[:, -1] for i in range(8)
    ]  # fmt: skip
    torch.testing.assert_close(torch.stack(steps, 1), want, rtol=1e-3, atol=1e-4)
    cpu = runner_for(loaded.program, "cpu").forward(given["input_ids"])
    assert float((cpu - want).norm() / want.norm()) < 0.02


def test_single_weights_are_factored_before_experts_and_keep_the_linears_between() -> None:
    program = capture(make("mixtral", num_hidden_layers=1))
    done = compiled("tucker,svdllm", program)
    first, second = done.structure
    assert [s["pass"] for s in (first, second)] == ["svdllm", "tucker"]
    assert not any("experts" in i for i in first["choice"]["ranks"])
    with pytest.raises(UsageError, match="expected 'svdllm' before 'tucker'"):
        compiled(["tucker", "svdllm"], program)
    with pytest.raises(UsageError, match="stale"):
        compiled(["w4", "tucker"], program)


# ** bad input **


def refused(knobs: str, error: type[Exception], match: str) -> None:
    with pytest.raises(error, match=match):
        compiled(named(knobs), zoo.build("moe"))


@pytest.mark.parametrize(
    ("knobs", "match"),
    [
        ("remove=0", "above 0 and below 1"),
        ("remove=0.99", "tucker:remove: expected room for .* at block0/experts0.gate_up"),
        ("ranks=12", "expected two ranks as in 64x32"),
        ("ranks=0x4", "expected two ranks as in 64x32"),
        ("ranks=12x7,remove=0.2", "expected one of ranks and remove"),
        ("ranks=49x7", "tucker:ranks of rows: expected at most 48, found 49"),
        ("ranks=12x25", "tucker:ranks of columns: expected at most 24, found 25"),
        ("experts_rank=5", "tucker:experts_rank: expected at most 4, found 5"),
        ("ranks=12x2", "less than that up to the product of the others"),
    ],
)
def test_knobs_that_no_stack_can_take(knobs: str, match: str) -> None:
    refused(knobs, UsageError, match)


def test_ranks_that_save_nothing() -> None:
    refused("ranks=48x24", GateError, "ranks 48x24 save nothing of 4x48x16 and 4x16x24")
    # One weight of the two saves: the other stays.
    done = compiled("tucker:ranks=44x16", zoo.build("moe"))
    assert done.structure[0]["choice"]["stacks"]["block0/experts0"] == {"down": [4, 16, 16]}
    given = model_inputs(tokens(3))
    want = run(expanded(done), given)
    torch.testing.assert_close(run(done.program, given), want, rtol=1e-4, atol=1e-4)


def test_dense_models_and_experts_that_share_already() -> None:
    with pytest.raises(GateError, match="no call of experts has stacked weights"):
        compiled("tucker", zoo.build("llama_gqa"))
    done = compiled("tucker:ranks=12x7", zoo.build("moe"))
    with pytest.raises(GateError, match=r"its experts share .*_left and .*_right already"):
        compiled("tucker:ranks=6x4", done.program)


def test_weights_that_are_not_finite() -> None:
    program = zoo.build("moe")
    name = calls(program)[0].gate_up
    broken = program.weights.load(name).clone()
    broken[1, 2, 3] = float("nan")
    program.set_tensor(name, broken)
    with pytest.raises(ModelError, match="found NaN or Inf"):
        compiled("tucker:metric=weights", program)


def test_parts_of_other_shapes_do_not_load() -> None:
    done = compiled("tucker:ranks=12x7", zoo.build("moe"))
    left = next(p for p in done.program.params.values() if p.name.endswith("_left"))
    assert prod(left.shape) > 0
    node = next(iter(done.program.calls("llmc.experts")))
    args = list(node.args)
    args[5], args[6] = args[6], args[5]
    node.args = tuple(args)
    with pytest.raises(VerifierError):
        verify(done.program)


def test_the_planned_memory_counts_what_deciding_holds() -> None:
    program = zoo.build("moe")
    blind, aware = (
        make_plan(program, recipe.from_strings([f"tucker:metric={m}"])).steps[0]
        for m in ("weights", "activations")
    )
    assert aware.held - blind.held == 8 * (16**2 + 24**2)
    assert blind.held >= 8 * 8 * (4 * 48 * 16)
    assert (blind.forwards, aware.forwards) == (0, 1)
