"""early_exit: calibrated to an agreement, refused where none is reached, saved to the bit."""

from __future__ import annotations

import math
from pathlib import Path
from typing import Any

import pytest
import torch

from llmc.compiler.api import compile as compile_model
from llmc.compiler.api import load
from llmc.compiler.backend import read_options
from llmc.compiler.ir.errors import GateError, UsageError
from llmc.compiler.ir.exits import CLASSIFIER, Exits
from llmc.compiler.ir.graph import Program
from llmc.compiler.pipeline import recipe, zoo
from llmc.compiler.pipeline.exits import Ladder, Outcome, Seen, doubt, lowest, replay
from llmc.compiler.pipeline.plan import make_plan
from llmc.compiler.runtime.exits import ExitRunner
from llmc.compiler.runtime.sizes import sizes

LENGTH = 24


def fading(blocks: int = 4) -> Program:
    """A decoder whose later blocks change less and less, so that early exits mostly agree."""
    program = zoo.decoder(blocks=blocks, vocab=24, seed=3)
    for name, param in list(program.params.items()):
        number = (int(name[1:]) - 1) // 9
        if len(param.shape) == 2 and int(name[1:]) > 0 and 0 < number < blocks:
            program.set_tensor(name, program.weights.load(name) * 0.45**number)
    return program


def tokens(windows: int = 24) -> torch.Tensor:
    g = torch.Generator().manual_seed(5)
    return torch.randint(0, 24, (windows, LENGTH), generator=g)


def compiled(passes: str, windows: int = 24) -> Any:
    return compile_model(fading(), passes, calibration=tokens(windows))


@pytest.mark.parametrize("rule", ["softmax", "cosine", "classifier"])
def test_keeps_the_agreement_on_other_tokens(rule: str) -> None:
    """What the pass promises on held-out windows holds, within noise, where a model decodes."""
    model = compiled(f"early_exit:agreement=0.9,rule={rule}")
    (step,) = model.solved.structure
    measured = step["choice"]["measured"]
    assert measured["held_out"] >= 0.9
    assert measured["blocks_per_token"] < measured["of"] == 4
    assert sum(measured["shares"]) == pytest.approx(1)
    assert measured["tokens"] == 12 * (LENGTH - 1)
    tests = [r for r in step["records"] if "threshold" in r]
    assert [r["threshold"] for r in tests] == sorted((r["threshold"] for r in tests), reverse=True)
    passed = [r for r in tests if r["p"] <= 0.05]
    assert passed[-1]["threshold"] == step["choice"]["threshold"] == model.program.exits.threshold
    assert all(r["agreement"] > 0.9 for r in passed)
    fresh = torch.randint(0, 24, (8, LENGTH), generator=torch.Generator().manual_seed(9))
    runner = model.generator
    assert isinstance(runner, ExitRunner)
    cache, said = runner.start(8), []
    for t in range(LENGTH):
        said.append(runner.forward(fresh[:, t : t + 1], cache=cache).argmax(-1))
    agree = (torch.cat(said, 1) == model(fresh).argmax(-1)).double().mean()
    assert agree > 0.85


def test_exits_that_nobody_took_are_left_out() -> None:
    model = compiled("early_exit:agreement=0.9,rule=classifier")
    shares = model.solved.structure[0]["choice"]["measured"]["shares"]
    taken = [f"block{i}" for i, share in enumerate(shares[:-1]) if share > 0]
    assert list(model.program.exits.blocks) == taken
    assert model.program.weights.load(CLASSIFIER).shape == (len(taken), 3)


