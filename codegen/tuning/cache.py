"""Measured choices, kept per machine: `llmc tune` writes them, lowering reads them.

A file holds what one machine measured with one version of torch and of llmc. Another machine's or
version's numbers say nothing about this one, so they are never used; `read` says why.
"""

from __future__ import annotations

import functools
import json
import os
import re
import sys
import tempfile
from collections.abc import Iterable, Mapping
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

import torch

from ...compiler.ir.errors import ModelError, ResourceError

FORMAT = 1
# The package's own version, without an import of what stands above this layer.
_LLMC = str(sys.modules[__name__.partition(".")[0]].__version__)


@dataclass(frozen=True)
class Machine:
    """What measurements hold for: the processor or GPU, torch, llmc and what compiles kernels."""

    target: str
    name: str
    torch: str = torch.__version__
    llmc: str = _LLMC
    compiler: str = ""

    def differs(self, other: Machine) -> str | None:
        """In which field another machine differs, in words; None when it does not."""
        for what, mine in asdict(self).items():
            found = getattr(other, what)
            if found != mine:
                return f"expected {what} {mine}, found {found}"
        return None


@dataclass(frozen=True)
class Entry:
    """What was measured of one problem at one number of tokens.

    Attributes:
        key: scheme and shape, as the target words them. seconds: by candidate.
    """

    key: str
    tokens: int
    seconds: Mapping[str, float]

    @property
    def best(self) -> str:
        """The fastest candidate."""
        return min(self.seconds, key=lambda name: self.seconds[name])


@dataclass(frozen=True)
class Table:
    """Entries of one machine; ``source`` says where they come from."""

    machine: Machine
    entries: tuple[Entry, ...] = ()
    source: str = "measured"

    def of(self, key: str) -> list[Entry]:
        """The entries of a key, by rising number of tokens."""
        return self._by_key.get(key, [])

    @functools.cached_property
    def _by_key(self) -> dict[str, list[Entry]]:
        found: dict[str, list[Entry]] = {}
        for entry in sorted(self.entries, key=lambda e: e.tokens):
            found.setdefault(entry.key, []).append(entry)
        return found

    def with_entries(self, more: Iterable[Entry]) -> Table:
        """This table with entries added; one of the same key and tokens is replaced."""
        merged = {(e.key, e.tokens): e for e in (*self.entries, *more)}
        return Table(self.machine, tuple(merged.values()), self.source)

    def to_json(self) -> dict[str, Any]:
        """As it is written."""
        rows = [
            {"key": e.key, "tokens": e.tokens, "best": e.best, "seconds": dict(e.seconds)}
            for e in sorted(self.entries, key=lambda e: (e.key, e.tokens))
        ]
        machine = {k: v for k, v in asdict(self.machine).items() if v}
        return {"format": FORMAT, "machine": machine, "entries": rows}


@dataclass(frozen=True)
class Found:
    """What lies in the cache for a machine: a table, or the reason why there is none to use."""

    path: Path
    table: Table | None = None
    reason: str = ""
    others: tuple[Path, ...] = field(default=())


def cpu_name() -> str:
    """The processor in words: its model, and the instructions that matrix products depend on."""
    text = ""
    try:
        text = Path("/proc/cpuinfo").read_text()
    except OSError:
        import platform

        text = f"model name : {platform.processor() or platform.machine()}"
    fields = dict(re.findall(r"^([^\t:]+?)\s*:\s*(.*)$", text, re.MULTILINE))
    told = [fields.get("model name") or fields.get("CPU part") or "unknown processor"]
    if "cpu family" in fields:
        told.append(f"family {fields['cpu family']} model {fields.get('model', '?')}")
    has = set((fields.get("flags") or fields.get("Features") or "").split())
    wanted = ("avx2", "avx512f", "avx512_vnni", "avx512_bf16", "amx_bf16", "amx_int8", "asimddp",
              "bf16", "i8mm")  # fmt: skip
    return ", ".join([*told, *(w for w in wanted if w in has)])


def folder() -> Path:
    """`$XDG_CACHE_HOME/llmc/tuned`, or under ~/.cache."""
    base = os.environ.get("XDG_CACHE_HOME") or os.path.join(os.path.expanduser("~"), ".cache")
    return Path(base) / "llmc" / "tuned"


def path_of(machine: Machine) -> Path:
    """Where a machine's table lies: one file per target and device name."""
    slug = re.sub(r"[^a-z0-9]+", "-", machine.name.lower()).strip("-")[:120]
    return folder() / f"{machine.target}-{slug}.json"


def read(machine: Machine) -> Found:
    """The table that was measured on `machine`; without one, why what lies there is not used."""
    path = path_of(machine)
    others = tuple(p for p in sorted(folder().glob(f"{machine.target}-*.json")) if p != path)
    if not path.is_file():
        why = "nothing was measured on this machine"
        if others:
            why += f" ({len(others)} of other machines are not used)"
        return Found(path, None, why, others)
    try:
        table = parse(path.read_text(), str(path))
    except (ModelError, OSError, UnicodeDecodeError) as error:
        return Found(path, None, f"cannot be read: {error}", others)
    differs = machine.differs(table.machine)
    if differs is not None:
        return Found(path, None, f"{differs}; measure again with llmc tune", others)
    return Found(path, table, "", others)


def parse(text: str, where: str, source: str = "measured") -> Table:
    """A table from its JSON. ModelError when it is none."""
    try:
        raw = json.loads(text)
        if raw["format"] != FORMAT:
            raise ModelError(f"expected format {FORMAT}, found {raw['format']}", where=where)
        entries = tuple(
            Entry(str(e["key"]), int(e["tokens"]), {str(k): float(v) for k, v in
                                                    e["seconds"].items()})
            for e in raw["entries"]
        )  # fmt: skip
        table = Table(Machine(**raw["machine"]), entries, source)
    except (ValueError, KeyError, TypeError, AttributeError) as error:
        what = f"{type(error).__name__}: {error}"
        raise ModelError(f"expected a table of measurements, found {what}", where=where) from None
    if any(not e.seconds or min(e.seconds.values()) <= 0 or e.tokens < 1 for e in entries):
        raise ModelError("expected times above 0 at 1 token or more, found others", where=where)
    return table


def write(table: Table) -> Path:
    """Put a table into the cache, whole or not at all. ResourceError when it cannot be written."""
    path = path_of(table.machine)
    try:
        path.parent.mkdir(parents=True, exist_ok=True, mode=0o700)
        handle, temporary = tempfile.mkstemp(dir=path.parent, suffix=".tmp")
        with os.fdopen(handle, "w") as file:
            json.dump(table.to_json(), file, indent=1)
            file.write("\n")
        os.replace(temporary, path)
    except OSError as error:
        raise ResourceError(f"cannot write measurements: {error}", where=str(path)) from error
    return path
