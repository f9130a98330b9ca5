"""The table of methods as Markdown, and its plot: perplexity by bits per weight."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from method_notes import NOTES
from method_rows import BESIDE, CACHES, INPUTS, KINDS, MIXED, MOVED, WEIGHTS

DENSE = "dense"
UNIFORM = ("w8", "w6", "w5", "w4", "w3", "w2")
# Okabe and Ito's colours, which stay apart for all eyes; a marker each, for print.
LOOKS = {
    WEIGHTS: ("#0072B2", "o"), MOVED: ("#E69F00", "^"), BESIDE: ("#009E73", "D"),
    MIXED: ("#D55E00", "*"), INPUTS: ("#CC79A7", "s"),
}  # fmt: skip


def markdown(data: Mapping[str, Any]) -> str:
    """All parts that are there, under one heading each."""
    out = ["# Methods", "", "Made by `benchmarks/methods.py`; numbers are in methods.json.", ""]
    if "model" in data:
        out += _model(data["model"])
    if "layer" in data:
        out += _layer(data["layer"])
    if "cost" in data:
        out += _cost(data["cost"])
    told = [f"- `{key}` {text}" for key, text in NOTES.items()]
    out += ["## Where a method does worse than its paper says", "", *told, ""]
    return "\n".join(out)


def _table(head: Sequence[str], rows: Sequence[Sequence[str]], left: int = 1) -> list[str]:
    rule = ["---" if i < left else "---:" for i in range(len(head))]
    lines = [f"| {' | '.join(line)} |" for line in (head, rule, *rows)]
    return [*lines, ""]


def _model(part: Mapping[str, Any]) -> list[str]:
    head, rows = part["head"], part["rows"]
    dense = next(r for r in rows if r["key"] == DENSE)
    out = [
        "## The demo model", "", f"`{part['command']}`", "",
        f"{head['model']}, {head['data']}: {head['windows']} windows of {head['window']} tokens "
        f"({head['cache_windows']} token by token for caches), {head['protocol']}; calibration on "
        f"{head['samples']} windows of {head['length']} tokens of {head['calibration']}. Dense: "
        f"perplexity {dense['perplexity']:.3f} at {dense['bits_per_weight']:g} bits.", "",
        "Ratios are of perplexities; the one in brackets is p of a paired bootstrap. Uniform is the"
        " grid `w2` to `w8` whose codes have as many bits. Loss is that of the layers, "
        "tr(D H Dᵀ) / tr(W H Wᵀ).", "",
    ]  # fmt: skip
    for kind in KINDS:
        mine = [r for r in rows if r["kind"] == kind]
        if not mine:
            continue
        out += [f"### {kind.capitalize()}", ""]
        measured = sorted((r for r in mine if "perplexity" in r), key=_bits)
        if kind == CACHES:
            head_line = ["recipe", "bits per number", "perplexity", "to dense"]
            lines = [_cache_line(r) for r in measured]
        else:
            head_line = ["recipe", "bits", "perplexity", "to dense", "to uniform", "Σ loss",
                         "mean loss", "seconds"]  # fmt: skip
            lines = [_line(r) for r in measured]
        out += _table(head_line, lines)
        out += _refused(mine)
    return out


def _refused(rows: Sequence[Mapping[str, Any]]) -> list[str]:
    told = [f"- `{r['key']}` refuses: {r['refused']}" for r in rows if "refused" in r]
    return [*told, ""] if told else []


def _bits(row: Mapping[str, Any]) -> float:
    return float(row.get("cache_bits_per_number") or row.get("bits_per_weight") or 0.0)


def _line(row: Mapping[str, Any]) -> list[str]:
    geomean = row["loss_geomean"]
    return [
        f"`{row['key']}`", f"{row['bits_per_weight']:.3f}", f"{row['perplexity']:.3f}",
        _ratio(row, DENSE), _ratio(row, "uniform"), f"{row['loss_sum']:.4g}",
        "" if geomean is None else f"{geomean:.3g}", f"{row['compile_seconds']:.1f}",
    ]  # fmt: skip


def _cache_line(row: Mapping[str, Any]) -> list[str]:
    shown = [f"{row['cache_bits_per_number']:.2f}", f"{row['perplexity']:.3f}"]
    return [f"`{row['key']}`", *shown, _ratio(row, DENSE)]


def _ratio(row: Mapping[str, Any], against: str) -> str:
    found = row.get("against", {}).get(against)
    if found is None:
        return ""
    p = "" if found["p"] is None else f" ({found['p']:.1g})"
    return f"{found['perplexity_ratio']:.4f}{p}"


def _layer(part: Mapping[str, Any]) -> list[str]:
    head, rows = part["head"], part["rows"]
    out = [
        "## One layer", "", f"`{part['command']}`", "",
        f"W [{head['n']}, {head['n']}] of {head['problem']} on {head['tokens']} rows of X, which "
        "are the calibration data too; W is stored in 16 bits. Loss is the relative error of the "
        "outputs, with what the method does to inputs and beside the codes. Nothing is reordered: "
        "X and the outputs are given.", "",
    ]  # fmt: skip
    for kind in KINDS:
        mine = [r for r in rows if r["kind"] == kind]
        found = sorted((r for r in mine if "loss" in r), key=_bits)
        if found:
            out += [f"### {kind.capitalize()}", ""]
            lines = [
                [f"`{r['key']}`", f"{r['bits_per_weight']:.3f}", f"{r['loss']:.3g}",
                 f"{r['seconds']:.2f}"]
                for r in found
            ]  # fmt: skip
            out += _table(["recipe", "bits", "loss", "seconds"], lines)
        out += _refused(mine)
    return out


def _cost(part: Mapping[str, Any]) -> list[str]:
    head, rows = part["head"], part["rows"]
    lines = [[r["key"], f"{r['seconds']:.2f}", f"{r['processor_seconds']:.2f}"] for r in rows]
    return [
        "## Cost", "", f"`{part['command']}`", "",
        f"A layer of {head['n']} by {head['n']} weights from a ready Hessian on {head['threads']} "
        f"threads; the least of {head['repeats']}.", "",
        *_table(["recipe", "seconds", "of the processor"], lines),
    ]  # fmt: skip


def front(rows: Sequence[Mapping[str, Any]]) -> list[Mapping[str, Any]]:
    """Rows that no other beats: fewer bits always cost perplexity among them."""
    best: list[Mapping[str, Any]] = []
    for r in sorted(rows, key=lambda r: (_bits(r), r["perplexity"])):
        if not best or r["perplexity"] < best[-1]["perplexity"]:
            best.append(r)
    return best


def plot(rows: Sequence[Mapping[str, Any]], path: Path) -> None:
    """The Pareto plot as PNG, weights alone on the left, with rounded inputs on the right.

    Raises:
        SystemExit: matplotlib is not installed; the extra that brings it is named.
    """
    try:
        import matplotlib

        matplotlib.use("Agg")
        from matplotlib import pyplot
    except ImportError as e:
        raise SystemExit(
            "expected matplotlib for the plot, found none; it comes with: pip install -e '.[plot]'"
        ) from e
    dense = next(r for r in rows if r["key"] == DENSE)["perplexity"]
    shown = [r for r in rows if r.get("kind") in LOOKS and "perplexity" in r]
    panels = {
        "weights": [r for r in shown if not _rounds(r)],
        "weights and inputs": [r for r in shown if _rounds(r)],
    }
    panels = {title: mine for title, mine in panels.items() if mine}
    figure, axes = pyplot.subplots(1, len(panels), figsize=(9 * len(panels), 8), squeeze=False)
    for ax, (title, mine) in zip(axes[0], panels.items(), strict=True):
        _panel(ax, title, mine, dense)
    figure.tight_layout()
    path.parent.mkdir(parents=True, exist_ok=True)
    # No date and no version inside, so that equal numbers give equal files.
    figure.savefig(path, dpi=110, metadata={"Software": None})
    pyplot.close(figure)


def _rounds(row: Mapping[str, Any]) -> bool:
    """Whether inputs are rounded too."""
    return row["kind"] == INPUTS or bool(row.get("rounds_inputs"))


LEAST, MOST = 0.0005, 3.0
"""Shares above the dense perplexity at which the plot ends; what lies beyond stands on its edge."""


def _panel(ax: Any, title: str, rows: Sequence[Mapping[str, Any]], dense: float) -> None:
    """One scatter: bits against the share by which perplexity exceeds the dense model's."""

    def above(r: Mapping[str, Any]) -> float:
        return min(max(r["perplexity"] / dense - 1, LEAST), MOST)

    for kind, (colour, marker) in LOOKS.items():
        mine = [r for r in rows if r["kind"] == kind]
        if mine:
            ax.scatter([_bits(r) for r in mine], [above(r) for r in mine], c=colour, label=kind,
                       s=150 if marker == "*" else 40, marker=marker, alpha=0.75,
                       linewidths=0)  # fmt: skip
    uniform = sorted((r for r in rows if r["key"] in UNIFORM), key=_bits)
    if uniform:
        ax.plot([_bits(r) for r in uniform], [above(r) for r in uniform], color="0.6",
                linewidth=1, linestyle=":", label="uniform, gptq")  # fmt: skip
    best = front([r for r in rows if r["perplexity"] / dense - 1 < MOST])
    ax.step([_bits(r) for r in best], [above(r) for r in best], where="post", color="0.25",
            linewidth=1.2, label="Pareto front")  # fmt: skip
    told, last, crowd = [], (0.0, 0.0), 0
    for i, r in enumerate(best, 1):
        here = (math.log(_bits(r)), math.log(above(r)))
        # Numbers of points that lie close go to different sides.
        near = abs(here[0] - last[0]) < 0.06 and abs(here[1] - last[1]) < 0.3
        crowd = crowd + 1 if near else 0
        place = ((-6, -13), (11, -8), (-13, 2), (14, 3))[crowd % 4]
        ax.annotate(str(i), (_bits(r), above(r)), xytext=place, textcoords="offset points",
                    fontsize=9, fontweight="bold", ha="center")  # fmt: skip
        told.append(f"{i:2d}  {r['key']}: {r['perplexity']:.3f} at {_bits(r):.2f}")
        last = here
    ax.text(0.98, 0.985, "\n".join(told), transform=ax.transAxes, va="top", ha="right",
            fontsize=9, linespacing=1.35, multialignment="left")  # fmt: skip
    ax.set_title(f"{title}; dense: {dense:.3f}")
    ax.set_xlabel("stored bits per weight, everything counted")
    ax.set_ylabel("perplexity, and by how much it exceeds the dense model's")
    ax.grid(True, which="major", color="0.92")
    ax.set_axisbelow(True)
    ax.legend(loc="lower left", fontsize=9, frameon=False)
    _ticks(ax, rows, dense)


