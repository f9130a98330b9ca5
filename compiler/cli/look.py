"""``llmc inspect`` and ``llmc diff``: headers and graphs, no tensor is read."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Any

import click

from ..ir.errors import ModelError, UsageError, nearest
from .output import Out, examples, output_options
from .pictures import check_picture, write_picture

if TYPE_CHECKING:
    from ..ir.graph import Program
    from ..runtime.artefact import Loaded


def open_headers(source: str, trust_remote_code: bool = False) -> tuple[Program, Loaded | None]:
    """The program of an artefact (headers alone) or of a model folder."""
    from ..runtime.artefact import is_artefact, load

    if is_artefact(source):
        found = load(Path(source).expanduser(), verify=False)
        return found.program, found
    # Imports passes and planner, which an artefact's headers do not need.
    from .. import api

    program = api.capture(source, trust_remote_code=trust_remote_code)
    if not program.segments:
        from ..analysis.blocks import apply_segments

        apply_segments(program)
    return program, None


@click.command(epilog=examples(
    "llmc inspect out",
    "llmc inspect out --block 0",
    "llmc inspect out --path model.layers.3.mlp",
    'llmc inspect out --where "op=linear,input.users>1"',
    "llmc inspect out --block 0 --picture block.svg",
    "llmc inspect out --python > program.py",
))  # fmt: skip
@click.argument("source", metavar="ARTEFACT_OR_MODEL")
@click.option("--block", type=int, default=None, help="The nodes of one block.")
@click.option("--path", "prefix", default=None, help="The nodes under one module path.")
@click.option("--python", "as_python", is_flag=True, help="The graph as runnable Python.")
@click.option("--where", "text", default=None, metavar="QUERY",
              help="Nodes that meet FIELD=VALUE,...; also != ~ > >= < <=, and input.FIELD for what "
              "a node reads.")  # fmt: skip
@click.option("--picture", default=None, metavar="FILE",
              help="Draw the data flow of what is shown: FILE.svg, FILE.dot for Graphviz, or "
              "FILE.json for Model Explorer.")  # fmt: skip
@click.option("--trust-remote-code", is_flag=True,
              help="Run modelling code that lies in the model's folder.")  # fmt: skip
@output_options
def inspect_command(
    source: str, block: int | None, prefix: str | None, as_python: bool, text: str | None,
    picture: str | None, trust_remote_code: bool, out: Out,
) -> None:  # fmt: skip
    """Show program, segments, sites, schemes and bytes. Reads headers, never a tensor.

    With -v also every site, each migrated scale, and the values between segments.
    """
    if sum(x is not None for x in (block, prefix, text)) + as_python > 1:
        raise UsageError("expected one of --block, --path, --where and --python, found several")
    check_picture(picture, (".svg", ".dot", ".json"))
    program, artefact = open_headers(source, trust_remote_code)
    if as_python:
        python = program.print_python(source)
        out.text(python, newline=False)
        out.data("inspect", {"source": source, "python": python})
        return
    if block is not None or prefix is not None or text is not None:
        names = _nodes(program, source, block, prefix, text, out)
    else:
        names = [n.name for n in program.graph.nodes]
        _overview(program, artefact, source, out)
    if picture is not None:
        selected = names if len(names) < len(program.graph.nodes) else None
        _draw(picture, program, artefact, source, selected)
        out.note(f"drawn to {picture}")


def _draw(
    goal: str, program: Program, artefact: Loaded | None, source: str, names: list[str] | None
) -> None:
    """Draw the selected nodes, or everything; for Model Explorer then every pass's graph too."""
    from ..report.explorer import explorer_json
    from ..report.flow import alone, dot, flow
    from ..report.flow import picture as drawn

    graphs = [("program", program)]
    if names is None and artefact is not None:
        graphs += [(name, artefact.graph(name)) for name in artefact.graphs]
    found = flow(program, [n.name for n in program.graph.nodes] if names is None else names)
    write_picture(goal, {
        ".svg": lambda: alone(drawn(found, source)), ".dot": lambda: dot(found),
        ".json": lambda: explorer_json(Path(source).name, graphs, names),
    })  # fmt: skip


