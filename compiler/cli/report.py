"""``llmc report``: a result as one HTML file that opens from disk."""

from __future__ import annotations

import os
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import click

from ..ir.errors import ModelError, UsageError
from .look import open_artefact
from .output import Out, examples, output_options
from .progress import waiting

if TYPE_CHECKING:
    from ..report.compare import Measured
    from ..report.html import Subject
    from ..runtime.artefact import Loaded

TARGETS = ("triton", "cpu")


@click.command(epilog=examples(
    "llmc report out",
    "llmc report out --eval out.eval.json -o out.html --force",
    "llmc report out w4 w8 --eval out.json --eval w4.json --eval w8.json",
))  # fmt: skip
@click.argument("folder", metavar="ARTEFACT")
@click.argument("others", metavar="[OTHER]...", nargs=-1)
@click.option(
    "-o",
    "--out",
    "path",
    default=None,
    type=click.Path(path_type=Path),
    help="The file to write.  [default: the artefact's name with .html, beside it]",
)
@click.option(
    "--eval",
    "evaluations",
    multiple=True,
    type=click.Path(path_type=Path),
    metavar="FILE",
    help="What llmc eval --json wrote of a result; may be repeated.",
)
@click.option(
    "--target",
    type=click.Choice(TARGETS),
    default="triton",
    show_default=True,
    help="Whose kernels are shown.",
)
@click.option("--force", is_flag=True, help="Replace a file that is there.")
@output_options
def report_command(
    folder: str, others: tuple[str, ...], path: Path | None, evaluations: tuple[Path, ...],
    target: str, force: bool, out: Out,
) -> None:  # fmt: skip
    """Write everything known of ARTEFACT into one HTML file: no script, no server, no network.

    OTHERs and the results of every --eval are compared with it, perplexity by bits per weight.
    Reads headers and JSON, never a tensor.
    """
    from ..report.compare import one_protocol, read_evaluation
    from ..report.text import size

    given = Path(folder).expanduser().resolve()
    goal = given.with_name(f"{given.name}.html") if path is None else path.expanduser()
    _check_goal(goal, force)
    found = [read_evaluation(p.expanduser()) for p in evaluations]
    one_protocol(found)
    with waiting(f"reading {folder}", out):
        text = page_of(folder, others, found, target)
    data = text.encode("utf-8", "replace")
    _write(goal, data)
    out.text(f"wrote {goal} ({size(len(data))})")
    out.data("report", {"source": folder, "out": str(goal), "bytes": len(data)})


def page_of(
    folder: str | Path, others: Sequence[str] = (), evaluations: Sequence[dict[str, Any]] = (),
    target: str = "triton",
) -> str:  # fmt: skip
    """The report of an artefact as HTML.

    Args:
        others: artefacts to compare with. evaluations: of any of them, on the same windows.
    Raises:
        ModelError: one of them is no artefact, or an evaluation is not of what is there.
    """
    from ..report.compare import measured_on
    from ..report.html import page

    found = [_read(str(f), evaluations) for f in (folder, *others)]
    subject = _subject(str(folder), *found[0][:2], target)
    return page(subject, _compared(found, evaluations), measured_on(evaluations))


def _check_goal(goal: Path, force: bool) -> None:
    """Raises UsageError where the file must not or cannot be written."""
    from ..runtime.artefact import is_artefact

    inside = next((p for p in goal.absolute().parents if is_artefact(p)), None)
    if inside is not None:
        raise UsageError(
            f"-o: expected a place outside artefacts, found {goal} in {inside}",
            hint="an artefact with a file that it does not list is refused",
        )
    if goal.is_dir():
        raise UsageError(f"-o: expected a file, found the folder {goal}")
    if goal.exists() and not force:
        raise UsageError(f"-o: expected no file at {goal}, found one", hint="--force replaces it")
    if not goal.absolute().parent.is_dir():
        raise UsageError(f"-o: expected a folder for {goal}, found none")


def _write(goal: Path, data: bytes) -> None:
    """Write whole or not at all."""
    beside = goal.with_name(f".{goal.name}.{os.getpid()}")
    try:
        try:
            beside.write_bytes(data)
            beside.replace(goal)
        finally:
            beside.unlink(missing_ok=True)
    except (FileNotFoundError, IsADirectoryError, NotADirectoryError, PermissionError) as e:
        raise UsageError(f"-o: expected a file that can be written, found {e}") from None


def _read(
    folder: str, evaluations: Sequence[dict[str, Any]]
) -> tuple[Loaded, dict[str, Any] | None, Measured]:
    """An artefact, its evaluation where one is given, and its place in a comparison."""
    from ..report.compare import Measured
    from ..runtime.sizes import sizes

    artefact = _open(folder)
    total = sizes(artefact.program)
    mine = next((e for e in evaluations if _same_place(e["source"], folder)), None)
    if mine is not None and mine["size"]["total"] != total.total:
        raise ModelError(
            f"expected an evaluation of the {total.total} bytes at {folder}, found one of "
            f"{mine['size']['total']}", hint="llmc eval again: the artefact was replaced since",
        )  # fmt: skip
    record = artefact.report.get("record") if isinstance(artefact.report, dict) else None
    passes = record.get("passes", "") if isinstance(record, dict) else ""
    perplexity = None if mine is None else mine["quality"]["perplexity"]
    place = Measured(folder, str(passes), total.total, total.bits_per_weight, perplexity)
    return artefact, mine, place


def _open(folder: str) -> Loaded:
    """An artefact, or a quantised checkpoint told like one."""
    from ..runtime.artefact import is_artefact

    path = Path(folder).expanduser()
    if is_artefact(path) or not (path / "config.json").is_file():
        return open_artefact(folder)
    from ..runtime.imported import imported
    from .look import open_headers

    found = imported(open_headers(folder)[0], path)
    return open_artefact(folder) if found is None else found


def _same_place(a: str, b: str) -> bool:
    return a == b or Path(a).expanduser().resolve() == Path(b).expanduser().resolve()


def _compared(
    found: list[tuple[Loaded, dict[str, Any] | None, Measured]],
    evaluations: Sequence[dict[str, Any]],
) -> list[Measured]:
    """The artefacts, then what evaluations speak of besides: other results and their baseline."""
    from dataclasses import replace

    from ..report.compare import of_evaluation

    out = [replace(place, chosen=i == 0) for i, (_, _, place) in enumerate(found)]
    more = [e for e in evaluations if not any(e is mine for _, mine, _ in found)]
    more += [e["baseline"] for e in evaluations if e.get("baseline") is not None]
    for evaluation in more:
        if not any(_same_place(evaluation["source"], m.name) for m in out):
            out.append(of_evaluation(evaluation))
    return out


def _subject(folder: str, artefact: Loaded, quality: dict[str, Any] | None, target: str) -> Subject:
    """All that the page says of the first artefact."""
    from ..report.html import Subject
    from ..runtime.sizes import sizes
    from .look import caches_text, exits_text, graph_of
    from .lowered import lowered

    graphs = [(n.partition("-")[2], graph_of(artefact, n)) for n in artefact.graphs]
    states = [
        (exits_text(p) if p.exits is not None else "", caches_text(p) if p.caches else "")
        for _, p in graphs
    ]
    name = Path(folder).expanduser().resolve().name
    return Subject(
        name, artefact, graphs, sizes(artefact.program), states, quality,
        lowered(artefact.program, target),
    )  # fmt: skip
