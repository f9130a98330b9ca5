"""The table of methods on the demo model: what its layers lose, perplexity, bits and seconds.

Weights are judged on whole windows, caches token by token, so that they are really used, on fewer.
Each row is held against the dense model and against the uniform grid of as many bits by a paired
bootstrap over the same windows. Nothing is tuned on that text.
"""

from __future__ import annotations

import math
import statistics
import time
from collections import Counter
from collections.abc import Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from method_report import DENSE, UNIFORM
from method_rows import CACHES, MIXED, Row

from llmc.compiler import api
from llmc.compiler.ir.errors import LlmcError
from llmc.compiler.ir.graph import Program
from llmc.compiler.model import Model
from llmc.compiler.pipeline.data import Stream, Tokenizer, calibration, read_stream
from llmc.compiler.runtime.evaluate import Evaluation, compare, evaluate
from llmc.compiler.runtime.executor import Runner
from llmc.compiler.runtime.stepwise import Stepwise

DIGITS = 6


@dataclass(frozen=True)
class Settings:
    """What decides a row's numbers beside its recipe."""

    model: Path
    data: Path
    calibration: Path
    samples: int
    length: int
    window: int
    windows: int
    cache_windows: int


class Bench:
    """The demo model, its held-out text and what the dense model makes of it."""

    def __init__(self, settings: Settings) -> None:
        self.settings = settings
        self.tokenizer = Tokenizer(settings.model)
        self.stream: Stream = read_stream(str(settings.data), self.tokenizer)
        self.program: Program = api.capture(settings.model)
        s = settings
        self.tokens = calibration(str(s.calibration), self.tokenizer, s.samples, s.length, 0).tokens

    @property
    def head(self) -> dict[str, Any]:
        """What rows must share to stand in one table."""
        s = self.settings
        return {
            "model": s.model.name, "data": s.data.name, "sha256": self.stream.sha256,
            "calibration": s.calibration.name, "samples": s.samples, "length": s.length,
            "window": s.window, "windows": s.windows, "cache_windows": s.cache_windows,
            "protocol": "one stream, windows do not overlap, tail dropped, mean over windows",
        }  # fmt: skip

    def dense(self) -> dict[str, Any]:
        """The first row: the model as it is."""
        stored = next(iter(self.program.params.values())).dtype.itemsize * 8
        found = self._plain(Runner(self.program, resident="dense"))
        return {
            "kind": DENSE, "passes": "", "key": DENSE, "bits_per_weight": float(stored),
            "bytes": self.program.weight_bytes(),
        } | _judged(found)  # fmt: skip

    def measure(self, row: Row) -> dict[str, Any]:
        """One row, or why there is none."""
        about = {"kind": row.kind, "passes": row.passes, "options": row.options, "key": row.key}
        began = time.process_time()
        try:
            small = api.compile(
                self.program, row.passes or None, calibration=self.tokens,
                tokenizer=self.tokenizer, **row.options,
            )  # fmt: skip
            seconds = time.process_time() - began
            judged = self._cached(small) if row.kind == CACHES else self._whole(small)
        except LlmcError as e:
            return {**about, "refused": str(e)}
        losses = [r["loss"] for r in small.records]
        return about | judged | {
            "compile_seconds": round(seconds, 1),
            "bits_per_weight": small.report["totals"]["bits_per_weight"],
            "code_bits": _code_bits(small), "rounds_inputs": _rounds(small),
            "bytes": small.program.weight_bytes(),
            "loss_sum": math.fsum(losses),
            "loss_geomean": statistics.geometric_mean(losses) if losses and min(losses) else None,
            "fallbacks": len(small.solved.fallbacks) if small.solved else 0,
        }  # fmt: skip

    def _plain(self, runner: Runner, limit: int | None = None) -> Evaluation:
        s = self.settings
        return evaluate(runner, self.stream, s.window, batch=8, limit=limit or s.windows)

    def _whole(self, small: Model) -> dict[str, Any]:
        return _judged(self._plain(Runner(small.program, resident="dense")))

    def _cached(self, small: Model) -> dict[str, Any]:
        speaker = Stepwise(small.generator, small.runner)
        s = self.settings
        found = evaluate(speaker, self.stream, s.window, batch=8, limit=s.cache_windows)
        told = speaker.to_json(found)["cache"]
        return _judged(found) | {"cache_bits_per_number": told["bits_per_number"]}


def _judged(found: Evaluation) -> dict[str, Any]:
    nll = [round(x, DIGITS) for x in found.nll]
    return {"perplexity": found.perplexity, "windows": found.windows, "nll": nll}


def _rounds(small: Model) -> bool:
    """Whether what linears read is rounded too."""
    return any(True for _ in small.program.calls("llmc.round_input"))


def _code_bits(small: Model) -> int | None:
    """Bits of most weights' codes."""
    plan = small.plan
    assert plan is not None
    found = Counter(
        d.scheme.codes.bits
        for stage in plan.stages
        for d in stage.decisions.values()
        if d.scheme.codes is not None
    )
    return found.most_common(1)[0][0] if found else None


def compared(rows: list[Mapping[str, Any]], head: Mapping[str, Any]) -> list[dict[str, Any]]:
    """Each row with its bootstrap against the dense model and the uniform grid of its bits."""
    by_key = {r["key"]: r for r in rows if "nll" in r}
    out = []
    for r in rows:
        made = dict(r)
        if "nll" in r and r["key"] != DENSE:
            uniform = _uniform(r, by_key)
            against = {DENSE: DENSE} | ({"uniform": uniform} if uniform != r["key"] else {})
            made["against"] = {
                name: {"row": key} | _compared(r, by_key[key], head)
                for name, key in against.items()
                if key in by_key
            }
        out.append(made)
    return out


def _uniform(row: Mapping[str, Any], rows: Mapping[str, Mapping[str, Any]]) -> str:
    """The uniform grid of as many bits: of a code, or, where codes are mixed, as stored."""
    if row["kind"] != MIXED:
        return f"w{row.get('code_bits')}"
    stored = row["bits_per_weight"]
    near = [u for u in UNIFORM if u in rows and rows[u]["bits_per_weight"] >= 0.999 * stored]
    last = min(near, key=lambda u: rows[u]["bits_per_weight"], default="")
    return last if last and rows[last]["bits_per_weight"] < 1.02 * stored else ""


def _compared(
    mine: Mapping[str, Any], other: Mapping[str, Any], head: Mapping[str, Any]
) -> dict[str, Any]:
    """A bootstrap over the windows that both rows have seen."""
    windows = min(len(mine["nll"]), len(other["nll"]))
    blank = Evaluation(head["data"], head["sha256"], head["window"], windows, ())
    a, b = (replace(blank, nll=tuple(r["nll"][:windows])) for r in (mine, other))
    told = compare(a, b).to_json()
    return {k: told[k] for k in ("perplexity_ratio", "difference", "low", "high", "p", "windows")}
