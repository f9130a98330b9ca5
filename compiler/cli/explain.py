"""``llmc explain``: where a pass applies, where it nearly did, and which condition failed."""

from __future__ import annotations

from dataclasses import fields
from typing import TYPE_CHECKING, Any

import click

from ..ir.errors import UsageError, nearest
from .look import graph_of, open_headers
from .output import Out, examples, output_options

if TYPE_CHECKING:
    from ..ir.graph import Program
    from ..pipeline.recipe import Call
    from ..runtime.artefact import Loaded


@click.command(epilog=examples(
    "llmc explain w4 out",
    "llmc explain smooth ./model",
    "llmc explain prune24 ./model --node linear_3",
    "llmc explain w4:group=64 ./model --json",
))  # fmt: skip
@click.argument("name", metavar="PASS")
@click.argument("source", metavar="ARTEFACT_OR_MODEL")
@click.option("--node", default=None, help="Only what concerns this node or parameter.")
@click.option("--trust-remote-code", is_flag=True,
              help="Run modelling code that lies in the model's folder.")  # fmt: skip
@output_options
def explain_command(
    name: str, source: str, node: str | None, trust_remote_code: bool, out: Out
) -> None:
    """List every site that PASS takes and every near miss, with the failing condition.

    For an artefact the graph that the pass found is asked again, with the knobs that were used.
    """
    from ..pipeline.analysis import Analysis
    from ..pipeline.recipe import from_strings
    from ..report.text import Table, counted

    calls = from_strings([name]).calls
    if len(calls) != 1:
        raise UsageError(f"expected one pass, found {len(calls)} in {name!r}")
    program, artefact = open_headers(source, trust_remote_code)
    call = calls[0]
    if artefact is not None:
        program = graph_of(artefact, artefact.graphs[_found_by(call, artefact)])
        call = _as_used(call, artefact)
    analysis = Analysis(program)
    sites, refused = call.made.sites(analysis)
    taken = [describe(program, s) for s in sites]
    missed = [_miss(program, r) for r in refused]
    if artefact is not None:
        missed += [
            _skipped(program, r) for r in artefact.report["refusals"]
            if r["by"] == call.name and r["predicate"] == "override"
        ]  # fmt: skip
        skipped = {m["node"] for m in missed if m["condition"] == "override"}
        taken = [t for t in taken if t["node"] not in skipped]
    about: dict[str, Any] = {"source": source, "pass": call.name, "knobs": call.made.values()}
    if node is not None:
        about["node"] = _node(program, node)
        taken = [t for t in taken if node in t["concerns"]]
        missed = [m for m in missed if node in m["concerns"]]
    table = Table(f"{call.name} takes {counted(len(taken), 'site')}",
                  ("site", "node", "kind", "concerns", "path", "source"))  # fmt: skip
    table.rows = [
        (t["site"], t["node"], t["kind"], " ".join(c for c in t["concerns"] if c != t["node"]),
         t["path"], t["source"])
        for t in taken
    ]  # fmt: skip
    out.table(table)
    table = Table(f"{call.name} refuses {counted(len(missed), 'near miss')}",
                  ("node", "condition", "reason", "path", "source"))  # fmt: skip
    table.rows = [(m["node"], m["condition"], m["reason"], m["path"], m["source"]) for m in missed]
    out.table(table)
    if node is not None and not taken and not missed:
        n = about["node"]
        out.text(f"{node} is {n['text']} : {n['type']}; the pattern of {call.name} does not look "
                 f"there: {type(call.made).law()}")  # fmt: skip
    out.text(f"{len(taken)} taken, {len(missed)} refused")
    out.data("explain", about | {"taken": taken, "refused": missed})


def _found_by(call: Call, artefact: Loaded) -> int:
    """Place of the graph that a pass finds: structural passes change what the next one sees.

    The others all look at the graph behind the last structural pass that came before them.
    """
    from ..pipeline.order import RANK, SHAPES
    from ..pipeline.registry import find

    stages = [find(row["pass"]).stage for row in artefact.manifest.passes]
    mine = call.made.stage
    if mine not in (*SHAPES, "exit"):
        return sum(stage in SHAPES for stage in stages)
    return sum(RANK[stage] < RANK[mine] for stage in stages)


def _as_used(call: Call, artefact: Loaded) -> Call:
    """The pass with the knobs of the artefact's recipe, unless the user gave some."""
    if any(call.made.explicit(k) for k in call.made.values()):
        return call
    for row in artefact.manifest.passes:
        if row["pass"] == call.name and row.get("given"):
            return call.adjusted(row["given"])
    return call


def _names(value: Any) -> list[str]:
    """Node and parameter names inside a site's fields."""
    if isinstance(value, str):
        return [value]
    if isinstance(value, (tuple, list)):
        return [n for v in value for n in _names(v)]
    return [value.param] if hasattr(value, "param") else []


def describe(program: Program, site: Any) -> dict[str, Any]:
    """A site as data: id, node, what it concerns, module path and source line."""
    from ..ir.graph import info

    nodes = {n.name: n for n in program.graph.nodes}
    node = getattr(site, "node", None) or site.value
    keep = ("node", "param", "bias", "reads", "value", "consumers", "absorbers")
    found: list[str] = []
    for f in fields(site):
        if f.name in keep:
            found += _names(getattr(site, f.name))
    known = dict.fromkeys(n for n in [node, *found] if n in nodes or n in program.params)
    at = info(nodes[node])
    return {
        "site": site.id, "node": node, "kind": getattr(site, "role", getattr(site, "kind", "")),
        "segment": site.segment, "concerns": list(known), "path": at.path, "source": at.source,
    }  # fmt: skip


def _miss(program: Program, refusal: Any) -> dict[str, Any]:
    return _skipped(program, refusal.to_json())


def _skipped(program: Program, row: dict[str, Any]) -> dict[str, Any]:
    """A refusal with path, source line, and every node that its reason names."""
    from ..ir.graph import info

    nodes = {n.name: n for n in program.graph.nodes}
    words = row["reason"].replace(",", " ").replace(":", " ").replace(";", " ").split()
    concerns = dict.fromkeys([row["node"], *(w for w in words if w in nodes)])
    at = info(nodes[row["node"]]) if row["node"] in nodes else None
    return {
        "node": row["node"], "condition": row["predicate"], "reason": row["reason"],
        "concerns": list(concerns), "path": row["path"] or (at.path if at else ""),
        "source": at.source if at else "",
    }  # fmt: skip


def _node(program: Program, name: str) -> dict[str, Any]:
    """The row of a node or of a parameter's node.

    Raises:
        UsageError: no such node; the nearest is named.
    """
    from ..report.nodes import node_row

    for n in program.graph.nodes:
        if name in (n.name, str(n.target) if n.op == "get_attr" else n.name):
            return node_row(program, n)
    known = [n.name for n in program.graph.nodes]
    raise UsageError(f"--node: expected a node of the graph, found {name!r}",
                     hint=nearest(name, known))  # fmt: skip
