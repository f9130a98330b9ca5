"""The kernels on a GPU in one call: right, then microseconds against floors, peers and whole steps.

    python benchmarks/gpu_suite.py --out benchmarks/results/gpu.json
    TRITON_INTERPRET=1 python benchmarks/gpu_suite.py --tiny

Nothing is fetched. Times are medians of CUDA graph replays that rotate over copies of the weight
beyond three times the L2 cache, so that every call reads its weight from memory; shares are of the
copy bandwidth and of the bf16 product measured in the same run. Without a GPU, under the
interpreter, everything runs once and nothing is timed. What the budget leaves out is named.
Exit 4 when a result is beyond its bound.
"""

from __future__ import annotations

import argparse
import dataclasses
import json
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import gpu_clock
import gpu_decode
import gpu_peers
import torch

from llmc.codegen.kernels import ROWS
from llmc.codegen.launch import fused_linear, unavailable
from llmc.codegen.prepack import prepack
from llmc.codegen.problem import DTYPES, Problem
from llmc.codegen.row import KernelRow
from llmc.codegen.samples import random_parts
from llmc.codegen.tuning.choices import reason
from llmc.codegen.variants import typical, unsupported
from llmc.compiler.ir import packing
from llmc.spec.pages import table

sys.path.insert(0, str(Path(__file__).parent.parent / "tests" / "codegen"))

SHAPES = ((4096, 4096), (14336, 4096), (28672, 4096), (4096, 14336))
TOKENS = (1, 8, 16, 64, 256, 2048)
SECONDS = 530.0
# Before the end: room for what comes after.
ROOM = {"numerics": 400.0, "kernels": 170.0, "peers": 110.0}
COPY = "share_of_copy"
SECTIONS = ("numerics", "kernels", "peers", "decode")
TINY = gpu_decode.Shapes(
    hidden=128, heads=4, kv_heads=2, width=32, inner=128, vocab=96, layers=1, context=8,
    dtype="fp16",
)  # fmt: skip


def numerics(count: int, budget: gpu_clock.Budget) -> dict[str, Any]:
    """Drawn cases of every row on this device, against fp64; what is wrong by the case's label."""
    from numerics import answered, judge
    from numerics_cases import ordered, sample

    ran, wrong, worst = 0, [], 0.0
    seen: set[str] = set()
    target = machine()
    for case in ordered(sample(count)):
        row = next(r for r in ROWS if r.name == case.row)
        if target and unsupported(row, target):
            continue
        if not budget.allows(f"numerics from case {ran} on", ROOM["numerics"]):
            break
        found = answered(case, gpu_clock.device())
        ran += 1
        seen.add(case.row)
        worst = max(worst, found.get("ratio", 0.0))
        if why := judge(case, found):
            wrong.append(f"{case.label}: {why}")
    return {"cases": ran, "rows": sorted(seen), "wrong": wrong, "worst_over_bound": worst}


def machine() -> str:
    """ "sm_90" or "sm_80" on a GPU; "" under the interpreter, which has every instruction."""
    if not gpu_clock.on_gpu():
        return ""
    return "sm_90" if torch.cuda.get_device_capability() >= (9, 0) else "sm_80"