def _nodes(
    program: Program, source: str, block: int | None, prefix: str | None, text: str | None,
    out: Out,
) -> list[str]:  # fmt: skip
    """Show the nodes that were asked for; their names."""
    from ..analysis.blocks import is_block
    from ..report.nodes import nodes_table, query, rows
    from ..report.text import counted

    found = query(program, text) if text is not None else rows(program)
    if block is not None:
        names = [s.name for s in program.segments if is_block(s.name)]
        if not 0 <= block < len(names):
            raise UsageError(f"--block: expected 0..{len(names) - 1}, found {block}")
        found = [r for r in found if r["segment"] == names[block]]
    if prefix is not None:
        under = prefix.rstrip(".") + "."
        found = [r for r in found if (r["path"] + ".").startswith(under)]
        if not found:
            known = {info_path for r in rows(program) if (info_path := r["path"])}
            raise UsageError(
                f"--path: expected a module path of the program, found {prefix!r}",
                hint=nearest(prefix, known),
            )
    table = nodes_table(found)
    out.table(table)
    out.text(counted(len(found), "node"))
    out.data("inspect", {"source": source, "nodes": found})
    return [r["name"] for r in found]


def _overview(program: Program, artefact: Loaded | None, source: str, out: Out) -> None:
    from ..report.checked import mixture_of, told_of
    from ..report.mixing import mixing_lines, mixing_tables
    from ..report.text import Table, size
    from ..runtime.sizes import sizes

    total = sizes(program)
    told = {} if artefact is None else told_of(artefact.report)
    record = told.get("record")
    record = record if isinstance(record, dict) else {}
    mixture = mixture_of(record.get("mixed"))
    about: dict[str, Any] = {
        "source": source,
        "inputs": {n.name: str(n.meta["llmc"].type) for n in program.inputs},
        "nodes": len(program.graph.nodes),
        "facts": {k: v for k, v in program.facts.items() if k not in ("config", "tokenizer")},
        "size": total.to_json(),
        "segments": segments_of(program),
    }
    out.text(f"{source}: {about['nodes']} nodes, {len(program.params)} parameters, "
             f"{size(total.total)}")  # fmt: skip
    if artefact is not None:
        m = artefact.manifest
        about |= {"content_hash": m.content_hash, "passes": m.passes, "versions": m.versions,
                  "fallbacks": m.fallbacks, "graphs": list(artefact.graphs),
                  "record": record}  # fmt: skip
        out.text(f"passes   {record.get('passes', '')}")
        out.text(f"content  {m.content_hash}")
        out.text(f"graphs   {' '.join(artefact.graphs)}")
        data = record.get("calibration")
        if isinstance(data, dict):
            out.text(
                f"data     {data.get('data')} ({str(data.get('sha256'))[:12]}), "
                f"{data.get('samples')} x {data.get('length')} tokens, seed {data.get('seed')}"
            )
        for line in mixing_lines(mixture):
            out.text(f"mixed    {line}")
    codes = program.facts.get("quantised")
    if isinstance(codes, dict) and isinstance(codes.get("schemes"), dict):
        found = ", ".join(f"{n} x {text}" for text, n in codes["schemes"].items())
        out.text(f"codes    {found}, read from {codes.get('method')}")
    out.text("inputs   " + ", ".join(f"{k} {v}" for k, v in about["inputs"].items()))
    if program.exits is not None:
        about["exits"] = program.exits.to_json() | {"threshold": program.exits.threshold}
        out.text(f"exits    {exits_text(program)}")
    if program.caches:
        about["caches"] = {n: c.to_json() for n, c in program.caches.items()}
        out.text(f"caches   {caches_text(program)}")
    if total.bits_per_weight is not None:
        out.text(f"linears  {total.bits_per_weight:.3f} bits per weight (head left out)")
    out.text("")
    table = Table("Bytes by role", ("role", "bytes"), right=("bytes",))
    table.rows = [(k, size(v)) for k, v in sorted(total.by_role.items(), key=lambda i: -i[1])]
    out.table(table)
    numbers = ("nodes", "linears", "params", "bytes")
    values = ("reads", "gives") if out.verbose else ()
    table = Table("Segments", ("segment", *numbers, *values), right=numbers)
    table.rows = [
        (s["name"], str(s["nodes"]), str(s["linears"]), str(s["params"]), size(s["bytes"]),
         *(" ".join(s[v]) for v in values))
        for s in about["segments"]
    ]  # fmt: skip
    out.table(table)
    if artefact is not None:
        from ..report.data import folds_table, result_table
        from ..report.structure import record_tables, structure_table

        steps = told["structure"]
        out.table(structure_table(steps))
        for table in record_tables(steps, out.verbose):
            out.table(table)
        for table in mixing_tables(mixture, out.verbose):
            out.table(table)
        about["structure"] = steps
        out.table(result_table(told, out.verbose))
        if out.verbose:
            out.table(folds_table(told["folds"]))
        about["sites"] = told["sites"]
        about["schemes"] = artefact.schemes
    out.data("inspect", about)


