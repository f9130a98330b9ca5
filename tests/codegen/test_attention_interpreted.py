"""Cached attention against the op row's reference, under the Triton interpreter.

One child process runs all cases (this file as a script); the tests judge its answers.
"""

from __future__ import annotations

import json
import sys
from pathlib import Path
from typing import Any

import pytest
from attention_cases import CASES, Case, random_cases
from interpreter import interpreted

LONG = 400


@pytest.fixture(scope="session")
def attended(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Any]:
    """What the child process found, by label."""
    return interpreted(__file__, tmp_path_factory.mktemp("kernel_cache"))


def judge(found: dict[str, Any]) -> None:
    """Within the bound, the same twice, and beyond the bound when one value is moved."""
    assert found["finite"]
    assert found["ratio"] <= 1.0, f"error is {found['ratio']:.2f} of its bound"
    assert found["same_twice"], "two launches gave different bits"
    assert found["spoiled_ratio"] > 1.0, "the bound does not see a value that is off by eight"


@pytest.mark.parametrize("case", CASES, ids=lambda c: c.label)
def test_attention_computes_its_op(case: Case, attended: dict[str, Any]) -> None:
    judge(attended[case.label])


@pytest.mark.slow
def test_attention_computes_its_op_in_random_cases(tmp_path: Path) -> None:
    """Sizes, caches, masks and runs by chance."""
    found = interpreted(__file__, tmp_path, "long")
    assert len(found) >= LONG // 2
    for label, one in found.items():
        assert one["finite"], label
        assert one["ratio"] <= 1.0, f"{label}: error is {one['ratio']:.2f} of its bound"
        assert one["same_twice"], label


def test_a_model_says_the_same_on_both_targets(attended: dict[str, Any]) -> None:
    """A prompt by torch, tokens by the kernels."""
    same(attended["llama"])


@pytest.mark.slow
@pytest.mark.parametrize("name", ["gpt_neox", "gemma2", "cohere", "glm4", "mistral"])
def test_models_say_the_same_on_both_targets(name: str, tmp_path: Path) -> None:
    """Partial and interleaved rotation, windows and soft caps."""
    same(interpreted(__file__, tmp_path, "model", name)[name])


def same(found: dict[str, Any]) -> None:
    """Both targets said the same tokens, and kernels made them."""
    assert found["rows"] == ["attention_kv", "attention_kv"]
    assert found["rotated"] == [True, True]
    assert found["launches"] > 0
    assert found["triton"] == found["reference"]


@pytest.mark.parametrize(
    ("call", "words"),
    [
        ("queries", "expected at most 1 queries, found 2"),
        ("heads", "expected q [1, 4, 1, 16], found [1, 2, 1, 16]"),
        ("positions", "expected positions [1, 1], found [1, 2]"),
        ("dtype", "expected q in fp32, found torch.float16"),
        ("valid", "expected valid=False, found True"),
        ("turn", "expected cosines and sines where keys are rotated"),
    ],
)
def test_calls_that_do_not_fit_are_refused(call: str, words: str, attended: dict[str, Any]) -> None:
    assert words in attended["refusals"][call]


def test_a_recorded_step_says_the_same(attended: dict[str, Any]) -> None:
    """Positions and lengths on the device, over caches of numbers and of codes."""
    found = attended["recorded"]
    assert found["recorded"] == found["steps"]
    assert found["steps"][-1] == [8.0, 8.0]
    for name, words in (
        ("reference", "expected cached attention on a kernel"),
        ("empty", "expected a cache that holds a prompt"),
        ("full", "expected at most 5 tokens, found 5 and one more"),
        ("shape", "expected ids and positions [2, 1], found [2, 5]"),
        ("device", "cannot record a CUDA graph on cpu"),
    ):
        assert words in found["texts"][name]


def test_generation_takes_recorded_steps(attended: dict[str, Any]) -> None:
    """And leaves them, with the reason, where they cannot be had or say what is not so."""
    made, notes = attended["recorded"]["generated"], attended["recorded"]["notes"]
    assert all(len(row) == 5 for row in made["plain"])
    assert made["replayed"] == made["stale"] == made["refused"] == made["plain"]
    assert notes == [
        "expected a CUDA device, found cpu",
        "expected a recorded step to give what its launches give, found other numbers; "
        "decode without graphs",
        "operation not permitted when stream is capturing",
    ]


# ** the child process **


def _model(name: str) -> dict[str, Any]:
    from llmc.codegen.attention import lower
    from llmc.compiler.runtime.generate import generate
    from llmc.compiler.runtime.lowering import lowered, runner_of

    sys.path.insert(0, str(Path(__file__).parents[1]))
    from tiny_models import capture_tiny

    launches = 0
    attend = lower.attend

    def counted(*args: Any, **kwargs: Any) -> Any:
        nonlocal launches
        launches += 1
        return attend(*args, **kwargs)

    lower.attend = counted  # type: ignore[assignment]
    program, prompts = capture_tiny(name), [[3, 1, 4, 1, 5, 9, 2, 6], [3, 1, 4, 1, 5]]
    done = {t: lowered(program, t, cached=True) for t in ("reference", "triton")}
    said = {t: generate(runner_of(d), prompts, max_new_tokens=3) for t, d in done.items()}
    lower.attend = attend
    nodes = done["triton"].program.calls("llmc.cached_attention")
    return {
        **said, "rows": [p.row.name for p in done["triton"].attention], "launches": launches,
        "rotated": [bool(n.kwargs.get("rotate")) for n in nodes],
    }  # fmt: skip


