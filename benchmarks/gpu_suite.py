"""The kernels on a GPU in one call: right against the reference, and microseconds against floors.

    python benchmarks/gpu_suite.py --out benchmarks/results/gpu.json
    TRITON_INTERPRET=1 python benchmarks/gpu_suite.py --shapes 128x256 --tokens 1,3

Times are medians of CUDA graph replays that rotate over copies of the weight beyond three times the
L2 cache, so that every call reads its weight from memory. Without a GPU only the check runs.
"""

from __future__ import annotations

import argparse
import json
import statistics
import sys
from pathlib import Path
from typing import Any

import torch

from llmc.codegen import meaning
from llmc.codegen.kernels import ROWS
from llmc.codegen.launch import fused_linear, interpreting, unavailable
from llmc.codegen.prepack import Packed, prepack
from llmc.codegen.problem import Problem
from llmc.codegen.row import KernelRow
from llmc.compiler.ir import packing

_ROTATE = 3 * 60 * 2**20


def weight(problem: Problem, seed: int, device: str) -> dict[str, Any]:
    """Random canonical tensors of a compressed weight [N, K]."""
    g = torch.Generator().manual_seed(seed)
    q = torch.randint(0, 16, (problem.N, problem.columns), generator=g)
    scale = torch.rand(problem.N, problem.groups, generator=g).add_(0.5).mul_(0.02).half()
    out: dict[str, Any] = {"codes": packing.pack(q, problem.bits), "scale": scale, "zero": None}
    out["meta"] = None
    if problem.asym:
        shape = (problem.N, problem.groups)
        out["zero"] = torch.randint(0, 16, shape, generator=g, dtype=torch.uint8)
    if problem.m:
        order = torch.rand(problem.N, problem.K // problem.m, problem.m, generator=g).argsort(-1)
        where = order[..., : problem.n].sort(-1).values.flatten(1)
        out["meta"] = packing.pack(where, packing.nm_bits(problem.m))
    return {k: v.to(device) if v is not None else None for k, v in out.items()}


def check(row: KernelRow, problem: Problem, tokens: int, device: str) -> dict[str, float]:
    """Largest error of the kernel over K·eps·Σ|x||w|, the bound of its accumulation."""
    parts = weight(problem, 0, device)
    x = torch.randn(tokens, problem.K, generator=torch.Generator().manual_seed(1)).half().to(device)
    y = fused_linear(prepack(row, problem, **parts), x)
    given = {name: part for name, part in parts.items() if part is not None}
    want = meaning.linear(problem, given, x.double())
    reach = x.double().abs() @ meaning.weight(problem, given).abs().T
    eps = torch.finfo(x.dtype).eps
    bound = problem.K * torch.finfo(torch.float32).eps * reach + 2 * eps * want.abs() + eps * reach
    return {"worst_over_bound": float(((y.double() - want).abs() / bound).max())}


def microseconds(packed: list[Packed], x: torch.Tensor, repeats: int) -> float:
    """Median microseconds per call of graph replays over rotating weights."""
    for p in packed:
        fused_linear(p, x)
    torch.cuda.synchronize()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        for p in packed:
            fused_linear(p, x)
    return _replay(graph, len(packed), repeats)


def dense_microseconds(n: int, k: int, x: torch.Tensor, repeats: int) -> float:
    """The same for torch's dense product in x's dtype."""
    count = max(2, _ROTATE // (2 * n * k) + 1)
    weights = [torch.randn(n, k, device=x.device, dtype=x.dtype) for _ in range(count)]
    for w in weights:
        torch.nn.functional.linear(x, w)
    torch.cuda.synchronize()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        for w in weights:
            torch.nn.functional.linear(x, w)
    return _replay(graph, count, repeats)


def _replay(graph: Any, calls: int, repeats: int) -> float:
    times = []
    for _ in range(repeats):
        start, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
        start.record()
        graph.replay()
        end.record()
        end.synchronize()
        times.append(start.elapsed_time(end) * 1e3 / calls)
    return statistics.median(times)


def measure(
    row: KernelRow, n: int, k: int, tokens: list[int], repeats: int
) -> list[dict[str, Any]]:
    """Check and, on a GPU, time one row at one shape."""
    sparse = {"n": 2, "m": 4, "group": 64} if row.step == 256 else {"group": 128}
    device = "cpu" if interpreting() else "cuda"
    out = []
    for asym in (False, True):
        problem = Problem(n, k, asym=asym, **sparse)
        if row.misfits(problem):
            continue
        for m in tokens:
            found: dict[str, Any] = {"row": row.name, "N": n, "K": k, "tokens": m, "asym": asym}
            found |= check(row, problem, m, device)
            if device == "cuda":
                x = torch.randn(m, k, device=device, dtype=torch.float16)
                one = prepack(row, problem, **weight(problem, 0, device))
                copies = max(2, _ROTATE // one.bytes + 1)
                packed = [
                    prepack(row, problem, **weight(problem, i, device)) for i in range(copies)
                ]
                took = microseconds(packed, x, repeats)
                found |= {"us": took, "GB_per_s": one.bytes / took / 1e3,
                          "dense_us": dense_microseconds(n, k, x, repeats)}  # fmt: skip
            out.append(found)
            print(json.dumps(found), file=sys.stderr, flush=True)
    return out


def main() -> int:
    """Run every row at every shape; exit 4 when a result is beyond its bound."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--shapes", default="4096x4096,28672x4096,4096x14336", help="NxK,…")
    parser.add_argument("--tokens", default="1,2,8,16,32,64")
    parser.add_argument("--repeats", type=int, default=50)
    parser.add_argument("--out", type=Path)
    args = parser.parse_args()
    why = unavailable()
    if why:
        print(
            f"gpu_suite: expected a GPU or the interpreter, found neither: {why}", file=sys.stderr
        )
        return 5
    shapes = [tuple(int(d) for d in s.split("x")) for s in args.shapes.split(",")]
    tokens = [int(t) for t in args.tokens.split(",")]
    rows = [r for row in ROWS for n, k in shapes for r in measure(row, n, k, tokens, args.repeats)]
    data = {
        "command": "python benchmarks/gpu_suite.py " + " ".join(sys.argv[1:]),
        "device": "interpreter" if interpreting() else torch.cuda.get_device_name(),
        "torch": torch.__version__, "rows": rows,
    }  # fmt: skip
    text = json.dumps(data, indent=1)
    print(text)
    if args.out:
        args.out.parent.mkdir(parents=True, exist_ok=True)
        args.out.write_text(text + "\n", encoding="utf-8")
    return 4 if any(r["worst_over_bound"] > 1 for r in rows) else 0


if __name__ == "__main__":
    sys.exit(main())
