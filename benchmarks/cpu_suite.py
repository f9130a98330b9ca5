"""Linears and a whole model on the CPU: llmc's kernels beside torch, torchao and onnxruntime.

    python benchmarks/cpu_suite.py --out benchmarks/results/cpu.json            # kernels and model
    python benchmarks/cpu_suite.py --only compiled --out benchmarks/results/cpu.json
    python benchmarks/cpu_suite.py --only experts --out benchmarks/results/cpu.json
    python benchmarks/cpu_suite.py --only inductor --tokens 16,128 --out benchmarks/results/cpu.json
    python benchmarks/cpu_suite.py --only kernels --tokens 1,128

One thread, the thread's own time, medians of calls taken in turn: a ratio to bf16 is of one run, so
that a busy machine meets all alike. Peers that are not installed are named and left out. With --out
the sections that are not measured stay as they are, each beside its own command and load.
`llmc tune --target cpu` measures the table by which ways are chosen; the file that it writes is
what is shipped as codegen/cpu/default.json.
"""

from __future__ import annotations

import argparse
import json
import os
import sys
from collections.abc import Callable, Iterable
from functools import partial
from pathlib import Path
from typing import Any

import cpu_peers
import torch
from speed import command, llama, mixtral

from llmc.codegen import cpu
from llmc.codegen.cpu import compiled
from llmc.codegen.cpu.table import machine
from llmc.codegen.cpu.tune import random_parts, timed
from llmc.codegen.problem import Problem
from llmc.compiler import api
from llmc.compiler.ir.graph import Program
from llmc.compiler.runtime.executor import Runner
from llmc.compiler.runtime.lowering import runner_for

SECTIONS = ("kernels", "model", "compiled", "experts", "inductor")
MODELS = {
    "bf16": "",
    "w4": "w4:solver=rtn",
    "w8": "w8:solver=rtn",
    "w8a8": "w8a8:solver=rtn",
}
Calls = dict[str, Callable[[], object]]


def schemes(N: int, K: int) -> dict[str, Problem]:
    """What llmc's rows of the kernel page compute."""
    common: dict[str, Any] = {"N": N, "K": K, "x_dtype": "bf16"}
    return {
        "w4 g128": Problem(**common),
        "w4 g128 asym": Problem(**common, asym=True),
        "w3 g128": Problem(**common, bits=3),
        "w8": Problem(**common, bits=8, group=0),
        "w8 g128": Problem(**common, bits=8, group=128),
        "w8a8 token": Problem(**common, bits=8, group=0, rounds="int8 token"),
        "w8a8 tensor": Problem(**common, bits=8, group=0, rounds="int8 tensor"),
    }


def kernel_page(N: int, K: int, tokens: list[int], seconds: float) -> dict[str, Any]:
    """Milliseconds and ratios to bf16 of llmc and its peers, by number of tokens."""
    g = torch.Generator().manual_seed(0)
    weight = torch.randn(N, K, generator=g) / 64
    packed = {}
    peers, missing = cpu_peers.linears(weight)
    why = compiled.unavailable()
    missing += [f"llmc compiled: {why}"] if why else []
    for name, problem in schemes(N, K).items():
        kernel, why_not = cpu.choose(problem)
        assert kernel is not None, why_not
        tensors = cpu.pack(kernel, problem, random_parts(problem, g))
        choice = cpu.ways_by_tokens(kernel, problem)
        packed[name] = problem, kernel, tensors, choice
        if why is None:
            made = compiled.attach(kernel, problem, tensors, choice)
            if "compiled" in made[0].ways:
                packed[f"{name} compiled"] = problem, *made
    rows = []
    for M in tokens:
        x = torch.randn(M, K, generator=g)
        calls: Calls = {
            "bf16": partial(torch.nn.functional.linear, x.bfloat16(), weight.bfloat16()),
            "fp32": partial(torch.nn.functional.linear, x, weight),
        }
        ways = {}
        for name, (problem, kernel, tensors, choice) in packed.items():
            ways[f"llmc {name}"] = choice.at(M)
            calls[f"llmc {name}"] = partial(
                cpu.call, kernel, problem, tensors, x.bfloat16(), None, choice
            )
        calls |= {name: make(x) for name, make in peers.items()}
        found = timed(calls, seconds=seconds)
        rows += [
            {"name": n, "tokens": M, "ms": 1e3 * s, "speed": found["bf16"] / s,
             "way": ways.get(n, "")}
            for n, s in found.items()
        ]  # fmt: skip
    return {"shape": [N, K], "rows": rows, "missing": missing}


