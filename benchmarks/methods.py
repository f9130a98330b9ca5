"""One table of all weight methods: on one layer, on the demo model, and what solving costs.

    python benchmarks/methods.py layer --problem layer_problem.py
    python benchmarks/methods.py model
    python benchmarks/methods.py cost
    python benchmarks/methods.py report

Rows come from the pass registry (method_rows.py). Each command writes its own part of
results/methods.json after every row, so that it can be stopped and goes on where it was; rows of
other settings are measured again. ``report`` makes methods.md and methods.png of what is there, as
every command does at its end. PROBLEM is a module with ``make(n) -> (W [n, n], X [tokens, n])``.
Seconds are those of the processor.
"""

from __future__ import annotations

import argparse
import json
import os
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import method_cost
import method_layer
import method_model
import method_report
import torch
from method_rows import rows
from solvers import load

ROOT = Path(__file__).resolve().parents[1]
MODEL = ROOT / "examples" / "pylm"
RESULTS = Path(__file__).parent / "results"


class Store:
    """One part of the results file: a head that rows must share, and rows by key."""

    def __init__(self, path: Path, part: str, head: dict[str, Any], fresh: bool) -> None:
        self.path, self.part, self.head = path, part, head
        known = read(path).get(part, {})
        same = not fresh and known.get("head") == head
        self.rows = {r["key"]: r for r in known["rows"]} if same else {}

    def fill(
        self, keys: list[str], only: list[str], make: Callable[[str], dict[str, Any]]
    ) -> list[dict[str, Any]]:
        """Rows in the order of keys; those that are missing and wanted are made and kept."""
        for key in keys:
            wanted = not only or any(part in key for part in only)
            if key in self.rows or not wanted:
                continue
            self.rows[key] = {"key": key} | make(key)
            print(told(self.rows[key]), file=sys.stderr, flush=True)
            self.write(keys)
        self.write(keys)
        return [self.rows[k] for k in keys if k in self.rows]

    def write(self, keys: list[str]) -> None:
        """Replace this part of the file; rows whose pass is gone are dropped."""
        data = read(self.path)
        kept = [self.rows[k] for k in keys if k in self.rows]
        data[self.part] = {"command": command(), "head": self.head, "rows": kept}
        save(self.path, data)


def read(path: Path) -> dict[str, Any]:
    """What the results file holds, nothing where there is none."""
    return json.loads(path.read_text(encoding="utf-8")) if path.is_file() else {}


def save(path: Path, data: dict[str, Any]) -> None:
    """Write it whole or not at all."""
    path.parent.mkdir(parents=True, exist_ok=True)
    new = path.with_suffix(".new")
    new.write_text(json.dumps(data) + "\n", encoding="utf-8")
    os.replace(new, path)


def told(row: dict[str, Any]) -> str:
    """A row as one line of progress."""
    if "refused" in row:
        return f"{row['key']:44s} refused: {row['refused']}"
    shown = ("loss", "perplexity", "bits_per_weight", "seconds", "compile_seconds")
    return f"{row['key']:44s} " + "  ".join(f"{k} {row[k]:.5g}" for k in shown if row.get(k))


def layer(args: argparse.Namespace) -> None:
    """Every method on one layer of a problem module."""
    if not args.problem:
        raise SystemExit("--problem (or LLMC_LAYER_PROBLEM) must name the layer-problem module")
    program, tokens, exact = method_layer.problem(load(args.problem), args.n)
    head = {"problem": Path(args.problem).name, "n": args.n, "tokens": tokens.numel(),
            "threads": torch.get_num_threads()}  # fmt: skip
    known = {r.key: r for r in rows(of_layer=True)}
    store = Store(args.out, "layer", head, args.fresh)
    store.fill(
        list(known), args.only, lambda k: method_layer.measure(known[k], program, tokens, exact)
    )


def model(args: argparse.Namespace) -> None:
    """Every method on the demo model."""
    if not Path(args.data).is_file():
        raise SystemExit("expected the demo's text; make it with: python examples/make_text.py "
                         "--out examples/pylm/text")  # fmt: skip
    bench = method_model.Bench(method_model.Settings(
        MODEL, Path(args.data), Path(args.calibration), args.samples, args.length, args.window,
        args.windows, args.cache_windows,
    ))  # fmt: skip
    known = {r.key: r for r in rows(of_layer=False)}
    store = Store(args.out, "model", bench.head, args.fresh)

    def make(key: str) -> dict[str, Any]:
        return bench.dense() if key == method_model.DENSE else bench.measure(known[key])

    # What the others are compared with is always there.
    first = [method_model.DENSE, *method_model.UNIFORM]
    keys = list(dict.fromkeys([*first, *known]))
    only = [*args.only, method_model.DENSE] if args.only else []
    store.fill(keys, only, make)


def cost(args: argparse.Namespace) -> None:
    """Seconds of the solvers on one layer from a ready Hessian."""
    keys = list(method_cost.CASES)
    head = {"n": args.n, "threads": torch.get_num_threads(), "repeats": args.repeats}
    store = Store(args.out, "cost", head, args.fresh)
    layer = method_cost.Layer(args.n)
    store.fill(keys, args.only, lambda k: method_cost.measure(layer, k, args.repeats))


def command() -> str:
    """What was typed, without folders of this machine."""
    shown = [Path(a).name if os.sep in a else a for a in sys.argv[1:]]
    return " ".join(["python benchmarks/methods.py", *shown])


def main() -> None:
    """Parse the command line, measure, and write the table and the plot."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("what", choices=("layer", "model", "cost", "report"))
    parser.add_argument("--problem", default=os.environ.get("LLMC_LAYER_PROBLEM"))
    parser.add_argument("--n", type=int, help="size of the layer: 1024, and 4096 for cost")
    parser.add_argument("--repeats", type=int, default=2)
    parser.add_argument("--data", default=str(MODEL / "text" / "heldout.txt"))
    parser.add_argument("--calibration", default=str(MODEL / "text" / "calibration.txt"))
    parser.add_argument("--samples", type=int, default=32)
    parser.add_argument("--length", type=int, default=512)
    parser.add_argument("--window", type=int, default=512)
    parser.add_argument("--windows", type=int, default=64, help="of the held-out text")
    parser.add_argument("--cache-windows", type=int, default=16, help="read token by token")
    parser.add_argument("--only", nargs="*", default=[], help="keys of rows, or parts of them")
    parser.add_argument("--fresh", action="store_true", help="measure what is there already, too")
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--no-plot", action="store_true", help="the table alone")
    parser.add_argument("--out", type=Path, default=RESULTS / "methods.json")
    args = parser.parse_args()
    torch.set_num_threads(args.threads)
    args.n = args.n or (4096 if args.what == "cost" else 1024)
    if args.what != "report":
        {"layer": layer, "model": model, "cost": cost}[args.what](args)
    data = read(args.out)
    if "model" in data and args.what in ("model", "report"):
        found = data["model"]
        found["rows"] = method_model.compared(found["rows"], found["head"])
        save(args.out, data)
    args.out.with_suffix(".md").write_text(method_report.markdown(data), encoding="utf-8")
    if "model" in data and not args.no_plot:
        method_report.plot(data["model"]["rows"], args.out.with_suffix(".png"))


if __name__ == "__main__":
    main()
