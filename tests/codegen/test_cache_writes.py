"""Tokens on their way into a cache, against the op row's reference, under the Triton interpreter.

They are normed, rotated and rounded in one launch. One child process runs all cases (this file as
a script); the tests judge its answers.
"""

from __future__ import annotations

import dataclasses
import json
import sys
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
from interpreter import interpreted


@dataclass(frozen=True)
class Write:
    """Steps of several tokens: cache, sizes, and what queries and keys go through.

    ``last``: how the last channels lie that are rotated, of which heads of keys share one row.
    """

    cache: str = "kv"
    keys: str = "token"
    turn: str = ""
    dtype: str = "fp32"
    norm: str = ""
    gains: bool = True
    offset: float = 0.0
    H: int = 2
    KV: int = 1
    D: int = 32
    R: int = 24
    last: str = ""
    scaled: bool = False
    padded: bool = False
    counted: bool = False

    @property
    def label(self) -> str:
        names = [(f.name, getattr(self, f.name), f.default) for f in dataclasses.fields(self)]
        return "-".join(f"{n}{v}" for n, v, default in names if v != default) or "plain"


CASES = [
    Write("kv", turn="half"),
    Write("kv", turn="pairs", dtype="fp16"),
    Write("int8", turn="half"),
    Write("int8", "channel", dtype="fp16"),
    Write("fp8"),
    Write("fp8", "channel", "pairs", "fp16"),
    Write("kivi", "channel", "half"),
    # a norm of each head: kinds of cache, sizes that are no powers of two, no rotation
    Write("kv", turn="half", norm="head"),
    Write("kv", turn="pairs", dtype="fp16", norm="head", H=6, KV=3, offset=1.0),
    Write("kv", norm="head", D=7, H=3, KV=3),
    Write("kv", turn="half", norm="head", D=25, H=3, KV=3, dtype="fp16", padded=True),
    Write("int8", turn="half", norm="head", dtype="fp16", counted=True),
    Write("int8", "channel", norm="head", gains=False),
    Write("fp8", turn="half", norm="head", padded=True),
    Write("fp8", "channel", "pairs", "fp16", norm="head", gains=False),
    Write("kivi", "channel", "half", norm="head", offset=1.0),
    # of each head behind its rotation
    Write("kv", turn="half", norm="behind", D=26, H=3, KV=3, dtype="fp16"),
    Write("kv", turn="pairs", dtype="fp16", norm="behind", offset=1.0, padded=True),
    Write("int8", turn="half", norm="behind", dtype="fp16", counted=True),
    Write("fp8", "channel", "pairs", norm="behind", gains=False),
    # the last channels alone rotated, keys' of all heads alike
    Write("kv", turn="half", last="woven", H=6, KV=3, R=8),
    Write("kv", turn="half", last="apart", D=26, R=10, KV=2, dtype="fp16", padded=True),
    Write("kv", turn="pairs", last="apart", R=16, counted=True),
    Write("int8", turn="half", last="woven", KV=2, R=16, dtype="fp16", counted=True),
    Write("fp8", "channel", "pairs", last="apart", R=12, dtype="fp16"),
    Write("kivi", "channel", "half", last="woven", KV=2, R=8),
    # queries times a number each
    Write("kv", turn="half", scaled=True, dtype="fp16", padded=True),
    Write("int8", turn="pairs", norm="head", scaled=True, counted=True),
    Write("kv", scaled=True),
    # of all heads of a token
    Write("kv", turn="half", norm="row", H=6, KV=3),
    Write("kv", turn="half", norm="row", dtype="fp16", counted=True),
    Write("kv", norm="row", D=7, H=5, KV=5, gains=False),
    Write("int8", turn="half", norm="row", H=4, KV=2, offset=1.0),
    Write("int8", "channel", norm="row", dtype="fp16", padded=True),
    Write("fp8", turn="pairs", norm="row", dtype="fp16", H=4, KV=4, counted=True),
    Write("kivi", "channel", "half", norm="row"),
]
# Models whose tokens are made on both targets, and those that go step by step by a recorded one.
SAID = ("qwen3",)
SLOW = ("olmo2", "gemma3_text", "olmoe", "opt", "gptj", "hunyuan_v1_dense", "bloom", "deepseek_v3")


