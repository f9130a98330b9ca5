"""Facts of compiled kernels: many at a time on two processes, kept by what they were made from.

A fact depends on the source, the tile, the machine and the compiler alone, so it is kept in the
user's cache under all of these and never read under others.
"""

from __future__ import annotations

import argparse
import functools
import hashlib
import inspect
import json
import multiprocessing
import os
import sys
import tempfile
from collections.abc import Callable, Iterable, Sequence
from concurrent.futures import ProcessPoolExecutor
from dataclasses import asdict
from pathlib import Path
from typing import Any

from ..compiler.ir.errors import LlmcError, ResourceError
from . import aot
from .aot import AotFacts, compile_variant
from .device import installed, interpreting
from .kernels import row as row_named
from .render import render
from .row import TileConfig
from .source import cache_folder
from .variants import SHARED, Variant, unsupported

PROCESSES = 2
COMMAND = "python -m llmc.codegen.facts spec/kernels.json"


def gather(
    wanted: Sequence[Variant],
    *,
    processes: int = PROCESSES,
    done: Callable[[int], None] = lambda count: None,
) -> list[AotFacts | str]:
    """The facts of variants, in their order; text where a row does not exist on the machine.

    ``done`` is called with how many are known. ResourceError when nothing can be compiled here.
    """
    compiler()
    if interpreting():
        raise ResourceError(
            "cannot compile ahead of time under TRITON_INTERPRET=1", hint="unset it and start again"
        )
    found: dict[Variant, AotFacts | str] = {}
    for variant in wanted:
        known = unsupported(row_named(variant.row), variant.target) or kept(variant)
        if known is not None:
            found[variant] = known
    left = [v for v in dict.fromkeys(wanted) if v not in found]
    done(len(found))
    for variant, facts in zip(left, _compiled(left, processes), strict=True):
        found[variant] = facts
        _keep(variant, facts)
        done(len(found))
    return [found[v] for v in wanted]


def _compiled(left: Sequence[Variant], processes: int) -> Iterable[AotFacts]:
    # Two variants take less than the start of a process that imports torch and Triton.
    if processes < 2 or len(left) < 4:
        yield from map(compiled, left)
        return
    # Spawned, not forked: torch keeps threads that a fork would lose.
    context = multiprocessing.get_context("spawn")
    with ProcessPoolExecutor(min(processes, len(left)), mp_context=context) as pool:
        yield from pool.map(compiled, left, chunksize=2)


def compiled(variant: Variant) -> AotFacts:
    """Compile one variant here and now."""
    row = row_named(variant.row)
    try:
        return compile_variant(row, variant.problem, variant.config, variant.target)
    except LlmcError:
        raise
    except Exception as error:
        what = str(error).strip().splitlines()
        told = what[-1] if what else type(error).__name__
        raise ResourceError(
            f"cannot compile {label(variant)}: {told}", where=f"kernel row {variant.row}"
        ) from error


def label(variant: Variant) -> str:
    """``w4a16 sides 8x32 sm_90``, as messages name a variant."""
    c = variant.config
    split = f"/{c.split}" if c.split > 1 else ""
    return f"{variant.row} {variant.what} {c.BM}x{c.BN}{split} {variant.target}"


def faults(variant: Variant, facts: AotFacts) -> list[str]:
    """What breaks the laws of every kernel: spills, too much shared memory, no tensor core."""
    row, found = row_named(variant.row), []
    problem = variant.problem
    if row.inner:
        row, problem = row.inner(row, problem, variant.config)
    if facts.stack or facts.local_memory:
        found.append(f"{facts.stack} bytes of stack, {facts.local_memory} local accesses")
    if facts.shared > SHARED[variant.target]:
        found.append(f"{facts.shared} bytes of shared memory")
    if row.product != "none":
        expected = row.matrix_instruction(variant.target, problem.x_dtype, variant.config)
        if not any(m.startswith(expected) for m in facts.matrix):
            found.append(f"expected {expected}, found {' '.join(facts.matrix) or 'none'}")
    return found


def compiler() -> str:
    """The version of Triton, which brings its own assembler. ResourceError without it."""
    if not installed():
        raise ResourceError(
            "cannot compile ahead of time: triton is not installed",
            hint="pip install 'triton>=3.6'",
        )
    import triton

    return str(triton.__version__)


def digest(variant: Variant) -> str:
    """SHA-256 over what the code of a variant depends on."""
    row, problem = row_named(variant.row), variant.problem
    if row.inner:
        row, problem = row.inner(row, problem, variant.config)
    told = [
        render(row, problem).digest, variant.fields, asdict(variant.config), variant.target,
        compiler(),
    ]  # fmt: skip
    return hashlib.sha256(json.dumps(told, sort_keys=True).encode()).hexdigest()


@functools.cache
def _reader() -> str:
    """What is read from the code, and how it is compiled, may change with `aot` alone."""
    return hashlib.sha256(inspect.getsource(aot).encode()).hexdigest()[:8]


def _path(variant: Variant) -> Path:
    return cache_folder().parent / "facts" / f"{digest(variant)[:32]}-{_reader()}.json"


def kept(variant: Variant) -> AotFacts | None:
    """Facts that an earlier call left in the cache; None where it left none."""
    try:
        return from_json(json.loads(_path(variant).read_text()))
    except (OSError, ValueError, TypeError, KeyError):
        return None  # nothing is kept, or nothing that can be read: it is compiled


def _keep(variant: Variant, facts: AotFacts) -> None:
    path = _path(variant)
    path.parent.mkdir(parents=True, exist_ok=True, mode=0o700)
    handle, temporary = tempfile.mkstemp(dir=path.parent, suffix=".tmp")
    with os.fdopen(handle, "w") as file:
        json.dump(facts.json(), file)
    os.replace(temporary, path)


def from_json(told: dict[str, Any]) -> AotFacts:
    """Facts from their plain values."""
    own = {**told, "config": TileConfig(**told["config"]), "matrix": tuple(told["matrix"])}
    return AotFacts(**own)


def page(wanted: Sequence[Variant], found: Sequence[AotFacts | str]) -> dict[str, Any]:
    """What `spec/kernels.json` holds: facts with the digest that they are for."""
    rows = []
    for variant, facts in zip(wanted, found, strict=True):
        told = {"row": variant.row, "what": variant.what, "target": variant.target,
                "config": asdict(variant.config), "problem": variant.fields}  # fmt: skip
        if isinstance(facts, str):
            rows.append(told | {"unsupported": facts})
        else:
            own = {k: v for k, v in facts.json().items() if k not in ("row", "target", "config")}
            rows.append(told | {"digest": digest(variant)[:16]} | own)
    return {"command": COMMAND, "triton": compiler(), "facts": rows}


def main() -> int:
    """Write the facts of all documented variants to the file named; exit 4 on any fault."""
    from .kernels import INNER, ROWS
    from .variants import variants

    parser = argparse.ArgumentParser(prog="python -m llmc.codegen.facts", description=main.__doc__)
    parser.add_argument("path", type=Path, help="the JSON file to write, as spec/kernels.json")
    path: Path = parser.parse_args().path
    wanted = variants((*ROWS, *INNER))
    found = gather(wanted)
    broken = [
        f"{label(v)}: {why}"
        for v, facts in zip(wanted, found, strict=True)
        if not isinstance(facts, str)
        for why in faults(v, facts)
    ]
    path.write_text(json.dumps(page(wanted, found), indent=1) + "\n")
    for line in broken:
        print(line, file=sys.stderr)
    return 4 if broken else 0


if __name__ == "__main__":
    sys.exit(main())