def problems(row: KernelRow, N: int, K: int) -> Iterator[tuple[str, Problem]]:
    """What is timed of a row: its typical problem, and what stands beside four bits."""
    base = typical(row, "bf16") or typical(row)
    if base is None:
        return
    plain = dataclasses.replace(base, N=N, K=K)
    if plain.weights == "factors":
        plain = dataclasses.replace(plain, rank=min(N, K) // 4)
    yield row.name, plain
    if row.name == "w4a16":
        yield "w4a16 rank 64", dataclasses.replace(plain, rank=64)
        yield "w4a16 1% columns", dataclasses.replace(plain, sparse=True)


def kernels(
    shapes: list[tuple[int, int]], tokens: list[int], budget: gpu_clock.Budget,
    limits: gpu_clock.Limits,
) -> list[dict[str, Any]]:  # fmt: skip
    """Every row at every shape: microseconds, and shares of the copy bandwidth and of the floor."""
    found: list[dict[str, Any]] = []
    for N, K in shapes:
        for row in ROWS:
            if (why := unsupported(row, machine())) and machine():
                found.append({"kernel": row.name, "unsupported": why})
                continue
            for name, problem in problems(row, N, K):
                label = f"{name} {N}x{K}"
                if row.misfits(problem) or not budget.allows(label, ROOM["kernels"]):
                    continue
                found += _timed(name, row, problem, tokens, limits)
    return found


def _timed(
    name: str, row: KernelRow, problem: Problem, tokens: list[int], limits: gpu_clock.Limits
) -> list[dict[str, Any]]:
    about = {"kernel": name, "N": problem.N, "K": problem.K}
    parts = random_parts(problem, kept=0.3, entries=0.01, device=gpu_clock.device())
    one = prepack(row, problem, **parts)
    if problem.bitmap:
        marks = packing.unpack(parts["bitmap"], 1, problem.K)
        problem = dataclasses.replace(problem, kept=int(marks.sum(dtype=torch.int64)))
    del parts
    packed = [one]
    for _ in range(gpu_clock.copies(one.bytes) - 1):
        copied = {n: t.clone() for n, t in one.tensors.items()}
        packed.append(dataclasses.replace(one, tensors=copied))
    found = []
    for m in tokens:
        x = torch.randn(m, problem.K, device=gpu_clock.device()).to(DTYPES[problem.x_dtype])
        try:
            us = gpu_clock.microseconds(lambda p, x=x: fused_linear(p, x), packed)
        except (RuntimeError, torch.OutOfMemoryError) as error:
            found.append(about | {"tokens": m, "error": str(error)[:200]})
            continue
        told = {"tokens": m, "us": us, "bytes": row.bytes_moved(problem, m),
                "weight_bytes": one.bytes}  # fmt: skip
        found.append(about | told | shares(told, problem, limits))
    return found


def shares(told: dict[str, Any], p: Problem, limits: gpu_clock.Limits) -> dict[str, float]:
    """Of the measured copy bandwidth, and of the floor: bytes or operations, whichever is more."""
    if told["us"] is None or limits.copy is None or limits.flops is None:
        return {}
    seconds = told["us"] * 1e-6
    by_bytes = told["bytes"] / limits.copy
    floor = max(by_bytes, 2 * told["tokens"] * p.N * p.K / limits.flops)
    return {"share_of_copy": by_bytes / seconds, "share_of_floor": floor / seconds}


def markdown(data: dict[str, Any]) -> str:
    """The pages as tables: kernels and peers by shape, then decode."""
    out = [f"# {data['device']}\n\n`{data['command']}`\n"]
    timed = [r for r in (*data["kernels"], *data["peers"]) if r.get("us") is not None]
    for N, K in dict.fromkeys((r["N"], r["K"]) for r in timed if "N" in r):
        here = [r for r in timed if (r.get("N"), r.get("K")) == (N, K)]
        tokens = sorted({r["tokens"] for r in here})
        rows = []
        for name in dict.fromkeys(r.get("kernel") or r["peer"] for r in here):
            own = {r["tokens"]: r for r in here if (r.get("kernel") or r["peer"]) == name}
            rows.append((name, *(_cell(own.get(m)) for m in tokens)))
        head = ("µs (share of copy, of floor)", *(f"M = {m}" for m in tokens))
        out.append(f"\n## {N} x {K}\n\n{table(head, rows)}")
    steps = [
        (
            r["what"],
            f"{r['tokens_per_s']:.0f}",
            f"{r['us']:.0f}",
            f"{r.get('share_of_copy', 0):.2f}",
        )
        for r in data["decode"]
        if "us" in r
    ]
    if steps:
        head = ("decode, batch 1", "tokens/s", "µs", "share of copy")
        out.append(f"\n## Llama-3.1-8B shapes\n\n{table(head, steps)}")
    if data["skipped"]:
        out.append(f"\nLeft out for time: {', '.join(data['skipped'])}.\n")
    return "".join(out)


def _cell(r: dict[str, Any] | None) -> str:
    if r is None:
        return ""
    if "share_of_copy" not in r:
        return f"{r['us']:.1f}"
    return f"{r['us']:.1f} ({r['share_of_copy']:.2f}, {r['share_of_floor']:.2f})"


def main() -> int:
    """Run the sections asked for; exit 4 when a result is wrong, 5 without a device."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--only", default=",".join(SECTIONS), help="numerics,kernels,peers,decode")
    parser.add_argument("--shapes", default=",".join(f"{n}x{k}" for n, k in SHAPES))
    parser.add_argument("--tokens", default=",".join(map(str, TOKENS)))
    parser.add_argument("--cases", type=int, default=400, help="of numerics, at most")
    parser.add_argument("--seconds", type=float, default=SECONDS)
    parser.add_argument("--tiny", action="store_true", help="small shapes, for the interpreter")
    parser.add_argument("--out", type=Path)
    args = parser.parse_args()
    if why := unavailable():
        print(
            f"gpu_suite: expected a GPU or the interpreter, found neither: {why}", file=sys.stderr
        )
        return 5
    only = args.only.split(",")
    if unknown := set(only) - set(SECTIONS):
        parser.error(f"--only: expected {','.join(SECTIONS)}, found {','.join(sorted(unknown))}")
    shapes = [(int(n), int(k)) for n, k in (s.split("x") for s in args.shapes.split(","))]
    tokens = [int(t) for t in args.tokens.split(",")]
    if args.tiny:
        shapes, tokens = [(70, 136)], [1, 3]
    budget = gpu_clock.Budget(args.seconds)
    limits = gpu_clock.limits()
    data: dict[str, Any] = {
        "command": "python benchmarks/gpu_suite.py " + " ".join(sys.argv[1:]),
        "device": torch.cuda.get_device_name() if gpu_clock.on_gpu() else "interpreter, not timed",
        "torch": torch.__version__, "tiles": reason(), "limits": vars(limits),
        "installed": gpu_peers.present(), "numerics": {}, "kernels": [], "peers": [], "decode": [],
    }  # fmt: skip
    with budget.section("numerics"):
        if "numerics" in only:
            data["numerics"] = numerics(args.cases, budget)
    with budget.section("kernels"), torch.no_grad():
        if "kernels" in only:
            data["kernels"] = kernels(shapes, tokens, budget, limits)
    with budget.section("peers"), torch.no_grad():
        if "peers" in only:
            for N, K in shapes:
                if budget.allows(f"peers {N}x{K}", ROOM["peers"]):
                    data["peers"] += gpu_peers.page(N, K, tokens, budget)
            data["peers"] += gpu_peers.liger(2048, 4096)
    with budget.section("decode"), torch.no_grad():
        if "decode" in only:
            sizes = TINY if args.tiny else gpu_decode.Shapes()
            data["decode"] = list(gpu_decode.page(sizes, budget, limits))
    data |= {"seconds": budget.taken, "skipped": budget.skipped}
    text = json.dumps(data, indent=1)
    print(text)
    print(markdown(data), file=sys.stderr)
    if args.out:
        args.out.parent.mkdir(parents=True, exist_ok=True)
        args.out.write_text(text + "\n", encoding="utf-8")
        args.out.with_suffix(".md").write_text(markdown(data), encoding="utf-8")
    off = [r for r in data["decode"] if r.get("relative_error", 0.0) > 0.03]
    return 4 if off or data["numerics"].get("wrong") else 0


if __name__ == "__main__":
    sys.exit(main())
