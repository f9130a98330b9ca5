"""Is every kernel right on this device? Drawn cases of each row, many tokens, and attention."""

from __future__ import annotations

import dataclasses
import importlib.util
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import gpu_clock
import torch
from gpu_work import Task

from llmc.codegen import large, meaning
from llmc.codegen.kernels import ROWS
from llmc.codegen.kernels import row as row_named
from llmc.codegen.launch import fused_linear
from llmc.codegen.prepack import prepack
from llmc.codegen.problem import DTYPES
from llmc.codegen.samples import loud, random_parts
from llmc.codegen.variants import typical, unsupported

sys.path.insert(0, str(Path(__file__).parent.parent / "tests" / "codegen"))

MANY = 1024  # tokens from which some rows decode their weight once; others from more
HALVES = ("fp16", "bf16")
STEPS = 12  # tokens of a generation
LOOSE = 16.0  # times the bound of a sum in fp32, where three products of 11 bits stand for one


def draws(count: int, machine: str) -> list[Task]:
    """Cases of each row, ``count`` over all rows: to find some takes seconds."""
    here = [r.name for r in ROWS if not machine or not unsupported(r, machine)]
    each = max(8, -(-count // len(ROWS)))
    return [Task(f"drawing cases of {name}", draw, (name, each)) for name in here]


def draw(name: str, count: int) -> list[Any]:
    """Cases of one row."""
    from numerics_cases import sample

    return list(sample(count, row=name))


def cases(drawn: list[Any], count: int) -> list[Task]:
    """Every row in fp16 and in bf16, then ``count`` cases over all rows in turn."""
    from numerics_cases import ordered

    drawn = ordered(drawn)
    first = {(c.row, c.problem.x_dtype): c for c in reversed(drawn)}
    ahead = [c for (_, dtype), c in first.items() if dtype in HALVES]
    rest = [c for c in drawn[:count] if c not in ahead]
    return [Task(f"numerics {c.label}", case, (c,), 90.0) for c in (*ahead, *rest)]


def case(drawn: Any) -> dict[str, Any]:
    """A drawn case against fp64."""
    from numerics import answered, judge

    found = answered(drawn, gpu_clock.device())
    about = {"row": drawn.row, "dtype": drawn.problem.x_dtype, "ratio": found.get("ratio", 0.0)}
    return about | {"label": drawn.label, "wrong": judge(drawn, found)}


def many(machine: str) -> Iterator[Task]:
    """Every row that decodes its weight once for many tokens, in fp16 and in bf16."""
    for row in ROWS:
        for dtype in HALVES:
            base = typical(row, dtype)
            if base is None or (machine and unsupported(row, machine)):
                continue
            problem = dataclasses.replace(base, N=320, K=768, bias="bias" in row.choices)
            if problem.weights == "factors":
                problem = dataclasses.replace(problem, rank=64)
            if row.misfits(problem) or not large.serves(row, problem):
                continue
            factors = problem.weights == "factors"
            M = MANY if factors else max(MANY, large.least(row, problem))
            yield Task(f"numerics {row.name} {dtype} M={M}", tokens, (row.name, problem, M), 90.0)


def tokens(name: str, problem: Any, M: int) -> dict[str, Any]:
    """Many tokens against the same in fp64: sums in fp32 of rounded weights, one rounding after."""
    parts = random_parts(problem)
    x = (torch.randn(M, problem.K) / loud(problem)).to(DTYPES[problem.x_dtype])
    want = meaning.linear(problem, parts, x.double())
    where = gpu_clock.device()
    packed = prepack(row_named(name), problem, **{n: t.to(where) for n, t in parts.items()})
    y = fused_linear(packed, x.to(where)).cpu().double()
    bound = 4 * torch.finfo(DTYPES[problem.x_dtype]).eps
    found = float((y - want).norm() / want.norm())
    wrong = "" if found <= bound else f"relative error {found:.2e} is beyond {bound:.2e}"
    return {"row": name, "dtype": problem.x_dtype, "ratio": found / bound,
            "label": f"{name} {problem.x_dtype} M={M}", "wrong": wrong}  # fmt: skip


def attention(count: int) -> list[Task]:
    """The attention kernels' cases: sizes, masks, caches and dtypes, those of 16 bits first."""
    from attention_cases import CASES

    given = sorted(CASES, key=lambda c: c.dtype == "fp32")[:count]
    return [Task(f"numerics attention {c.label}", attended, (c,), 90.0) for c in given]


def attended(drawn: Any) -> dict[str, Any]:
    """One attention over a cache against fp64; its buffers are filled by torch."""
    from attention_cases import Step

    from llmc.codegen.attention.launch import attend
    from llmc.codegen.attention.rows import choose

    step = Step(drawn)
    row, why = choose(step.problem)
    if row is None:
        raise RuntimeError("; ".join(map(str, why)))
    config = row.config(step.problem, drawn.B, drawn.T, drawn.S)
    # Short steps, so that a few tokens are several runs.
    BT = config.BT if drawn.cache == "kivi" else 16
    config = dataclasses.replace(config, splits=drawn.splits, BT=BT)
    exact, bound = step.oracle()
    where = gpu_clock.device()
    beside = (None if t is None else t.to(where) for t in (step.sinks, step.slopes))
    given = (step.q.to(where), _there(step.held, where), step.pos.to(where), *beside)
    both = [attend(row, step.problem, *given, scale=step.scale, config=config) for _ in "ab"]
    ratio = float(((both[0].cpu().double() - exact).abs() / bound).max())
    ratio /= LOOSE if drawn.dtype == "fp32" and where != "cpu" else 1.0
    wrong = "" if ratio <= 1 else f"error is {ratio:.2f} of its bound"
    wrong = wrong if torch.equal(*both) else "two launches gave different bits"
    return {"row": row.name, "dtype": drawn.dtype, "ratio": ratio,
            "label": f"{row.name} {drawn.label}", "wrong": wrong}  # fmt: skip


def _there(held: Any, where: str) -> Any:
    """The same buffers elsewhere, contiguous as they are."""

    def moved(side: Any) -> Any:
        tail = None if side.tail is None else side.tail.to(where)
        return dataclasses.replace(side, parts=tuple(t.to(where) for t in side.parts), tail=tail)

    return dataclasses.replace(
        held, keys=moved(held.keys), values=moved(held.values), pos=held.pos.to(where),
        real=held.real.to(where),
    )  # fmt: skip


def generations(steps: int = STEPS) -> list[Task]:
    """Whole generations of so many tokens by recorded steps; none where what compresses a model is
    not installed."""
    here = importlib.util.find_spec("pydantic") is not None
    return [Task(f"generation over {kind}", generated, (kind, steps), 120.0)
            for kind in ("kv", "int8") if here]  # fmt: skip


def generated(kind: str, steps: int) -> dict[str, Any]:
    """Tokens of a small 4-bit decoder as `llmc run` makes them: those of single launches, and the
    prompt's logits as the reference has them. On a GPU the steps must have been recorded."""
    from llmc.compiler.ir.caches import CacheScheme
    from llmc.compiler.pipeline import recipe, zoo
    from llmc.compiler.pipeline.compile import compile_plan
    from llmc.compiler.pipeline.plan import make_plan
    from llmc.compiler.runtime.generate import generate
    from llmc.compiler.runtime.lowering import runner_for

    program = zoo.decoder(hidden=64, inner=128, size=16, rope=1.0)
    calls = recipe.from_strings(["w4:group=32,solver=rtn"])
    done = compile_plan(make_plan(program, calls), None).program
    if kind != "kv":
        node = next(iter(done.calls("llmc.attention"))).name
        done.caches = {node: CacheScheme(kind, 8, keys="token")}
    prompt, notes = [3, 1, 4, 1, 5], list[str]()
    runner, plain = (runner_for(done, t, cached=True) for t in ("triton", "reference"))
    made = generate(runner, [prompt], max_new_tokens=steps, on_note=notes.append)[0]
    cache, said, ids = runner.start(1), list[int](), torch.tensor([prompt])
    for at in range(steps):
        logits = runner.forward(ids, cache=cache)[:, -1].float().cpu()
        if at == 0:
            want = plain.forward(ids, cache=plain.start(1))[:, -1].float()
            off = float((logits - want).abs().max() / want.abs().max())
        said.append(int(logits.argmax()))
        ids = torch.tensor([said[-1:]])
    wrong = "; ".join(notes) or ("" if made == said else f"expected {said}, found {made}")
    wrong = wrong or ("" if off < 0.03 else f"logits are off by {off:.2e}")
    return {"row": "generation", "dtype": "fp32", "ratio": off / 0.03,
            "label": f"generation over {kind}", "wrong": wrong}  # fmt: skip


def summary(answers: list[dict[str, Any]], failed: list[dict[str, Any]]) -> dict[str, Any]:
    """How many cases ran, of which rows in which dtypes, what was wrong and how near to a bound."""
    rows: dict[str, dict[str, int]] = {}
    for a in answers:
        own = rows.setdefault(a["row"], {})
        own[a["dtype"]] = own.get(a["dtype"], 0) + 1
    wrong = [f"{a['label']}: {a['wrong']}" for a in answers if a["wrong"]]
    wrong += [f"{f['what']}: {f['error']}" for f in failed]
    worst = max((a["ratio"] for a in answers), default=0.0)
    return {"cases": len(answers), "rows": rows, "wrong": wrong, "worst_over_bound": worst}
