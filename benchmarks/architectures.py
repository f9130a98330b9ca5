"""Dependency groups of 25 model families: what can be cut, and whether sliced equals masked.

    python benchmarks/architectures.py

Each family is a tiny random model with two blocks, captured from transformers. Of every group of a
kind a third of the units is cut, in all blocks at once, and the result is compared with the masked
model: the largest difference of the logits over the largest logit. No family has code of its own
here or in the analysis. Writes ``results/architectures.json`` and ``spec/architectures.md``.
"""

from __future__ import annotations

import argparse
import json
import platform
import sys
import time
from collections import Counter
from pathlib import Path
from typing import Any

import torch

from llmc.compiler.analysis.cut import cut
from llmc.compiler.analysis.groups import Group, dependency_groups
from llmc.compiler.analysis.masked import masked
from llmc.compiler.ir.errors import LlmcError
from llmc.compiler.ir.graph import Program, info
from llmc.compiler.ir.interpret import run
from llmc.spec.pages import table

ROOT = Path(__file__).resolve().parent.parent
RESULTS = ROOT / "benchmarks" / "results" / "architectures.json"
PAGE = ROOT / "spec" / "architectures.md"
LIMIT = 1e-5
"""Largest error, relative to the largest logit, at which sliced counts as equal to masked."""

KINDS = {
    "neurons": ("neuron",), "heads": ("kv_group", "head"), "hidden": ("hidden",),
    "experts": ("expert",),
}  # fmt: skip
_NAMES = ("neurons", "KV groups or heads", "hidden channels", "experts")
TOKENS = (2, 9)


def keep_some(groups: list[Group], seed: int = 0) -> dict[Group, torch.Tensor]:
    """Of each group about two thirds of its units, at random."""
    random = torch.Generator().manual_seed(seed)
    out = {}
    for g in groups:
        count = max(g.least, g.units - max(1, g.units // 3))
        out[g] = torch.randperm(g.units, generator=random)[:count].sort().values
    return out


def difference(a: torch.Tensor, b: torch.Tensor) -> float:
    """Largest difference over the largest magnitude of ``b``."""
    return float((a - b).abs().max() / b.abs().max())


def compare(
    program: Program, inputs: dict[str, torch.Tensor], groups: list[Group]
) -> dict[str, Any]:
    """Cut some units: the error against the masked model, and what the whole one changed by."""
    keep = keep_some(groups)
    small = program.clone()
    try:
        cut(small, keep)
    except LlmcError as e:
        return {"refused": {"group": "", "node": e.where or "", "reason": e.message}}
    with torch.no_grad():
        whole = run(program, inputs)
        want = run(program, inputs, implementations=masked(program, keep))
        found = run(small, inputs)
    return {"error": difference(found, want), "change": difference(want, whole)}


def judge(
    program: Program, inputs: dict[str, torch.Tensor], found: list[Group], kinds: tuple[str, ...]
) -> dict[str, Any] | None:
    """One cell of the table; None where the family has no such units.

    A group of which no unit could go (as many as must stay) says nothing and is left out.
    """
    mine = [g for g in found if g.kind in kinds and g.units > g.least]
    if not mine:
        return None
    about = {
        "groups": len(mine), "units": sorted({g.units for g in mine}),
        "kinds": sorted({g.kind for g in mine}),
    }  # fmt: skip
    blocked = next((g for g in mine if g.blocked), None)
    if blocked is not None:
        first = blocked.blocked[0]
        path = info(program.node(first.node)).path
        why = {"group": blocked.id, "node": first.node, "path": path, "reason": first.reason}
        return about | {"refused": why}
    return about | compare(program, inputs, mine)


def measure(program: Program, inputs: dict[str, torch.Tensor]) -> dict[str, Any]:
    """One row: a verdict per kind, all kinds in one cut, and how many groups there are."""
    found = dependency_groups(program)
    row: dict[str, Any] = {k: judge(program, inputs, found, kinds) for k, kinds in KINDS.items()}
    wanted = {k for kinds in KINDS.values() for k in kinds}
    free = [g for g in found if g.kind in wanted and not g.blocked and g.units > g.least]
    row["together"] = {"groups": len(free), **compare(program, inputs, free)}
    row["counts"] = dict(sorted(Counter(g.kind for g in found if not g.blocked).items()))
    row["blocked"] = dict(sorted(Counter(g.kind for g in found if g.blocked).items()))
    return row


def works(cell: dict[str, Any] | None) -> bool:
    """Whether a cell says that sliced equals masked."""
    return cell is not None and cell.get("error", 1.0) <= LIMIT


def _cell(cell: dict[str, Any] | None) -> str:
    if cell is None:
        return "none"
    if "refused" in cell:
        why = cell["refused"]
        return f"refused: {why['reason']} (`{why['node']}`)"
    verdict = "equal" if works(cell) else "differs"
    return f"{verdict}, {cell['error']:.0e}" if cell["error"] else f"{verdict}, 0"


def page(record: dict[str, Any]) -> str:
    """``spec/architectures.md`` from the measured record."""
    rows = record["rows"]
    names = dict(zip(KINDS, _NAMES, strict=True))
    total = ", ".join(
        f"{name} on {sum(works(r[k]) for r in rows)} of {sum(r[k] is not None for r in rows)}"
        for k, name in names.items()
    )
    body = []
    for r in rows:
        heads = r["heads"]
        which = " and ".join("KV groups" if k == "kv_group" else "heads" for k in heads["kinds"])
        others = ", ".join(f"{n} {k}" for k, n in r["counts"].items())
        body.append([
            r["family"], _cell(r["neurons"]), f"{_cell(heads)} ({which})", _cell(r["hidden"]),
            _cell(r["experts"]), _cell(r["together"]), others,
        ])  # fmt: skip
    head = ("family", "neurons", "heads", "hidden channels", "experts", "all in one cut", "groups")
    return (
        "# Architectures\n\n"
        f"<!-- Made from benchmarks/results/architectures.json by `{record['command']}`. -->\n\n"
        "Dependency groups of tiny random models, found in their graphs with no name and no rule "
        "of a family. In each cell a third of the units is cut from every block; `equal` means "
        "that the sliced program gives what the masked one gives, followed by the largest "
        f"difference over the largest logit (fp32, at most {LIMIT:.0e}). A refusal names the node "
        "that forbids the cut.\n\n"
        f"Sliced equals masked: {total} families that have them.\n\n" + table(head, body)
    )


def main() -> None:
    """Measure every family, and write the JSON and the page."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--only", default="", help="families, comma separated; prints, no files")
    args = parser.parse_args()
    sys.path.insert(0, str(ROOT / "tests"))
    import tiny_models

    torch.set_num_threads(1)
    names = args.only.split(",") if args.only else tiny_models.FAMILIES
    rows = []
    for name in names:
        start = time.perf_counter()
        program = tiny_models.capture_tiny(name)
        row = measure(program, tiny_models.random_inputs(name, *TOKENS))
        rows.append({"family": name, **row})
        verdicts = {k: _cell(row[k]) for k in (*KINDS, "together")}
        print(f"{name:12s} {time.perf_counter() - start:5.1f} s  {verdicts}", flush=True)
    if args.only:
        return
    import transformers

    record = {
        "command": "python benchmarks/architectures.py",
        "torch": torch.__version__, "transformers": transformers.__version__,
        "python": platform.python_version(), "tokens": list(TOKENS), "limit": LIMIT, "rows": rows,
    }  # fmt: skip
    RESULTS.write_text(json.dumps(record, indent=1) + "\n")
    PAGE.write_text(page(record))


if __name__ == "__main__":
    main()
