"""Early exits: above 1 is the full model to the bit; a real exit does what a run by hand does."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from typing import Any

import pytest
import torch

from llmc.compiler.analysis.blocks import apply_segments
from llmc.compiler.analysis.depth import leave_out
from llmc.compiler.analysis.exits import exit_spans
from llmc.compiler.ir.errors import ModelError
from llmc.compiler.ir.exits import CLASSIFIER, Exits, set_exits
from llmc.compiler.ir.graph import Program
from llmc.compiler.ir.refusal import Refusal
from llmc.compiler.pipeline.exits import ExitWalk
from llmc.compiler.pipeline.measure import Options
from llmc.compiler.runtime.evaluate import Evaluation
from llmc.compiler.runtime.exits import ExitRunner
from llmc.compiler.runtime.generate import generate
from llmc.compiler.runtime.lowering import runner_for
from llmc.compiler.runtime.stepwise import Stepwise

Make = Callable[..., Program]
PROMPTS = [[3, 1, 4], [1, 5, 9, 2, 6, 5], [7], [2, 2]]
IDS = torch.randint(0, 32, (3, 14), generator=torch.Generator().manual_seed(0))
LAYERS = 4
FIRST = ("block0", "block1", "block2")


def with_exits(
    program: Program, threshold: float, rule: str = "softmax", blocks: Sequence[str] = FIRST,
    decay: int | None = None, classifier: torch.Tensor | None = None,
) -> Program:  # fmt: skip
    out = program.clone()
    set_exits(out, Exits(rule, tuple(blocks), threshold, decay), classifier)
    return out


def leaving(program: Program, threshold: float, target: str = "reference", **more: Any) -> Any:
    return runner_for(with_exits(program, threshold, **more), target, cached=True)


def decoded(runner: Any, ids: torch.Tensor) -> tuple[torch.Tensor, list[list[int]]]:
    """Logits [B, S, V] and blocks by token and row, one token at a time."""
    cache = runner.start(len(ids), 4)
    logits, used = [], []
    for t in range(ids.shape[1]):
        logits.append(runner.forward(ids[:, t : t + 1], cache=cache))
        used.append(list(runner.used))
        assert {s.length for s in cache.states.values()} == {t + 1}
    return torch.cat(logits, 1), used


@pytest.fixture(scope="module")
def program(make_tiny: Make) -> Program:
    out = make_tiny(layers=LAYERS)
    apply_segments(out)
    return out


# ** an oracle by hand **


def by_hand(
    program: Program, ids: torch.Tensor, leaves: Callable[[int, int, torch.Tensor], bool]
) -> tuple[torch.Tensor, list[int]]:
    """Logits [S, V] of ``tiny`` and blocks per token; ``leaves(t, block, logits)`` decides."""
    w = [program.fetch(name) for name in program.params]
    table, places, head = w[0], w[1], w[-1]
    layers = [w[2 + 9 * i : 11 + 9 * i] for i in range(LAYERS)]

    def norm(x: torch.Tensor, gain: torch.Tensor) -> torch.Tensor:
        return x * torch.rsqrt(x.square().mean() + 1e-6) * gain

    kept: list[tuple[list[torch.Tensor], list[torch.Tensor]]] = [([], []) for _ in layers]
    out, used = [], []
    for t, token in enumerate(ids.tolist()):
        x, gone, depth = table[token] + places[t], False, 0
        for i, (g1, q, k, v, o, g2, gate, up, down) in enumerate(layers):
            h = norm(x, g1)
            keys, values = kept[i]
            keys.append((k @ h).view(2, 4))
            values.append((v @ h).view(2, 4))
            if gone:
                continue
            depth += 1
            query = (q @ h).view(2, 2, 4)
            weights = torch.einsum("ghd,tgd->ght", query, torch.stack(keys)) * 0.5
            mixed = torch.einsum("ght,tgd->ghd", weights.softmax(-1), torch.stack(values))
            x = x + o @ mixed.reshape(-1)
            h = norm(x, g2)
            x = x + down @ (torch.nn.functional.silu(gate @ h) * (up @ h))
            gone = i < LAYERS - 1 and leaves(t, i, head @ x)
        out.append(head @ x)
        used.append(depth)
    return torch.stack(out), used


def gap(logits: torch.Tensor) -> float:
    best = logits.softmax(-1).topk(2).values
    return float(best[0] - best[1])


@pytest.mark.parametrize("target", ["reference", "cpu"])
@pytest.mark.parametrize("threshold", [0.5, 0.85, -1.0])
def test_equals_a_run_by_hand(program: Program, threshold: float, target: str) -> None:
    """Logits, blocks per token and so the keys and values that skipped blocks were given."""
    runner = leaving(program, threshold, target)
    logits, used = decoded(runner, IDS)
    for row, ids in enumerate(IDS):
        want, depth = by_hand(program, ids, lambda t, i, said: t > 0 and gap(said) >= threshold)
        assert [u[row] for u in used] == depth
        torch.testing.assert_close(logits[row], want, rtol=1e-4, atol=1e-4)
    assert len({n for u in used for n in u}) > 1


def test_kept_keys_are_projections_of_the_exit_state(program: Program) -> None:
    """Two tokens, the second leaves behind block 0: what block 2 keeps is made from that stream."""
    runner = leaving(program, -1.0)
    cache = runner.start(1)
    for token in (3, 5):
        runner.forward(torch.tensor([[token]]), cache=cache)
    assert runner.used == [1]
    block = program.segments[3]
    w = [program.fetch(name) for name in program.params]
    span = exit_spans(program)[0]
    env = ExitWalk(program, [span], torch.tensor([[3, 5]]), Options())
    seen: dict[str, torch.Tensor] = {}
    for segment, envs in env._segments():
        new = env._walk.outputs(segment, envs[0])
        if segment.name == span.block:
            seen["stream"] = new[program.node(span.leaves)][0, 1]
        envs[0] = env._walk.advanced(segment, envs[0], new)
    x = seen["stream"]
    h = x * torch.rsqrt(x.square().mean() + 1e-6) * w[2 + 18]
    assert block.name == "block2"
    state = cache.states["kv2"]
    torch.testing.assert_close(state._kv[0][0, :, 1].reshape(-1), w[2 + 18 + 2] @ h)
    torch.testing.assert_close(state._kv[1][0, :, 1].reshape(-1), w[2 + 18 + 3] @ h)


# ** laws **


@pytest.mark.parametrize("target", ["reference", "cpu"])
@pytest.mark.parametrize("asked", [False, True])
def test_above_one_is_the_full_model_to_the_bit(program: Program, asked: bool, target: str) -> None:
    """Where a classifier is asked and always says no, the path itself changes no bit either."""
    full = runner_for(program, target, cached=True)
    runner = leaving(program, 2.0, target)
    if asked:
        never = torch.tensor([[0.0, 0.0, -30.0]] * 3)
        runner = leaving(program, 1.0, target, rule="classifier", classifier=never)
    assert isinstance(runner, ExitRunner)
    for prompts in (PROMPTS, PROMPTS[:1]):
        assert generate(runner, prompts, max_new_tokens=9) == generate(
            full, prompts, max_new_tokens=9
        )
    valid = torch.tensor([[0, 0, 1, 1], [1, 1, 1, 1], [0, 1, 1, 1]]).bool()
    caches = full.start(3), runner.start(3)
    a = full.forward(IDS[:, :4], valid, cache=caches[0])
    assert torch.equal(a, runner.forward(IDS[:, :4], valid, cache=caches[1]))
    for t in range(4, 14):
        step = IDS[:, t : t + 1]
        a, b = full.forward(step, cache=caches[0]), runner.forward(step, cache=caches[1])
        assert torch.equal(a, b)
        assert runner.used == [LAYERS] * 3


def test_leaving_behind_the_last_block_is_the_full_model(program: Program) -> None:
    full, _ = decoded_full(program)
    logits, used = decoded(leaving(program, -1.0, blocks=("block3",)), IDS)
    assert torch.equal(logits, full)
    assert {n for u in used for n in u} == {LAYERS}


def decoded_full(program: Program) -> tuple[torch.Tensor, Any]:
    runner = runner_for(program, "reference", cached=True)
    cache = runner.start(len(IDS), 4)
    steps = [runner.forward(IDS[:, t : t + 1], cache=cache) for t in range(IDS.shape[1])]
    return torch.cat(steps, 1), cache


@pytest.mark.parametrize("block", [0, 1, 2])
def test_forced_exit_equals_a_model_without_the_later_blocks(program: Program, block: int) -> None:
    short = program.clone()
    leave_out(short, [f"block{i}" for i in range(block + 1, LAYERS)])
    logits, used = decoded(leaving(program, -1.0, blocks=(f"block{block}",)), IDS)
    want = runner_for(short).forward(IDS)[:, 1:]
    torch.testing.assert_close(logits[:, 1:], want, rtol=1e-4, atol=1e-4)
    assert {n for u in used[1:] for n in u} == {block + 1}
    assert used[0] == [LAYERS] * 3


@pytest.mark.parametrize("rule", ["softmax", "cosine", "classifier"])
@pytest.mark.parametrize("target", ["reference", "cpu"])
def test_a_row_of_a_batch_leaves_as_it_does_alone(program: Program, rule: str, target: str) -> None:
    """Left-padded rows of other lengths, each with its own depths and tokens."""
    made = torch.tensor([[2.0, 1.0, -2.0]] * 3) if rule == "classifier" else None
    threshold = {"softmax": 0.7, "cosine": 0.75, "classifier": 0.55}[rule]
    runner = leaving(program, threshold, target, rule=rule, classifier=made)

    def run(prompts: list[list[int]]) -> tuple[list[list[int]], list[list[int]]]:
        depths: list[list[int]] = [[] for _ in prompts]
        made = generate(
            runner, prompts, max_new_tokens=12, on_depth=lambda r, n: depths[r].append(n)
        )
        return made, depths

    together, depths = run(PROMPTS)
    alone = [run([p]) for p in PROMPTS]
    assert together == [a[0][0] for a in alone]
    assert depths == [a[1][0] for a in alone]
    assert len({n for row in depths for n in row[1:]}) > 1
    assert all(row[0] == LAYERS for row in depths)


@pytest.mark.parametrize("rule", ["softmax", "cosine"])
def test_expected_depth_falls_with_the_threshold(program: Program, rule: str) -> None:
    depths = []
    for threshold in (-1.0, 0.3, 0.6, 0.8, 0.9, 0.97, 1.0, 2.0):
        _, used = decoded(leaving(program, threshold, rule=rule), IDS)
        depths.append(sum(map(sum, used)))
    assert depths == sorted(depths)
    assert depths[0] == IDS.numel() + 3 * (LAYERS - 1)
    assert depths[-1] == IDS.numel() * LAYERS
    assert len(set(depths)) > 3


def test_counted_blocks_are_those_that_ran(program: Program) -> None:
    """Rows through each block's first step, counted beside what the runner says."""
    runner = leaving(program, 0.7)
    rows = [0] * LAYERS
    for i, block in enumerate(runner.blocks):
        first = block.steps[0]

        def counting(x: torch.Tensor, *rest: Any, _i: int = i, _call: Any = first.call) -> Any:
            rows[_i] += len(x)
            return _call(x, *rest, eps=1e-6)

        first.call, first.kwargs = counting, {}
    cache = runner.start(3)
    told = [0] * LAYERS
    runner.forward(IDS[:, :1], cache=cache)
    rows[:] = [0] * LAYERS
    for t in range(1, IDS.shape[1]):
        runner.forward(IDS[:, t : t + 1], cache=cache)
        for used in runner.used:
            told[:used] = [n + 1 for n in told[:used]]
    assert rows == told
    assert rows[0] == 3 * 13 > rows[-1] > 0


