"""Generation: cached equals uncached, batches equal rows alone, sampling obeys its settings."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

from llmc.compiler.ir.errors import UsageError
from llmc.compiler.ir.graph import Program
from llmc.compiler.pipeline.data import Tokenizer
from llmc.compiler.runtime.cache import add_cache
from llmc.compiler.runtime.executor import Runner
from llmc.compiler.runtime.generate import Sampling, TextStream, choose, generate
from llmc.compiler.runtime.graphed import decoder_for

Make = Callable[..., Program]
PROMPTS = [[3, 1, 4], [1, 5, 9, 2, 6, 5], [7]]


def test_cached_greedy_equals_uncached(make_tiny: Make) -> None:
    program = make_tiny()
    plain, cached = Runner(program), Runner(add_cache(program))
    want = generate(plain, PROMPTS, max_new_tokens=12)
    assert generate(cached, PROMPTS, max_new_tokens=12) == want
    assert [generate(plain, [p], max_new_tokens=12)[0] for p in PROMPTS] == want
    assert all(len(row) == 12 for row in want)


def test_demo_model_writes_the_same_with_and_without_cache(
    pylm_runner: Runner, pylm_cached: Runner, pylm_tokenizer: Tokenizer
) -> None:
    texts = ("def main(", "import os\n\nclass Reader(object):\n    def __init__(self", "x = [")
    prompts = [pylm_tokenizer.encode(t) for t in texts]
    want = generate(pylm_runner, prompts, max_new_tokens=16)
    assert generate(pylm_cached, prompts, max_new_tokens=16) == want
    assert [generate(pylm_cached, [p], max_new_tokens=16)[0] for p in prompts] == want
    assert "self" in pylm_tokenizer.decode(want[1])


@pytest.mark.parametrize(
    ("device", "kind", "tokens", "why"),
    [
        ("cpu", Runner, 40, "expected a CUDA device, found cpu"),
        ("cuda", type("Leaves", (Runner,), {}), 40, "early exits choose in each step"),
        ("cuda", Runner, 8, "expected 8 steps or more, found 5"),
        ("cuda", Runner, 40, "expected cached attention on a kernel over a cache of kv, int8, fp8"),
    ],
)
def test_steps_that_are_not_recorded(
    make_tiny: Make, device: str, kind: type[Runner], tokens: int, why: str
) -> None:
    """The reason is told on a CUDA device, and each kernel is launched by itself."""
    runner = kind(add_cache(make_tiny()))
    cache = runner.start(1)
    runner.forward(torch.tensor([[3, 1, 4]]), cache=cache)
    runner.device = torch.device(device)
    found = decoder_for(runner, cache, tokens)
    assert isinstance(found, str)
    assert why in found


def test_eos_ends_a_row_and_is_left_out(make_tiny: Make) -> None:
    cached = Runner(add_cache(make_tiny()))
    free = generate(cached, PROMPTS, max_new_tokens=8)
    end = free[1][3]
    first = [row.index(end) if end in row else len(row) for row in free]
    got = generate(cached, PROMPTS, max_new_tokens=8, eos=[end])
    assert got == [row[:n] for row, n in zip(free, first, strict=True)]


def test_callback_sees_every_token_in_order(make_tiny: Make) -> None:
    cached = Runner(add_cache(make_tiny()))
    seen: list[tuple[int, int]] = []
    out = generate(cached, PROMPTS, max_new_tokens=5, on_token=lambda row, t: seen.append((row, t)))
    assert [[t for r, t in seen if r == row] for row in range(3)] == out
    assert [r for r, _ in seen[:3]] == [0, 1, 2]


def test_one_seed_gives_one_text(make_tiny: Make) -> None:
    cached = Runner(add_cache(make_tiny()))

    def sample(seed: int) -> list[list[int]]:
        return generate(
            cached, PROMPTS, max_new_tokens=20, sampling=Sampling(1.5, top_p=0.99, seed=seed)
        )

    assert sample(1) == sample(1)
    assert sample(1) != sample(2)


def test_top_k_and_top_p_bound_the_choice() -> None:
    logits = torch.log(torch.tensor([[0.5, 0.3, 0.15, 0.05]])).expand(4000, 4)
    generator = torch.Generator().manual_seed(0)

    def shares(sampling: Sampling) -> list[float]:
        drawn = choose(logits, sampling, generator)
        return [float((drawn == i).float().mean()) for i in range(4)]

    assert shares(Sampling(1.0)) == pytest.approx([0.5, 0.3, 0.15, 0.05], abs=0.03)
    assert shares(Sampling(1.0, top_k=2)) == pytest.approx([0.625, 0.375, 0, 0], abs=0.03)
    assert shares(Sampling(1.0, top_p=0.79)) == pytest.approx([0.625, 0.375, 0, 0], abs=0.03)
    assert shares(Sampling(1.0, top_p=0.81))[2] > 0.1
    assert shares(Sampling(1.0, top_p=1e-9)) == [1, 0, 0, 0]
    assert shares(Sampling(0.0)) == [1, 0, 0, 0]
    assert shares(Sampling(0.25))[0] > 0.85


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"temperature": -1.0}, "temperature >= 0, found -1"),
        ({"temperature": float("nan")}, "temperature"),
        ({"temperature": 1.0, "top_k": 0}, "top_k >= 1, found 0"),
        ({"temperature": 1.0, "top_p": 1.5}, r"top_p in \(0, 1\], found 1.5"),
        ({"top_k": 5}, "temperature above 0"),
    ],
)
def test_bad_settings_are_named(settings: dict[str, Any], message: str) -> None:
    with pytest.raises(UsageError, match=message):
        Sampling(**settings).check()


def test_bad_prompts_are_refused(make_tiny: Make) -> None:
    runner = Runner(make_tiny())
    for prompts in ([], [[]], [[1], []]):
        with pytest.raises(UsageError, match="at least one token"):
            generate(runner, prompts, max_new_tokens=1)
    with pytest.raises(UsageError, match="max_new_tokens >= 1"):
        generate(runner, [[1]], max_new_tokens=0)
    with pytest.raises(UsageError, match="below 32, found 32"):
        generate(runner, [[32]], max_new_tokens=1)


def test_more_tokens_than_the_context_are_refused(make_tiny: Make) -> None:
    program = make_tiny()
    program.facts["context"] = 8
    with pytest.raises(UsageError, match="at most 8 tokens, found 3 of the prompt and 6 new"):
        generate(Runner(program), [[1, 2, 3]], max_new_tokens=6)
    assert len(generate(Runner(program), [[1, 2, 3]], max_new_tokens=5)[0]) == 5


def test_streamed_text_adds_up(pylm: Path) -> None:
    tokenizer = Tokenizer(pylm)
    text = 'x = "naïve – 日本語 😀"\nprint(x)\n'
    stream = TextStream(tokenizer)
    pieces = [stream.push(i) for i in tokenizer.encode(text)]
    assert "".join([*pieces, stream.rest()]) == text
    assert "�" not in "".join(pieces)
    assert sum(bool(p) for p in pieces) > 5