def model_page(
    args: argparse.Namespace, names: Iterable[str], made: Callable[..., Program] = llama
) -> dict[str, Any]:
    """Decode and prefill of a random model in one executor, its smaller forms against bf16."""
    dense = made(args)
    count = sum(torch.Size(p.shape).numel() for p in dense.params.values() if p.trained)
    runners = {}
    for name in names:
        recipe, compiled = MODELS[name.removesuffix(" compiled")], name.endswith(" compiled")
        program = api.compile(dense, recipe).program if recipe else dense
        runners[name] = runner_for(
            program, "cpu", cached=True, dtype=torch.bfloat16, compiled=compiled
        )
    g = torch.Generator().manual_seed(0)
    rows = []
    for kind, prompt, new in [("decode", 16, args.new), *(("prefill", m, 0) for m in args.prefill)]:
        ids = torch.randint(0, args.vocab, (1, prompt), generator=g)
        calls: Calls = {n: partial(_speak, r, ids, new) for n, r in runners.items()}
        found = timed(calls, turns=args.rounds, seconds=args.seconds * 4)
        rows += [
            {"name": n, "kind": kind, "prompt": prompt, "tokens_per_second": (new or prompt) / s,
             "speed": found["bf16"] / s}
            for n, s in found.items()
        ]  # fmt: skip
    memory = {n: r.memory_report().total for n, r in runners.items()}
    return {"model": made.__name__, "parameters": count, "rows": rows, "resident_bytes": memory}


def _speak(runner: Runner, ids: torch.Tensor, new: int) -> torch.Tensor:
    """A prefill, or ``new`` greedy steps behind a short one that is a small part of the time."""
    cache = runner.start(1, ids.shape[1] + new)
    logits = runner.forward(ids, cache=cache)
    for _ in range(new):
        logits = runner.forward(logits[:, -1].argmax(-1, keepdim=True), cache=cache)
    return logits


def inductor_page(N: int, K: int, tokens: list[int], seconds: float) -> dict[str, Any]:
    """bf16 and torch's int4 kernel under Inductor's max-autotune, compiled for each number."""
    g = torch.Generator().manual_seed(0)
    weight = torch.randn(N, K, generator=g) / 64
    problem = schemes(N, K)["w4 g128"]
    kernel, _ = cpu.choose(problem)
    assert kernel is not None
    tensors = cpu.pack(kernel, problem, random_parts(problem, g))
    choice = cpu.ways_by_tokens(kernel, problem)
    made = None
    if compiled.unavailable() is None:
        made = compiled.attach(kernel, problem, tensors, choice)
    rows = []
    for M in tokens:
        x = torch.randn(M, K, generator=g).bfloat16()
        calls: Calls = {
            "bf16": partial(torch.nn.functional.linear, x, weight.bfloat16()),
            "inductor bf16": cpu_peers.inductor_dense(weight.bfloat16(), x),
            "inductor int4pack": cpu_peers.inductor_int4(tensors, x),
            "llmc w4 g128": partial(cpu.call, kernel, problem, tensors, x, None, choice),
        }
        if made is not None:
            own, same, best = made
            calls["llmc w4 g128 compiled"] = partial(cpu.call, own, problem, same, x, None, best)
        found = timed(calls, seconds=seconds)
        rows += [
            {"name": n, "tokens": M, "ms": 1e3 * s, "speed": found["bf16"] / s, "way": ""}
            for n, s in found.items()
        ]
    return {"shape": [N, K], "rows": rows}


