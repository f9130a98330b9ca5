"""``llmc kernels`` without a model: the kernels that there are, or one with what it requires."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from ..ir.errors import UsageError, nearest

if TYPE_CHECKING:
    from .output import Out


def show_list(target: str, out: Out) -> None:
    """Every kernel of a target."""
    from ...codegen.listing import all_rows, described, described_cpu
    from ..report.text import Table

    if target == "cpu":
        told = described_cpu()
        table = Table("Kernels for cpu, torch's own, in order of preference",
                      ("kernel", "ways, from how many tokens on", "note"))  # fmt: skip
        for k in told:
            ways = " ".join(f"{way} {k['from'].get(way, '-')}" for way in k["ways"])
            table.rows.append((k["name"], ways, k["note"]))
        more = "Ways are those where nothing was measured: llmc tune --target cpu measures."
    else:
        told = [described(row) for row in all_rows()]
        table = Table("Kernels for triton, those of linears in order of preference",
                      ("kernel", "op", "machines", "what it does"))  # fmt: skip
        table.rows = [(r["name"], r["op"], " ".join(r["targets"]), r["summary"]) for r in told]
        more = "llmc kernels --row NAME shows one; llmc kernels MODEL what a model is lowered to."
    out.table(table)
    out.text(more)
    out.data("kernels", {"source": None, "target": target, "kernels": told})


def show_one(name: str, out: Out) -> None:
    """One Triton kernel: requirements, arguments, bytes and tiles. UsageError when unknown."""
    from ...codegen.listing import all_rows, described
    from ..report.text import Table

    known = {row.name: row for row in all_rows()}
    if name not in known:
        raise UsageError(f"no kernel row {name!r}, rows are {', '.join(known)}",
                         hint=nearest(name, list(known)))  # fmt: skip
    about = described(known[name])
    out.text(name)
    facts: list[tuple[str, Any]] = [
        ("does", about["summary"]), ("op", about["op"]), ("template", about["template"]),
        ("machines", ", ".join(about["targets"])), ("bytes moved", about["moves"]),
    ]  # fmt: skip
    if "tiles" in about:
        tiles = ", ".join(f"{tokens}x{features}" for tokens, features in about["tiles"])
        facts += [("tiles", f"{tiles} (tokens x features)"),
                  ("stages", ", ".join(map(str, about["stages"])))]  # fmt: skip
    for key, value in facts:
        out.text(f"  {key:<14}{value}")
    out.text("")
    needs = Table("Requires", ("field", "expected"))
    needs.rows = [(n["field"], n["expected"]) for n in about["requires"]]
    out.table(needs)
    if about["arguments"]:
        table = Table("Arguments", ("name", "shape", "dtypes", "present"))
        table.rows = [(a["name"], a["shape"], ", ".join(a["dtypes"]),
                       f"if {a['if']}" if a["if"] else "always")
                      for a in about["arguments"]]  # fmt: skip
        out.table(table)
    out.data("kernels", {"source": None, "target": "triton", "kernels": [about]})
