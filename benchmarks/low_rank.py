"""Low rank: perplexity of the demo model by method, share and rank split; speed of a larger model.

    python benchmarks/low_rank.py quality --out benchmarks/results/low_rank.json
    python benchmarks/low_rank.py speed --out benchmarks/results/low_rank_speed.json
    python benchmarks/low_rank.py layer --out benchmarks/results/low_rank_layer.json

Quality: the same share of the factored weights' parameters goes by every method; combinations with
codes and zeros stand beside their parts, and every row tells the bytes of the block weights, so
that rows of equal bytes can be compared. Nothing is tuned on the held-out text. Speed: one process
times the whole model and its factored forms in turn, round after round. Layer: seconds and memory
of whitening and truncating one large weight by each solver, with the error of each.
"""

from __future__ import annotations

import argparse
import json
import sys
import time
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import speed
import torch
import width

from llmc.compiler import api
from llmc.compiler.analysis.blocks import is_block, segments_of
from llmc.compiler.ir.graph import Program
from llmc.compiler.pipeline.data import Tokenizer, read_stream
from llmc.compiler.runtime.evaluate import Evaluation, compare, evaluate
from llmc.compiler.runtime.executor import Runner
from llmc.compiler.solvers.factor import factor, whitening

MODEL = width.MODEL
AGAINST = "svdllm"

# Each takes ``remove=`` as its first knob.
METHODS = {
    "svd": "svd:remove={0}",
    "fwsvd": "fwsvd:remove={0}",
    "asvd": "asvd:remove={0}",
    "asvd, its own ranks": "asvd:remove={0},alloc=asvd,samples=4",
    "svdllm": "svdllm:remove={0}",
    "svdllm, U updated": "svdllm:remove={0},update=closed",
    "svdllm, sequential, U updated": "svdllm:remove={0},update=closed,sequential=true",
    "svdllm, shared latents": "svdllm:remove={0},share=true",
    "svdllm, global ranks": "svdllm:remove={0},alloc=global",
    "svdllm, global ranks by measured loss": "svdllm:remove={0},alloc=global,weigh=loss,samples=4",
    "svdllm, global ranks, shared latents": "svdllm:remove={0},alloc=global,share=true",
    "svdllm, global ranks, sequential, U updated": (
        "svdllm:remove={0},alloc=global,update=closed,sequential=true"
    ),
}
# What low rank adds to codes and zeros, and what they do alone.
COMBINED = (
    "w5", "w4", "w3", "lowrank_residual:rank=16,w4", "lowrank_residual:rank=32,w3",
    "lowrank_residual:rank=32,prune24", "lorc:rank=16,w4", "lorc:rank=16,w3", "lorc:rank=32,w3",
    "svdllm:remove=0.1,alloc=global,w4", "svdllm:remove=0.2,alloc=global,w4",
    "prune24", "prune24,w4", "lorc:rank=16,prune24", "lorc:rank=32,prune24",
    "svdllm:remove=0.1,alloc=global,prune24", "svdllm:remove=0.4,alloc=global",
)  # fmt: skip


def recipes(shares: list[float]) -> Iterator[tuple[str, str]]:
    """(name, passes) of every row but the dense one."""
    for share in shares:
        for name, text in METHODS.items():
            yield f"{name}, {share:.0%}", text.format(f"{share:g}")
    for text in COMBINED:
        yield text, text


def quality(args: argparse.Namespace) -> dict[str, Any]:
    """Compile and evaluate every row; written after each, so that it can go on."""
    stream = read_stream(args.data, Tokenizer(MODEL))

    def score(program: Program) -> Evaluation:
        runner = Runner(program, resident="dense")
        return evaluate(runner, stream, args.window, batch=8, limit=args.windows)

    dense = api.capture(MODEL)
    found = {"dense": score(dense)}
    first = found["dense"].to_json()
    kept = ("data", "sha256", "window", "windows", "tokens", "protocol")
    head = {
        "command": speed.command(), "protocol": {k: first[k] for k in kept},
        "calibration": {"samples": args.samples, "length": args.length, "seed": 0},
        "threads": torch.get_num_threads(),
    }  # fmt: skip
    known = speed.known(args.out, head)
    rows = [_row("dense", "", found["dense"], dense, 0.0, [])]
    for name, passes in recipes(args.shares):
        wanted = not args.only or any(word in passes for word in args.only)
        if not wanted or any(word in passes for word in args.skip):
            continue
        if passes in known:
            rows.append(known[passes] | {"name": name})
            found[name] = replace(found["dense"], nll=tuple(known[passes]["nll"]))
            continue
        began = time.process_time()
        small = api.compile(MODEL, passes, calibration=args.calibration, samples=args.samples,
                            length=args.length)  # fmt: skip
        seconds = time.process_time() - began
        found[name] = score(small.program)
        assert small.solved is not None
        steps = small.solved.structure
        rows.append(_row(name, passes, found[name], small.program, seconds,
                         steps[0]["records"] if steps else []))  # fmt: skip
        print(f"{name}: {found[name].perplexity:.3f}", file=sys.stderr, flush=True)
        done = {r["passes"] for r in rows}
        later = [r for p, r in known.items() if p not in done]
        speed.write(args.out, {**head, "rows": rows + later})
    pairs = []
    for share in args.shares:
        names = [f"{name}, {share:.0%}" for name in METHODS]
        base = f"{AGAINST}, {share:.0%}"
        pairs += [
            {"method": n, "against": base, **compare(found[n], found[base]).to_json()}
            for n in names if n != base and n in found and base in found
        ]  # fmt: skip
    return {**head, "rows": rows, "pairs": pairs}


