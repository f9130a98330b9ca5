"""``llmc compile`` and ``llmc plan``."""

from __future__ import annotations

import os
import sys
from pathlib import Path
from typing import TYPE_CHECKING, Any, TypeVar

import click

from ..ir.errors import ResourceError, UsageError
from .mix import choose, mixing_options, target_of
from .output import Out, examples, output_options, size
from .progress import Solving, waiting

if TYPE_CHECKING:
    from ..api import Settings
    from ..model import Model
    from ..pipeline.plan import Plan
    from ..pipeline.trace import Trace

F = TypeVar("F")
# Graphs, manifest and report beside the weights.
_OVERHEAD = 1 << 20

_SHARED = [
    click.argument("model"),
    click.option("-p", "--passes", "passes", multiple=True, metavar="LIST",
                 help="Passes with knobs, e.g. smooth,w4:group=64,prune24. Order in one LIST is "
                 "free; a repeated --passes is a barrier whose order is kept. See: llmc passes."),
    click.option("--recipe", type=click.Path(), metavar="FILE",
                 help="A YAML recipe instead of --passes, or a shipped one: default, careful."),
    click.option("--samples", type=int, default=128, show_default=True,
                 help="Calibration windows."),
    click.option("--length", type=int, default=None,
                 help="Tokens per window.  [default: 2048, or the model's context]"),
    click.option("--seed", type=int, default=0, show_default=True, help="Of the windows' offsets."),
    click.option("--propagate", type=click.Choice(["compressed", "dense"]), default="compressed",
                 show_default=True, help="Outputs that the next block is calibrated on."),
    click.option("--true-sequential", is_flag=True,
                 help="Solve each block in waves that see their compressed predecessors."),
    click.option("--batch", type=int, default=8, show_default=True, help="Windows run at once."),
    click.option("--budget-ram", type=size, default="4GiB", show_default=True,
                 help="Memory for the Hessians of one wave."),
    click.option("--trust-remote-code", is_flag=True,
                 help="Run modelling code that lies in the model's folder."),
    click.option("--calibration", type=click.Path(), default=None,
                 help="Text (.txt, .jsonl) or tokens (.npy, .safetensors).  "
                 "[default: the installed Python standard library]"),
    click.option("--trace", type=click.Path(path_type=Path), default=None, metavar="DIR",
                 help="Write every graph before and after each pass, every event and the match "
                 "statistics to DIR.  [default: what LLMC_TRACE names]"),
]  # fmt: skip


def _shared(command: F) -> F:
    made: Any = mixing_options(command)
    for option in reversed(_SHARED):
        made = option(made)
    return made


def _settings(given: dict[str, Any]) -> Settings:
    from ..api import Settings

    return Settings(
        given["samples"], given["length"], given["seed"], given["propagate"],
        given["true_sequential"], given["batch"], given["budget_ram"],
    )  # fmt: skip


def _plan(model: str, given: dict[str, Any], out: Out) -> tuple[Plan, Settings]:
    """Recipe first, then the model: a wrong flag is refused before anything is captured."""
    from .. import api
    from ..pipeline.plan import make_plan

    passes = list(given["passes"]) or None
    recipe = api.read_recipe(passes, given["recipe"])
    settings, target = _settings(given), target_of(given)
    with waiting(f"capturing {model}", out):
        program = api.capture(model, trust_remote_code=given["trust_remote_code"])
    unread = program.facts.get("unread") or []
    if unread:
        count = "1 tensor" if len(unread) == 1 else f"{len(unread)} tensors"
        out.note(f"{count} of the checkpoint without a place in the model, first {unread[0]!r}")
    settings = settings.for_program(program)
    mixture = None
    if target is not None:
        mixture = choose(
            program, recipe, target, model, given["calibration"], settings, given, out
        )  # fmt: skip
    planned = make_plan(program, recipe) if mixture is None else mixture.plan(program)
    return planned, settings


def _plan_json(planned: Plan, settings: Settings) -> dict[str, Any]:
    from ..api import needs_data

    assert settings.length is not None
    tokens = settings.samples * settings.length if needs_data(planned) else 0
    return planned.to_json(tokens, settings.length)


@click.command(epilog=examples(
    "llmc plan ./model --passes smooth,w4,prune24",
    "llmc plan ./model --passes prune24 --passes w4 -v",
    "llmc plan ./model --recipe recipe.yaml --json",
    "llmc plan ./model --passes w4 --bits 4.25 --write-recipe mixed.yaml",
))  # fmt: skip
@_shared
@output_options
def plan_command(model: str, out: Out, **given: Any) -> None:
    """Say what compiling MODEL would do: order, sites, refusals, bytes.

    Loads no weight, but with --bits, --size or --budget, which measure before they choose.
    """
    from ..pipeline.trace import tracing
    from ..report.mixing import mixing_lines
    from ..report.planned import plan_tables, totals

    with tracing(given.pop("trace")) as trace:
        planned, settings = _plan(model, given, out)
    _traced(trace, out)
    data = _plan_json(planned, settings)
    for table in plan_tables(data, out.verbose):
        out.table(table)
    for line in [*totals(data), *mixing_lines(planned.mixing)]:
        out.text(line)
    out.data("plan", {"model": model, "plan": data})