@pytest.fixture(scope="module")
def written(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Any]:
    """What the child process found, by label."""
    return interpreted(__file__, tmp_path_factory.mktemp("kernel_cache"))


@pytest.mark.parametrize("case", CASES, ids=lambda c: c.label)
def test_a_write_leaves_what_the_state_would(case: Write, written: dict[str, Any]) -> None:
    """Norm, rotation, codes, scales, positions and validity, over steps of several tokens."""
    found = written[case.label]
    assert found["buffers"] == [], "these buffers differ"
    assert found["error"] < (2e-6 if case.dtype == "fp32" else 4e-3)
    assert found["kernels"] == 4
    assert found["counted"] == 4 * case.counted
    # The reference says something else where nothing is normed.
    assert found["unlike"] == bool(case.norm)


@pytest.mark.parametrize("name", SAID)
def test_models_say_the_same_on_both_targets(name: str, written: dict[str, Any]) -> None:
    """A prompt by torch, tokens by the kernels, which norm what they write."""
    same(written[name], name)


@pytest.mark.slow
@pytest.mark.parametrize("name", SLOW)
def test_more_models_say_the_same_on_both_targets(name: str, tmp_path: Path) -> None:
    same(interpreted(__file__, tmp_path, name)[name], name)


def same(found: dict[str, Any], name: str) -> None:
    norms = {"qwen3": "head", "olmo2": "row", "gemma3_text": "head", "olmoe": "row",
             "hunyuan_v1_dense": "behind"}  # fmt: skip
    assert found["norms"] == [norms.get(name, "")] * 2
    assert found["writes"] > 0
    assert found["triton"] == found["reference"]
    # By a recorded step: positions and lengths on the device.
    assert found["counted"] > 0
    assert found["recorded"] == found["steps"]


def test_a_lowered_decoder_computes_what_its_reference_does(written: dict[str, Any]) -> None:
    """Four-bit linears, norms of heads and rotations, in a model as it was captured."""
    found = written["lowered"]
    assert found["kernels"] == [*["w4a16"] * 8, "w16"]
    assert found["norms"] == ["head"] * 2
    assert found["refused"] == []
    assert found["error"] < 2 * found["noise"] + 2e-6 < 0.02


def test_gains_that_do_not_fit_are_refused(written: dict[str, Any]) -> None:
    assert all("expected gains where the norm has some" in t for t in written["refusals"])
    assert len(written["refusals"]) == 3


# ** the child process **