def _recorded() -> dict[str, Any]:
    """Tokens of a model, step by step, and by a decoder that reads what changes on the device."""
    import torch
    from tiny_models import capture_tiny

    from llmc.compiler.ir.caches import CacheScheme
    from llmc.compiler.ir.errors import LlmcError
    from llmc.compiler.runtime.graphed import GraphDecoder
    from llmc.compiler.runtime.lowering import runner_for

    program = capture_tiny("llama")
    node = next(iter(program.calls("llmc.attention"))).name
    program.caches = {node: CacheScheme("int8", 8, keys="token")}
    runner = runner_for(program, "triton", cached=True)
    prompt = torch.tensor([[3, 1, 4, 1, 5], [2, 7, 1, 8, 2]])
    said: list[list[float]] = []
    for recorded in (False, True):
        cache = runner.start(2, 6)
        runner.forward(prompt, cache=cache)
        decoder = GraphDecoder(runner, cache, 12, lambda step: step) if recorded else None
        for at, token in ((5, 9), (6, 2), (7, 6)):
            ids, pos = torch.full((2, 1), token), torch.full((2, 1), at)
            if decoder is None:
                logits = runner.forward(ids, None, pos, cache)
            else:
                logits = decoder.step(ids, pos)
            said.append(logits.flatten().tolist())
        kept = [s._pos[:, : s.length].tolist() for s in cache.states.values()]
        said.append([float(len(k[0])) for k in kept])
    texts = {}
    plain = runner_for(program, "reference", cached=True)
    cache = plain.start(2)
    plain.forward(prompt, cache=cache)
    fresh, many = runner.start(2), runner.start(2)
    runner.forward(prompt, cache=many)
    calls = {
        "reference": lambda: GraphDecoder(plain, cache, 12),
        "empty": lambda: GraphDecoder(runner, fresh, 12),
        "full": lambda: GraphDecoder(runner, many, 5, lambda s: s).step(
            prompt[:, :1], prompt[:, :1]
        ),
        "shape": lambda: GraphDecoder(runner, many, 12).step(prompt, prompt),
        "device": lambda: GraphDecoder(runner, many, 12).step(prompt[:, :1], prompt[:, :1]),
    }
    for name, call in calls.items():
        try:
            call()
        except LlmcError as error:
            texts[name] = str(error)
    return {"steps": said[:4], "recorded": said[4:], "texts": texts, **_generated(runner)}


def _generated(runner: Any) -> dict[str, Any]:
    """Tokens by plain steps, by recorded ones, and by a record that says the same for ever."""
    from llmc.compiler.runtime import generate

    prompts, made, notes = [[3, 1, 4, 1, 5], [2, 7, 1]], {}, []
    plain = generate.decoder_for
    records = {
        "plain": None, "replayed": lambda step: step,
        "stale": lambda step: (lambda out: lambda: out)(step().clone()),
        "refused": lambda step: torch_error(),
    }  # fmt: skip

    def torch_error() -> Any:
        raise RuntimeError("operation not permitted when stream is capturing")

    for name, record in records.items():
        if record is not None:
            generate.decoder_for = lambda r, c, n, how=record: generate.GraphDecoder(r, c, n, how)
        steps = generate.Steps._note
        generate.Steps._note = lambda self, why: notes.append(why)
        made[name] = generate.generate(runner, prompts, max_new_tokens=5)
        generate.Steps._note, generate.decoder_for = steps, plain
    return {"generated": made, "notes": notes}


def _refusals() -> dict[str, str]:
    """The error texts of calls that do not fit."""
    import dataclasses

    from attention_cases import Step

    from llmc.codegen.attention.launch import attend
    from llmc.codegen.attention.rows import KV
    from llmc.codegen.attention.write import write
    from llmc.compiler.ir.errors import UsageError

    s = Step(Case(4, 2, 16, 16, 9))
    p = s.problem
    two = s.q.expand(1, 4, 2, 16)
    calls: dict[str, Any] = {
        "queries": (p, two, s.pos.expand(1, 2)),
        "heads": (p, s.q[:, :2], s.pos),
        "positions": (p, s.q, s.pos.expand(1, 2)),
        "dtype": (p, s.q.half(), s.pos),
        "valid": (dataclasses.replace(p, valid=True), s.q, s.pos),
    }
    texts = {}
    for name, (problem, q, pos) in calls.items():
        try:
            attend(KV, problem, q, s.held, pos, scale=1.0)
        except UsageError as error:
            texts[name] = str(error)
    turned = dataclasses.replace(p, turn="half", rotary=16)
    try:
        write(turned, s.held, s.q, s.q[:, :2], s.q[:, :2], s.pos, None, None, s.q, s.q)
    except UsageError as error:
        texts["turn"] = str(error)
    return texts


def main() -> None:
    """Answer all cases as JSON on the last line of stdout."""
    import torch
    from attention_cases import answer

    torch.set_num_threads(1)
    if "model" in sys.argv:
        print(json.dumps({sys.argv[2]: _model(sys.argv[2])}))
        return
    if "long" in sys.argv:
        print(json.dumps({c.label: answer(c) for c in random_cases(LONG)}))
        return
    answers: dict[str, Any] = {case.label: answer(case) for case in CASES}
    answers["llama"] = _model("llama")
    answers["recorded"] = _recorded()
    answers["refusals"] = _refusals()
    print(json.dumps(answers))


if __name__ == "__main__":
    main()