def test_all_tokens_at_once_and_one_by_one_do_the_same(program: Program) -> None:
    """Calibration's walk over whole windows against decoding with a cache."""
    spans = exit_spans(program)
    assert not isinstance(spans, Refusal)
    full = runner_for(program)
    final = full.forward(IDS).argmax(-1)
    for threshold, decay in ((0.8, None), (0.9, 6)):
        left = with_exits(program, threshold, decay=decay)
        stepwise = Stepwise(runner_for(left, cached=True), full)
        said = stepwise.forward(IDS).argmax(-1)
        found = ExitWalk(left, spans[:-1], IDS, Options(batch=2)).run(left.exits, None, final)
        assert torch.equal(said == final, found.agrees)
        counts = torch.bincount(found.depth[:, 1:].flatten(), minlength=LAYERS + 1)[1:]
        assert stepwise.counts == counts.tolist()
        told = stepwise.to_json(Evaluation("ids", "", IDS.shape[1], len(IDS), (0.0,)))["exits"]
        assert told["agreement"] == pytest.approx(found.agreement)
        assert told["decoded_tokens"] == found.decoded.depth.numel()
        assert 0 < told["agreement"] < 1
        assert stepwise.blocks == pytest.approx(float(found.depth[:, 1:].double().mean()))


def test_calibration_and_decoding_compare_alike(program: Program) -> None:
    """A classifier that says 0.5 of every token, and a λ that only f64 tells from it."""
    spans = exit_spans(program)
    assert not isinstance(spans, Refusal)
    final = runner_for(program).forward(IDS).argmax(-1)
    even = torch.zeros(3, 3)
    above = math.nextafter(0.5, 1.0)
    assert bool(torch.full((1,), 0.5) >= above)
    for threshold, depth in ((0.5, 1), (above, LAYERS)):
        left = with_exits(program, threshold, rule="classifier", classifier=even)
        walked = ExitWalk(left, spans[:-1], IDS, Options()).run(left.exits, even, final)
        assert bool((walked.decoded.depth == depth).all())
        _, used = decoded(runner_for(left, cached=True), IDS)
        assert used[1:] == [[depth] * len(IDS)] * (IDS.shape[1] - 1)


