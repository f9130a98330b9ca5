"""Loss and time of every solver on one reproducible layer, from a ready Hessian.

    python benchmarks/solvers.py --problem layer_problem.py --reference reference_figures.md

PROBLEM is a module with ``make(n) -> (W [n, n], X [tokens, n])`` and ``loss(W, W_hat, X) ->
float``.
REFERENCE, when given, is a Markdown table with a row per n and a column per method; our loss is
divided by it. Both may come from LLMC_LAYER_PROBLEM and LLMC_LAYER_REFERENCE.

Times are in units of one n^3 fp32 product plus one Cholesky factor for n = 2048, measured in the
same
run; the least of several runs of each. With one thread both are CPU time, so that neighbours on the
machine do not count; with more they are wall time and need a quiet machine.
"""

from __future__ import annotations

import argparse
import gc
import importlib.util
import json
import os
import platform
import sys
import time
from collections.abc import Callable
from functools import partial
from pathlib import Path
from types import ModuleType
from typing import Any

import torch

from llmc.compiler.solvers import Grid, MaskRule, solve

NM = MaskRule("nm", 2, 4)
HALF = MaskRule("unstructured", sparsity=0.5)
G4, G4S = Grid(4, 128), Grid(4, 128, clip="mse")

# name, column of the reference table, options of solve()
CASES: list[tuple[str, str | None, dict[str, Any]]] = [
    ("rtn4 g128", "rtn4 g128", {"grid": G4, "grid_solver": "rtn"}),
    ("magnitude 2:4", "magnitude 2:4", {"mask": NM, "mask_solver": "magnitude"}),
    ("wanda 2:4", "Wanda 2:4", {"mask": NM, "mask_solver": "wanda"}),
    ("sparsegpt 50%", "SparseGPT 50 %", {"mask": HALF}),
    ("sparsegpt 2:4", "SparseGPT 2:4", {"mask": NM}),
    ("joint w4 g128 + 2:4", "joint 4-bit + 2:4", {"grid": G4, "mask": NM}),
    (
        "joint w4 per row asymmetric + 2:4",
        "joint 4-bit + 2:4",
        {"grid": Grid(4, None, symmetric=False), "mask": NM},
    ),
    ("gptq4 g128", "GPTQ4 g128", {"grid": G4}),
    ("gptq4 g128 act-order", "+ act-order", {"grid": G4, "act_order": True}),
    ("gptq3 g128", "GPTQ3 g128", {"grid": Grid(3, 128)}),
    ("gptq2 g128", "GPTQ2 g128", {"grid": Grid(2, 128)}),
    ("rtn4 g128, searched clip", "rtn4 g128", {"grid": G4S, "grid_solver": "rtn"}),
    ("gptq4 g128, searched clip", "GPTQ4 g128", {"grid": G4S}),
    ("gptq3 g128, searched clip", "GPTQ3 g128", {"grid": Grid(3, 128, clip="mse")}),
    ("gptq2 g128, searched clip", "GPTQ2 g128", {"grid": Grid(2, 128, clip="mse")}),
    ("gptq4 g128, searched clip, 1 pass", "GPTQ4 g128", {"grid": G4S, "sweeps": 1}),
    (
        "gptq2 g128, searched clip, 3 passes",
        "GPTQ2 g128",
        {"grid": Grid(2, clip="mse"), "sweeps": 3},
    ),
    ("sparsegpt 2:4, 1 pass", "SparseGPT 2:4", {"mask": NM, "sweeps": 1}),
    ("sparsegpt 50%, 1 pass", "SparseGPT 50 %", {"mask": HALF, "sweeps": 1}),
    ("joint, searched clip", "joint 4-bit + 2:4", {"grid": G4S, "mask": NM}),
    ("joint, searched clip, 1 pass", "joint 4-bit + 2:4", {"grid": G4S, "mask": NM, "sweeps": 1}),
    (
        "joint, searched clip, 3 passes, mask search",
        "joint 4-bit + 2:4",
        {"grid": G4S, "mask": NM, "sweeps": 3, "mask_search": True},
    ),
]