@pytest.mark.parametrize(
    ("knobs", "exact"),
    [("agreement=0.9,rule=classifier", False), ("rule=classifier,threshold=0.9", True),
     ("agreement=0.9", True), ("threshold=0.9", True)],
)  # fmt: skip
def test_planned_bytes_count_the_classifier(knobs: str, exact: bool) -> None:
    """The plan counts a classifier row of three f32 for each exit; calibration may keep fewer."""
    plan = make_plan(fading(), recipe.from_strings([f"early_exit:{knobs}"]))
    told = plan.predictions(0, 1)
    rows = 3 if "classifier" in knobs else 0
    assert told["bytes_after"] - told["bytes_before"] == 12 * rows
    assert plan.exact is told["exact"] is exact
    done = compiled(f"early_exit:{knobs}").program
    kept = 12 * len(done.exits.blocks) if rows else 0
    assert done.weight_bytes() - told["bytes_before"] == kept <= 12 * rows
    if exact:
        assert done.weight_bytes() == told["bytes_after"]
    found = sizes(done)
    assert found.total == sum(found.by_role.values()) == done.weight_bytes()


def test_a_lower_agreement_leaves_earlier() -> None:
    depths = [
        compiled(f"early_exit:agreement={a}").solved.structure[0]["choice"]["measured"]
        for a in (0.95, 0.85, 0.6)
    ]
    blocks = [d["blocks_per_token"] for d in depths]
    assert blocks == sorted(blocks, reverse=True)
    assert blocks[0] > blocks[-1]


def test_refused_where_no_threshold_keeps_it() -> None:
    with pytest.raises(GateError, match=r"agreement of 0\.9999 on held-out windows, found") as e:
        compiled("early_exit:agreement=0.9999")
    assert "the exits would never be taken" in str(e.value)
    assert e.value.exit_code == 4


def test_one_held_out_window_calibrates_nothing() -> None:
    with pytest.raises(UsageError, match=r"4 calibration windows or more, found 3.*--samples"):
        compiled("early_exit:agreement=0.5", windows=3)
    assert compiled("early_exit:agreement=0.5", windows=4).program.exits is not None
    with pytest.raises(UsageError, match="2 calibration windows or more, found 1"):
        compiled("early_exit:rule=classifier,threshold=0.9", windows=1)
    fitted = compiled("early_exit:rule=classifier,threshold=0.9", windows=2)
    assert fitted.program.exits.threshold == 0.9


def test_explicit_threshold_needs_no_data_and_is_kept() -> None:
    model = compile_model(fading(), "early_exit:threshold=0.25,first=1,every=2,decay=40")
    assert model.program.exits == Exits("softmax", ("block1",), 0.25, 40)
    assert model.record["calibration"] is None
    full = compile_model(fading(), "early_exit:threshold=2")
    ids = tokens(2)
    assert full.generate(ids, max_new_tokens=6) == generated_in_full(full, ids)
    assert full.layers_used == [[4] * 6] * 2


def generated_in_full(model: Any, ids: torch.Tensor) -> list[list[int]]:
    from llmc.compiler.runtime.generate import generate

    return generate(model.full_generator, ids.tolist(), max_new_tokens=6)


def test_layers_used_are_told() -> None:
    model = compile_model(fading(), "early_exit:threshold=-1,first=1")
    model.generate(tokens(2), max_new_tokens=5)
    assert model.layers_used == [[4, 2, 2, 2, 2]] * 2
    assert not isinstance(model.full_generator, ExitRunner)


@pytest.mark.parametrize("rule", ["softmax", "classifier"])
def test_artefact_is_the_same_to_the_bit(rule: str, tmp_path: Path) -> None:
    passes = f"early_exit:agreement=0.9,rule={rule}"
    model = compiled(passes)
    sealed = model.save(tmp_path / "out")
    again = load(tmp_path / "out")
    assert again.program.exits == model.program.exits
    assert again.program.clone().exits == model.program.exits
    ids = tokens(3)
    assert again.generate(ids, max_new_tokens=8) == model.generate(ids, max_new_tokens=8)
    assert again.layers_used == model.layers_used
    if rule == "classifier":
        kept = again.program.weights.load(CLASSIFIER)
        assert torch.equal(kept, model.program.weights.load(CLASSIFIER))
        assert sealed.tensors[CLASSIFIER].file == "weights-exits.safetensors"
    assert again.save(tmp_path / "two").content_hash == sealed.content_hash
    other = compile_model(fading(), "early_exit:threshold=0.5").save(tmp_path / "three")
    assert other.content_hash != sealed.content_hash