def exits_text(program: Program) -> str:
    """When a token leaves early, and where."""
    e = program.exits
    if e is None:
        return "none"
    decay = "" if e.decay is None else f", relaxed over {e.decay} tokens,"
    return f"{e.rule} >= {e.threshold:.4g}{decay} behind {' '.join(e.blocks)}"


def caches_text(program: Program) -> str:
    """How keys and values are kept, and by how many attentions."""
    count: dict[str, int] = {}
    for c in program.caches.values():
        parts = [f"{c.kind} {c.bits} bits" if not c.rank else f"keys as latents of {c.rank}"]
        parts += [f"groups of {c.group}, the newest {c.residual} as they are"] * (
            c.group is not None
        )
        parts += [f"the first {c.first} as they are"] * bool(c.first)
        parts += [f"{c.outliers:.3g} apart"] * bool(c.outliers)
        parts += ["keys before their rotation"] * c.turned
        text = ", ".join(parts)
        count[text] = count.get(text, 0) + 1
    return "; ".join(f"{n} x {text}" for text, n in count.items()) or "plain"


def segments_of(program: Program) -> list[dict[str, Any]]:
    """Segments with their nodes, linears, parameters and bytes, counted from the graph."""
    from ..ir.ops import row_of

    nodes = {n.name: n for n in program.graph.nodes}
    out = []
    for s in program.segments:
        mine = [nodes[n] for n in s.nodes]
        params = [p for n in mine if (p := program.param_of(n)) is not None]
        linears = sum(n.op == "call_function" and "linear" in row_of(n).name for n in mine)
        out.append({
            "name": s.name, "nodes": len(mine), "linears": linears, "params": len(params),
            "bytes": sum(p.bytes for p in params), "reads": list(s.live_in),
            "gives": list(s.live_out),
        })  # fmt: skip
    return out


@click.command(epilog=examples(
    "llmc diff out --pass w4",
    "llmc diff out --pass smooth",
    "llmc diff out --pass prune24 --side-by-side --all",
    "llmc diff out --json",
))  # fmt: skip
@click.argument("folder", metavar="ARTEFACT")
@click.option("--pass", "name", default=None, metavar="NAME",
              help="One pass.  [default: everything from capture to the end]")  # fmt: skip
