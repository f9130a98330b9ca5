"""What became of each layer as plots and tables: error, bits, bytes, tokens, saturation, shares."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

from markupsafe import Markup

from .checked import is_number
from .plots import bars, heat
from .text import Table, number, size

Site = dict[str, Any]
MOST = 3000
"""Weights that the table of all shows; a mixture of experts may have more."""


@dataclass(frozen=True)
class Metric:
    """A figure of each weight: its field, its name, what it says, and how it is written."""

    field: str
    name: str
    about: str
    show: Callable[[float], str]
    log: bool = False
    total: bool = False


def _share(value: float) -> str:
    return f"{value:.2%}"


def _small(value: float) -> str:
    return f"{value:.3g}"


METRICS = (
    Metric("loss", "error", "relative squared error of the layer's output on calibration data",
           lambda v: f"{v:.2e}", log=True),
    Metric("bits", "bits", "stored bits per weight, every side tensor counted",
           lambda v: f"{v:.4g}"),
    Metric("bytes_after", "bytes", "as stored", size, total=True),
    Metric("sensitivity", "sensitivity", "loss that the model is predicted to gain", _small, True),
    Metric("tokens", "tokens seen", "calibration tokens that reached the layer",
           lambda v: f"{v:,.0f}"),
    Metric("ends", "saturation", "share of the codes on the two ends of their grid", _share),
    Metric("zeros", "zeros", "share of the weights that the mask sets to zero", _share),
    Metric("outliers", "outliers", "share of the weights that are kept beside the codes", _share),
    Metric("recovered", "recovered", "share of the weights that came back beside the mask",
           _share),
    Metric("rank", "rank", "of the low-rank matrices beside the codes", lambda v: f"{v:.0f}"),
    Metric("rows_rtn", "rows rounded", "rows that fell back to plain rounding",
           lambda v: f"{v:.0f}", total=True),
    Metric("seconds", "seconds", "that the solve took", _small, total=True),
    Metric("damp", "damping", "share of the mean diagonal added to XᵀX", _small, True),
)  # fmt: skip


@dataclass(frozen=True)
class Plot:
    """A metric drawn by layer and role; ``strip`` has one bar per layer."""

    metric: Metric
    heat: Markup
    strip: Markup


def with_seconds(sites: Sequence[Site], run: Any) -> list[Site]:
    """The sites, each with the seconds that run.json says its solves took; they lie apart from
    the report, which does not change from run to run."""
    times = run.get("times") if isinstance(run, dict) else None
    solves = times.get("solves") if isinstance(times, dict) else None
    took: dict[str, float] = {}
    for row in solves if isinstance(solves, list) else ():
        if isinstance(row, dict) and (seconds := value_of(row, "seconds")) is not None:
            took[str(row.get("site"))] = took.get(str(row.get("site")), 0.0) + seconds
    return [s | {"seconds": took[s["site"]]} if s["site"] in took else s for s in sites]


def layer_of(site: Site) -> str:
    """The segment in which a weight lies: site ids are ``segment/role and number``."""
    return str(site["site"]).partition("/")[0]


def value_of(site: Site, field: str) -> float | None:
    """A finite number, or None: a field may be absent, null or no number."""
    found = site.get(field)
    return float(found) if found is not None and is_number(found) else None


def plots(sites: Sequence[Site]) -> tuple[list[Plot], list[str]]:
    """A plot of each metric that differs between weights, and a line on each that does not."""
    drawn, same = [], []
    roles = list(dict.fromkeys(str(s["role"]) for s in sites))
    layers = list(dict.fromkeys(layer_of(s) for s in sites))
    for metric in METRICS:
        known = [(s, v) for s in sites if (v := value_of(s, metric.field)) is not None]
        values = {v for _, v in known}
        if not values:
            continue
        if len(values) == 1:
            (one,) = values
            if one != 0 or metric.field in ("rows_rtn", "loss"):
                all_of = "everywhere" if len(known) == len(sites) else f"in {len(known)} weights"
                same.append(f"{metric.name}: {metric.show(one)} {all_of} ({metric.about})")
            continue
        cells = _by(known, lambda s: (str(s["role"]), layer_of(s)), metric.total)
        by_layer = _by(known, layer_of, metric.total, metric.field == "bits")
        label = f"{metric.name} by layer and role: {metric.about}"
        drawn.append(Plot(
            metric,
            heat(roles, layers, cells, label, metric.show, log=metric.log),
            bars(layers, [by_layer.get(n) for n in layers],
                 f"{metric.name} by layer, {_joined(metric)}", metric.show),
        ))  # fmt: skip
    return drawn, same


def _joined(metric: Metric) -> str:
    return "summed" if metric.total else "mean of its weights"


def _by(
    known: Sequence[tuple[Site, float]], key: Callable[[Site], Any], total: bool,
    weighted: bool = False,
) -> dict[Any, float]:  # fmt: skip
    """Sums or means of a metric; ``weighted`` by the number of weights."""
    sums: dict[Any, list[float]] = {}
    for site, value in known:
        count = float(math.prod(site["shape"])) if weighted else 1.0
        into = sums.setdefault(key(site), [0.0, 0.0])
        into[0] += value * count
        into[1] += count
    return {k: s if total else s / max(n, 1.0) for k, (s, n) in sums.items()}


def weights_table(sites: Sequence[Site], title: str = "") -> Table:
    """One row per weight with the figures that any weight has."""
    shown = [m for m in METRICS if any(value_of(s, m.field) is not None for s in sites)]
    figures = [m.name for m in shown]
    table = Table(title, ("weight", "role", "shape", "scheme", "solver", "bytes before",
                          *figures, "fallback"),
                  right=("bytes before", *figures))  # fmt: skip
    for s in sites[:MOST]:
        found = [value_of(s, m.field) for m in shown]
        path = str(s.get("path", ""))
        solver = s.get("solver")
        parts = solver.values() if isinstance(solver, dict) else ()
        table.rows.append((
            f"{s['site']} {path}".strip(), str(s["role"]), "×".join(map(str, s["shape"])),
            str(s["scheme"]), "+".join(dict.fromkeys(str(p) for p in parts if p)),
            size(value_of(s, "bytes_before")),
            *("-" if v is None else m.show(v) for v, m in zip(found, shown, strict=True)),
            "; ".join(map(str, s.get("fallbacks") or ())),
        ))  # fmt: skip
    return table


def worst_table(sites: Sequence[Site], count: int = 10) -> Table:
    """The weights with the largest error, the worst first."""
    known = [(v, s) for s in sites if (v := value_of(s, "loss")) is not None and v > 0]
    known.sort(key=lambda k: -k[0])
    table = Table(f"The {min(count, len(known))} largest errors",
                  ("weight", "role", "scheme", "error", "tokens"),
                  right=("error", "tokens"))  # fmt: skip
    for loss, s in known[:count]:
        table.rows.append((
            f"{s['site']} {s.get('path', '')}".strip(), str(s["role"]), str(s["scheme"]),
            f"{loss:.2e}", number(s.get("tokens")),
        ))  # fmt: skip
    return table
