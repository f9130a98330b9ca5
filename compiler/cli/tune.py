"""``llmc tune``: measure which kernel is fastest on this machine, and keep the answer."""

from __future__ import annotations

import time
from collections.abc import Iterator
from typing import TYPE_CHECKING, Any

import click

from ..ir.errors import UsageError
from .look import open_headers
from .output import Out, examples, output_options
from .progress import Progress

if TYPE_CHECKING:
    from ...codegen.problem import Problem
    from ...codegen.tuning.cache import Found, Machine
    from ...codegen.tuning.tuners import Trial, Tuner


@click.command(epilog=examples(
    "llmc tune",
    "llmc tune out --target cpu --tokens 1,16,512",
    "llmc tune --dry-run --json",
))  # fmt: skip
@click.argument("source", metavar="[ARTEFACT_OR_MODEL]", required=False)
@click.option("--target", type=click.Choice(["cpu", "triton"]), default=None,
              help="Whose kernels.  [default: triton with a CUDA device, else cpu]")  # fmt: skip
@click.option("--tokens", default=None, metavar="LIST",
              help="Numbers of tokens to measure, such as 1,16,512.")  # fmt: skip
@click.option("--dry-run", is_flag=True, help="Say what would be measured; measure nothing.")
@click.option("--trust-remote-code", is_flag=True,
              help="Run modelling code that lies in the model's folder.")  # fmt: skip
@output_options
def tune_command(
    source: str | None, target: str | None, tokens: str | None, dry_run: bool,
    trust_remote_code: bool, out: Out,
) -> None:  # fmt: skip
    """Measure this machine's kernels on a model's shapes, or on common ones.

    Results go to the user's cache, keyed by the processor or GPU and the versions of torch and
    llmc; lowering uses them from then on. Those of another machine or version are never used.
    """
    from ...codegen.tuning.cache import Table, read, write
    from ...codegen.tuning.tuners import check_available, tuner

    found = tuner(target or _default())
    if not dry_run:
        check_available(found)
    counts = _counts(tokens) or found.tokens
    problems = found.typical()
    if source is not None:
        problems = _problems(source, found.target, trust_remote_code)
    trials = found.trials(problems, counts)
    if not trials:
        raise UsageError(
            f"expected a compressed linear that {found.target} has a choice for, found none",
            where=source, hint="llmc kernels shows what is fused",
        )  # fmt: skip
    machine = found.machine()
    held = read(machine)
    result: dict[str, Any] = {
        "source": source, "target": found.target, "dry_run": dry_run,
        "machine": vars(machine), "path": str(held.path), "cache": held.reason or "used",
    }  # fmt: skip
    if dry_run:
        _plan(trials, found, machine, held, out)
        out.data("tune", result | {"trials": [_row(t) for t in trials]})
        return
    if held.table is None and held.path.exists():
        out.note(f"{held.path} is replaced: {held.reason}")
    began = time.perf_counter()
    table = held.table or Table(machine)
    made = [found.entry(t) for t in _listed(trials, found, out)]
    path = write(table.with_entries(made))
    rows = [
        _row(t) | {"best": e.best, "seconds": dict(e.seconds)}
        for t, e in zip(trials, made, strict=True)
    ]
    _tell(rows, out)
    out.note(f"{len(made)} choices in {time.perf_counter() - began:.0f} s, kept at {path}")
    out.data("tune", result | {"trials": rows})


def _default() -> str:
    import torch

    from ...codegen.tuning.tuners import TUNERS

    return "triton" if torch.cuda.is_available() and "triton" in TUNERS else "cpu"


def _counts(text: str | None) -> tuple[int, ...]:
    if text is None:
        return ()
    parts = [p.strip() for p in text.split(",")]
    if not all(p.isascii() and p.isdigit() and int(p) for p in parts):
        raise UsageError(f"--tokens: expected numbers such as 1,16,512, found {text!r}")
    return tuple(sorted({int(p) for p in parts}))


def _problems(source: str, target: str, trust_remote_code: bool) -> list[Problem]:
    """The distinct problems of a model's fused linears, from headers alone."""
    from ...codegen.problem import Problem
    from ...codegen.targets import BANDWIDTH
    from .kernels import lowering

    program, _ = open_headers(source, trust_remote_code)
    told = lowering(program, target, 1, "bf16", BANDWIDTH)
    found = [p for row in told["fused"] for p in row.get("timed", [row["problem"]])]
    return list(dict.fromkeys(Problem(**p) for p in found))


def _listed(trials: list[Trial], found: Tuner, out: Out) -> Iterator[Trial]:
    """The trials, each announced as it comes up."""
    with Progress(f"tuning {found.target}", out) as progress:
        progress.steps(len(trials))
        for i, trial in enumerate(trials):
            progress.at(i, f"{trial.key} M={trial.tokens}")
            yield trial


def _row(trial: Trial) -> dict[str, Any]:
    return {"key": trial.key, "tokens": trial.tokens, "candidates": list(trial.candidates)}


def _plan(trials: list[Trial], found: Tuner, machine: Machine, held: Found, out: Out) -> None:
    from ..report.text import Table, counted

    table = Table(f"To measure for {machine.target}", ("problem", "tokens", "candidates"),
                  right=("tokens",))  # fmt: skip
    mark = ", " if any(" " in c for t in trials for c in t.candidates) else " "
    table.rows = [(t.key, found.bucket(t.tokens), mark.join(t.candidates)) for t in trials]
    out.table(table)
    out.text(f"{counted(len(trials), 'choice')} on {machine.name}, torch {machine.torch}")
    used = "" if held.table is None else f"{len(held.table.entries)} choices in use"
    out.text(f"cache {held.path}: {held.reason or used}")
    why_not = found.unavailable()
    if why_not is not None:
        out.text(f"cannot be measured here: {why_not}")


def _tell(rows: list[dict[str, Any]], out: Out) -> None:
    from ..report.text import Table

    table = Table("Measured", ("problem", "tokens", "fastest", "ms", "others"),
                  right=("tokens", "ms"))  # fmt: skip
    for r in rows:
        best = r["seconds"][r["best"]]
        others = [f"{n} x{s / best:.2f}" for n, s in r["seconds"].items() if n != r["best"]]
        table.rows.append((r["key"], str(r["tokens"]), r["best"], f"{1e3 * best:.3g}",
                           " ".join(others)))  # fmt: skip
    out.table(table)