def _ticks(ax: Any, rows: Sequence[Mapping[str, Any]], dense: float) -> None:
    from matplotlib.ticker import FixedLocator, FuncFormatter, NullLocator

    low, high = (f(_bits(r) for r in rows) for f in (min, max))
    ax.set(xscale="log", yscale="log", xlim=(low * 0.93, high * 1.1))
    ax.set_ylim(LEAST * 0.8, MOST * 1.2)
    bits = [b for b in (1, 1.5, 2, 2.5, 3, 3.5, 4, 5, 6, 8) if low * 0.93 <= b <= high * 1.1]
    shares = [LEAST, 0.001, 0.002, 0.005, 0.01, 0.02, 0.05, 0.1, 0.2, 0.5, 1, MOST]

    def shown(share: float, _: object) -> str:
        edge = {LEAST: "\u2264 ", MOST: "\u2265 "}.get(share, "")
        return f"{edge}{dense * (1 + share):.2f}  (+{100 * share:g} %)"

    for axis, marks, text in (
        (ax.xaxis, bits, lambda v, _: f"{v:g}"),
        (ax.yaxis, shares, shown),
    ):
        axis.set_major_locator(FixedLocator(marks))
        axis.set_major_formatter(FuncFormatter(text))
        axis.set_minor_locator(NullLocator())
