"""The trace of a run: every graph before and after each pass as runnable Python, and every event.

    000_captured.py  001_smooth_before.py  001_smooth_after.py  …  the graphs of the last plan
    events.jsonl     one event per line as it happens, with seconds, memory and its peak
    rules.json       per rule: places taken, near misses by failing condition, the first of each;
                     per pass also seconds of solving and the peak of memory by then; weights
                     that several passes solve jointly count for each of them

Weights are not in it. A folder that holds an earlier trace is taken over; any other is refused.
"""

from __future__ import annotations

import json
import os
import resource
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch

from ..ir.errors import ResourceError, UsageError
from ..ir.events import Event, hearing
from ..ir.graph import DictWeights, Program
from ..ir.printer import print_python
from ..ir.serial import attach, from_json, provenance

VARIABLE = "LLMC_TRACE"
EVENTS, RULES = "events.jsonl", "rules.json"
# Trace folders of this process: a second run inside one goes to a numbered folder of its own.
_USED: set[Path] = set()


@contextmanager
def tracing(folder: str | Path | None = None) -> Iterator[Trace | None]:
    """Trace what happens inside, to ``folder`` or else to the one that LLMC_TRACE names.

    Raises:
        UsageError: a folder that holds something else. ResourceError: one that cannot be written.
    """
    wanted = folder or os.environ.get(VARIABLE)
    if not wanted:
        yield None
        return
    trace = Trace(_own(Path(wanted).expanduser().absolute()))
    with hearing(trace):
        try:
            yield trace
        except BaseException as error:
            trace(Event("failed", {"error": f"{type(error).__name__}: {error}"}))
            raise
        finally:
            trace.close()


def _own(folder: Path) -> Path:
    place, count = folder, 1
    while place in _USED:
        count += 1
        place = folder / str(count)
    _USED.add(place)
    return place


class Trace:
    """A listener that writes what it hears to a folder."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self.rules: dict[str, dict[str, Any]] = {}
        self._began = time.perf_counter()
        try:
            folder.mkdir(parents=True, exist_ok=True)
            self._take_over()
            self._events = open(folder / EVENTS, "w", encoding="utf-8")  # noqa: SIM115
        except OSError as error:
            raise ResourceError(
                "expected a trace folder that can be written, found one that cannot "
                f"({error.strerror})",
                where=str(folder), hint=f"name another one by --trace or {VARIABLE}",
            ) from error  # fmt: skip

    def _take_over(self) -> None:
        """Remove an earlier trace.

        Raises:
            UsageError: the folder holds something that no trace has.
        """
        found = sorted(self.folder.iterdir())
        files = [p for p in found if not (p.is_dir() and p.name.isdigit())]
        strange = [p.name for p in files if not _is_ours(p)]
        if strange or (files and not (self.folder / EVENTS).is_file()):
            name = strange[0] if strange else files[0].name
            raise UsageError(
                f"expected an empty folder or an earlier trace at {self.folder}, found {name}",
                hint="name another folder",
            )
        for path in files:
            path.unlink()

    def __call__(self, event: Event) -> None:
        if event.kind == "laid":
            self._graphs(event.data["plan"])
            data: dict[str, Any] = {
                "decided": event.data["decided"],
                "graphs": [s.name for s in event.data["plan"].snapshots],
            }
        else:
            data = event.data
        if event.kind == "rule":
            self._count(data)
            missed = data["refused"]
            data = {**data, "refused": len(missed), "first": missed[0] if missed else None}
        now, most = memory()
        for name in data.get("passes", ()) if event.kind == "site" else ():
            rule = self._rule(name)
            rule["solved"] = rule.get("solved", 0) + 1
            rule["solve_seconds"] = rule.get("solve_seconds", 0.0) + data.get("seconds", 0.0)
            rule["peak_bytes"] = most
        line = {
            "t": round(time.perf_counter() - self._began, 6), "kind": event.kind, **data,
            "bytes": now, "peak_bytes": most,
        }  # fmt: skip
        self._events.write(json.dumps(line, default=_plain, ensure_ascii=False) + "\n")
        self._events.flush()

    def _graphs(self, plan: Any) -> None:
        """Write the graphs of a plan; those of an earlier plan go."""
        for path in self.folder.glob("[0-9][0-9][0-9]_*.py"):
            path.unlink()
        before: Program | None = None
        origin = _origin(plan)
        for number, snapshot in enumerate(plan.snapshots):
            after = from_json(snapshot.graph, DictWeights())
            attach(after, {
                "nodes": {n.name: origin["nodes"][n.name] for n in after.graph.nodes
                          if n.name in origin["nodes"]},
                "params": {n: origin["params"][n] for n in after.params if n in origin["params"]},
            })  # fmt: skip
            name = f"{number:03}_{snapshot.name}"
            if before is None:
                self._write(f"{name}.py", after, snapshot.name)
            else:
                self._write(f"{name}_before.py", before, plan.snapshots[number - 1].name)
                self._write(f"{name}_after.py", after, snapshot.name)
            before = after

    def _write(self, name: str, program: Program, title: str) -> None:
        (self.folder / name).write_text(print_python(program, title), encoding="utf-8")

    def _count(self, data: dict[str, Any]) -> None:
        rule = self._rule(data["name"])
        rule["asked"] += 1
        rule["taken"] += data["taken"]
        rule["seconds"] += data["seconds"]
        for miss in data["refused"]:
            seen = rule["misses"].setdefault(miss["predicate"], {"count": 0, "first": miss})
            seen["count"] += 1

    def _rule(self, name: str) -> dict[str, Any]:
        empty: dict[str, Any] = {"asked": 0, "taken": 0, "seconds": 0.0, "misses": {}}
        return self.rules.setdefault(name, empty)

    def close(self) -> None:
        """Write the statistics of the rules and end the list of events."""
        text = json.dumps(self.rules, indent=1, ensure_ascii=False) + "\n"
        (self.folder / RULES).write_text(text, encoding="utf-8")
        self._events.close()


def _plain(value: Any) -> Any:
    """What JSON has no word for: a tensor by its size and spread, anything else as text."""
    if not isinstance(value, torch.Tensor):
        return str(value)
    told: dict[str, Any] = {"shape": list(value.shape)}
    if value.numel() and not value.is_complex():
        wide = value.double()
        told |= {"min": float(wide.min()), "mean": float(wide.mean()), "max": float(wide.max())}
    return told


def _origin(plan: Any) -> dict[str, Any]:
    """Where the nodes and parameters of all its graphs come from; snapshots hold none of it."""
    found = [provenance(p) for p in (plan.program, plan.source, plan.captured)]
    return {key: {n: v for one in found for n, v in one[key].items()} for key in found[0]}


def _is_ours(path: Path) -> bool:
    number, _, rest = path.name.partition("_")
    graph = len(number) == 3 and number.isdigit() and rest.endswith(".py")
    return path.is_file() and (graph or path.name in (EVENTS, RULES))


def memory() -> tuple[int | None, int]:
    """Resident bytes of this process now, where the system tells, and at most so far."""
    most = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024
    try:
        with open("/proc/self/statm") as file:
            return int(file.read().split()[1]) * os.sysconf("SC_PAGE_SIZE"), most
    except OSError:
        return None, most