def _steps(case: Write) -> dict[str, Any]:
    """Three states, filled by kernels, by the reference, and by that without a norm."""
    import torch
    from attention_cases import Case, Step

    from llmc.codegen.attention.lower import CachedAttention
    from llmc.codegen.attention.rows import choose
    from llmc.compiler.ir.ops.attention import cached_attention
    from llmc.compiler.runtime import rows

    E = 16
    kivi = {"group": 16, "residual": 16} if case.cache == "kivi" else {}
    bits = 4 if case.cache == "kivi" else 8
    sizes = (case.H, case.KV, case.D, E, 6, 6)
    base = Case(*sizes, 1, case.dtype, case.cache, bits, keys=case.keys, **kivi)
    mine, theirs, plain = Step(base), Step(base), Step(base)
    problem = dataclasses.replace(
        mine.problem, queries=16, turn=case.turn, rotary=case.R if case.turn else 0, valid=False,
        norm=case.norm, gains=bool(case.norm) and case.gains, eps=1e-5, offset=case.offset,
        last=bool(case.last), woven=case.last == "woven", scaled=case.scaled,
    )  # fmt: skip
    row, misfits = choose(problem)
    assert row is not None, misfits
    kernel = CachedAttention(row, problem)
    g, error, unlike = torch.Generator().manual_seed(3), 0.0, 0.0
    many = 12 if case.cache == "kivi" else 4  # beyond the ring of numbers
    for at, count in ((6, 3), (9, 1), (10, many), (10 + many, 1)):
        # Squares of eighths add up without rounding, whatever the order.
        q, k, v = (
            torch.randint(-24, 25, (1, count, h, n), generator=g).div(8).to(mine.dtype)
            for h, n in ((case.H, case.D), (case.KV, case.D), (case.KV, E))
        )
        q, k, v = (x.transpose(1, 2) for x in (q, k, v))
        pos = torch.arange(at, at + count).expand(1, count)
        valid = torch.full((1, count), not case.padded) if at == 9 else None
        angle = torch.rand(1, 1, count, case.R, generator=g)
        turn = (angle.cos(), angle.sin()) if case.turn else (None, None)
        gains: list[Any] = [None, None]
        if problem.gains:
            heads = (case.H, case.KV) if case.norm == "row" else (1, 1)
            gains = [torch.rand(h * case.D, generator=g).to(mine.dtype) for h in heads]
        how: dict[str, Any] = {
            "scale": 0.2, "interleaved": case.turn == "pairs", "rotate": bool(case.turn),
            "last": problem.last, "woven": problem.woven,
        }  # fmt: skip
        if case.last:
            k, last = k[..., : case.D - case.R], k[:, :1, :, case.D - case.R :]
            gains += [None, last]
        norm = {"norm": case.norm, "eps": 1e-5, "offset": case.offset} if case.norm else {}
        if case.counted:
            counter = torch.tensor([mine.state.length], dtype=torch.int32)
            mine.state.step = rows.Step(counter=counter)
        given = (q, k, v, pos, valid, None, None, *turn, None, None)
        if case.scaled:
            gains += [*(None,) * (4 - len(gains)), 1 + torch.rand(1, 1, count, 1, generator=g)]
        a = kernel(*given, *gains, state=mine.state, **how, **norm)
        b = cached_attention(*given, *gains, state=theirs.state, **how, **norm).double()
        rest = gains if case.last or (case.scaled and not case.norm) else ()
        c = cached_attention(*given, *rest, state=plain.state, **how).double()
        error = max(error, float((a.double() - b).norm() / b.norm()))
        unlike = max(unlike, float((c - b).norm() / b.norm()))
    pairs = list(zip(mine.state._growing(), theirs.state._growing(), strict=True))
    if case.cache == "kivi":
        sides = zip(mine.state._sides, theirs.state._sides, strict=True)
        pairs += [(a.ring, b.ring) for a, b in sides]
    # What no token has filled yet is whatever memory held.
    tokens = mine.state.length
    cut = [tuple(t.narrow(min(2, t.dim() - 1), 0, min(tokens, t.shape[min(2, t.dim() - 1)]))
                 for t in p) for p in pairs]  # fmt: skip
    differ = [i for i, (a, b) in enumerate(cut) if not torch.equal(_bits(a), _bits(b))]
    return {"error": error, "buffers": differ, "unlike": unlike > 0.01}


def _bits(x: Any) -> Any:
    import torch

    return x.view(torch.uint8) if x.dtype == torch.float8_e4m3fn else x


def _answer(case: Write) -> dict[str, Any]:
    """Of one case: errors, launches of the kernel, and whether the norm matters."""
    from llmc.codegen.attention import lower

    problems, write = [], lower.write

    def noted(problem: Any, *args: Any) -> None:
        problems.append(problem)
        write(problem, *args)

    lower.write = noted  # type: ignore[assignment]
    found = _steps(case)
    lower.write = write
    return found | {"kernels": len(problems), "counted": sum(p.counted for p in problems)}


