"""Perplexity by the papers' protocol, divergence, paired bootstrap, speed."""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

import pytest
import torch

from llmc.compiler.ir.errors import UsageError
from llmc.compiler.ir.graph import Program
from llmc.compiler.pipeline.data import Stream, read_stream
from llmc.compiler.runtime.cache import add_cache
from llmc.compiler.runtime.evaluate import (
    Evaluation,
    compare,
    evaluate,
    evaluate_pair,
    peak_rss,
    speed,
    windows_of,
)
from llmc.compiler.runtime.executor import Runner

Make = Callable[..., Program]


def stream_of(length: int, top: int = 32) -> Stream:
    generator = torch.Generator().manual_seed(0)
    return read_stream(torch.randint(0, top, (length,), generator=generator), None)


def result(losses: list[float], **changes: Any) -> Evaluation:
    given: dict[str, Any] = {
        "sha256": "s", "window": 8, "windows": len(losses), "nll": tuple(losses),
    }  # fmt: skip
    return Evaluation("d", **(given | changes))


def test_perplexity_is_the_exponential_of_the_mean_over_windows(make_tiny: Make) -> None:
    runner, stream = Runner(make_tiny()), stream_of(59)
    got = evaluate(runner, stream, 8)
    assert (got.windows, got.tokens, got.window) == (7, 56, 8)
    losses = []
    for ids in stream.tokens[:56].split(8):
        logits = runner.forward(ids[None])[0, :-1]
        losses.append(float(torch.nn.functional.cross_entropy(logits, ids[1:])))
    assert got.nll == pytest.approx(losses, rel=1e-5)
    assert got.perplexity == pytest.approx(math.exp(sum(losses) / 7), rel=1e-5)


def test_batch_changes_nothing(make_tiny: Make) -> None:
    runner, stream = Runner(make_tiny()), stream_of(60)
    one, four = evaluate(runner, stream, 8), evaluate(runner, stream, 8, batch=4)
    assert one.nll == pytest.approx(four.nll, rel=1e-5)


def test_result_names_its_protocol(make_tiny: Make) -> None:
    out = evaluate(Runner(make_tiny()), stream_of(60), 8, limit=3).to_json()
    assert (out["window"], out["windows"], out["tokens"]) == (8, 3, 24)
    assert out["data"] == "tokens in memory"
    assert len(out["sha256"]) == 64
    assert "tail dropped" in out["protocol"]


def test_divergence_from_itself_is_nothing(make_tiny: Make) -> None:
    runner = Runner(make_tiny())
    got = evaluate(runner, stream_of(40), 8, baseline=Runner(make_tiny()))
    assert max(got.kl) < 1e-6
    assert set(got.agree) == {1.0}


def test_divergence_from_another(make_tiny: Make) -> None:
    runner, other = Runner(make_tiny()), Runner(make_tiny(softcap=0.1))
    got = evaluate(runner, stream_of(40), 8, baseline=other)
    ids = stream_of(40).tokens[:8][None]
    mine = torch.log_softmax(runner.forward(ids)[0, :-1], -1)
    theirs = torch.log_softmax(other.forward(ids)[0, :-1], -1)
    want = torch.nn.functional.kl_div(mine, theirs, log_target=True, reduction="batchmean")
    assert got.kl[0] == pytest.approx(float(want), rel=1e-3)
    assert got.agree[0] == pytest.approx(
        float((mine.argmax(-1) == theirs.argmax(-1)).float().mean())
    )
    assert got.to_json()["kl_to_baseline"] > 0


def test_a_pair_is_measured_in_one_run(make_tiny: Make) -> None:
    runner, other, stream = Runner(make_tiny()), Runner(make_tiny(softcap=0.1)), stream_of(60)
    mine, theirs = evaluate_pair(runner, other, stream, 8, batch=3)
    assert mine == evaluate(runner, stream, 8, baseline=other, batch=3)
    assert theirs == evaluate(other, stream, 8, batch=3)
    assert compare(mine, theirs).windows == 7


