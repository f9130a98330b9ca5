"""``llmc doctor``: what this machine can run, and why not."""

from __future__ import annotations

import click

from ..ir.errors import ResourceError
from .output import Out, examples, output_options
from .progress import waiting


@click.command(epilog=examples("llmc doctor", "llmc doctor --trial", "llmc doctor --json"))
@click.option("--trial", "tried", is_flag=True,
              help="Also run a tiny model on every target, against the reference.")  # fmt: skip
@output_options
def doctor_command(tried: bool, out: Out) -> None:
    """Say what this machine can run, what it cannot and why, and what to do about it.

    Exit 5 where something is missing that llmc cannot work without, or a trial went wrong.
    """
    from ..report.text import Table
    from ..runtime.doctor import examine, trial

    checks = examine()
    if tried:
        with waiting("running a tiny model on every target", out):
            checks += trial()
    quiet = {"packages", "optional"}
    shown = [c for c in checks if out.verbose or c.about not in quiet or c.verdict != "ok"]
    table = Table("", ("", "what", "found", "what to do"))
    table.rows = [(c.verdict, c.name, c.found, c.remedy) for c in shown]
    out.table(table)
    hidden = len(checks) - len(shown)
    bad = [c for c in checks if c.needed and c.verdict == "no"]
    cannot = sum(c.verdict == "no" for c in checks)
    more = f"; {hidden} packages are as they should be (-v lists them)" if hidden else ""
    out.text(f"{cannot} of {len(checks)} checks say no{more}")
    out.data("doctor", {"checks": [c.to_json() for c in checks], "usable": not bad})
    if bad:
        raise ResourceError(f"expected {bad[0].name} to be usable, found {bad[0].found}",
                            hint=bad[0].remedy)  # fmt: skip
