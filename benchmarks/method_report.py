"""The table of methods as Markdown, and its plot: perplexity by bits per weight."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from method_rows import BESIDE, CACHES, INPUTS, KINDS, MIXED, MOVED, WEIGHTS

DENSE = "dense"
# Okabe and Ito's colours, which stay apart for all eyes; a marker each, for print.
LOOKS = {
    WEIGHTS: ("#0072B2", "o"), MOVED: ("#E69F00", "^"), BESIDE: ("#009E73", "D"),
    MIXED: ("#D55E00", "*"), INPUTS: ("#CC79A7", "s"),
}  # fmt: skip

NOTES: dict[str, str] = {}
"""By recipe: why a method does worse here than its paper says."""


def markdown(data: Mapping[str, Any]) -> str:
    """All parts that are there, under one heading each."""
    out = ["# Methods", "", "Made by `benchmarks/methods.py`; numbers are in methods.json.", ""]
    if "model" in data:
        out += _model(data["model"])
    if "layer" in data:
        out += _layer(data["layer"])
    if "cost" in data:
        out += _cost(data["cost"])
    told = [f"- `{key}`: {text}" for key, text in NOTES.items()]
    if told:
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
        " grid `w8`, `w4`, `w3` or `w2` whose codes have as many bits. Loss is that of the layers, "
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
    figure, axes = pyplot.subplots(1, 2, figsize=(15, 7.5), width_ratios=(3, 2), sharey=False)
    for ax, (title, mine) in zip(axes, panels.items(), strict=True):
        if mine:
            _panel(ax, title, mine, dense)
    figure.tight_layout()
    path.parent.mkdir(parents=True, exist_ok=True)
    # No date and no version inside, so that equal numbers give equal files.
    figure.savefig(path, dpi=120, metadata={"Software": None})
    pyplot.close(figure)


def _rounds(row: Mapping[str, Any]) -> bool:
    """Whether inputs are rounded too."""
    return row["kind"] == INPUTS or bool(row.get("rounds_inputs"))


def _panel(ax: Any, title: str, rows: Sequence[Mapping[str, Any]], dense: float) -> None:
    best = front(rows)
    top = dense * 4
    for kind, (colour, marker) in LOOKS.items():
        mine = [r for r in rows if r["kind"] == kind]
        inside = [r for r in mine if r["perplexity"] <= top]
        size = 110 if marker == "*" else 36
        if mine:
            ax.scatter([_bits(r) for r in inside], [r["perplexity"] for r in inside], s=size,
                       c=colour, marker=marker, alpha=0.75, label=kind, linewidths=0)  # fmt: skip
        for r in mine:
            if r["perplexity"] > top:
                ax.scatter([_bits(r)], [top * 0.985], s=30, c=colour, marker=6, alpha=0.75)
    ax.step([_bits(r) for r in best], [min(r["perplexity"], top) for r in best], where="post",
            color="0.35", linewidth=1, label="Pareto front")  # fmt: skip
    ax.axhline(dense, color="0.5", linestyle="--", linewidth=1, label="dense")
    ax.set_yscale("log")
    ax.set_xscale("log", base=2)
    ax.set_ylim(dense * 0.985, top)
    _ticks(ax, rows, dense, top)
    for i, r in enumerate(r for r in best if r["perplexity"] <= top):
        below = 10 if i % 2 else 22
        ax.annotate(
            r["key"], (_bits(r), r["perplexity"]), xytext=(6, below), textcoords="offset points",
            fontsize=7, rotation=28, color="0.15",
            arrowprops={"arrowstyle": "-", "color": "0.6", "linewidth": 0.5},
        )  # fmt: skip
    ax.set_title(title)
    ax.set_xlabel("stored bits per weight, everything counted")
    ax.set_ylabel("perplexity")
    ax.grid(True, which="major", color="0.92")
    ax.legend(loc="upper right", fontsize=8, frameon=False)


def _ticks(ax: Any, rows: Sequence[Mapping[str, Any]], dense: float, top: float) -> None:
    from matplotlib.ticker import FixedLocator, FuncFormatter, NullLocator

    low, high = (f(_bits(r) for r in rows) for f in (min, max))
    ax.set_xlim(low * 0.93, high * 1.12)
    bits = [b for b in (1, 1.5, 2, 2.5, 3, 3.5, 4, 5, 6, 8) if low * 0.9 <= b <= high * 1.1]
    values = [dense * f for f in (1, 1.02, 1.05, 1.1, 1.2, 1.5, 2, 3, 4) if dense * f <= top]
    for axis, marks, text in (
        (ax.xaxis, bits, lambda v, _: f"{v:g}"),
        (ax.yaxis, values, lambda v, _: f"{v:.2f}"),
    ):
        axis.set_major_locator(FixedLocator(marks))
        axis.set_major_formatter(FuncFormatter(text))
        axis.set_minor_locator(NullLocator())
