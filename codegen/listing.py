"""What kernel rows declare, as plain values: for pages, tables and JSON."""

from __future__ import annotations

from typing import Any

from . import cpu, kernels
from .attention.row import AttentionRow
from .attention.rows import ROWS as ATTENTION
from .row import KernelRow

Row = KernelRow | AttentionRow


def all_rows() -> tuple[Row, ...]:
    """Every Triton row: those of linears in order of preference, what their calls launch, and
    cached attention."""
    return (*kernels.rows(), *kernels.INNER, *ATTENTION)


def described(row: Row) -> dict[str, Any]:
    """A row's name, op, template, targets, requirements by field, arguments, bytes and tiles."""
    needs = [(n.field, n.expected) for n in row.requires]
    needs += [(f, " or ".join(str(v) or "none" for v in allowed))
              for f, allowed in row.choices.items()]  # fmt: skip
    about = {
        "name": row.name, "op": row.op, "template": f"codegen/templates/{row.template}",
        "summary": row.summary, "targets": list(row.targets), "inner": row in kernels.INNER,
        "requires": [{"field": f, "expected": e} for f, e in needs], "moves": row.moves,
    }  # fmt: skip
    if isinstance(row, AttentionRow):
        return about | {"note": row.note, "arguments": [], "steps": list(row.steps)}
    return about | {
        "arguments": [{"name": a.name, "shape": a.shape, "dtypes": list(a.dtypes), "if": a.flag}
                      for a in row.args],
        "tiles": [list(t) for t in row.tiles], "stages": list(row.stages),
        "splits": list(row.splits),
    }  # fmt: skip


def described_cpu() -> list[dict[str, Any]]:
    """The kernels of the CPU target, in order of preference."""
    return [
        {"name": k.name, "ways": list(k.ways), "note": k.note,
         "from": {way: tokens for tokens, way in k.usual}}
        for k in cpu.KERNELS
    ]  # fmt: skip