def _model(name: str) -> dict[str, Any]:
    """Tokens and logits of a model on both targets, and step by step by a recorded one."""
    import torch
    from tiny_models import capture_tiny

    from llmc.codegen.attention import lower
    from llmc.compiler.ir.caches import CacheScheme
    from llmc.compiler.runtime.generate import generate
    from llmc.compiler.runtime.graphed import GraphDecoder
    from llmc.compiler.runtime.lowering import lowered, runner_for, runner_of

    problems, write = [], lower.write

    def noted(problem: Any, *args: Any) -> None:
        problems.append(problem)
        write(problem, *args)

    program, prompts = capture_tiny(name), [[3, 1, 4, 1, 5, 9, 2, 6], [3, 1, 4, 1, 5]]
    lower.write = noted  # type: ignore[assignment]
    done = {t: lowered(program, t, cached=True) for t in ("reference", "triton")}
    said = {t: generate(runner_of(d), prompts, max_new_tokens=3) for t, d in done.items()}
    writes = len(problems)
    first = next(iter(program.calls("llmc.attention"))).name
    program.caches = {first: CacheScheme("int8", 8, keys="token")}
    runner, steps = runner_for(program, "triton", cached=True), list[list[float]]()
    prompt = torch.tensor([[3, 1, 4, 1, 5], [2, 7, 1, 8, 2]])
    for recorded in (False, True):
        cache = runner.start(2, 6)
        runner.forward(prompt, cache=cache)
        decoder = GraphDecoder(runner, cache, 12, lambda step: step) if recorded else None
        for at, token in ((5, 9), (6, 2)):
            ids, pos = torch.full((2, 1), token), torch.full((2, 1), at)
            logits = (
                runner.forward(ids, None, pos, cache) if decoder is None
                else decoder.step(ids, pos)
            )  # fmt: skip
            steps.append(logits.flatten().tolist())
    lower.write = write
    return {
        **said, "writes": writes, "counted": sum(p.counted for p in problems),
        "norms": [p.problem.norm for p in done["triton"].attention],
        "steps": steps[:2], "recorded": steps[2:],
    }  # fmt: skip


def _lowered() -> dict[str, Any]:
    """qwen3 with four-bit weights: prompt and steps in fp16 on kernels, against fp32 and fp16."""
    import torch
    from tiny_models import make

    import llmc
    from llmc.codegen.targets import lower
    from llmc.compiler.pipeline import recipe
    from llmc.compiler.pipeline.compile import compile_plan
    from llmc.compiler.pipeline.plan import make_plan
    from llmc.compiler.runtime.cache import add_cache
    from llmc.compiler.runtime.lowering import recast, runner_for, runner_of

    tokens = torch.randint(0, 90, (4, 8), generator=torch.Generator().manual_seed(0))
    source = llmc.capture(make("qwen3", hidden_size=64, intermediate_size=64, head_dim=16))
    plan = make_plan(source, recipe.from_strings(["w4:group=32"]))
    wide = compile_plan(plan, tokens).program
    program = recast(wide, torch.float16)
    made = lower(add_cache(program), "triton")
    outs = []
    runners = (
        *(runner_for(p, cached=True) for p in (wide, program)),
        runner_of(made, device="cpu"),
    )
    for runner in runners:
        cache = runner.start(2, 32)
        steps = [tokens[:2, :4], *(tokens[:2, i : i + 1] for i in range(4, 6))]
        outs.append(torch.cat([runner.forward(s, cache=cache) for s in steps], 1).double())
    noise, error = (float((o - outs[0]).norm() / outs[0].norm()) for o in outs[1:])
    return {
        "error": error, "noise": noise, "kernels": [p.kernel for p in made.placed],
        "norms": [p.problem.norm for p in made.attention],
        "refused": [r.predicate for r in made.refused],
    }  # fmt: skip


def _refusals() -> list[str]:
    """The error texts of writes whose gains are not what the problem says."""
    import torch
    from attention_cases import Case, Step

    from llmc.codegen.attention.write import write
    from llmc.compiler.ir.errors import UsageError

    s, gain, texts = Step(Case(4, 2, 16, 16, 9)), torch.ones(16), []
    k = s.q[:, :2]
    for gains, has in (((gain, gain), False), ((None, None), True), ((gain, None), True)):
        problem = dataclasses.replace(s.problem, norm="head", gains=has)
        try:
            write(problem, s.held, s.q, k, k, s.pos, None, None, s.q, k, gains)
        except UsageError as error:
            texts.append(str(error))
    return texts


def main() -> None:
    """Answer all cases as JSON on the last line of stdout."""
    import torch

    from llmc.codegen.attention import write

    torch.set_num_threads(1)
    # So that several turns of a program's loop are needed for all heads of a token.
    write.AT_ONCE = 64
    if len(sys.argv) > 1:
        print(json.dumps({name: _model(name) for name in sys.argv[1:]}))
        return
    answers: dict[str, Any] = {case.label: _answer(case) for case in CASES}
    answers |= {name: _model(name) for name in SAID}
    answers |= {"lowered": _lowered(), "refusals": _refusals()}
    print(json.dumps(answers))


if __name__ == "__main__":
    sys.path.insert(0, str(Path(__file__).parents[1]))
    main()
