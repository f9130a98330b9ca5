"""The report of a compile as data, and its tables: what each weight became and at what error.

Everything here follows from the plan, the records of the solves and the tensors, so two runs of one
recipe on one model give the same report; times are kept apart.
"""

from __future__ import annotations

from math import prod
from typing import TYPE_CHECKING, Any

from ..ir.graph import Program
from ..ir.packing import unpack
from .text import Table, number, size

if TYPE_CHECKING:
    from ..pipeline.compile import Compiled

FORMAT = 1


def report(done: Compiled) -> dict[str, Any]:
    """Sites with error, bits, bytes, tokens and fallbacks; folds; refusals; totals.

    ``loss`` is tr(D H Dᵀ) / tr(W H Wᵀ) of the last solve of the weight, D the change and H = XᵀX of
    the calibration tokens; ``ends`` the share of its codes on the two ends of the grid.
    """
    solved: dict[str, dict[str, Any]] = {}
    for record in done.records:
        solved[record["site"]] = {k: v for k, v in record.items() if k != "seconds"}
    ends = code_ends(done.program)
    params = {d.site.id: d.site.param for s in done.plan.stages for d in s.decisions.values()}
    stored = done.program.stored_bytes()
    sites = []
    for row in done.plan.rows():
        of = solved.get(row["site"], {})
        keep = (
            "loss", "damp", "tokens", "zeros", "recovered", "outliers", "rows_rtn", "fallbacks",
            "round", "rank", "without_rank", "experts",
        )  # fmt: skip
        weights = prod(row["shape"])
        after = stored[params[row["site"]]]
        sites.append(
            row
            | {k: of[k] for k in keep if k in of}
            | {"param": params[row["site"]], "bytes_after": after, "bits": 8 * after / weights}
            | {"ends": ends.get(params[row["site"]]), "bytes_are": "exact"}
        )
    return {
        "format_version": FORMAT,
        "passes": done.plan.recipe.text(),
        "sites": sites,
        "structure": done.structure,
        "folds": done.folds,
        "fallbacks": done.fallbacks,
        "refusals": [r.to_json() for r in done.plan.refusals],
        "totals": _totals(done, sites),
    }


def times(done: Compiled) -> dict[str, Any]:
    """Seconds of each solve and their sum; they differ from run to run."""
    rows = [{"site": r["site"], "round": r["round"], "seconds": r["seconds"]} for r in done.records]
    return {"solves": rows, "solving_seconds": sum(r["seconds"] for r in rows)}


def code_ends(program: Program) -> dict[str, float]:
    """For each weight with codes, the share of them that is 0 or 2^bits - 1."""
    out: dict[str, float] = {}
    for node in program.calls("llmc.dequantize"):
        source = program.param_of(node.args[0])
        if source is None:
            continue
        bits, columns = node.kwargs["bits"], node.kwargs["columns"]
        assert isinstance(bits, int)
        assert isinstance(columns, int)
        q = unpack(program.weights.load(source.name), bits, columns)
        share = ((q == 0) | (q == (1 << bits) - 1)).double().mean()
        out[source.name.removesuffix(".codes")] = float(share)
    return out


def _totals(done: Compiled, sites: list[dict[str, Any]]) -> dict[str, Any]:
    before, after = done.plan.captured.weight_bytes(), done.program.weight_bytes()
    weights = sum(prod(s["shape"]) for s in sites)
    losses = [s["loss"] for s in sites if s.get("loss") is not None]
    return {
        "bytes_before": before,
        "bytes_after": after,
        "sites": len(sites),
        "folds": len(done.folds),
        "fallbacks": len(done.fallbacks),
        "refusals": len(done.plan.refusals),
        "bits_per_weight": 8 * sum(s["bytes_after"] for s in sites) / weights if weights else None,
        "recovered": _recovered(sites),
        "mean_loss": sum(losses) / len(losses) if losses else None,
        "worst_loss": max(losses) if losses else None,
        "worst_site": max(sites, key=lambda s: s.get("loss") or 0)["site"] if losses else None,
    }


