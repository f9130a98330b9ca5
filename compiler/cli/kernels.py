"""``llmc kernels MODEL``: what is fused, which kernel runs it, its bytes, and what is left."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import click

from ..ir.errors import UsageError, nearest
from .kernel_facts import documented, of_problems, show_facts
from .kernel_list import show_list, show_one
from .look import open_headers
from .output import Out, examples, output_options

if TYPE_CHECKING:
    from ..ir.graph import Program

MACHINES = ("sm_80", "sm_90")


@click.command(epilog=examples(
    "llmc kernels",
    "llmc kernels --row w4a16",
    "llmc kernels out",
    "llmc kernels out --target cpu",
    "llmc kernels out --tokens 16",
    "llmc kernels out --aot sm_80,sm_90",
    "llmc kernels --aot sm_80,sm_90 --json",
    "llmc kernels --aot sm_80 --row w4a16 --dtype bf16",
))  # fmt: skip
@click.argument("source", metavar="[ARTEFACT_OR_MODEL]", required=False)
@click.option("--target", type=click.Choice(["triton", "cpu"]), default="triton", show_default=True,
              help="Whose kernels.")  # fmt: skip
@click.option("--tokens", type=int, default=1, show_default=True,
              help="Tokens of the call whose bytes are counted.")  # fmt: skip
@click.option("--dtype", type=click.Choice(["fp16", "bf16", "fp32"]), default="fp16",
              show_default=True, help="Of the activations that bytes are counted for.")  # fmt: skip
@click.option("--bandwidth", type=float, default=None,
              help="Bytes per second that floors are taken at.  [default: 4.3e12]")  # fmt: skip
@click.option("--aot", default=None, metavar="LIST",
              help="Compile the kernels for sm_80,sm_90 without a GPU; show registers, stack and "
              "shared memory.")  # fmt: skip
@click.option("--row", "row_name", default=None, metavar="NAME",
              help="Without a model: this kernel alone, what it requires; with --aot, its machine "
              "code.")  # fmt: skip
@click.option("--trust-remote-code", is_flag=True,
              help="Run modelling code that lies in the model's folder.")  # fmt: skip
@output_options
def kernels_command(
    source: str | None, target: str, tokens: int, dtype: str, bandwidth: float | None,
    aot: str | None, row_name: str | None, trust_remote_code: bool, out: Out,
) -> None:  # fmt: skip
    """List the kernels, or show how an artefact or a model is lowered to them.

    Reads headers; needs neither a GPU nor a tensor. With --aot and no model, every documented
    variant is compiled for 4096 x 4096 weights.
    """
    from ...codegen.problem import Problem
    from ...codegen.targets import BANDWIDTH
    from ..report.text import Table, counted, size

    if tokens < 1:
        raise UsageError(f"--tokens: expected at least 1, found {tokens}")
    if bandwidth is not None and not bandwidth > 0:
        raise UsageError(f"--bandwidth: expected more than 0, found {bandwidth}")
    machines = _machines(aot, target)
    if row_name is not None and (source is not None or target != "triton"):
        beside = f"with {source}" if source is not None else "with --target cpu"
        raise UsageError(f"--row: expected no model and --target triton, found it {beside}")
    if source is None and not machines:
        if row_name is None:
            show_list(target, out)
        else:
            show_one(row_name, out)
        return
    if source is None:
        wanted = documented(machines, dtype, row_name)
        out.data("kernels", {
            "source": None, "target": target, "tokens": tokens, "dtype": dtype,
            "aot": show_facts(wanted, out),
        })  # fmt: skip
        return
    program, _ = open_headers(source, trust_remote_code)
    told = lowering(program, target, tokens, dtype, bandwidth or BANDWIDTH)
    table = Table(f"Fused for {target}, {counted(tokens, 'token')} in {dtype}",
                  ("node", "kernel", "shape", "scheme", "parts", "bytes", "floor us", "path"),
                  right=("bytes", "floor us"))  # fmt: skip
    for r in told["fused"]:
        p = r["problem"]
        table.rows.append((
            r["node"], r["kernel"] + (f" ({r['way']})" if "way" in r else ""),
            f"{p['N']}x{p['K']}", scheme_text(p),
            " ".join(x.split(".")[1] for x in r["parts"]), size(r["bytes"]),
            f"{r['floor_us']:.3g}", r["path"],
        ))  # fmt: skip
    out.table(table)
    table = Table("Not fused", ("node", "condition", "reason", "path"))
    table.rows = [(r["node"], r["predicate"], r["reason"], r["path"]) for r in told["not_fused"]]
    out.table(table)
    if told["attention"]:
        table = Table("Attention to the cache", ("node", "kernel", "note", "path"))
        table.rows = [(r["node"], r["kernel"], r["note"], r["path"]) for r in told["attention"]]
        out.table(table)
    if target == "cpu":
        show_ways(told["fused"], out)
    if target == "triton" and told["launches_per_block"] is not None:
        most = told["launches_per_block"]
        table = Table("Launches of a decode step", ("segment", "launches", "calls"),
                      right=("launches",))  # fmt: skip
        table.rows = [(name, str(b["launches"]), " ".join(b["calls"]))
                      for name, b in told["blocks"].items()]  # fmt: skip
        out.table(table)
        out.text(f"at most {most} launches in a block")
    if target == "triton":
        from ...codegen.device import unavailable
        from ...codegen.tuning.choices import reason

        told["tiles"], told["unavailable"] = reason(), unavailable() or ""
        out.text(f"tiles {told['tiles']}")
        if told["unavailable"]:
            out.text(f"cannot run here: {told['unavailable']}")
    out.text(
        f"{len(told['fused'])} fused, {len(told['not_fused'])} not; "
        f"{size(told['bytes'])} moved, floor {told['floor_us']:.4g} us "
        f"at {told['bandwidth'] / 1e12:g} TB/s"
    )
    if machines:
        problems = list(dict.fromkeys(Problem(**p) for r in told["fused"] for p in problems_of(r)))
        told["aot"] = show_facts(of_problems(problems, machines, tokens), out)
    out.data("kernels", {"source": source, **told})


def show_ways(fused: list[dict[str, Any]], out: Out) -> None:
    """Which way of a CPU kernel is taken at how many tokens, and where that was measured."""
    from ..report.text import Table

    table = Table("Ways by tokens, and where they were measured", ("kernel", "ways", "note"))
    table.rows += sorted({(r["kernel"], r["ways"], r["note"]) for r in fused if "ways" in r})
    out.table(table)


def lowering(
    program: Program, target: str, tokens: int, dtype: str, bandwidth: float
) -> dict[str, Any]:
    """Fused nodes with kernel, bytes and floor, refusals and launches, from types alone.

    A program that can keep state is looked at as it decodes.
    """
    from ...codegen.survey import survey
    from ..analysis.cacheable import cache_refusals
    from ..ir.graph import info
    from ..runtime.cache import add_cache

    if not program.states and any(program.calls("llmc.attention")) and not cache_refusals(program):
        program = add_cache(program)
    told = survey(program, target, tokens, dtype, bandwidth)
    for row in told["fused"]:
        # From a kernel back to the lines of the model's own code.
        row["source"] = sorted({info(program.node(n)).source for n in row["linears"]} - {""})
    return told


def problems_of(row: dict[str, Any]) -> list[dict[str, Any]]:
    """What the kernels of a fused node serve: one problem, or the two of a mixture of experts."""
    return [row[k] for k in ("problem", "down") if k in row]


def scheme_text(problem: dict[str, Any]) -> str:
    """``2:4 w4 g128``; the group counts dense columns."""
    n, m, group = problem["n"], problem["m"], problem["group"]
    parts = [f"{n}:{m}"] if m else []
    parts += ["bitmap"] if problem.get("bitmap") else []
    kind = problem.get("weights", "int")
    if kind in ("dense", "factors"):
        parts.append(kind)
    if kind != "dense" and (kind != "factors" or problem["bits"] < 16):
        whole = group <= 0 or group >= (problem["K"] * n // m if m else problem["K"])
        dense = group * m // n if m else group
        levels = problem.get("levels") or ("table" if kind == "table" else "w")
        parts += [f"{levels}{problem['bits']}", "row" if whole else f"g{dense}"]
    parts += [f"r{problem['rank']}"] if problem.get("rank") else []
    parts += ["sparse"] if problem.get("sparse") else []
    parts += [f"outliers {problem['outliers']}"] if problem.get("outliers") else []
    if problem.get("experts"):
        each = problem.get("always", 0)
        parts.append(f"{problem['chosen'] - each} of {problem['experts'] - each} experts")
        parts += [f"+ {each} for all tokens"] if each else []
    return " ".join(parts + (["asym"] if problem["asym"] else []))


def _machines(aot: str | None, target: str) -> tuple[str, ...]:
    if aot is None:
        return ()
    if target != "triton":
        raise UsageError(f"--aot: expected --target triton, found {target}")
    names = tuple(n.strip() for n in aot.split(","))
    for name in names:
        if name not in MACHINES:
            raise UsageError(
                f"--aot: expected machines of {', '.join(MACHINES)}, found {name!r}",
                hint=nearest(name, MACHINES),
            )
    return names
