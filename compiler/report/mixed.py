"""How mixed precision chose: the frontier of predictions, what was tried, the table of groups.

The record is the one of :func:`..pipeline.mixing.mix`: options, bytes and predicted rises by group.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from markupsafe import Markup

from ..ir.errors import ModelError
from .checked import rows
from .layers import Site
from .plots import Point, scatter
from .text import Table, number, size

_TABLE = {"group": str, "sites": list, "roles": list, "option": str, "bytes": int, "bits": float,
          "predicted": dict}  # fmt: skip
_TRY = {"by": str, "bytes": int, "bits": float, "perplexity": float, "fits": bool, "chosen": bool}


@dataclass(frozen=True)
class Mixed:
    """What the page shows: facts, one plot per measure, a plot and a table of what was tried."""

    facts: Sequence[tuple[str, str]]
    frontiers: Sequence[tuple[str, Markup]]
    tried: Markup | None
    tries: Table
    table: Table


def mixed(record: Any) -> Mixed | None:
    """The record drawn; None where precision was not mixed.

    Raises:
        ModelError: the record is not of the form that compiling writes.
    """
    if record is None:
        return None
    where = "report.json, mixed"
    if not isinstance(record, dict):
        raise ModelError("expected an object, found something else", where=where)
    table = rows(record.get("table"), _TABLE, where)
    tries = rows(record.get("tries"), _TRY, where)
    return Mixed(
        _facts(record, table), list(_frontiers(record, table)), _tried(record, tries),
        _tries_table(tries), _choice_table(table),
    )  # fmt: skip


def with_sensitivity(sites: Sequence[Site], record: Any) -> list[Site]:
    """The sites, each with what its fused group is predicted to cost as it was chosen."""
    if not isinstance(record, dict):
        return list(sites)
    told: dict[str, float] = {}
    for row in rows(record.get("table"), _TABLE, "report.json, mixed"):
        found = next((v for v in row["predicted"].values() if _is_number(v)), None)
        if found is not None:
            told |= dict.fromkeys(map(str, row["sites"]), float(found))
    return [s | {"sensitivity": told[s["site"]]} if s["site"] in told else s for s in sites]


def _is_number(value: Any) -> bool:
    return isinstance(value, (int, float)) and not isinstance(value, bool) and math.isfinite(value)


def _facts(
    record: Mapping[str, Any], table: Sequence[Mapping[str, Any]]
) -> list[tuple[str, str]]:  # fmt: skip
    count: dict[str, int] = {}
    for row in table:
        count[row["option"]] = count.get(row["option"], 0) + 1
    bits = record.get("bits")
    out = [
        ("asked", str(record.get("target", ""))),
        ("reached", f"{number(bits if _is_number(bits) else None)} bits per weight"),
        ("chosen by", str(record.get("by", ""))),
        ("options", ", ".join(map(str, record.get("options", ())))),
        ("groups", ", ".join(f"{n} × {o}" for o, n in sorted(count.items()))),
    ]
    held = record.get("held_out")
    if isinstance(held, dict):
        out.append(
            (
                "judged on",
                ", ".join(f"{v} {k}" if isinstance(v, int) else str(v) for k, v in held.items()),
            )
        )
    return [(k, v) for k, v in out if v]


def _frontiers(record: Mapping[str, Any], table: Sequence[Mapping[str, Any]]) -> Any:
    """(measure, plot): the least predicted loss at each size, and where the choice lies."""
    found, weights = record.get("frontier"), record.get("weights")
    if not isinstance(found, dict) or not _is_number(weights) or not weights:
        return
    for measure, line in found.items():
        stored, predicted = (_numbers(line, k) for k in ("bytes", "predicted"))
        if len(stored) != len(predicted):
            raise ModelError(
                f"expected as many bytes as losses for {measure}, found {len(stored)} and "
                f"{len(predicted)}", where="report.json, mixed",
            )  # fmt: skip
        places = zip(stored, predicted, strict=True)
        # Without the places that lose nothing, so that the others can be told apart by logarithm.
        points = [Point(8 * b / weights, loss) for b, loss in places if loss > 0]
        rises = [row["predicted"].get(measure) for row in table]
        if all(map(_is_number, rises)):
            bits = 8 * sum(row["bytes"] for row in table) / weights
            points.append(Point(bits, sum(rises), str(record.get("by", "chosen")), True))
        if len(points) > 1:
            yield measure, scatter(
                points, ("bits per weight", f"loss predicted by {measure}"),
                f"frontier of {measure}: the least predicted loss at each size",
                (lambda v: f"{v:g}", lambda v: f"{v:.3g}"), log=True,
            )  # fmt: skip


def _numbers(line: Any, key: str) -> list[float]:
    found = line.get(key) if isinstance(line, dict) else None
    if not isinstance(found, list) or not all(map(_is_number, found)):
        raise ModelError(f"expected a list of numbers for {key}, found something else",
                         where="report.json, mixed")  # fmt: skip
    return found


def _tried(record: Mapping[str, Any], tries: Sequence[Mapping[str, Any]]) -> Markup | None:
    if len(tries) < 2:
        return None
    points = [Point(t["bits"], t["perplexity"], t["by"], t["chosen"]) for t in tries]
    return scatter(
        points, ("bits per weight", "perplexity"),
        "perplexity on the held-out slice of everything that was compiled and judged",
        (lambda v: f"{v:g}", lambda v: f"{v:.4g}"), log=True,
    )  # fmt: skip


def _tries_table(tries: Sequence[Mapping[str, Any]]) -> Table:
    numbers = ("bits per weight", "bytes", "perplexity", "rise", "predicted rise")
    table = Table("Compiled and judged on the held-out slice", ("by", *numbers, ""), right=numbers)
    for t in tries:
        rise, told = (v if _is_number(v := t.get(k)) else None for k in ("rise", "predicted_rise"))
        note = "chosen" if t["chosen"] else "" if t["fits"] else "too large"
        table.rows.append((
            t["by"], number(t["bits"]), size(t["bytes"]), number(t["perplexity"], 5),
            number(rise, 3), number(told, 3), note,
        ))  # fmt: skip
    return table


def _choice_table(table: Sequence[Mapping[str, Any]]) -> Table:
    measures = list(dict.fromkeys(m for row in table for m in row["predicted"]))
    heads = [f"predicted by {m}" for m in measures]
    out = Table("", ("group", "roles", "chosen", "bits", "bytes", *heads),
                right=("bits", "bytes", *heads))  # fmt: skip
    for row in table:
        told = [row["predicted"].get(m) for m in measures]
        out.rows.append((
            row["group"], " ".join(map(str, row["roles"])), row["option"], number(row["bits"]),
            size(row["bytes"]), *(number(v, 3) if _is_number(v) else "-" for v in told),
        ))  # fmt: skip
    return out