def _row(
    name: str, passes: str, e: Evaluation, program: Program, seconds: float, records: list[Any]
) -> dict[str, Any]:
    """One line of the table, with the ranks that were chosen and what was predicted of them."""
    told = {r["site"]: r for r in records if r["site"] in ("all", "model")}
    return {
        "name": name, "passes": passes, "perplexity": e.perplexity,
        "block_bytes": block_bytes(program), "bytes": program.weight_bytes(),
        "compile_cpu_seconds": round(seconds, 1), "nll": list(e.nll),
        "ranks": {r["site"]: r["rank"] for r in records if "rank" in r},
        "dense": [r["site"] for r in records if "stays" in r],
        "decided": told.get("all", {}), "loss": told.get("model", {}),
    }  # fmt: skip


def block_bytes(program: Program) -> int:
    """Stored bytes of the parameters of repeated blocks."""
    inside = {n for s in segments_of(program) if is_block(s.name) for n in s.nodes}
    nodes = (n for n in program.graph.nodes if n.name in inside)
    params = (program.param_of(n) for n in nodes)
    return sum(p.bytes for p in params if p is not None and p.trained)


def table(data: dict[str, Any]) -> str:
    """The rows as Markdown: perplexity, and bytes of the blocks beside the dense ones."""
    whole = data["rows"][0]["block_bytes"]
    lines = ["| row | passes | perplexity | block bytes |", "|---|---|---:|---:|"]
    for r in data["rows"]:
        share = r["block_bytes"] / whole
        lines.append(f"| {r['name']} | `{r['passes']}` | {r['perplexity']:.3f} | {share:.1%} |")
    return "\n".join(lines)


def measure_speed(args: argparse.Namespace) -> dict[str, Any]:
    """Prefill and decode of a larger random model and its factored forms."""
    removed = "removed_share_of_factored_weights"
    return speed.measured(args, "svd:remove={0}", args.speed_shares, args.target, removed)


def measure_layer(args: argparse.Namespace) -> dict[str, Any]:
    """Seconds, memory in copies of the weight in fp64, and error of one square weight's factors.

    Memory is the peak of the process over what it held before the weight and XᵀX were made.
    """
    n, rows = args.size, []
    # What the libraries hold once they have run is no copy of the weight.
    factor(torch.randn(1024, 1024), whitening(torch.eye(1024)), 64)
    for solver in ("auto", "randomised"):
        g = torch.Generator().manual_seed(0)
        held = _resident("VmRSS")
        weight = torch.randn(n, n, generator=g) / n**0.5
        gram = torch.zeros(n, n, dtype=torch.float64)
        for _ in range(3):
            x = torch.randn(n // 2, n, generator=g) * torch.arange(1, n + 1) ** -0.3
            gram.addmm_(x.double().t(), x.double())
        del x
        Path("/proc/self/clear_refs").write_text("5", encoding="utf-8")
        began = time.perf_counter(), time.process_time()
        root = whitening(gram)
        del gram
        made = factor(weight, root, 2 * n // 5, solver=solver)
        rows.append({
            "solver": made.solver, "size": n, "rank": made.rank, "metric": root.kind,
            "wall_seconds": time.perf_counter() - began[0],
            "cpu_seconds": time.process_time() - began[1],
            "copies": (_resident("VmHWM") - held) / (8 * n * n),
            "error": made.error / made.whole**0.5,
        })  # fmt: skip
        del root, made
    return {"command": speed.command(), "threads": torch.get_num_threads(), "rows": rows}


def _resident(field: str) -> int:
    """Bytes that Linux tells of this process: VmRSS now, VmHWM at most since the last reset."""
    lines = Path("/proc/self/status").read_text(encoding="utf-8").splitlines()
    return 1024 * next(int(line.split()[1]) for line in lines if line.startswith(field))


def main() -> None:
    """Parse the command line and write the results."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("what", choices=("quality", "speed", "layer"))
    parser.add_argument("--data", default=str(MODEL / "text" / "heldout.txt"))
    parser.add_argument("--calibration", default=str(MODEL / "text" / "calibration.txt"))
    parser.add_argument("--shares", type=float, nargs="*", default=[0.1, 0.2, 0.3])
    parser.add_argument("--samples", type=int, default=128)
    parser.add_argument("--length", type=int, default=512)
    parser.add_argument("--window", type=int, default=512)
    parser.add_argument("--windows", type=int, help="only the first windows of the held-out text")
    parser.add_argument("--only", nargs="*", help="only rows whose passes hold one of these words")
    parser.add_argument("--skip", nargs="*", default=[], help="no rows whose passes hold one")
    parser.add_argument("--target", default="reference", help="what runs the decode")
    parser.add_argument("--speed-shares", type=float, nargs="*", default=[0.3, 0.5])
    parser.add_argument("--size", type=int, default=4096, help="of the layer")
    speed.add_sizes(parser)
    parser.add_argument("--out", type=Path)
    args = parser.parse_args()
    what = {"quality": quality, "speed": measure_speed, "layer": measure_layer}
    data = what[args.what](args)
    speed.write(args.out, data)
    if args.what == "quality":
        print(table(data))
    elif args.out is None:
        print(json.dumps(data, indent=1))


if __name__ == "__main__":
    main()