def test_goes_with_codes_and_comes_last() -> None:
    """Exits are calibrated on the compressed program, in whatever order they are typed."""
    a, b = (
        compiled(f"{one},{two}")
        for one, two in (("w8", "early_exit:agreement=0.9"), ("early_exit:agreement=0.9", "w8"))
    )
    assert a.program.exits == b.program.exits
    assert [s["pass"] for s in a.solved.structure] == ["early_exit"]
    assert "dequantize" in a.program.print_python()
    with pytest.raises(UsageError, match="expected 'w8' before 'early_exit'"):
        compile_model(fading(), ["early_exit:threshold=0.5", "w8"])


def test_wrong_knobs() -> None:
    for passes, message in (
        ("early_exit:agreement=0.9,threshold=0.5", "agreement or threshold, found both"),
        ("early_exit:rule=best", "one of softmax, cosine, classifier"),
        ("early_exit:agreement=1", "0.01..0.9999"),
        ("early_exit:classifier=svm", "rule=classifier with it, found rule=softmax"),
        ("early_exit:threshold=0.5,first=3", "early_exit:first: expected 0..2, found 3"),
    ):
        with pytest.raises(UsageError, match=message):
            make_plan(fading(), recipe.from_strings([passes]))
    with pytest.raises(UsageError, match="run the graph as a whole, found 'early_exit'"):
        read_options({"passes": "w8,early_exit"})


def test_no_exit_without_a_cache_or_a_second_block() -> None:
    with pytest.raises(GateError, match="one block, and behind it there is nothing to save"):
        make_plan(zoo.build("one_block"), recipe.from_strings(["early_exit"]))
    program = fading()
    node = next(program.calls("llmc.attention"))
    node.kwargs = {**node.kwargs, "causal": False}
    with pytest.raises(GateError, match="attention that is not causal"):
        make_plan(program, recipe.from_strings(["early_exit"]))


# ** the calibration's own laws **


def seen(exits: int = 3, windows: int = 5, length: int = 16) -> Seen:
    g = torch.Generator().manual_seed(2)
    gap = torch.rand(exits, windows, length, generator=g)
    right = torch.rand(exits, windows, length, generator=g) < 0.4 + 0.6 * gap
    return Seen(gap, gap, gap, right, torch.zeros(windows, length, dtype=torch.int64))


def test_depth_is_monotone_in_the_threshold_for_every_token() -> None:
    s, last = seen(), None
    for value in (-1.0, 0.2, 0.5, 0.7, 0.9, 1.0, 2.0):
        found = replay(s, Exits("softmax", ("a", "b", "c"), value), None, [1, 2, 3, 4])
        assert last is None or bool((found.depth >= last).all())
        last = found.depth
        assert bool((found.depth[:, 0] == 4).all())
    assert bool((last == 4).all())


def test_replay_by_hand() -> None:
    s = seen()
    found = replay(s, Exits("softmax", ("a", "b", "c"), 0.6), None, [1, 2, 3, 4])
    for w in range(5):
        for t in range(16):
            at = next((e for e in range(3) if t and s.gap[e, w, t] >= 0.6), 3)
            assert found.depth[w, t] == at + 1
            assert found.agrees[w, t] == (at == 3 or bool(s.right[at, w, t]))
    assert found.shares(4) == pytest.approx(
        [float((found.depth[:, 1:] == n).double().mean()) for n in (1, 2, 3, 4)]
    )


def test_prompts_are_not_counted() -> None:
    """Two windows of a prompt and three tokens: the prompts' agreement and depth change nothing."""
    agrees = torch.tensor([[1, 1, 0, 1], [1, 0, 1, 1]]).bool()
    depth = torch.tensor([[4, 1, 2, 1], [4, 4, 1, 2]])
    found = Outcome(agrees, depth)
    assert found.agreement == pytest.approx(4 / 6)
    assert found.blocks == pytest.approx(11 / 6)
    assert found.shares(4) == pytest.approx([3 / 6, 2 / 6, 0, 1 / 6])
    assert found.asked([1, 2]) == pytest.approx(1 + 3 / 6)
    right = torch.ones(8, 40, dtype=torch.bool)
    right[:, 1] = False
    records: list[dict[str, Any]] = []
    tried = iter([(0.5, Outcome(right, torch.ones(8, 40, dtype=torch.int64)))])
    lowest(tried, 0.9, 0.05, records)
    assert records[0]["agreement"] == pytest.approx(38 / 39)
    assert records[0]["p"] == doubt(right[:, 1:], 0.9) > doubt(right, 0.9)