def test_rewinding_and_resetting(program: Program) -> None:
    """A step that is taken back and taken again gives the same; so does a cache used anew."""
    runner = leaving(program, 0.8, decay=4)
    cache = runner.start(3, 2)

    def step(t: int) -> tuple[torch.Tensor, list[int]]:
        return runner.forward(IDS[:, t : t + 1], cache=cache), list(runner.used)

    runner.forward(IDS[:, :5], cache=cache)
    first = [step(t) for t in range(5, 10)]
    cache.rewind(3)
    again = [step(t) for t in range(7, 10)]
    cache.reset()
    runner.forward(IDS[:, :5], cache=cache)
    anew = [step(t) for t in range(5, 10)]
    for a, b in [*zip(first[2:], again, strict=True), *zip(first, anew, strict=True)]:
        assert torch.equal(a[0], b[0])
        assert a[1] == b[1]


def test_a_prompt_runs_at_full_depth(program: Program) -> None:
    runner = leaving(program, -1.0)
    cache = runner.start(3)
    logits = runner.forward(IDS[:, :6], cache=cache)
    assert torch.equal(logits, runner_for(program, cached=True).forward(
        IDS[:, :6], cache=runner_for(program, cached=True).start(3)))  # fmt: skip
    assert runner.used == [LAYERS] * 3
    assert cache.prompt == 6


