"""How many units stay and which: budgets, rounding, floors, the global ranking; shapes only."""

from __future__ import annotations

from functools import cache

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from llmc.compiler.analysis.cut import cut
from llmc.compiler.ir.errors import UsageError
from llmc.compiler.pipeline import width, zoo
from llmc.compiler.pipeline.analysis import Analysis
from llmc.compiler.pipeline.width import Ledger, Rounding, Target


@cache
def analysed(name: str, **sizes) -> Analysis:
    program = zoo.decoder(**sizes) if sizes else zoo.build(name)
    return Analysis(program)


def groups(analysis: Analysis, units: str):
    kinds = {k for u in units.split("+") for k in width.UNITS[u]}
    return [g for g in analysis.groups if g.kind in kinds]


def ledger(analysis: Analysis, units: str = "neuron+head", rounding: Rounding | None = None):
    return Ledger(analysis.program, groups(analysis, units), rounding or Rounding())


def parameters(program, inside: set[str]) -> int:
    """Elements of the trained parameters of those names, as the program stands."""
    return sum(torch.Size(p.shape).numel() for n, p in program.params.items() if n in inside)


BIG = {"hidden": 16, "inner": 128, "heads": 8, "kv": 8, "size": 4, "blocks": 3}
UNITS = ["neuron+head", "neuron", "head", "hidden", "neuron+head+hidden", "neuron+hidden"]


@settings(max_examples=40, deadline=None)
@given(st.sampled_from(UNITS), st.floats(0.02, 0.9))
def test_counts_meet_the_budget_to_half_a_step(units, share):
    """What is left differs from what was asked by half a step of the finest kind everywhere."""
    made = ledger(analysed("", **BIG), units)
    full = made.count({}, inside=True)
    try:
        counts = width.counts(made, Target(remove=share))
    except UsageError as e:
        refused_rightly(made, share, e)
        return
    finest = min(made.cost(g, inside=True) for g in counts)
    slack = finest * len(counts) / 2
    clamped = any(counts[g] in (made.floor[g], made.units(g)) for g in counts)
    off = abs(made.count(counts, inside=True) - full * (1 - share))
    assert off <= slack + 1e-6 or clamped


@settings(max_examples=25, deadline=None)
@given(st.sampled_from(UNITS), st.floats(0.05, 0.2), st.floats(0.05, 0.2))
def test_asking_for_more_leaves_no_more(units, a, b):
    made = ledger(analysed("", **BIG), units)
    low, high = sorted((a, b))
    step = max(made.cost(g, inside=True) for g in made.groups) * len(made.groups)
    left = [made.count(width.counts(made, Target(remove=s)), inside=True) for s in (low, high)]
    assert left[1] <= left[0] + step / 2


