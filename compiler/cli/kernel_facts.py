"""``llmc kernels --aot``: what the machine code of kernels shows, without a GPU."""

from __future__ import annotations

from dataclasses import asdict
from typing import TYPE_CHECKING, Any

from ..ir.errors import UsageError
from .output import Out
from .progress import Progress

if TYPE_CHECKING:
    from ...codegen.problem import Problem
    from ...codegen.variants import Variant


def documented(machines: tuple[str, ...], dtype: str, row_name: str | None) -> list[Variant]:
    """Every documented variant of every row, or of one. UsageError when there is none."""
    from ...codegen.kernels import INNER, ROWS, row
    from ...codegen.variants import variants

    rows = (*ROWS, *INNER) if row_name is None else (row(row_name),)
    found = variants(rows, machines, dtype)
    if not found:
        raise UsageError(f"expected a dtype that {row_name or 'a kernel'} serves, found {dtype}")
    return found


def of_problems(problems: list[Problem], machines: tuple[str, ...], tokens: int) -> list[Variant]:
    """A model's own problems at their untuned tiles."""
    from ...codegen.kernels import choose
    from ...codegen.variants import Variant

    found = []
    for problem in problems:
        row, _ = choose(problem)
        assert row is not None
        config = row.default_config(problem, tokens)
        found += [Variant(row.name, _sides(problem), problem, config, m) for m in machines]
    return found


def _sides(problem: Problem) -> str:
    told = [s for s in ("norm", "smooth", "bias", "residual") if getattr(problem, s)]
    told += [problem.pairs or problem.act] if problem.act else []
    told += [f"rank {problem.rank}"] if problem.rank else []
    return " ".join(told) or "plain"


def show_facts(wanted: list[Variant], out: Out) -> list[dict[str, Any]]:
    """Compile variants, print a table and give the facts as plain values, faults among them."""
    from ...codegen.facts import faults, gather
    from ..report.text import Table
    from .kernels import scheme_text

    table = Table("Compiled ahead of time",
                  ("kernel", "variant", "shape", "scheme", "machine", "tile", "registers", "stack",
                   "shared", "matrix", "LDL/STL", "loop stores", "slots per weight"),
                  right=("registers", "stack", "shared", "LDL/STL", "loop stores",
                         "slots per weight"))  # fmt: skip
    told: list[dict[str, Any]] = []
    with Progress("compiling", out) as bar:
        bar.steps(len(wanted))
        found = gather(wanted, done=bar.at)
    for variant, facts in zip(wanted, found, strict=True):
        p, c = variant.problem, variant.config
        tile = f"{c.BM}x{c.BN}" + (f"/{c.split}" if c.split > 1 else "")
        problem = asdict(p)
        head = (variant.row, variant.what, f"{p.N}x{p.K}", scheme_text(problem), variant.target)
        about = {"row": variant.row, "what": variant.what, "target": variant.target,
                 "config": asdict(c), "N": p.N, "K": p.K, "problem": problem}  # fmt: skip
        if isinstance(facts, str):
            told.append(about | {"unsupported": facts})
            table.rows.append((*head, tile, *("-",) * 3, "unsupported", *("-",) * 3))
            continue
        told.append(about | facts.json() | {"row": variant.row, "faults": faults(variant, facts)})
        table.rows.append((
            *head, tile, str(facts.registers), str(facts.stack), str(facts.shared),
            " ".join(facts.matrix) or "-", str(facts.local_memory), str(facts.loop_stores),
            str(facts.slots),
        ))  # fmt: skip
    out.table(table)
    for fact in told:
        for fault in fact.get("faults", ()):
            out.text(f"{fact['row']} {fact['what']} {fact['target']}: {fault}")
    return told
