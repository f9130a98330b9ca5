"""Results beside each other: perplexity by bits per weight, with the front of the best."""

from __future__ import annotations

import json
import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from markupsafe import Markup

from ..ir.errors import ModelError, UsageError
from .plots import Point, front, scatter
from .text import Table, number, size

# An evaluation is a few numbers per window; more than this is no evaluation.
_MOST_BYTES = 64 << 20


@dataclass(frozen=True)
class Measured:
    """A result as a comparison needs it; None where nothing was measured.

    Attributes:
        name: a folder, or what the evaluation calls it.
        passes: what was applied; "" where that is not known.
        bits: per linear weight. perplexity: on the data that all share.
        chosen: the subject of the report.
    """

    name: str
    passes: str = ""
    bytes: int | None = None
    bits: float | None = None
    perplexity: float | None = None
    chosen: bool = False


@dataclass(frozen=True)
class Comparison:
    """A plot, where at least two results were measured, and a table of all."""

    plot: Markup | None
    table: Table
    data: str


def read_evaluation(path: Path) -> dict[str, Any]:
    """What ``llmc eval --json`` wrote.

    Raises:
        UsageError: no such file.
        ModelError: not an evaluation, or its perplexity is no number.
    """
    try:
        if path.stat().st_size > _MOST_BYTES:
            raise ModelError(f"expected an evaluation, found {path.stat().st_size} bytes",
                             where=str(path))  # fmt: skip
        found = json.loads(path.read_bytes())
    except OSError as e:
        raise UsageError(
            f"--eval: expected a file that can be read, found {path} ({e.strerror})"
        ) from None
    except (ValueError, RecursionError):
        raise ModelError("expected the JSON of llmc eval --json", where=str(path)) from None
    if not isinstance(found, dict) or found.get("command") != "eval":
        raise ModelError("expected the JSON of llmc eval --json", where=str(path))
    _check(found, str(path))
    base = found.get("baseline")
    if base is not None:
        _check(base, f"{path}, baseline")
    return found


def _check(found: Any, where: str) -> None:
    """Raises ModelError unless the fields that a report reads are there."""
    for path, kind in (
        ("source", str), ("quality.data", str), ("quality.sha256", str), ("quality.window", int),
        ("quality.windows", int), ("quality.perplexity", (int, float)), ("size.total", int),
    ):  # fmt: skip
        value = found
        for key in path.split("."):
            value = value.get(key) if isinstance(value, dict) else None
        if not isinstance(value, kind) or isinstance(value, bool):
            raise ModelError(f"expected a value at {path}, found {value!r}", where=where)
    if not math.isfinite(found["quality"]["perplexity"]):
        raise ModelError("expected a finite perplexity, found none", where=where)
    bits = found["size"].get("bits_per_linear_weight")
    if bits is not None and (not isinstance(bits, (int, float)) or not math.isfinite(bits)):
        raise ModelError(f"expected bits per weight, found {bits!r}", where=where)


def one_protocol(evaluations: Sequence[Mapping[str, Any]]) -> None:
    """Perplexities are compared on the same windows of the same text only.

    Raises:
        UsageError: two of them are not.
    """
    for other in evaluations[1:]:
        for key in ("sha256", "window", "windows"):
            mine, theirs = (e["quality"][key] for e in (evaluations[0], other))
            if mine != theirs:
                raise UsageError(
                    f"--eval: expected evaluations on the same windows, found {key} {mine} for "
                    f"{evaluations[0]['source']} and {theirs} for {other['source']}"
                )


def measured_on(evaluations: Sequence[Mapping[str, Any]]) -> str:
    """The text and the windows that all evaluations share; "" without any."""
    if not evaluations:
        return ""
    q = evaluations[0]["quality"]
    return f"Measured on {q['data']} ({q['sha256'][:12]}), {q['windows']} windows of {q['window']}."


def quality_facts(found: Mapping[str, Any]) -> list[tuple[str, str]]:
    """What an evaluation says besides perplexity: divergence, speed, exits, cache, memory."""

    def value(*keys: str) -> float | None:
        at: Any = found
        for key in keys:
            at = at.get(key) if isinstance(at, dict) else None
        known = isinstance(at, (int, float)) and not isinstance(at, bool) and math.isfinite(at)
        return float(at) if known else None

    told = (
        ("KL to the baseline", value("quality", "kl_to_baseline"), "{:.4g} nats per token"),
        ("top-1 agreement", value("quality", "top1_agreement"), "{:.2%} with the baseline"),
        ("decode", value("speed", "decode_tokens_per_second"), "{:.4g} tokens/s"),
        ("prefill", value("speed", "prefill_tokens_per_second"), "{:.4g} tokens/s"),
        ("layers per token", value("exits", "blocks_per_token"), "{:.2f}"),
        ("KV cache", value("cache", "bytes_per_token"), "{:,.0f} bytes per token"),
        ("peak memory", value("peak_rss_bytes"), "{}"),
    )
    return [
        (name, size(at) if form == "{}" else form.format(at)) for name, at, form in told
        if at is not None
    ]  # fmt: skip


def of_evaluation(found: Mapping[str, Any]) -> Measured:
    """A result that is known by its evaluation alone."""
    stored, quality = found["size"], found["quality"]
    bits = stored.get("bits_per_linear_weight")
    return Measured(found["source"], "", stored["total"], bits, quality["perplexity"])


def comparison(results: Sequence[Measured], data: str = "") -> Comparison | None:
    """The results beside each other; None for one alone that was not measured."""
    if len(results) < 2:
        return None
    known = [(r, Point(r.bits, r.perplexity, r.name, r.chosen)) for r in results
             if r.bits is not None and r.perplexity is not None]  # fmt: skip
    best = set(front(p for _, p in known))
    on = {id(r) for r, p in known if p in best}
    table = Table("", ("result", "passes", "size", "bits per weight", "perplexity", "front"),
                  right=("size", "bits per weight", "perplexity"))  # fmt: skip
    for r in sorted(results, key=lambda r: (r.bits is None, r.bits or 0.0, r.name)):
        table.rows.append((
            r.name, r.passes, size(r.bytes), number(r.bits), number(r.perplexity, 5),
            "best of its size" if id(r) in on else "",
        ))  # fmt: skip
    plot = None
    if len(known) > 1:
        plot = scatter(
            [p for _, p in known], ("bits per weight", "perplexity"),
            "perplexity by bits per weight; the line is the front of the best",
            (lambda v: f"{v:g}", lambda v: f"{v:.4g}"), log=True,
        )  # fmt: skip
    return Comparison(plot, table, data)