@pytest.mark.parametrize("name", ["llama_gqa", "layer_norm", "with_bias", "moe", "tied_head"])
@pytest.mark.parametrize("units", [*UNITS, "expert", "expert+neuron"])
def test_the_ledger_counts_what_the_cut_leaves(name, units):
    """The forecast is exact: the cut program has exactly that many parameters."""
    analysis = analysed(name)
    chosen = groups(analysis, units)
    if not chosen:
        assert "expert" in units
        return
    made = Ledger(analysis.program, chosen, Rounding())
    kept = {g.id: max(g.units * 2 // 3, g.least) for g in chosen}
    program = analysis.program.clone()
    cut(program, {g: torch.arange(kept[g.id]) for g in chosen})
    everything = set(made.shapes)
    assert made.count(kept, inside=False) == parameters(program, everything)
    assert made.count(kept, inside=True) == parameters(program, made.inside)
    assert made.inside < everything


@pytest.mark.parametrize("multiple", [2, 4, 8, 16])
def test_widths_are_multiples(multiple):
    made = ledger(analysed("", **BIG), "neuron", Rounding(multiple))
    for share in (0.05, 0.11, 0.3, 0.52):
        counts = width.counts(made, Target(remove=share))
        assert all(c % multiple == 0 and c >= multiple for c in counts.values())


def test_small_widths_are_not_rounded_unless_asked():
    small = ledger(analysed("llama_gqa"), "neuron", Rounding(8, everywhere=False))
    assert set(small.steps.values()) == {1}
    asked = ledger(analysed("llama_gqa"), "neuron", Rounding(8))
    assert set(asked.steps.values()) == {8}
    heads = ledger(analysed("llama_gqa"), "head", Rounding(8))
    assert set(heads.steps.values()) == {1}


def test_the_finer_kind_makes_up_for_the_coarser():
    """Of eight heads at 20 % two go (a quarter, not a fifth), so fewer neurons go."""
    made = ledger(analysed("", **BIG))
    counts = width.counts(made, Target(remove=0.2))
    heads = {c for g, c in counts.items() if "head" in g}
    neurons = {c for g, c in counts.items() if "neuron" in g}
    assert heads == {6}
    assert len(neurons) == 1
    assert neurons.pop() > 128 * 0.8


def test_a_total_number_of_parameters():
    analysis = analysed("", **BIG)
    made = ledger(analysis, "neuron")
    full = made.count({}, inside=False)
    counts = width.counts(made, Target(params=int(full) - 3 * 48 * 20))
    assert set(counts.values()) == {108}
    for wrong in (1, int(full) + 1):
        with pytest.raises(UsageError, match="params: expected"):
            width.counts(made, Target(params=wrong))


def test_absolute_counts():
    made = ledger(analysed("moe"), "expert+head")
    counts = width.counts(made, Target(kept={"expert": 3}))
    assert {g: c for g, c in counts.items() if "expert" in g} == {
        "block0/expert0": 3, "block1/expert0": 3,
    }  # fmt: skip
    assert all(c == made.units(g) for g, c in counts.items() if "expert" not in g)
    with pytest.raises(UsageError, match=r"experts: expected 2 to 4 kept, found 1"):
        width.counts(made, Target(kept={"expert": 1}))
    with pytest.raises(UsageError, match=r"heads: expected 1 to 2 kept, found 3"):
        width.counts(made, Target(kept={"head": 3}))
    with pytest.raises(UsageError, match="hidden: expected such a group"):
        width.counts(made, Target(kept={"hidden": 3}))


@pytest.mark.parametrize("ranking", ["local", "global"])
def test_a_share_that_would_empty_a_layer_is_refused(ranking):
    made = ledger(analysed("llama_gqa"))
    scores = random_scores(made, 0)
    ask = width.counts if ranking == "local" else lambda m, t: width.ranked(m, t, scores)
    with pytest.raises(UsageError, match="a layer would be empty"):
        ask(made, Target(remove=0.97))


def test_local_keeps_the_best_and_prefers_the_earlier_of_equals():
    score = torch.tensor([3.0, 1.0, 2.0, 1.0, 5.0])
    assert width.local(score, 4).tolist() == [0, 1, 2, 4]
    assert width.local(score, 3).tolist() == [0, 2, 4]
    assert width.local(torch.ones(5), 2).tolist() == [0, 1]
    assert width.local(score, 5).tolist() == [0, 1, 2, 3, 4]


def refused_rightly(made: Ledger, share: float, error: UsageError) -> None:
    """A share is refused only where a layer would be empty, or where nothing would go."""
    low, full = (made.count(k, inside=True) for k in (made.floor, {}))
    assert full * (1 - share) < low + 1e-6 or "nothing would go" in str(error)


def rounds_to_nothing(made: Ledger, target: Target, error: UsageError) -> None:
    """A number is refused only where it is half a step of the finest kind below the whole."""
    finest = min(made.steps[g] * made.cost(g, inside=False) for g in made.groups)
    assert "nothing would go" in str(error)
    assert made.count({}, inside=False) - target.params <= finest * len(made.groups) / 2 + 1


def random_scores(made: Ledger, seed: int) -> dict[str, torch.Tensor]:
    g = torch.Generator().manual_seed(seed)
    return {n: torch.rand(made.units(n), generator=g, dtype=torch.float64) for n in made.groups}


@settings(max_examples=30, deadline=None)
@given(
    st.sampled_from(["neuron", "neuron+head", "head"]), st.floats(0.05, 0.8), st.integers(0, 99),
    st.sampled_from([1, 8]),
)  # fmt: skip
def test_the_global_ranking_meets_the_budget_and_the_floors(units, share, seed, multiple):
    made = ledger(analysed("", **BIG), units, Rounding(multiple))
    full = made.count({}, inside=True)
    scores = random_scores(made, seed)
    try:
        keep = width.ranked(made, Target(remove=share), scores)
    except UsageError as e:
        refused_rightly(made, share, e)
        return
    counts = {n: len(k) for n, k in keep.items()}
    packet = max(made.cost(n, inside=True) * made.steps[n] for n in made.groups)
    off = made.count(counts, inside=True) - full * (1 - share)
    assert abs(off) <= packet / 2 + 1e-6 or counts == made.floor
    for name, kept in keep.items():
        assert made.floor[name] <= len(kept) <= made.units(name)
        assert len(kept) % made.steps[name] == 0
        gone = torch.ones(made.units(name), dtype=torch.bool)
        gone[kept] = False
        if bool(gone.any()):
            assert float(scores[name][gone].max()) <= float(scores[name][kept].min())


def test_the_global_ranking_takes_the_least_important_layer_first():
    made = ledger(analysed("", **BIG), "neuron")
    scores = {n: torch.full((128,), float(i)) for i, n in enumerate(made.groups)}
    keep = width.ranked(made, Target(remove=0.2), scores)
    assert [len(k) for k in keep.values()][1:] == [128, 128]
    assert len(next(iter(keep.values()))) < 128


def test_costs_that_do_not_add_are_refused_globally():
    made = ledger(analysed("llama_gqa"), "neuron+hidden")
    with pytest.raises(UsageError, match="costs add"):
        width.ranked(made, Target(remove=0.2), random_scores(made, 0))


def test_uniform_wants_one_width_everywhere():
    analysis = analysed("", **BIG)
    made = ledger(analysis)
    chosen = list(made.groups.values())
    counts = width.counts(made, Target(remove=0.3))
    width.check_uniform(analysis.program, counts, chosen)
    with pytest.raises(UsageError, match=r"one width in all blocks, found .* in block0"):
        width.check_uniform(analysis.program, {**counts, "block1/neuron0": 7}, chosen)
    some = [g for g in chosen if g.segment != "block2"]
    with pytest.raises(UsageError, match="what it has in block2"):
        width.check_uniform(analysis.program, counts, some)


@pytest.mark.parametrize("together", [False, True])
def test_a_group_that_costs_nothing_stays_whole(together):
    """However little it matters: cutting it brings a share of the blocks no nearer."""
    made = ledger(analysed("", **BIG), "neuron")
    first = next(iter(made.groups))
    made.inside = made.inside - {m.param for m in made.groups[first].members}
    scores = random_scores(made, 0)
    keep = width.ranked(
        made, Target(remove=0.2), {**scores, first: scores[first] - 9}, together=together
    )
    assert len(keep.pop(first)) == 128
    assert all(len(k) < 128 for k in keep.values())


@settings(max_examples=30, deadline=None)
@given(
    st.sampled_from(["neuron+head", "neuron", "neuron+hidden", "hidden"]),
    st.floats(0.1, 0.7),
    st.sampled_from([1, 8]),
)
def test_a_number_of_parameters_is_never_passed(units, share, multiple):
    """No more are left than asked, and less by a step of the finest kind everywhere at most."""
    made = ledger(analysed("", **BIG), units, Rounding(multiple))
    low, full = (made.count(k, inside=False) for k in (made.floor, {}))
    target = Target(params=int(low + (1 - share) * (full - low)))
    try:
        kept = width.counts(made, target)
    except UsageError as e:
        rounds_to_nothing(made, target, e)
        return
    assert low <= made.count(kept, inside=False) <= target.params
    assert all(kept[g] >= made.floor[g] and kept[g] % made.steps[g] == 0 for g in kept)
    if "hidden" not in units:
        scores = random_scores(made, multiple)
        for together in (False, True):
            stays = width.ranked(made, target, scores, together=together)
            left = made.count({g: len(k) for g, k in stays.items()}, inside=False)
            packet = max(made.cost(g, inside=False) * made.steps[g] for g in kept)
            assert target.params - packet * (len(kept) if together else 1) < left
            assert left <= target.params