def test_too_little_data_is_said_with_both_counts(make_tiny: Make) -> None:
    with pytest.raises(UsageError, match="at least 64 tokens for one window, found 12"):
        evaluate(Runner(make_tiny()), stream_of(12), 64)
    with pytest.raises(UsageError, match="window of at least 2"):
        windows_of(stream_of(12), 1)
    with pytest.raises(UsageError, match="limit of at least 1"):
        windows_of(stream_of(12), 4, 0)


def test_tokens_of_another_vocabulary_are_refused(make_tiny: Make) -> None:
    with pytest.raises(UsageError, match="below 32, found 39"):
        evaluate(Runner(make_tiny()), stream_of(200, 40), 8)


def test_windows_beyond_the_context_are_refused(make_tiny: Make) -> None:
    program = make_tiny()
    program.facts["context"] = 8
    with pytest.raises(UsageError, match="at most 8 tokens"):
        evaluate(Runner(program), stream_of(40), 9)


def test_bootstrap_sees_a_small_steady_difference() -> None:
    noise = torch.randn(200, generator=torch.Generator().manual_seed(1)).tolist()
    base = [3 + n for n in noise]
    worse = [b + 0.01 + 0.01 * n for b, n in zip(base, reversed(noise), strict=True)]
    got = compare(result(worse), result(base))
    assert got.difference == pytest.approx(
        sum(w - b for w, b in zip(worse, base, strict=True)) / 200
    )
    assert 0 < got.low < got.difference < got.high
    assert got.p < 0.001
    assert got.perplexity_ratio == pytest.approx(math.exp(got.difference))
    turned = compare(result(base), result(worse))
    assert (turned.low, turned.high) == pytest.approx((-got.high, -got.low), rel=0.05)


@pytest.mark.parametrize(("windows", "p"), [(7, None), (8, 2.0**-7), (11, 2.0**-10)])
def test_few_windows_that_agree_prove_little(windows: int, p: float | None) -> None:
    got = compare(result([2.0] * windows), result([1.0] * windows))
    assert (got.difference, got.p) == (1.0, p)
    assert (got.low is None) == (p is None)


def test_bootstrap_does_not_see_noise() -> None:
    noise = torch.randn(2, 100, generator=torch.Generator().manual_seed(2)).tolist()
    got = compare(result(noise[0]), result(noise[1]))
    assert got.low < 0 < got.high
    assert got.p > 0.05
    same = compare(result(noise[0]), result(noise[0]))
    assert (same.difference, same.p) == (0, 1)


def test_bootstrap_interval_covers_the_truth_as_often_as_it_says() -> None:
    generator = torch.Generator().manual_seed(3)
    hits = 0
    for _ in range(200):
        drawn = (torch.randn(60, generator=generator) + 0.3).tolist()
        got = compare(result(drawn), result([0.0] * 60), samples=400)
        hits += got.low < 0.3 < got.high
    assert 178 <= hits <= 199


def test_other_windows_are_not_compared() -> None:
    for changes in ({"sha256": "t"}, {"window": 9}, {"windows": 4, "nll": (1.0,) * 4}):
        with pytest.raises(UsageError, match="same windows"):
            compare(result([1.0] * 3), result([1.0] * 3, **changes))


def test_speed_of_prefill_and_decode(make_tiny: Make) -> None:
    got = speed(Runner(add_cache(make_tiny())), stream_of(9).tokens, batch=2, prompt=7, new=3)
    assert got.prefill > 0
    assert got.decode > 0
    assert got.to_json()["prompt_tokens"] == 7
    with pytest.raises(UsageError, match="KV cache"):
        speed(Runner(make_tiny()), stream_of(9).tokens)


def test_peak_memory_is_in_bytes() -> None:
    assert 50 << 20 < peak_rss() < 1 << 40


def test_demo_model_is_as_good_as_its_card_says(pylm_runner: Runner, heldout: Stream) -> None:
    got = evaluate(pylm_runner, heldout, 512, limit=12, batch=4)
    assert 5 < got.perplexity < 15
