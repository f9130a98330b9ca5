"""How mixed precision chose: the frontier of predictions, what was tried, the table of groups.

The record is the one of :func:`..pipeline.mixing.mix`: options, bytes and predicted rises by group.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from markupsafe import Markup

from ..ir.errors import ModelError
from .checked import GROUP, MIXED, is_number, mixture_of, rows
from .layers import Site
from .mixing import chosen_table, tries_table
from .plots import Point, scatter
from .text import Table, number


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
    checked = mixture_of(record)
    if checked is None:
        return None
    table, tries = checked["table"], checked["tries"]
    return Mixed(
        _facts(checked, table), list(_frontiers(checked, table)), _tried(tries),
        tries_table(checked), chosen_table(checked, full=True),
    )  # fmt: skip


def with_sensitivity(sites: Sequence[Site], record: Any) -> list[Site]:
    """The sites, each with what its fused group is predicted to cost as it was chosen."""
    if not isinstance(record, dict):
        return list(sites)
    told: dict[str, float] = {}
    for row in rows(record.get("table"), GROUP, MIXED):
        found = next((v for v in row["predicted"].values() if is_number(v)), None)
        if found is not None:
            told |= dict.fromkeys(map(str, row["sites"]), float(found))
    return [s | {"sensitivity": told[s["site"]]} if s["site"] in told else s for s in sites]


def _facts(
    record: Mapping[str, Any], table: Sequence[Mapping[str, Any]]
) -> list[tuple[str, str]]:  # fmt: skip
    count: dict[str, int] = {}
    for row in table:
        count[row["option"]] = count.get(row["option"], 0) + 1
    held = record["held_out"]
    return [
        ("asked", record["target"]),
        ("reached", f"{number(record['bits'])} bits per weight"),
        ("chosen by", record["by"]),
        ("options", ", ".join(map(str, record["options"]))),
        ("groups", ", ".join(f"{n} × {o}" for o, n in sorted(count.items()))),
        ("judged on", f"{held['windows']} windows: {held['from']}"),
    ]


def _frontiers(record: Mapping[str, Any], table: Sequence[Mapping[str, Any]]) -> Any:
    """(measure, plot): the least predicted loss at each size, and where the choice lies."""
    weights = max(record["weights"], 1)
    for measure, line in record["frontier"].items():
        stored, predicted = (_numbers(line, k) for k in ("bytes", "predicted"))
        if len(stored) != len(predicted):
            raise ModelError(
                f"expected as many bytes as losses for {measure}, found {len(stored)} and "
                f"{len(predicted)}", where=MIXED,
            )  # fmt: skip
        places = zip(stored, predicted, strict=True)
        # Without the places that lose nothing, so that the others can be told apart by logarithm.
        points = [Point(8 * b / weights, loss) for b, loss in places if loss > 0]
        rises = [row["predicted"].get(measure) for row in table]
        if all(map(is_number, rises)):
            bits = 8 * sum(row["bytes"] for row in table) / weights
            points.append(Point(bits, sum(rises), record["by"], True))
        if len(points) > 1:
            yield measure, scatter(
                points, ("bits per weight", f"loss predicted by {measure}"),
                f"frontier of {measure}: the least predicted loss at each size",
                (lambda v: f"{v:g}", lambda v: f"{v:.3g}"), log=True,
            )  # fmt: skip


def _numbers(line: Any, key: str) -> list[float]:
    found = line.get(key) if isinstance(line, dict) else None
    if not isinstance(found, list) or not all(map(is_number, found)):
        raise ModelError(f"expected a list of numbers for {key}, found something else",
                         where=MIXED)  # fmt: skip
    return found


def _tried(tries: Sequence[Mapping[str, Any]]) -> Markup | None:
    if len(tries) < 2:
        return None
    points = [Point(t["bits"], t["perplexity"], t["by"], t["chosen"]) for t in tries]
    return scatter(
        points, ("bits per weight", "perplexity"),
        "perplexity on the held-out slice of everything that was compiled and judged",
        (lambda v: f"{v:g}", lambda v: f"{v:.4g}"), log=True,
    )  # fmt: skip
