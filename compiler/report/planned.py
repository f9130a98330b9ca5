"""The plan as tables: order with reasons, sites by role, refusals by reason, predicted bytes."""

from __future__ import annotations

from math import prod
from typing import Any

from ..pipeline.base import Pass
from ..pipeline.registry import all_passes
from .mixing import mixing_tables
from .structure import structure_table
from .text import Table, size


def order_table(plan: dict[str, Any]) -> Table:
    """Passes in applied order with the reason of their place."""
    table = Table("Order", ("pass", "round", "knobs", "why here"))
    stages = plan["recipe"]["stages"]
    known = all_passes()
    for row in plan["order"]:
        knobs = stages[row["stage"]][row["pass"]]
        usual = _usual(known[row["pass"]], row["pass"]) if row["pass"] in known else {}
        shown = " ".join(f"{k}={_value(v)}" for k, v in knobs.items() if usual.get(k, v) != v)
        table.rows.append((row["pass"], str(row["stage"] + 1), shown or "as usual", row["why"]))
    return table


def _usual(made: type[Pass], name: str) -> dict[str, Any]:
    """Every knob's value where nobody gave one (``llmc passes NAME`` shows them)."""
    return {k: made.variants[name].get(k, knob.default) for k, knob in made.knobs().items()}


def _value(value: Any) -> str:
    if value is None:
        return "none"
    return str(value).lower() if isinstance(value, bool) else str(value)


def sites_table(plan: dict[str, Any], full: bool = False) -> Table:
    """Sites: one row each when ``full``, else one per role, scheme and solver."""
    right = ("sites", "before", "after", "bits")
    if full:
        table = Table(
            "Sites",
            ("site", "role", "shape", "scheme", "solver", "before", "after", "bits", "note"),
            right=right,
        )
        for r in plan["sites"]:
            table.rows.append((
                r["site"], r["role"], "x".join(map(str, r["shape"])), r["scheme"], _solver(r),
                size(r["bytes_before"]), size(r["bytes_after"]), _bits([r]), _note(r),
            ))  # fmt: skip
        return table
    table = Table(
        "Sites", ("role", "scheme", "solver", "sites", "before", "after", "bits", "note"),
        right=right,
    )  # fmt: skip
    groups: dict[tuple[str, ...], list[dict[str, Any]]] = {}
    for r in plan["sites"]:
        key = (r["role"], r["scheme"], _solver(r), _note(r))
        groups.setdefault(key, []).append(r)
    for (role, scheme, solver, note), rows in groups.items():
        before, after = (sum(r[k] for r in rows) for k in ("bytes_before", "bytes_after"))
        table.rows.append(
            (role, scheme, solver, str(len(rows)), size(before), size(after), _bits(rows), note)
        )
    return table


def _note(row: dict[str, Any]) -> str:
    bytes_are = "" if row["bytes_are"] == "exact" else f"bytes {row['bytes_are']}"
    return "; ".join(n for n in (bytes_are, row.get("note", "")) if n)


def _solver(row: dict[str, Any]) -> str:
    used = row.get("solver", {})
    parts = [used[k] for k in ("mask_solver", "grid_solver") if used.get(k)]
    joint = set(parts) == {"sparsegpt", "gptq"}
    return "joint" if joint else "+".join(parts)


def _bits(rows: list[dict[str, Any]]) -> str:
    weights = sum(prod(r["shape"]) for r in rows)
    return f"{8 * sum(r['bytes_after'] for r in rows) / weights:.3f}"


def migrations_table(plan: dict[str, Any]) -> Table:
    """Places across which scales move, by kind."""
    table = Table("Scale migrations", ("pass", "kind", "sites", "channels", "scales"),
                  right=("sites", "channels", "scales"))  # fmt: skip
    groups: dict[tuple[str, str, int, int], int] = {}
    for m in plan["migrations"]:
        key = (m["pass"], m["kind"], m["channels"], m["scales"])
        groups[key] = groups.get(key, 0) + 1
    for (name, kind, channels, scales), count in groups.items():
        table.rows.append((name, kind, str(count), str(channels), str(scales)))
    return table


def refusals_table(refusals: list[dict[str, Any]], full: bool = False) -> Table:
    """Places where a pass nearly applied; equal reasons in one row unless ``full``."""
    if full:
        table = Table("Refused", ("pass", "node", "path", "condition", "reason"))
        for r in refusals:
            table.rows.append((r["by"], r["node"], r["path"], r["predicate"], r["reason"]))
        return table
    table = Table("Refused", ("pass", "places", "condition", "reason", "first node"),
                  right=("places",))  # fmt: skip
    groups: dict[tuple[str, str, str], list[dict[str, Any]]] = {}
    for r in refusals:
        groups.setdefault((r["by"], r["predicate"], r["reason"]), []).append(r)
    for (by, predicate, reason), rows in groups.items():
        table.rows.append((by, str(len(rows)), predicate, reason, rows[0]["node"]))
    return table


def totals(plan: dict[str, Any]) -> list[str]:
    """The predicted figures, one line each."""
    p = plan["predicted"]
    before, after = p["bytes_before"], p["bytes_after"]
    bounds = {r["bytes_are"] for r in plan["sites"]} | {
        "exact" if s["exact"] else "at most" for s in plan["structure"]
    }
    most = "at most " if "at most" in bounds else "" if p["exact"] else "about "
    lines = [f"weights {size(before)} -> {most}{size(after)} ({after / before:.1%})"]
    if plan["bits_per_weight"] is not None:
        lines[0] += f", {plan['bits_per_weight']:.3f} bits per compressed weight"
    if p["calibration_tokens"]:
        lines.append(
            f"calibration on {p['calibration_tokens']:,} tokens, "
            f"{p['calibration_flops'] / 1e12:.3g} TFLOP; memory at most {size(p['ram_bound'])}"
        )
    return lines


def plan_tables(plan: dict[str, Any], full: bool = False) -> list[Table]:
    """Every table of a plan, in reading order."""
    return [
        order_table(plan),
        structure_table(plan["structure"]),
        migrations_table(plan),
        *mixing_tables(plan.get("mixed"), full),
        sites_table(plan, full),
        refusals_table(plan["refusals"], full),
    ]