def load(path: str) -> ModuleType:
    """The problem module at path."""
    spec = importlib.util.spec_from_file_location("layer_problem", path)
    if spec is None or spec.loader is None:
        raise SystemExit(f"--problem: expected a Python file, found {path}")
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def reference_table(path: str) -> dict[int, dict[str, float]]:
    """{n: {method: loss}} from the first Markdown table whose first column is n."""
    lines = [line for line in Path(path).read_text().splitlines() if line.startswith("|")]
    rows = [[cell.strip() for cell in line.strip("|").split("|")] for line in lines]
    names = rows[0][1:]
    return {
        int(row[0]): dict(zip(names, map(float, row[1:]), strict=True))
        for row in rows[1:]
        if row[0].isdigit()
    }


def timed(action: Callable[[], Any], threads: int) -> tuple[float, Any]:
    """Seconds of action, and what it returned."""
    clock = time.thread_time if threads == 1 else time.perf_counter
    gc.collect()
    start = clock()
    result = action()
    return clock() - start, result


def unit(threads: int, n: int = 2048) -> float:
    """Seconds of one n^3 product plus one Cholesky factor, once."""
    a = torch.randn(n, n, generator=torch.Generator().manual_seed(1))
    h = a @ a.T + n * torch.eye(n)
    return timed(lambda: (a @ a, torch.linalg.cholesky(h)), threads)[0]


def measure(
    problem: ModuleType, n: int, repeats: int, only: str, threads: int
) -> list[dict[str, Any]]:
    """One row per case: loss, and time in seconds and in units."""
    w, x = problem.make(n)
    h = x.T @ x
    rows, units = [], []
    for name, column, options in CASES:
        if not any(part in name for part in only.split(",")):
            continue
        seconds = []
        for _ in range(repeats):
            units.append(unit(threads))
            took, found = timed(partial(solve, w, h, **options), threads)
            seconds.append(took)
        rows.append(
            {
                "n": n,
                "case": name,
                "reference": column,
                "loss": problem.loss(w, found.weight, x),
                "reported_loss": found.loss,
                "seconds": round(min(seconds), 4),
                "fallbacks": list(found.fallbacks),
            }
        )
        print(f"n={n} {name:44s} loss {rows[-1]['loss']:.6f} {min(seconds):.3f} s", flush=True)
    for row in rows:
        row["units"] = round(row["seconds"] / min(units), 2)
    return rows


def main() -> None:
    """Measure, print, and write the JSON."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--problem", default=os.environ.get("LLMC_LAYER_PROBLEM"))
    parser.add_argument("--reference", default=os.environ.get("LLMC_LAYER_REFERENCE"))
    parser.add_argument("--sizes", default="512,1024,2048")
    parser.add_argument("--repeats", type=int, default=5)
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument(
        "--only", default="", help="cases whose name contains one of these, comma separated"
    )
    parser.add_argument("--out", default=str(Path(__file__).parent / "results" / "solvers.json"))
    args = parser.parse_args()
    if not args.problem:
        parser.error("--problem (or LLMC_LAYER_PROBLEM) must name the layer-problem module")
    torch.set_num_threads(args.threads)
    problem = load(args.problem)
    reference = reference_table(args.reference) if args.reference else {}
    rows = []
    for n in map(int, args.sizes.split(",")):
        rows += measure(problem, n, args.repeats, args.only, args.threads)
    for row in rows:
        known = reference.get(row["n"], {}).get(row["reference"])
        if known:
            row["loss_over_reference"] = round(row["loss"] / known, 4)
    record = {
        "command": " ".join(["python benchmarks/solvers.py", *map(_public, sys.argv[1:])]),
        "torch": torch.__version__,
        "python": platform.python_version(),
        "threads": args.threads,
        "repeats": args.repeats,
        "time": "least of the repeats over the least unit; from a ready Hessian, guard included",
        "rows": rows,
    }
    Path(args.out).write_text(json.dumps(record, indent=1) + "\n")


def _public(argument: str) -> str:
    """Folders of this machine stay out of the record."""
    return Path(argument).name if os.sep in argument else argument


if __name__ == "__main__":
    main()
