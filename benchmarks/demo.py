"""Perplexity of the demo model by recipe and solver, ranked by paired bootstrap.

    python benchmarks/demo.py --out benchmarks/results/demo.json

Calibration and held-out text are made by examples/make_text.py from the installed standard library
and share no module. Nothing is tuned on the held-out text. With ``--readme`` the table goes between
the markers of benchmarks/README.md.
"""

from __future__ import annotations

import argparse
import json
import sys
import time
from pathlib import Path
from typing import Any

import torch

from llmc.compiler import api
from llmc.compiler.pipeline.data import Stream, Tokenizer, read_stream
from llmc.compiler.runtime.evaluate import Evaluation, compare, evaluate
from llmc.compiler.runtime.executor import Runner
from llmc.compiler.runtime.sizes import sizes

ROOT = Path(__file__).resolve().parents[1]
MODEL = ROOT / "examples" / "pylm"

RECIPES = {
    "w4, rtn": "w4:solver=rtn",
    "w4, gptq": "w4",
    "w4, gptq, absmax clip": "w4:clip=absmax",
    "smooth + w4, gptq": "smooth,w4",
    "w3, rtn": "w3:solver=rtn",
    "w3, gptq": "w3",
    "w3, gptq, absmax clip": "w3:clip=absmax",
    "prune24, magnitude": "prune24:solver=magnitude",
    "prune24, wanda": "prune24:solver=wanda",
    "prune24, sparsegpt": "prune24",
    "prune24, sparsegpt, 2 sweeps": "prune24:sweeps=2,mask_search=true",
    "smooth + w4 + prune24, rtn + magnitude": "smooth,w4:solver=rtn,prune24:solver=magnitude",
    "smooth + w4 + prune24, gptq + wanda": "smooth,w4,prune24:solver=wanda",
    "smooth + w4 + prune24, joint": "smooth,w4,prune24",
    "smooth + w4 + prune24, joint, 2 sweeps": "smooth,w4,prune24:sweeps=2,mask_search=true",
}
# Pairs whose order the field agrees on: the first should be the better one.
PAIRS = [
    ("w4, gptq", "w4, rtn"),
    ("w3, gptq", "w3, rtn"),
    ("prune24, wanda", "prune24, magnitude"),
    ("prune24, sparsegpt", "prune24, wanda"),
    ("smooth + w4 + prune24, joint", "smooth + w4 + prune24, gptq + wanda"),
    ("smooth + w4 + prune24, joint, 2 sweeps", "smooth + w4 + prune24, joint"),
]


def measure(args: argparse.Namespace) -> dict[str, Any]:
    """Compile and evaluate every recipe."""
    tokenizer = Tokenizer(MODEL)
    stream = read_stream(args.data, tokenizer)
    dense = api.capture(MODEL)
    found: dict[str, Evaluation] = {"dense": score(dense, stream, args)}
    rows = [row("dense", "", found["dense"], dense, 0.0, None)]
    for name, passes in RECIPES.items():
        began = time.perf_counter()
        small = api.compile(MODEL, passes, calibration=args.calibration, samples=args.samples,
                            length=args.length)  # fmt: skip
        seconds = time.perf_counter() - began
        found[name] = score(small.program, stream, args)
        rows.append(row(name, passes, found[name], small.program, seconds, small.records))
        print(f"{name}: {found[name].perplexity:.3f}", file=sys.stderr, flush=True)
    pairs = [{"better": a, "worse": b, **compare(found[a], found[b]).to_json()} for a, b in PAIRS]
    first = found["dense"].to_json()
    protocol = {k: first[k] for k in ("data", "sha256", "window", "windows", "tokens", "protocol")}
    return {
        "command": "python benchmarks/demo.py " + " ".join(sys.argv[1:]),
        "protocol": protocol,
        "calibration": {"samples": args.samples, "length": args.length, "seed": 0},
        "threads": torch.get_num_threads(), "rows": rows, "pairs": pairs,
    }  # fmt: skip


def score(program: Any, stream: Stream, args: argparse.Namespace) -> Evaluation:
    """Perplexity on the reference target; weights are decoded once, which changes speed alone."""
    runner = Runner(program, resident="dense")
    return evaluate(runner, stream, args.window, batch=8, limit=args.windows)


def row(
    name: str, passes: str, e: Evaluation, program: Any, seconds: float, records: Any
) -> dict[str, Any]:
    """One line of the table."""
    size = sizes(program)
    losses = [r["loss"] for r in records or []]
    return {
        "name": name, "passes": passes, "perplexity": e.perplexity, "bytes": program.weight_bytes(),
        "bits_per_weight": size.bits_per_weight, "compile_seconds": round(seconds, 1),
        "mean_layer_loss": sum(losses) / len(losses) if losses else None,
    }  # fmt: skip


def markdown(data: dict[str, Any]) -> str:
    """The page's table with the command that made it."""
    p = data["protocol"]
    out = [
        f"Perplexity of `examples/pylm` on {p['data']} (window {p['window']}, {p['tokens']} "
        f"tokens, windows do not overlap), by `{data['command']}`:",
        "",
        "| recipe | perplexity | bits per linear weight | MB |",
        "|---|---|---|---|",
    ]
    for r in data["rows"]:
        bits = f"{r['bits_per_weight']:.3f}"
        out.append(f"| {r['name']} | {r['perplexity']:.3f} | {bits} | {r['bytes'] / 1e6:.2f} |")
    out += [
        "",
        "Paired bootstrap over windows, ratio of perplexities (below 1: the first wins):",
        "",
    ]
    for c in data["pairs"]:
        if c["p"] is None:
            out.append(
                f"- {c['better']} against {c['worse']}: {c['perplexity_ratio']:.4f}, "
                f"too few windows ({c['windows']}) to rank by"
            )
            continue
        low, high = (2.718281828459045 ** c[k] for k in ("low", "high"))
        out.append(
            f"- {c['better']} against {c['worse']}: {c['perplexity_ratio']:.4f} "
            f"[{low:.4f}, {high:.4f}], p = {c['p']:.4f}"
        )
    return "\n".join(out)


def into_readme(text: str) -> None:
    """Replace what stands between the markers of benchmarks/README.md."""
    path = ROOT / "benchmarks" / "README.md"
    body = path.read_text(encoding="utf-8")
    start, end = "<!-- figures:begin -->", "<!-- figures:end -->"
    head, rest = body.split(start, 1)
    path.write_text(f"{head}{start}\n{text}\n{end}{rest.split(end, 1)[1]}", encoding="utf-8")


def main() -> None:
    """Parse the command line and write the results."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--data", default=str(MODEL / "text" / "heldout.txt"))
    parser.add_argument("--calibration", default=str(MODEL / "text" / "calibration.txt"))
    parser.add_argument("--samples", type=int, default=128)
    parser.add_argument("--length", type=int, default=512)
    parser.add_argument("--window", type=int, default=512)
    parser.add_argument("--windows", type=int, help="only the first windows of the held-out text")
    parser.add_argument("--out", type=Path)
    parser.add_argument("--readme", action="store_true", help="put it into benchmarks/README.md")
    args = parser.parse_args()
    data = measure(args)
    text = markdown(data)
    print(text)
    if args.out:
        args.out.parent.mkdir(parents=True, exist_ok=True)
        args.out.write_text(json.dumps(data, indent=1) + "\n", encoding="utf-8")
    if args.readme:
        into_readme(text)


if __name__ == "__main__":
    main()
