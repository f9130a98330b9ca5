"""Records of an artefact as a report may use them: a file may hold anything."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from ..ir.errors import ModelError

_PASS = {"pass": str, "stage": int, "knobs": dict, "given": dict, "folds": dict, "sites": int}
_TOLD: dict[str, dict[str, type]] = {
    "sites": {"site": str, "role": str, "scheme": str, "shape": list, "bytes_after": int,
              "bits": float},
    "refusals": dict.fromkeys(("by", "node", "reason", "predicate", "path"), str),
    "structure": {"pass": str, "sites": int, "before": dict, "after": dict, "exact": bool},
    "folds": {"site": str, "pass": str, "kind": str, "scales": int, "moved": int,
              "smallest": float, "largest": float},
    "fallbacks": {"site": str},
}  # fmt: skip
MIXED = "report.json, mixed"
_MIXTURE = {"target": str, "options": list, "measures": list, "held_out": dict, "dense": dict,
            "by": str, "bits": float, "weights": int, "frontier": dict, "model_bytes": int,
            "model_share": float}  # fmt: skip
GROUP = {"group": str, "sites": list, "roles": list, "option": str, "bytes": int, "bits": float,
         "predicted": dict}  # fmt: skip
"""Fields of a group of a mixture."""
_TRY = {"by": str, "bytes": int, "bits": float, "perplexity": float, "rise": float, "fits": bool,
        "chosen": bool}  # fmt: skip
_LARGE = 1e100
_SIZES = {"blocks": int, "bytes": int, "parameters": int}


def is_number(value: Any) -> bool:
    """Whether it is a number that can be drawn: finite, and far from where floats end."""
    return isinstance(value, (int, float)) and not isinstance(value, bool) and abs(value) <= _LARGE


def texts(found: Any, where: str) -> list[str]:
    """A list of texts.

    Raises:
        ModelError: anything else.
    """
    if not isinstance(found, list) or not all(isinstance(t, str) for t in found):
        raise ModelError(f"expected a list of texts, found {found!r}"[:200], where=where)
    return found


def rows(found: Any, wanted: Mapping[str, type], where: str) -> list[dict[str, Any]]:
    """Objects with fields of those types; an int serves where a float is wanted.

    Raises:
        ModelError: naming the first field that is missing or of another type.
    """
    if not isinstance(found, list) or not all(isinstance(r, dict) for r in found):
        raise ModelError("expected a list of objects, found something else", where=where)
    for row in found:
        for key, kind in wanted.items():
            value = row.get(key)
            fits = is_number(value) if kind in (int, float) else isinstance(value, kind)
            if not fits or (kind is int and not isinstance(value, int)):
                raise ModelError(f"expected {kind.__name__} for {key}, found {value!r}",
                                 where=where)  # fmt: skip
    return found


def told_of(report: Any) -> dict[str, Any]:
    """report.json with its lists checked; those that it lacks are empty.

    Raises:
        ModelError: a record is not of the form that compiling writes.
    """
    found = report if isinstance(report, dict) else {}
    out = dict(found)
    for name, wanted in _TOLD.items():
        out[name] = rows(found.get(name, []), wanted, f"report.json, {name}")
    for row in out["sites"]:
        row.setdefault("ends", None)
        texts(row.get("fallbacks") or [], "report.json, sites")
        shape = row["shape"]
        if not all(isinstance(n, int) for n in shape) or len(shape) not in (2, 3):
            raise ModelError(f"expected two or three sizes, found {shape!r}", where="report.json")
        for key in ("loss", "ends", "zeros", "tokens", "damp"):
            if row.get(key) is not None and not is_number(row[key]):
                raise ModelError(f"expected a number for {key}, found {row[key]!r}",
                                 where="report.json, sites")  # fmt: skip
    for row in out["structure"]:
        rows([row["before"], row["after"]], _SIZES, "report.json, structure")
        rows(row.get("records", []), {}, "report.json, structure")
    return out


def applied_of(passes: Any, graphs: int) -> list[dict[str, Any]]:
    """The applied passes of a manifest, each with a graph before and after it.

    Raises:
        ModelError: they are of another form, or graphs are missing.
    """
    found = rows(passes, _PASS, "manifest.json, passes")
    if found and graphs != len(found) + 1:
        raise ModelError(
            f"expected a graph before and after each of {len(found)} passes, found {graphs}",
            where="manifest.json",
        )
    return found


def mixture_of(record: Any) -> dict[str, Any] | None:
    """How mixed precision chose, checked; None where it did not.

    Raises:
        ModelError: the record is not of the form that compiling writes.
    """
    if record is None:
        return None
    (checked,) = rows([record], _MIXTURE, MIXED)
    rows([checked["held_out"]], {"from": str, "windows": int}, MIXED)
    rows([checked["dense"]], {"perplexity": float}, MIXED)
    table = rows(record.get("table"), GROUP, MIXED)
    tries = rows(record.get("tries"), _TRY, MIXED)
    told = [v for row in table for v in row["predicted"].values()]
    told += [t.setdefault("predicted_rise", None) for t in tries]
    odd = next((v for v in told if v is not None and not is_number(v)), None)
    measures = texts(checked["measures"], MIXED)
    for row in table:
        texts(row["roles"], MIXED)
        if row["bits"] <= 0 or row["bytes"] <= 0:
            raise ModelError(f"expected bits and bytes above 0 of {row['group']}, found others",
                             where=MIXED)  # fmt: skip
    missing = any(m not in row["predicted"] for m in measures for row in table)
    if odd is not None or missing or not measures:
        raise ModelError(f"expected a predicted loss by each of {measures}, found {odd!r}",
                         where=MIXED)  # fmt: skip
    return checked