def test_decay_relaxes_the_threshold() -> None:
    """CALM: clip(0.9 λ + 0.1 exp(-4 t / N), 0, 1); above 1 it stays above 1."""
    exits = Exits("softmax", ("block0",), 0.5, 8)
    t = torch.tensor([0, 8, 800])
    want = 0.45 + 0.1 * torch.exp(-4.0 * t.double() / 8)
    torch.testing.assert_close(exits.at(t), want)
    assert float(Exits("softmax", ("block0",), 1.0, 8).at(0)) == 1.0
    assert float(Exits("softmax", ("block0",), 2.0, 8).at(0)) == 2.0
    assert float(Exits("cosine", ("block0",), -1.0, 8).at(90)) == 0.0


def test_classifier_is_a_logistic_of_gap_and_top(program: Program) -> None:
    """Weights (1, 0) on a large scale take the softmax rule's decisions at the same gap."""
    scale = 1e4
    row = torch.tensor([scale, 0.0, -0.8 * scale])
    by_class = leaving(program, 0.5, rule="classifier", classifier=row.repeat(3, 1))
    by_gap = leaving(program, 0.8)
    a, b = decoded(by_class, IDS), decoded(by_gap, IDS)
    assert a[1] == b[1]
    assert torch.equal(a[0], b[0])


# ** refusals **


def test_exits_that_the_program_cannot_have(program: Program, make_tiny: Make) -> None:
    with pytest.raises(ModelError, match="a program with exits and a KV cache"):
        ExitRunner(with_exits(program, 0.5))
    for blocks in (("block9",), ("block1", "block0"), ("epilogue",), ("prologue",)):
        with pytest.raises(ModelError, match="exits after blocks in order"):
            with_exits(program, 0.5, blocks=blocks)
    with pytest.raises(ModelError, match=r"named .exits\.classifier."):
        leaving(program, 0.5, rule="classifier")
    for bad in (torch.zeros(2, 3), torch.zeros(3, 3).double(), torch.full((3, 3), torch.nan)):
        with pytest.raises(ModelError, match=CLASSIFIER):
            with_exits(program, 0.5, rule="classifier", classifier=bad)
    for wrong in ({"threshold": 2.5}, {"threshold": float("nan")}, {"rule": "best"},
                  {"decay": 0}, {"blocks": ()}, {"blocks": ("block0", "block0")}):  # fmt: skip
        given: dict[str, Any] = {"rule": "softmax", "blocks": ("block0",), "threshold": 0.5}
        with pytest.raises(ModelError, match="expected"):
            Exits(**(given | wrong))


def test_blocks_that_share_more_than_the_stream_are_refused(program: Program) -> None:
    """A value that one block computes from weights and another reads: an exit may skip it."""
    shared = program.clone()
    gains = list(shared.calls("llmc.rms_norm"))
    doubled = shared.emit(
        "aten.add.Tensor", gains[0].args[1], gains[0].args[1], before=gains[0], made_by="test"
    )
    for node in (gains[0], gains[2]):
        node.args = (node.args[0], doubled)
    shared.prune()
    apply_segments(shared)
    found = exit_spans(shared)
    assert isinstance(found, Refusal)
    assert (found.predicate, found.node) == ("stream_alone", doubled.name)
    shared.exits = Exits("softmax", ("block0",), 0.5)
    with pytest.raises(ModelError, match=r"can be left early.*stream_alone"):
        runner_for(shared, cached=True)
