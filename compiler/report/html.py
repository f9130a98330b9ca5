"""The report of a result as one HTML file: no script, no server, nothing fetched.

Data comes from the artefact's JSON and headers; templates escape all of it. Every graph is told
once per distinct block, so that the file grows with the weights and not with the nodes.
"""

from __future__ import annotations

import functools
import shlex
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import jinja2

from ..ir.graph import Program
from .blocks import View, views
from .checked import applied_of, told_of
from .compare import Measured, comparison, quality_facts
from .data import folds_table, result_table
from .difference import Hunk, changes, hunks, totals
from .flow import MOST, flow, picture
from .layers import plots, weights_table, with_seconds, worst_table
from .mixed import mixed, with_sensitivity
from .planned import refusals_table
from .structure import record_tables, structure_table
from .text import Table, counted, number, seconds, size

if TYPE_CHECKING:
    from ..runtime.artefact import Loaded
    from ..runtime.sizes import Sizes


@dataclass(frozen=True)
class Subject:
    """The artefact that a report is about.

    Attributes:
        name: as the reader knows it.
        graphs: (pass name, program) as captured and after each pass, without tensors.
        size: of the final program.
        states: (exits, caches) of each graph in words; "" where there are none.
        quality: what ``llmc eval --json`` said of it.
        kernels: what lowering it gives; see ``llmc kernels``.
    """

    name: str
    artefact: Loaded
    graphs: Sequence[tuple[str, Program]]
    size: Sizes
    states: Sequence[tuple[str, str]] = ()
    quality: Mapping[str, Any] | None = None
    kernels: Mapping[str, Any] | None = None


@dataclass(frozen=True)
class Step:
    """One pass of the pipeline: what was asked and what it changed."""

    name: str
    round: str
    knobs: str
    usual: str
    effect: str
    why: str
    sites: int
    folds: int
    refused: int
    counts: Mapping[str, int]
    states: tuple[tuple[str, str], ...]
    hunks: Sequence[Hunk]

    @property
    def unchanged(self) -> bool:
        """Whether nothing is as the pass would have it: no node, no weight, no state."""
        nodes = any(self.counts[k] for k in ("added", "removed", "changed"))
        return not (nodes or self.folds or self.sites or self.states)


@dataclass(frozen=True)
class Drawn:
    """A distinct block with its pictures; None where it is too large to draw."""

    view: View
    before: str | None
    after: str | None


@dataclass(frozen=True)
class Figure:
    """A headline number."""

    name: str
    value: str
    note: str = ""


def page(subject: Subject, others: Sequence[Measured] = (), data: str = "") -> str:
    """The whole report.

    Args:
        others: results that the subject is compared with, itself among them.
        data: what they were measured on.
    Raises:
        ModelError: a record of the artefact is not of the form that llmc writes.
    """
    told = told_of(subject.artefact.report)
    steps = _steps(subject, told)
    drawn = _drawn(subject)
    record = told.get("record")
    mixture = record.get("mixed") if isinstance(record, dict) else None
    sites = with_seconds(with_sensitivity(told["sites"], mixture), subject.artefact.run)
    pictures, same = plots(sites)
    return _environment().get_template("report.html.j2").render(
        title=subject.name,
        figures=_figures(subject, told),
        facts=_facts(subject, told),
        steps=steps,
        comparison=comparison(others, data),
        structure=[t for t in (structure_table(told["structure"]),
                               *record_tables(told["structure"], full=True)) if t.rows],
        by_role=result_table(told),
        mixed=mixed(mixture),
        plots=pictures,
        same=same,
        worst=worst_table(sites),
        weights=weights_table(sites),
        left_out=max(0, len(sites) - len(weights_table(sites).rows)),
        folds=folds_table(told["folds"]),
        stored=_stored(subject.size),
        blocks=drawn,
        refusals=told["refusals"],
        refused=refusals_table(told["refusals"]),
        fallbacks=_fallbacks(told),
        kernels=subject.kernels,
        settings=_settings(subject),
    )  # fmt: skip


@functools.cache
def _environment() -> jinja2.Environment:
    """Templates of this package alone; all is escaped, and a missing name is an error."""
    made = jinja2.Environment(
        loader=jinja2.PackageLoader(__package__, "templates"), autoescape=True,
        undefined=jinja2.StrictUndefined, trim_blocks=True, lstrip_blocks=True,
    )  # fmt: skip
    made.filters |= {"size": size, "number": number, "counted": counted}
    return made


def _figures(subject: Subject, told: Mapping[str, Any]) -> list[Figure]:
    """The headline."""
    before = subject.graphs[0][1].weight_bytes() if subject.graphs else None
    after = subject.size.total
    share = f"{after / before:.1%} of {size(before)}" if before else ""
    out = [Figure("weights", size(after), share)]
    bits = subject.size.bits_per_weight
    if bits is not None:
        out.append(Figure("bits per weight", f"{bits:.3f}", "linears, head left out"))
    if subject.quality is not None:
        quality = subject.quality["quality"]
        base = subject.quality.get("baseline")
        note = f"{quality['data']}, windows of {quality['window']}"
        if isinstance(base, dict):
            note = f"{base['quality']['perplexity']:.5g} before; {note}"
        out.append(Figure("perplexity", f"{quality['perplexity']:.5g}", note))
    losses = [s["loss"] for s in told["sites"] if isinstance(s.get("loss"), (int, float))]
    if losses:
        worst = f"at most {max(losses):.2e}"
        out.append(Figure("mean error", f"{sum(losses) / len(losses):.2e}", worst))
    out.append(Figure("fallbacks", str(len(told["fallbacks"])), "solves that fell back"))
    out.append(Figure("refusals", str(len(told["refusals"])), "places left as they were"))
    return out


