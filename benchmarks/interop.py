"""Exports loaded by other people's packages on the CPU: how far weights and logits are from ours.

    make interop        # or: python benchmarks/interop.py [--only gptq] [--out FILE]

The demo model is rounded to the nearest, exported in fp32 where the format takes it, and read by a
loader that knows nothing of llmc. ``weights`` is the largest difference of a decoded weight, and
``logits`` of a logit as a share of the largest one. A row over its limit is a failure (exit 1).
Writes ``results/interop.json``. A further format is a module of functions with ``@row``, and its
name in ``MODULES``.

GPTQModel is not a dependency: ``make interop`` installs it beside the venv where it can, else its
rows say that they were not run.
"""

from __future__ import annotations

import argparse
import importlib
import json
import platform
import sys
import tempfile
import time
from importlib import metadata
from pathlib import Path
from typing import Any

from interop_base import GPTQ, ROOT, ROWS, NotRun, Row, Subject

from llmc.compiler.ir.errors import LlmcError

RESULTS = ROOT / "benchmarks" / "results" / "interop.json"
PACKAGES = ("torch", "transformers", "compressed-tensors", "gguf", "onnxruntime", "onnx")
MODULES = ("interop_codes", "interop_graphs")


def measure(found: Row, subject: Subject) -> dict[str, Any]:
    """One row's record."""
    began = time.perf_counter()
    record: dict[str, Any] = {"export": found.export, "loader": found.loader}
    try:
        got = found.measure(subject)
    except NotRun as e:
        return record | {"state": "not run", "note": str(e)}
    except LlmcError as e:
        return record | {"state": "failed", "note": str(e)}
    pairs = ((got.weights, found.weights), (got.logits, found.logits))
    bad = any(v is None or not v <= limit for v, limit in pairs if limit is not None)
    return record | {
        "state": "failed" if bad else "ok", "weights": got.weights, "logits": got.logits,
        "limits": {"weights": found.weights, "logits": found.logits}, "note": got.note,
        "seconds": round(time.perf_counter() - began, 2),
    }  # fmt: skip


def say(record: dict[str, Any]) -> str:
    """One line of the table."""
    weights, logits = (
        "-" if record.get(k) is None else f"{record[k]:.1e}" for k in ("weights", "logits")
    )
    return (f"{record['state']:8}{record['export']:58}{weights:>9}{logits:>9}  "
            f"{record['loader']}{'; ' * bool(record['note'])}{record['note']}")  # fmt: skip


def versions() -> dict[str, str]:
    """Of the packages that took part."""
    out = {"python": platform.python_version()}
    for name in PACKAGES:
        try:
            out[name] = metadata.version(name)
        except metadata.PackageNotFoundError:
            continue
    found = sorted(GPTQ.glob("gptqmodel-*.dist-info"))
    return out | ({"gptqmodel": found[0].name.split("-")[1].removesuffix(".dist")} if found else {})


def main() -> int:
    """Measure every row; 1 where one is over its limit."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--only", default="", help="rows whose export holds this text")
    parser.add_argument("--out", type=Path, default=RESULTS)
    given = parser.parse_args()
    for module in MODULES:
        importlib.import_module(module)
    records = []
    print(f"{'':8}{'export':58}{'weights':>9}{'logits':>9}  loader")
    with tempfile.TemporaryDirectory() as place:
        subject = Subject(Path(place))
        for found in (r for r in ROWS if given.only in r.export):
            records.append(measure(found, subject))
            print(say(records[-1]), flush=True)
    told = {"command": "make interop", "model": "examples/pylm", "versions": versions(),
            "rows": records}  # fmt: skip
    if not given.only or given.out != RESULTS:
        given.out.parent.mkdir(parents=True, exist_ok=True)
        given.out.write_text(json.dumps(told, indent=1) + "\n", encoding="utf-8")
    return int(any(r["state"] == "failed" for r in records))


if __name__ == "__main__":
    sys.exit(main())