@click.command(epilog=examples(
    "llmc compile ./model --passes smooth,w4,prune24 -o out",
    "llmc compile ./model --passes w4:group=64,solver=rtn -o out",
    "llmc compile ./model --passes prune24 --passes w4 --calibration text.txt -o out --force",
    "llmc compile ./model --recipe recipe.yaml -o out --json",
    "llmc compile ./model --passes smooth,w4 --bits 4.0 -o out",
    "llmc compile ./model --passes w4 --budget ppl+2% --candidates w3,w4,nf4,dense -o out",
))  # fmt: skip
@_shared
@click.option("-o", "--out", "folder", required=True, type=click.Path(path_type=Path),
              help="The artefact folder to write.")  # fmt: skip
@click.option("--force", is_flag=True, help="Replace an existing artefact.")
@click.option("--strict", is_flag=True, help="A solve that fell back is an error (exit 4).")
@output_options
def compile_command(
    model: str, folder: Path, force: bool, strict: bool, out: Out,
    **given: Any,
) -> None:  # fmt: skip
    """Compress MODEL, a folder or a hub id, into an artefact.

    The plan is printed first; nothing is written before the end, and then whole or not at all.
    """
    check_target(folder, force)
    from .. import api
    from ..pipeline.trace import tracing
    from ..report.planned import plan_tables, totals

    with tracing(given.pop("trace")) as trace:
        planned, settings = _plan(model, given, out)
        data = _plan_json(planned, settings)
        check_disk(folder, data["predicted"]["bytes_after"])
        tokenizer = api.find_tokenizer(model, planned.source)
        windows = api.calibrate(planned, given["calibration"], tokenizer, settings)
        for table in plan_tables(data, out.verbose):
            out.table(table, err=True)
        for line in totals(data):
            out.note(line)
        if windows is not None:
            record = windows.record
            out.note(f"calibration data {record['data']} ({record['sha256'][:12]})")
        with Solving("solving", out) as progress:
            made = api.carry_out(
                planned, windows, settings, tokenizer=tokenizer, strict=strict, listener=progress
            )
    _traced(trace, out)
    with waiting(f"writing {folder}", out):
        made.save(folder, force=force, command=sys.argv[1:])
    _result(made, folder, data, out)


def _traced(trace: Trace | None, out: Out) -> None:
    if trace is not None:
        out.note(f"trace in {trace.folder}")


def check_target(folder: Path, force: bool) -> None:
    """Refuse an output that exists before any work is done.

    Raises:
        UsageError: it exists without ``force``, or is no folder or one that holds something else
            than an artefact, or its parent cannot be a folder.
    """
    if os.path.lexists(folder):
        if not folder.is_dir() or folder.is_symlink():
            raise UsageError(f"expected a folder to write, found a file or a link at {folder}")
        from ..runtime.artefact import check_replaceable

        check_replaceable(folder)
        if not force:
            raise UsageError(f"expected a new folder, found {folder}", hint="--force replaces it")
    for parent in folder.absolute().parents:
        if parent.exists():
            if not parent.is_dir():
                raise UsageError(f"expected a folder at {parent}, found a file")
            return


def check_disk(folder: Path, weights: int) -> None:
    """Refuse when the disk cannot hold the predicted artefact and 5 % more.

    Raises:
        ResourceError: naming the bytes needed and found.
    """
    import shutil

    place = next(p for p in folder.absolute().parents if p.exists())
    needed = weights + weights // 20 + _OVERHEAD
    free = shutil.disk_usage(place).free
    if free < needed:
        raise ResourceError(
            f"expected {needed} free bytes for {folder}, found {free}",
            hint="free some space or choose another folder",
        )


def _result(made: Model, folder: Path, plan: dict[str, Any], out: Out) -> None:
    from ..report.data import result_table, summary
    from ..report.mixing import mixing_lines
    from ..report.structure import record_tables, structure_table

    told = made.report
    out.table(structure_table(told["structure"]))
    for table in record_tables(told["structure"], out.verbose):
        out.table(table)
    out.table(result_table(told, out.verbose))
    for line in [*summary(told), *mixing_lines(told["record"].get("mixed"))]:
        out.text(line)
    out.text(f"wrote {folder}")
    out.data("compile", {"out": str(folder), "plan": plan, "report": told})