def table(result: dict[str, Any]) -> str:
    """The pages as markdown: speeds relative to bf16 of the same run."""
    lines = [f"# CPU suite\n\nOn {result['machine']['name']}, torch {result['machine']['torch']}, "
             "one thread, thread time.\n"]  # fmt: skip
    for section in ("kernels", "inductor"):
        if section not in result:
            continue
        page = result[section]
        N, K = page["shape"]
        tokens = sorted({r["tokens"] for r in page["rows"]})
        lines.append(f"## {section}: {N}x{K}, times as fast as bf16 (ms)\n")
        lines.append(taken(page))
        lines.append("| | " + " | ".join(f"M={m}" for m in tokens) + " |")
        lines.append("|---|" + "---|" * len(tokens))
        for name in dict.fromkeys(r["name"] for r in page["rows"]):
            cells = {r["tokens"]: r for r in page["rows"] if r["name"] == name}
            shown = [
                f"{cells[m]['speed']:.2f} ({cells[m]['ms']:.3g})" if m in cells else "-"
                for m in tokens
            ]
            lines.append(f"| {name} | " + " | ".join(shown) + " |")
        lines += [f"\nNot measured: {m}." for m in page.get("missing", [])] + [""]
    for section in ("model", "compiled", "experts"):
        if section not in result:
            continue
        page = result[section]
        kinds = list(dict.fromkeys((r["kind"], r["prompt"]) for r in page["rows"]))
        kind, millions = page.get("model", "llama"), page["parameters"] / 1e6
        lines.append(
            f"## {section}: random {kind} of {millions:.0f} M parameters in bf16, "
            "times as fast as dense (tokens/s)\n"
        )
        lines.append(taken(page))
        heads = [f"prefill {p}" if k == "prefill" else "decode" for k, p in kinds]
        lines.append("| | " + " | ".join(heads) + " | resident MB |")
        lines.append("|---|" + "---|" * (len(kinds) + 1))
        for name, size in page["resident_bytes"].items():
            cells = {(r["kind"], r["prompt"]): r for r in page["rows"] if r["name"] == name}
            shown = [f"{cells[k]['speed']:.2f} ({cells[k]['tokens_per_second']:.4g})"
                     for k in kinds]  # fmt: skip
            lines.append(f"| {name} | " + " | ".join(shown) + f" | {size / 1e6:.0f} |")
        lines.append("")
    return "\n".join(lines) + "\n"


def taken(page: dict[str, Any]) -> str:
    """By which command a page was measured, and how busy the machine was before."""
    return f"`{page['command']}`, load {page['load']:.1f} before.\n"


def main() -> int:
    """Measure, print the table, write JSON and the table beside it."""
    parser = argparse.ArgumentParser(description=__doc__.split("\n\n")[0] if __doc__ else None)
    parser.add_argument("--only", choices=SECTIONS, action="append", default=[])
    parser.add_argument("--shape", default="4096x4096")
    parser.add_argument("--tokens", default="1,4,16,128,1024")
    parser.add_argument("--prefill", default="16,64,128,1024")
    parser.add_argument("--new", type=int, default=16)
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--seconds", type=float, default=0.5, help="per call and row, at most")
    for name, default in (("hidden", 1024), ("inner", 4096), ("layers", 8), ("heads", 16),
                          ("vocab", 8192)):  # fmt: skip
        parser.add_argument(f"--{name}", type=int, default=default)
    parser.add_argument("--out", type=Path)
    args = parser.parse_args()
    args.prefill = [int(t) for t in args.prefill.split(",")]
    tokens = [int(t) for t in args.tokens.split(",")]
    N, K = (int(n) for n in args.shape.split("x"))
    torch.set_num_threads(1)
    only = args.only or ["kernels", "model"]
    result: dict[str, Any] = {"machine": vars(machine())}
    if args.out and args.out.is_file():
        old = json.loads(args.out.read_text())
        if old["machine"] == result["machine"]:
            told = {k: old[k] for k in ("command", "load") if k in old}
            result |= {k: told | v for k, v in old.items() if k in SECTIONS}
    pages: dict[str, Callable[[], dict[str, Any]]] = {
        "kernels": lambda: kernel_page(N, K, tokens, args.seconds),
        "model": lambda: model_page(args, MODELS),
        "compiled": lambda: model_page(args, ("bf16", "w4", "w4 compiled")),
        "experts": lambda: model_page(args, ("bf16", "w4", "w8"), mixtral),
        "inductor": lambda: inductor_page(N, K, tokens, args.seconds),
    }
    with torch.no_grad():
        for name in (n for n in SECTIONS if n in only):
            head = {"command": command(), "load": os.getloadavg()[0]}
            result[name] = head | pages[name]()
    text = table(result)
    sys.stdout.write(text)
    if args.out:
        args.out.write_text(json.dumps(result, indent=1) + "\n")
        args.out.with_suffix(".md").write_text(text)
    return 0


if __name__ == "__main__":
    sys.exit(main())