def _recovered(sites: list[dict[str, Any]]) -> float | None:
    """Share of the weights that came back beside an N:M mask, where any was to."""
    found = [(s["recovered"], prod(s["shape"])) for s in sites if "recovered" in s]
    return sum(r * n for r, n in found) / sum(n for _, n in found) if found else None


def result_table(told: dict[str, Any], full: bool = False) -> Table:
    """What became of the weights: one row each when ``full``, else one per role and scheme."""
    right = ("sites", "loss", "worst", "zeros", "ends", "bits", "bytes", "tokens", "damp")
    head: tuple[str, ...]
    if full:
        head = ("site", "role", "scheme", "loss", "damp", "tokens", "zeros", "ends", "bits",
                "bytes", "fallback")  # fmt: skip
        table = Table("Weights", head, right=right)
        for s in told["sites"]:
            table.rows.append((
                s["site"], s["role"], s["scheme"], _loss(s.get("loss")),
                number(s.get("damp"), 2), number(s.get("tokens")), _share(s.get("zeros")),
                _share(s["ends"]), f"{s['bits']:.3f}", size(s["bytes_after"]),
                "; ".join(s.get("fallbacks", ())),
            ))  # fmt: skip
        return table
    head = ("role", "scheme", "sites", "loss", "worst", "zeros", "ends", "bits", "bytes")
    table = Table("Weights (loss: relative squared error of the layer's output)", head, right=right)
    groups: dict[tuple[str, str], list[dict[str, Any]]] = {}
    for s in told["sites"]:
        groups.setdefault((s["role"], s["scheme"]), []).append(s)
    for (role, scheme), rows in groups.items():
        losses = [r["loss"] for r in rows if r.get("loss") is not None]
        weights = sum(prod(r["shape"]) for r in rows)
        stored = sum(r["bytes_after"] for r in rows)
        table.rows.append((
            role, scheme, str(len(rows)),
            _loss(sum(losses) / len(losses) if losses else None),
            _loss(max(losses, default=None)), _mean(rows, "zeros"), _mean(rows, "ends"),
            f"{8 * stored / weights:.3f}", size(stored),
        ))  # fmt: skip
    return table


def _loss(value: float | None) -> str:
    return "-" if value is None else f"{value:.2e}"


def _share(value: float | None) -> str:
    return "-" if value is None else f"{value:.1%}"


def _mean(rows: list[dict[str, Any]], key: str) -> str:
    found = [r[key] for r in rows if r.get(key) is not None]
    return _share(sum(found) / len(found) if found else None)


def folds_table(folds: list[dict[str, Any]]) -> Table:
    """Migrated scales: where, how many moved, and their range."""
    table = Table("Migrated scales", ("site", "pass", "kind", "scales", "moved", "smallest",
                  "largest"), right=("scales", "moved", "smallest", "largest"))  # fmt: skip
    for f in folds:
        table.rows.append((
            f["site"], f["pass"], f["kind"], str(f["scales"]), str(f["moved"]),
            number(f["smallest"], 3), number(f["largest"], 3),
        ))  # fmt: skip
    return table


def summary(told: dict[str, Any]) -> list[str]:
    """The figures of a whole compile, one line each."""
    t = told["totals"]
    before, after = t["bytes_before"], t["bytes_after"]
    lines = [f"weights {size(before)} -> {size(after)} ({after / before:.1%})"]
    if t["bits_per_weight"] is not None:
        lines[0] += f", {t['bits_per_weight']:.3f} bits per compressed weight"
    if t["recovered"] is not None:
        lines.append(f"{t['recovered']:.2%} of the weights came back beside their mask")
    if t["worst_site"] is not None:
        lines.append(
            f"loss {t['mean_loss']:.2e} on average, at most {t['worst_loss']:.2e} "
            f"at {t['worst_site']}"
        )
    without = [s["without_rank"] for s in told["sites"] if "without_rank" in s]
    if without:
        lines.append(f"low rank lowered it from {sum(without) / len(without):.2e}")
    if t["fallbacks"]:
        lines.append(f"{t['fallbacks']} of {t['sites']} solves fell back; -v lists them")
    return lines
