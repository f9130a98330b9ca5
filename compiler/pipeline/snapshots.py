"""The graph behind each pass: kept for ``llmc diff`` and the artefact, told to whoever traces."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from ..ir.events import rule_event, tell
from ..ir.graph import Program
from ..ir.refusal import Refusal
from ..ir.serial import to_json
from .recipe import Call


@dataclass(frozen=True)
class Snapshot:
    """The graph after one pass, without tensors, and the parameters that the pass rewrote."""

    name: str
    graph: dict[str, Any]
    rewrote: tuple[str, ...]
    sites: int
    effect: str


def keep(
    call: Call, program: Program, rewrote: tuple[str, ...], sites: int,
    refused: Sequence[Refusal], began: float,
) -> Snapshot:  # fmt: skip
    """The snapshot behind a pass, told; ``began`` is when it did, by ``time.perf_counter``."""
    tell(rule_event(call.name, sites, refused, len(program.graph.nodes), began))
    return Snapshot(call.name, to_json(program), rewrote, sites, str(call.made.effect))
