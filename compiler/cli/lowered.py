"""What the report says of kernels: fused nodes, what is left, launches, sources and limits."""

from __future__ import annotations

import json
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

from .kernels import lowering, problems_of, scheme_text

if TYPE_CHECKING:
    from ...codegen.problem import Problem
    from ...codegen.row import KernelRow
    from ..ir.graph import Program
    from ..report.text import Table

FACTS = Path(__file__).parents[2] / "spec" / "kernels.json"
"""Facts of the documented variants, compiled without a GPU."""
PROMPT = 256
"""Tokens of a call that may start other kernels than a call of one."""


def lowered(program: Program, target: str) -> dict[str, Any] | None:
    """What lowering gives, nodes and blocks that are alike in one row; None for nothing.

    Each kernel stands once with its limits, under it the source of every variant that is run and
    what its machine code was found to hold.
    """
    from ...codegen.targets import BANDWIDTH

    told = lowering(program, target, 1, "fp16", BANDWIDTH)
    if not told["fused"] and not told["not_fused"]:
        return None
    return told | {
        "table": _fused(told["fused"]), "refused": _refused(told["not_fused"]),
        "attended": _attended(told["attention"]),
        "launches": _launches(told if target == "triton" else told | {"blocks": {}}),
        "rows": _sources(told["fused"]) if target == "triton" else [],
    }  # fmt: skip


def _grouped(
    rows: Iterable[dict[str, Any]], key: Any
) -> list[tuple[tuple[str, ...], list[dict[str, Any]]]]:
    groups: dict[tuple[str, ...], list[dict[str, Any]]] = {}
    for row in rows:
        groups.setdefault(key(row), []).append(row)
    return list(groups.items())


def _first(row: Mapping[str, Any]) -> str:
    return f"{row['node']} {row['path']}".strip()


def _fused(rows: list[dict[str, Any]]) -> Table:
    from ..report.text import Table, size

    def key(r: dict[str, Any]) -> tuple[str, ...]:
        p = r["problem"]
        parts = " ".join(x.split(".")[1] for x in r["parts"])
        return r["kernel"], f"{p['N']}×{p['K']}", scheme_text(p), parts

    table = Table("", ("kernel", "shape", "scheme", "parts", "nodes", "bytes each", "floor µs each",
                       "first"), right=("nodes", "bytes each", "floor µs each"))  # fmt: skip
    for told, alike in _grouped(rows, key):
        first = alike[0]
        table.rows.append((*told, str(len(alike)), size(first["bytes"]),
                           f"{first['floor_us']:.3g}", _first(first)))  # fmt: skip
    return table


def _refused(rows: list[dict[str, Any]]) -> Table:
    from ..report.text import Table

    table = Table("", ("nodes", "condition", "reason", "first"), right=("nodes",))
    for told, alike in _grouped(rows, lambda r: (r["predicate"], r["reason"])):
        table.rows.append((str(len(alike)), *told, _first(alike[0])))
    return table


def _attended(rows: list[dict[str, Any]]) -> Table:
    from ..report.text import Table, size

    tokens = rows[0]["tokens"] if rows else 0
    table = Table(f"Attention to a cache of {tokens} tokens",
                  ("kernel", "nodes", "bytes each", "floor µs each", "note", "first"),
                  right=("nodes", "bytes each", "floor µs each"))  # fmt: skip
    for (kernel, note, moved, floor), alike in _grouped(
        rows, lambda r: (r["kernel"], r["note"], size(r["bytes"]), f"{r['floor_us']:.3g}")
    ):
        table.rows.append((kernel, str(len(alike)), moved, floor, note, _first(alike[0])))
    return table


def _launches(told: Mapping[str, Any]) -> Table:
    """Segments that start the same kernels in one row, by the first of them."""
    from ..report.text import Table

    kernels = {r["node"]: r["kernel"] for r in (*told["fused"], *told["attention"])}
    table = Table("Launches of a decode step", ("segment", "alike", "launches", "calls"),
                  right=("alike", "launches"))  # fmt: skip
    for (launches, *_), alike in _grouped(
        ({"name": name, **block} for name, block in told["blocks"].items()),
        lambda r: (str(r["launches"]), *(kernels.get(c, "") for c in r["calls"])),
    ):
        first = alike[0]
        table.rows.append((first["name"], str(len(alike)), launches, " ".join(first["calls"])))
    return table


def _sources(fused: list[dict[str, Any]]) -> list[dict[str, Any]]:
    """By kernel: its limits and its variants, each with source, facts and how many nodes run it."""
    from ...codegen.kernels import choose
    from ...codegen.problem import Problem
    from ...codegen.render import render

    facts = json.loads(FACTS.read_text())["facts"] if FACTS.is_file() else []
    rows: dict[str, dict[str, Any]] = {}
    for problem in (Problem(**p) for r in fused for p in problems_of(r)):
        row, _ = choose(problem)
        if row is None:
            continue
        for one, of in _launched(row, problem):
            made = render(one, of)
            kernel = rows.setdefault(one.name, {
                "name": one.name, "summary": one.summary, "limits": _limits(one), "variants": {},
            })  # fmt: skip
            variant = kernel["variants"].setdefault(made.digest, {
                "name": made.name, "source": made.source, "nodes": 0,
                "facts": _facts(f for f in facts if f.get("variant") == made.name),
            })  # fmt: skip
            variant["nodes"] += 1
    return [r | {"variants": list(r["variants"].values())} for r in rows.values()]


def _launched(row: KernelRow, problem: Problem) -> dict[tuple[KernelRow, Problem], None]:
    """The kernels that a call starts, of one token and of a prompt, each once."""
    from ...codegen.survey import launched

    return dict.fromkeys(each for tokens in (1, PROMPT) for each in launched(row, problem, tokens))


def _limits(row: KernelRow) -> Table:
    from ..report.text import Table

    limits = Table("What it serves", ("field", "expected"))
    limits.rows = [(f, " or ".join(map(_word, allowed))) for f, allowed in row.choices.items()]
    limits.rows += [(n.field, n.expected) for n in row.requires]
    return limits


def _word(value: object) -> str:
    return ("no", "yes")[value] if isinstance(value, bool) else str(value) or "none"


def _facts(found: Iterable[Mapping[str, Any]]) -> Table:
    """What ahead-of-time compilation showed of a variant at its documented size."""
    from ..report.text import Table, size

    table = Table("Compiled ahead of time, without a GPU",
                  ("machine", "shape", "tile", "registers", "stack", "shared", "matrix",
                   "LDL and STL", "slots per weight"),
                  right=("registers", "stack", "shared", "LDL and STL",
                         "slots per weight"))  # fmt: skip
    for f in found:
        c, p = f["config"], f["problem"]
        tile = f"{c['BM']}×{c['BN']}" + (f" / {c['split']}" if c["split"] > 1 else "")
        table.rows.append((
            f["target"], f"{p['N']}×{p['K']}", tile, str(f["registers"]), str(f["stack"]),
            size(f["shared"]), " ".join(f["matrix"]) or "none", str(f["local_memory"]),
            str(f["slots"]),
        ))  # fmt: skip
    return table