def test_thresholds_go_from_timid_to_bold() -> None:
    s = seen(windows=64)
    exits = Exits("softmax", ("a", "b", "c"), 2.0)
    ladder = Ladder(s, exits, None, [1, 2, 3, 4])
    found = ladder.around(0.9)
    assert found == sorted(found, reverse=True)
    reached = [ladder.outcome(v).agreement for v in found]
    assert reached[0] > 0.99
    assert min(reached) < 0.9
    lowest_kept = ladder.lowest(0.9)
    assert lowest_kept in found
    below = ladder.rungs[ladder.rungs.index(lowest_kept) + 1]
    assert ladder.outcome(lowest_kept).agreement >= 0.9 > ladder.outcome(below).agreement


def test_doubt_is_a_bound_on_the_binomial_tail() -> None:
    """Independent tokens: above the exact tail, below twice its exponent's value, 1 at the rate."""
    n, wrong, agreement = 400, 8, 0.95
    agrees = torch.ones(20, 20, dtype=torch.bool)
    agrees[:wrong, 0] = False
    exact = sum(math.comb(n, k) * 0.05**k * 0.95 ** (n - k) for k in range(wrong + 1))
    assert exact <= doubt(agrees, agreement) <= exact**0.5
    assert doubt(torch.ones(2, 50, dtype=torch.bool), 0.95) == pytest.approx(0.95**100)
    half = torch.ones(10, 20, dtype=torch.bool)
    half[:, 0] = False
    assert doubt(half, 0.95) == 1.0


def test_tokens_of_a_window_that_fail_together_prove_less() -> None:
    spread, clustered = torch.ones(20, 20), torch.ones(20, 20)
    spread[:10, 0] = 0
    clustered[0, :10] = 0
    assert doubt(clustered.bool(), 0.95) > 10 * doubt(spread.bool(), 0.95)
    assert doubt(torch.ones(1, 400, dtype=torch.bool), 0.95) == pytest.approx(0.95)


def test_testing_stops_at_the_first_failure() -> None:
    good, bad = torch.ones(10, 50, dtype=torch.bool), torch.zeros(10, 50, dtype=torch.bool)
    asked: list[float] = []

    def tried() -> Any:
        for value, agrees in ((0.9, good), (0.8, good), (0.7, bad), (0.6, good)):
            asked.append(value)
            yield value, Outcome(agrees, torch.ones(10, 50, dtype=torch.int64))

    records: list[dict[str, Any]] = []
    found = lowest(tried(), 0.95, 0.05, records)
    assert found is not None
    assert found[0] == 0.8
    assert asked == [0.9, 0.8, 0.7]
    assert [r["p"] <= 0.05 for r in records] == [True, True, False]


def test_the_first_exit_is_where_it_costs_least() -> None:
    """Of all suffixes of the exits, the pass takes the cheapest; an explicit one is obeyed."""
    auto = compiled("early_exit:agreement=0.8").solved.structure[0]["choice"]
    costs = []
    for first in range(3):
        m = compiled(f"early_exit:agreement=0.8,first={first}").solved.structure[0]["choice"]
        assert all(int(b.removeprefix("block")) >= first for b in m["blocks"])
        m = m["measured"]
        costs.append(m["blocks_per_token"] + m["head_in_blocks"] * m["heads_asked_per_token"])
    m = auto["measured"]
    found = m["blocks_per_token"] + m["head_in_blocks"] * m["heads_asked_per_token"]
    assert found <= min(costs) + 0.15
    assert m["head_in_blocks"] > 0