def _facts(subject: Subject, told: Mapping[str, Any]) -> list[tuple[str, str]]:
    """Names and values of what was made, from what, and how."""
    a = subject.artefact
    facts, run = a.program.facts, a.run if isinstance(a.run, dict) else {}
    states = subject.states[-1] if subject.states else ("", "")
    record: Any = told.get("record")
    record = record if isinstance(record, dict) else {}
    out = [
        ("model", " ".join(str(facts[k]) for k in ("architecture", "model_type") if k in facts)),
        ("passes", str(record.get("passes", told.get("passes", "")))),
        ("program", f"{len(a.program.graph.nodes)} nodes, {len(a.program.params)} parameters, "
                    f"{counted(len(a.program.segments), 'segment')}"),
        *zip(("exits", "caches"), states, strict=True),
    ]  # fmt: skip
    data = record.get("calibration")
    if isinstance(data, dict):
        out.append(("calibration", f"{data.get('data')} ({str(data.get('sha256'))[:12]}), "
                    f"{data.get('samples')} × {data.get('length')} tokens"
                    + ("" if data.get("seed") is None else f", seed {data['seed']}")))  # fmt: skip
    if subject.quality is not None:
        out += quality_facts(subject.quality)
    command = run.get("command")
    if isinstance(command, list) and command:
        out.append(("command", shlex.join(["llmc", *map(str, command)])))
    if isinstance(run.get("seconds"), (int, float)):
        out.append(("took", seconds(run["seconds"])))
    host = run.get("host")
    if isinstance(host, dict):
        parts = (counted(v, k.removesuffix("s")) if isinstance(v, int) else str(v)
                 for k, v in host.items())  # fmt: skip
        out.append(("machine", ", ".join(parts)))
    made = a.manifest.versions
    out.append(("versions", ", ".join(f"{k} {v}" for k, v in made.items())))
    out.append(("content", a.manifest.content_hash))
    return [(name, text) for name, text in out if text]


def _steps(subject: Subject, told: Mapping[str, Any]) -> list[Step]:
    """The pipeline in applied order."""
    plan = subject.artefact.plan if isinstance(subject.artefact.plan, dict) else {}
    order = plan.get("order")
    why = {
        (str(r.get("pass")), str(r.get("stage"))): str(r.get("why", ""))
        for r in (order if isinstance(order, list) else []) if isinstance(r, dict)
    }  # fmt: skip
    applied = applied_of(subject.artefact.manifest.passes, len(subject.graphs))
    out = []
    for i, row in enumerate(applied):
        (_, before), (_, after) = subject.graphs[i], subject.graphs[i + 1]
        found = changes(before, after)
        name, stage, given, knobs = (row[k] for k in ("pass", "stage", "given", "knobs"))
        was, now = subject.states[i], subject.states[i + 1]
        out.append(Step(
            name, str(stage + 1), _knobs(given),
            _knobs({k: v for k, v in knobs.items() if k not in given}),
            str(row.get("effect", "")), why.get((name, str(stage)), ""), row["sites"],
            len(row["folds"]),
            sum(r["by"] == name for r in told["refusals"]), totals(found),
            tuple((a or "none", b or "none") for a, b in zip(was, now, strict=True) if a != b),
            hunks(found),
        ))  # fmt: skip
    return out


def _knobs(values: Mapping[str, Any]) -> str:
    return " ".join(f"{k}={'none' if v is None else str(v).lower() if isinstance(v, bool) else v}"
                    for k, v in values.items())  # fmt: skip


def _drawn(subject: Subject) -> list[Drawn]:
    """Each distinct block, captured and final, with a picture of both where there is room."""
    if not subject.graphs:
        return []
    before, after = subject.graphs[0][1], subject.graphs[-1][1]
    out = []
    for view in views(before, after):
        sides = []
        for program, names in ((before, view.names(False)), (after, view.names(True))):
            found = flow(program, names)
            count = sum(map(len, found.layers))
            label = f"data flow of {view.segment or 'the graph'}"
            sides.append(picture(found, label) if 0 < count <= MOST else None)
        out.append(Drawn(view, sides[0], sides[1] if view.changed else None))
    return out


def _stored(total: Sizes) -> Table:
    table = Table("Bytes by role", ("role", "bytes", "share"), right=("bytes", "share"))
    for role, count in sorted(total.by_role.items(), key=lambda i: (-i[1], i[0])):
        table.rows.append((role, size(count), f"{count / max(total.total, 1):.1%}"))
    return table


def _fallbacks(told: Mapping[str, Any]) -> Table:
    table = Table("", ("weight", "what was given up"))
    for row in told["fallbacks"]:
        table.rows.append((row["site"], "; ".join(map(str, row.get("reasons") or ()))))
    return table


def _settings(subject: Subject) -> Table:
    """Every knob of every pass, as used."""
    table = Table("", ("pass", "knob", "value"))
    for row in subject.artefact.manifest.passes:
        for knob, value in row["knobs"].items():
            table.rows.append((row["pass"], knob, _knobs({knob: value}).partition("=")[2]))
    return table
