"""Mixed precision as tables: what each group became, and what was judged on the held-out slice."""

from __future__ import annotations

from typing import Any

from .text import Table, number, size


def mixing_tables(mixing: dict[str, Any] | None, full: bool = False) -> list[Table]:
    """The chosen table, one row per group when ``full``, and the tries; none without mixing."""
    return [] if mixing is None else [chosen_table(mixing, full), tries_table(mixing)]


def chosen_table(mixing: dict[str, Any], full: bool = False) -> Table:
    """Groups by option: one row each when ``full``, else one per option and roles."""
    first = mixing["measures"][0]
    title = f"Mixed precision for {mixing['target']} (rise: predicted by {first})"
    right = ("groups", "weights", "bits", "bytes", "rise")
    if full:
        table = Table(title, ("group", "roles", "option", "bits", "bytes", "rise"), right=right)
        for r in mixing["table"]:
            table.rows.append((
                r["group"], " ".join(r["roles"]), r["option"], f"{r['bits']:.3f}",
                size(r["bytes"]), number(r["predicted"][first], 3),
            ))  # fmt: skip
        return table
    table = Table(title, ("option", "roles", "groups", "bits", "bytes", "rise"), right=right)
    kinds: dict[tuple[str, str], list[dict[str, Any]]] = {}
    for option in mixing["options"]:
        for r in mixing["table"]:
            if r["option"] == option:
                kinds.setdefault((option, " ".join(r["roles"])), []).append(r)
    for (option, roles), rows in kinds.items():
        stored = sum(r["bytes"] for r in rows)
        weights = sum(8 * r["bytes"] / r["bits"] for r in rows)
        rises = [r["predicted"][first] for r in rows]
        table.rows.append((
            option, roles, str(len(rows)), f"{8 * stored / weights:.3f}", size(stored),
            number(None if None in rises else float(sum(rises)), 3),
        ))  # fmt: skip
    return table


def tries_table(mixing: dict[str, Any]) -> Table:
    """What was compiled and judged, by bytes."""
    held = mixing["held_out"]
    title = f"Judged on {held['windows']} windows: {held['from']}"
    right = ("bits", "bytes", "perplexity", "rise", "predicted")
    table = Table(title, ("choice", "bits", "bytes", "perplexity", "rise", "predicted", ""),
                  right=right)  # fmt: skip
    table.rows.append(
        ("as it is", "", "", f"{mixing['dense']['perplexity']:.4f}", "0", "", "")
    )  # fmt: skip
    for t in mixing["tries"]:
        note = "chosen" if t["chosen"] else "" if t["fits"] else "too large"
        table.rows.append((
            t["by"], f"{t['bits']:.3f}", size(t["bytes"]), f"{t['perplexity']:.4f}",
            number(t["rise"], 3), number(t["predicted_rise"], 3), note,
        ))  # fmt: skip
    return table


def mixing_lines(mixing: dict[str, Any] | None) -> list[str]:
    """The outcome in one line."""
    if mixing is None:
        return []
    return [
        f"{mixing['target']}: {mixing['by']}, {mixing['bits']:.4f} bits per weight, "
        f"{size(mixing['model_bytes'])} in all ({mixing['model_share']:.1%})"
    ]
