"""``llmc kernels``: what lowering fuses, which kernel runs it, its bytes, and what is left."""

from __future__ import annotations

from dataclasses import asdict, replace
from typing import TYPE_CHECKING, Any

import click

from ..ir.errors import LlmcError, UsageError, nearest
from .look import open_headers
from .output import Out, examples, output_options
from .progress import waiting

if TYPE_CHECKING:
    from ...codegen.problem import Problem
    from ..ir.graph import Program

MACHINES = ("sm_80", "sm_90")


@click.command(epilog=examples(
    "llmc kernels out",
    "llmc kernels out --target cpu",
    "llmc kernels out --tokens 16",
    "llmc kernels out --aot sm_80,sm_90",
    "llmc kernels --aot sm_80 --dtype bf16",
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
@click.option("--trust-remote-code", is_flag=True,
              help="Run modelling code that lies in the model's folder.")  # fmt: skip
@output_options
def kernels_command(
    source: str | None, target: str, tokens: int, dtype: str, bandwidth: float | None,
    aot: str | None, trust_remote_code: bool, out: Out,
) -> None:  # fmt: skip
    """Show how an artefact or a model is lowered. Reads headers; needs neither a GPU nor a tensor.

    With --aot and no model, every kernel is compiled for 4096 x 4096 weights.
    """
    from ...codegen.problem import Problem
    from ...codegen.targets import BANDWIDTH
    from ..report.text import Table, counted, size

    if tokens < 1:
        raise UsageError(f"--tokens: expected at least 1, found {tokens}")
    if bandwidth is not None and not bandwidth > 0:
        raise UsageError(f"--bandwidth: expected more than 0, found {bandwidth}")
    machines = _machines(aot, target)
    if source is None:
        if not machines:
            raise UsageError("expected an artefact, a model or --aot, found none")
        problems = _typical(dtype)
        out.data("kernels", {
            "source": None, "target": target, "tokens": tokens, "dtype": dtype,
            "aot": _compile(problems, machines, tokens, out),
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
            r["node"], r["kernel"], f"{p['N']}x{p['K']}", scheme_text(p),
            " ".join(x.split(".")[1] for x in r["parts"]), size(r["bytes"]),
            f"{r['floor_us']:.3g}", r["path"],
        ))  # fmt: skip
    out.table(table)
    table = Table("Not fused", ("node", "condition", "reason", "path"))
    table.rows = [(r["node"], r["predicate"], r["reason"], r["path"]) for r in told["not_fused"]]
    out.table(table)
    out.text(
        f"{len(told['fused'])} fused, {len(told['not_fused'])} not; "
        f"{size(told['bytes'])} moved, floor {told['floor_us']:.4g} us "
        f"at {told['bandwidth'] / 1e12:g} TB/s"
    )
    if machines:
        problems = list(dict.fromkeys(Problem(**r["problem"]) for r in told["fused"]))
        told["aot"] = _compile(problems, machines, tokens, out)
    out.data("kernels", {"source": source, **told})


def lowering(
    program: Program, target: str, tokens: int, dtype: str, bandwidth: float
) -> dict[str, Any]:
    """Fused nodes with kernel, bytes and floor, and refusals, from types alone."""
    from ...codegen import cpu
    from ...codegen.fuse import fuse
    from ...codegen.kernels import choose

    def accept(problem: Problem) -> str | None:
        if target == "cpu":
            return cpu.choose(problem)[1] or None
        row, misfits = choose(replace(problem, x_dtype=dtype))
        return None if row is not None else "; ".join(str(m) for m in misfits)

    own = program.clone()
    beside = target == "triton"
    plan = fuse(own, accept, norm=beside, residual=beside)
    rows: list[dict[str, Any]] = []
    for fused in plan.fused:
        problem = replace(fused.problem, x_dtype=dtype)
        stored = sum(
            p.bytes for n in own.node(fused.node).args[1:5] if (p := own.param_of(n)) is not None
        )
        if target == "cpu":
            kernel, _ = cpu.choose(problem)
            name = kernel.name if kernel is not None else ""
            # torch's layouts: dense codes (N:M is spread), two bf16 values per group.
            weight = problem.N * problem.K * problem.bits // 8 + 4 * problem.N * problem.groups
            moved = weight + 2 * tokens * (problem.N + problem.K)
        else:
            row, _ = choose(problem)
            assert row is not None
            name, moved = row.name, row.bytes_moved(problem, tokens)
        rows.append({
            "node": fused.node, "path": fused.path, "kernel": name, "parts": list(fused.parts),
            "problem": asdict(problem), "bytes": moved, "stored_bytes": stored,
            "floor_us": 1e6 * moved / bandwidth,
        })  # fmt: skip
    return {
        "target": target, "tokens": tokens, "dtype": dtype, "bandwidth": bandwidth, "fused": rows,
        "not_fused": [r.to_json() for r in plan.refused],
        "bytes": sum(r["bytes"] for r in rows), "floor_us": sum(r["floor_us"] for r in rows),
    }  # fmt: skip


def scheme_text(problem: dict[str, Any]) -> str:
    """``2:4 w4 g128``; the group counts dense columns."""
    n, m, group = problem["n"], problem["m"], problem["group"]
    parts = [f"{n}:{m}"] if m else []
    whole = group <= 0 or group >= (problem["K"] * n // m if m else problem["K"])
    dense = group * m // n if m else group
    parts += [f"w{problem['bits']}", "row" if whole else f"g{dense}"]
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


def _typical(dtype: str) -> list[Problem]:
    """For each kernel row the problems that it is for: plain, with zero points, with every side."""
    from ...codegen.kernels import ROWS
    from ...codegen.problem import Problem

    schemes = [
        Problem(4096, 4096, bits=bits, group=128 * n // m if m else 128, n=n, m=m, x_dtype=dtype)
        for bits in (4, 8, 3, 2)
        for n, m in ((0, 0), (2, 4), (4, 8))
    ]
    out = []
    for row in ROWS:
        fits = next((p for p in schemes if not row.misfits(p)), None)
        if fits is None:
            raise LlmcError(f"expected a typical problem for kernel {row.name}, found none")
        sides = replace(fits, asym=True, bias=True, residual=True, norm=True)
        out += [p for p in (fits, replace(fits, asym=True), sides) if not row.misfits(p)]
    return out


def _compile(
    problems: list[Problem], machines: tuple[str, ...], tokens: int, out: Out
) -> list[dict[str, Any]]:
    """Machine-code facts of each distinct problem, at its untuned tile."""
    from ...codegen.aot import compile_variant
    from ...codegen.kernels import choose
    from ..report.text import Table

    facts: list[dict[str, Any]] = []
    table = Table("Compiled ahead of time",
                  ("kernel", "shape", "scheme", "sides", "machine", "tile", "registers", "stack",
                   "shared", "matrix", "slots per weight"),
                  right=("registers", "stack", "shared", "slots per weight"))  # fmt: skip
    with waiting(f"compiling {len(problems)} variants for {', '.join(machines)}", out):
        for problem in problems:
            row, _ = choose(problem)
            assert row is not None
            config = row.default_config(problem, tokens)
            sides = [s for s in ("norm", "bias", "residual") if getattr(problem, s)]
            for machine in machines:
                found = compile_variant(row, problem, config, machine).json()
                facts.append(found | {"N": problem.N, "K": problem.K, "problem": asdict(problem)})
                table.rows.append((
                    row.name, f"{problem.N}x{problem.K}", scheme_text(asdict(problem)),
                    " ".join(sides) or "-", machine, f"{config.BM}x{config.BN}",
                    str(found["registers"]), str(found["stack"]), str(found["shared"]),
                    " ".join(found["matrix"]), str(found["slots"]),
                ))  # fmt: skip
    out.table(table)
    return facts
