"""Width pruning: perplexity of the demo model by method, and speed of a larger model by share.

    python benchmarks/width.py quality --out benchmarks/results/width.json
    python benchmarks/width.py speed --out benchmarks/results/width_speed.json

Quality: the same share of the blocks' parameters goes by every method, ranked against FLAP by a
paired bootstrap over the held-out windows; nothing is tuned on that text. Speed: one process times
the whole model and its cuts in turn, round after round, beside the share of operations removed.
"""

from __future__ import annotations

import argparse
import json
import sys
import time
from dataclasses import replace
from pathlib import Path
from typing import Any

import speed
import torch

from llmc.compiler import api
from llmc.compiler.analysis.blocks import is_block, segments_of
from llmc.compiler.ir.graph import Program
from llmc.compiler.pipeline.data import Tokenizer, read_stream
from llmc.compiler.runtime.evaluate import Evaluation, compare, evaluate
from llmc.compiler.runtime.executor import Runner

ROOT = Path(__file__).resolve().parents[1]
MODEL = ROOT / "examples" / "pylm"
AGAINST = ("flap", "flap, one share")

# One share of every layer and kind goes, or layers and kinds compete ("global" in the knobs), which
# is how FLAP is published; without a repair, or with what the method itself repairs.
METHODS = {
    "random, seed 0": "method=random,seed=0",
    "random, seed 1": "method=random,seed=1",
    "random, seed 2": "method=random,seed=2",
    "magnitude, one share": "method=magnitude",
    "wanda, one share": "method=wanda",
    "taylor vector, one share": "method=taylor,taylor=vector",
    "taylor first, one share": "method=taylor,taylor=first",
    "taylor second, one share": "method=taylor,taylor=second",
    "taylor mixed, one share": "method=taylor,taylor=mixed",
    "michel, one share": "method=michel",
    "obs, one share, no repair": "method=obs,compensate=none",
    "flap, one share, no bias": "method=flap,compensate=none",
    "flap, one share": "method=flap",
    "magnitude": "method=magnitude,ranking=global",
    "wanda": "method=wanda,ranking=global",
    "taylor vector": "method=taylor,taylor=vector,ranking=global",
    "taylor first": "method=taylor,taylor=first,ranking=global",
    "taylor second": "method=taylor,taylor=second,ranking=global",
    "flap, no bias": "method=flap,ranking=global,compensate=none",
    "flap": "method=flap,ranking=global",
    "taylor second + moved weights": (
        "method=taylor,taylor=second,ranking=global,compensate=weights"
    ),
    "flap + moved weights": "method=flap,ranking=global,compensate=weights",
    "obs (moves weights)": "method=obs,ranking=global",
    "obs (moves weights), one share": "method=obs",
    "taylor second + moved weights, equal layers": (
        "method=taylor,taylor=second,ranking=global,uniform=true,compensate=weights"
    ),
    "taylor second + moved weights, one share": ("method=taylor,taylor=second,compensate=weights"),
    "flap, one share, neurons only": "method=flap,units=neuron",
    "obs (moves weights), one share, neurons only": "method=obs,units=neuron",
}


def quality(args: argparse.Namespace) -> dict[str, Any]:
    """Compile and evaluate every method at one share; written after each, so that it can go on."""
    stream = read_stream(args.data, Tokenizer(MODEL))

    def score(program: Program) -> Evaluation:
        runner = Runner(program, resident="dense")
        return evaluate(runner, stream, args.window, batch=8, limit=args.windows)

    dense = api.capture(MODEL)
    found = {"dense": score(dense)}
    rows: list[dict[str, Any]] = [_row("dense", "", found["dense"], dense, 0.0, [])]
    first = found["dense"].to_json()
    kept = ("data", "sha256", "window", "windows", "tokens", "protocol")
    head = {
        "command": speed.command(), "protocol": {k: first[k] for k in kept},
        "calibration": {"samples": args.samples, "length": args.length, "seed": 0},
        "removed_share_of_block_parameters": args.remove,
        "threads": torch.get_num_threads(),
    }  # fmt: skip
    known = speed.known(args.out, head)
    for name, knobs in METHODS.items():
        passes = f"prune_width:remove={args.remove:g},{knobs}"
        if passes in known:
            rows.append(known[passes] | {"name": name})
            found[name] = replace(found["dense"], nll=tuple(known[passes]["nll"]))
            continue
        began = time.perf_counter()
        small = api.compile(MODEL, passes, calibration=args.calibration, samples=args.samples,
                            length=args.length)  # fmt: skip
        seconds = time.perf_counter() - began
        found[name] = score(small.program)
        assert small.solved is not None
        records = small.solved.structure[0]["records"]
        rows.append(_row(name, passes, found[name], small.program, seconds, records))
        print(f"{name}: {found[name].perplexity:.3f}", file=sys.stderr, flush=True)
        speed.write(args.out, {**head, "rows": rows})
    pairs = [
        {"method": name, "against": other, **compare(found[name], found[other]).to_json()}
        for other in AGAINST
        for name in found
        if name not in ("dense", other)
    ]
    return {**head, "rows": rows, "pairs": pairs}


def _row(
    name: str, passes: str, e: Evaluation, program: Program, seconds: float, records: list[Any]
) -> dict[str, Any]:
    """One line of the table; widths are those of the groups that the pass saw."""
    return {
        "name": name, "passes": passes, "perplexity": e.perplexity,
        "block_parameters": _block_parameters(program), "bytes": program.weight_bytes(),
        "compile_seconds": round(seconds, 1),
        "nll": list(e.nll),
        "widths": {r["site"]: r["units_after"] for r in records if "units_after" in r},
    }  # fmt: skip


def _block_parameters(program: Program) -> int:
    inside = {n for s in segments_of(program) if is_block(s.name) for n in s.nodes}
    return sum(
        torch.Size(p.shape).numel()
        for n in program.graph.nodes
        if n.name in inside and (p := program.param_of(n)) is not None and p.trained
    )


def main() -> None:
    """Parse the command line and write the results."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("what", choices=("quality", "speed"))
    parser.add_argument("--data", default=str(MODEL / "text" / "heldout.txt"))
    parser.add_argument("--calibration", default=str(MODEL / "text" / "calibration.txt"))
    parser.add_argument("--remove", type=float, default=0.2)
    parser.add_argument("--samples", type=int, default=128)
    parser.add_argument("--length", type=int, default=512)
    parser.add_argument("--window", type=int, default=512)
    parser.add_argument("--windows", type=int, help="only the first windows of the held-out text")
    parser.add_argument("--only", nargs="*", help="only these methods, and both forms of flap")
    parser.add_argument("--shares", type=float, nargs="*", default=[0.2, 0.4])
    speed.add_sizes(parser)
    parser.add_argument("--out", type=Path)
    args = parser.parse_args()
    if args.only is not None:
        for name in [n for n in METHODS if n not in (*args.only, *AGAINST)]:
            del METHODS[name]
    if args.what == "quality":
        data = quality(args)
    else:
        passes, removed = (
            "prune_width:remove={0},method=magnitude",
            "removed_share_of_block_parameters",
        )
        data = speed.measured(args, passes, args.shares, "reference", removed)
    speed.write(args.out, data)
    if args.out is None:
        print(json.dumps(data, indent=1))


if __name__ == "__main__":
    main()