@click.option("--side-by-side", is_flag=True, help="Before and after in two columns.")
@click.option("--all", "everything", is_flag=True, help="Blocks that changed alike too.")
@output_options
def diff_command(
    folder: str, name: str | None, side_by_side: bool, everything: bool, out: Out
) -> None:
    """Show what one pass changed: nodes with shapes, dtypes and bytes, and rescaled parameters."""
    from ..report.difference import changes, hunks, totals, unified
    from ..report.difference import side_by_side as columns
    from ..report.text import size

    artefact = open_artefact(folder)
    before, after = _pair(artefact, name)
    old, new = (artefact.graph(n) for n in (before, after))
    found = changes(graph_of(artefact, before), graph_of(artefact, after))
    out.text(f"{before} -> {after}")
    for hunk in hunks(found, collapse=not everything):
        if side_by_side:
            out.table(columns(hunk))
        else:
            out.text(unified(hunk) + "\n")
    t = totals(found)
    out.text(
        f"{t['added']} added, {t['removed']} removed, {t['changed']} changed; parameters "
        f"{size(t['bytes_before'])} -> {size(t['bytes_after'])}"
    )
    exits = [exits_text(p) for p in (old, new)]
    if exits[0] != exits[1]:
        out.text(f"exits {exits[0]} -> {exits[1]}")
    kept = [caches_text(p) for p in (old, new)]
    if kept[0] != kept[1]:
        out.text(f"caches {kept[0]} -> {kept[1]}")
    folds = [f for f in artefact.report["folds"] if name in (None, f["pass"])]
    scaled = _rescaled(artefact, folds)
    if folds:
        _tell_folds(folds, scaled, artefact.program, out)
    out.data("diff", {
        "folder": folder, "before": before, "after": after, "totals": t,
        "changes": [c.to_json() for c in found], "folds": folds, "rescaled": scaled,
        "exits": exits, "caches": kept,
    })  # fmt: skip


def _tell_folds(
    folds: list[dict[str, Any]], scaled: dict[str, list[str]], program: Program, out: Out
) -> None:
    from ..report.data import folds_table
    from ..report.text import Table

    out.table(folds_table(folds))
    table = Table("Parameters rescaled", ("site", "parameter", "names in the model"))
    for site, params in scaled.items():
        for p in params:
            table.rows.append((site, p, " ".join(_names(program, p))))
    out.table(table)


def _names(program: Program, param: str) -> tuple[str, ...]:
    """What the model calls a parameter, though only its pieces (``.codes``, ``.meta``) are left."""
    for name, piece in program.params.items():
        if name == param or name.startswith(param + "."):
            ending = name.removeprefix(param)
            return tuple(n.removesuffix(ending) for n in piece.names)
    return ()


def _rescaled(artefact: Loaded, folds: list[dict[str, Any]]) -> dict[str, list[str]]:
    """Parameters that each fold rescaled, by site."""
    wanted = {f["site"] for f in folds}
    return {
        site: params
        for p in artefact.manifest.passes
        for site, params in p.get("folds", {}).items()
        if site in wanted
    }


def open_artefact(folder: str) -> Loaded:
    """An artefact by its headers.

    Raises:
        ModelError: it is none.
    """
    from ..runtime.artefact import is_artefact, load

    path = Path(folder).expanduser()
    if not is_artefact(path):
        found = "a folder without manifest.json" if path.is_dir() else "no folder"
        raise ModelError(
            f"expected an artefact, found {found} at {folder}", hint="llmc compile makes one"
        )
    return load(path, verify=False)


def graph_of(artefact: Loaded, name: str) -> Program:
    """A per-pass graph with module paths, source lines and segments where they are known."""
    from dataclasses import replace

    from ..ir.graph import info

    program = artefact.graph(name)
    known = {n.name: info(n) for n in artefact.program.graph.nodes}
    for node in program.graph.nodes:
        origin = known.get(node.name)
        if origin is not None:
            node.meta["llmc"] = replace(info(node), path=origin.path, source=origin.source)
    return program


def _pair(artefact: Loaded, name: str | None) -> tuple[str, str]:
    """Names of the graphs before and after a pass."""
    graphs = artefact.graphs
    if name is None:
        return graphs[0], graphs[-1]
    passes = [g.partition("-")[2] for g in graphs]
    if name not in passes[1:]:
        raise UsageError(
            f"--pass: expected one of {', '.join(passes[1:])}, found {name!r}",
            hint=nearest(name, passes[1:]),
        )
    at = passes.index(name, 1)
    return graphs[at - 1], graphs[at]
