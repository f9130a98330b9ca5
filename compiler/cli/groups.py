"""``llmc groups``: what must be cut together, what one unit costs, and what forbids cutting."""

from __future__ import annotations

from typing import TYPE_CHECKING

import click

from ..ir.errors import UsageError, nearest
from .look import open_headers
from .output import Out, examples, output_options
from .pictures import check_picture, write_picture

if TYPE_CHECKING:
    from ..ir.graph import Program


@click.command(epilog=examples(
    "llmc groups ./model",
    "llmc groups ./model --kind kv_group -v",
    "llmc groups ./model --block 0 --picture groups.svg",
    "llmc groups ./model --json",
))  # fmt: skip
@click.argument("source", metavar="MODEL_OR_ARTEFACT")
@click.option("--kind", default=None, metavar="KIND",
              help="Groups of one kind, such as neuron, kv_group or hidden.")  # fmt: skip
@click.option("--block", type=int, default=None, help="Groups that lie in one block.")
@click.option("--all", "everything", is_flag=True, help="Each block, also where all are alike.")
@click.option("--picture", default=None, metavar="FILE",
              help="Draw the groups: FILE.svg, or FILE.dot for Graphviz.")  # fmt: skip
@click.option("--trust-remote-code", is_flag=True,
              help="Run modelling code that lies in the model's folder.")  # fmt: skip
@output_options
def groups_command(
    source: str, kind: str | None, block: int | None, everything: bool, picture: str | None,
    trust_remote_code: bool, out: Out,
) -> None:  # fmt: skip
    """Show the dependency groups: parameter axes that must be cut, scaled or permuted together.

    Found in the graph alone; no tensor is read. With -v also every axis of each group.
    """
    from ..analysis.groups import dependency_groups
    from ..report.groups import UNITS, alike, groups_json, groups_table, members_table
    from ..report.picture import dot, svg
    from ..report.text import counted

    if kind is not None and kind not in UNITS:
        hint = nearest(kind, UNITS)
        raise UsageError(f"--kind: expected one of {', '.join(UNITS)}, found {kind!r}", hint=hint)
    check_picture(picture)
    program, _ = open_headers(source, trust_remote_code)
    coded = next((p.name for p in program.params.values() if p.name != p.source), None)
    if coded is not None:
        raise UsageError(
            f"expected dense weights, found coded ones ({coded})", where=source,
            hint="give the model that it was made from",
        )  # fmt: skip
    found = dependency_groups(program)
    if kind is not None:
        found = [g for g in found if g.kind == kind]
    if block is not None:
        name = _block(program, block)
        found = [g for g in found if g.segment == name]
    rows = alike(program, found, merge=not everything and block is None)
    out.table(groups_table(program, rows))
    for row in rows if out.verbose else ():
        out.table(members_table(program, row))
    blocked = sum(bool(g.blocked) for g in found)
    out.text(f"{counted(len(found), 'group')}, {blocked} of them blocked")
    if picture is not None:
        drawings = {".svg": lambda: svg(program, rows), ".dot": lambda: dot(program, rows)}
        write_picture(picture, drawings)
        out.note(f"drawn to {picture}")
    out.data("groups", {"source": source, "groups": groups_json(program, found)})


def _block(program: Program, block: int) -> str:
    """Name of a block by its number."""
    from ..analysis.blocks import is_block

    names = [s.name for s in program.segments if is_block(s.name)]
    if not 0 <= block < len(names):
        raise UsageError(f"--block: expected 0..{len(names) - 1}, found {block}")
    return names[block]
