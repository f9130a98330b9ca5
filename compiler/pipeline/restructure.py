"""One structural step: sites, a choice about all of them, and the program rewritten by it."""

from __future__ import annotations

import os
from collections.abc import Callable, Iterable
from dataclasses import dataclass, replace
from math import prod
from typing import Any

from ..analysis.blocks import apply_segments, is_block
from ..analysis.latents import renew_latents
from ..ir.errors import GateError
from ..ir.graph import Program
from ..ir.refusal import Refusal
from ..ir.segments import refresh_segments
from ..ir.verifier import verify, verify_interface
from .analysis import Analysis
from .order import LATE
from .recipe import Call, Override, at_site
from .structure import Choice, Structural

# How a step comes to its choice: by prediction or by measurement.
Choose = Callable[[Call, Analysis, list[Any]], Choice]


@dataclass(frozen=True)
class Step:
    """What one structural pass did.

    Attributes:
        stage: the recipe's stage in which the pass was asked for.
        sites: that it took; choice: what was decided about them.
        before, after: parameters, stored bytes and blocks of the program.
        resized: parameters with a new shape or tensor.
        covers: (site, kind, block, number of blocks) of each site, for overrides.
    """

    call: Call
    stage: int
    sites: int
    choice: Choice
    before: dict[str, int]
    after: dict[str, int]
    resized: tuple[str, ...]
    covers: tuple[tuple[str, str, int, int], ...]
    forwards: float
    held: int = 0

    def to_json(self, *, full: bool = False) -> dict[str, Any]:
        """The step as data; ``full`` adds what was decided and the rows of its measurement."""
        out: dict[str, Any] = {
            "pass": self.call.name, "stage": self.stage, "sites": self.sites,
            "exact": self.choice.exact, "before": self.before, "after": self.after,
            "resized": len(self.resized),
        }  # fmt: skip
        return out | {"choice": self.choice.data, "records": self.choice.records} if full else out


@dataclass(frozen=True)
class Taken:
    """A rewritten program, how it came about, and where the pass did not apply."""

    program: Program
    step: Step
    refusals: list[Refusal]


def checks_on() -> bool:
    """Whether the verifier runs after each pass (on unless LLMC_CHECK=0)."""
    return os.environ.get("LLMC_CHECK", "1") != "0"


def take(
    program: Program, call: Call, stage: int, overrides: Iterable[Override], choose: Choose
) -> Taken:
    """Run one structural pass on a clone of a segmented program.

    Blocks are found anew behind it, so their names count from 0 again; behind an exit pass they
    keep their names.
    Raises:
        GateError: the pass has no place here. UsageError: knobs that these sites cannot take.
        VerifierError: the rewrite broke a rule, or the program's inputs or outputs.
    """
    made = call.made
    assert isinstance(made, Structural)
    analysis = Analysis(program)
    found, refused = made.sites(analysis)
    refusals = [replace(r, by=call.name) for r in refused]
    sites = [s for s in found if own_call(call, overrides, s, analysis, refusals) is not None]
    if not sites:
        first = refusals[0] if refusals else None
        why = first.reason if first else "the graph has no such place"
        raise GateError(f"expected a place for {call.name}, found none: {why}",
                        where=f"node {first.node}" if first else "")  # fmt: skip
    choice = choose(call, analysis, sites)
    new = program.clone()
    resized = made.apply(new, choice)
    renew_latents(new, call.name)
    if made.stage in LATE:
        refresh_segments(new)
    else:
        new.segments = []
        apply_segments(new)
    if checks_on():
        verify(new)
        verify_interface(program, new)
    blocks = len(analysis.blocks)
    covers = tuple((s.id, kind_of(s), analysis.block_of(s.segment), blocks) for s in found)
    step = Step(
        call, stage, len(sites), choice, amounts(program), amounts(new), tuple(resized), covers,
        made.forwards(sites), made.held(sites),
    )  # fmt: skip
    return Taken(new, step, refusals)


def amounts(program: Program) -> dict[str, int]:
    """Parameters, stored bytes and blocks of a segmented program."""
    return {
        "parameters": sum(prod(p.shape) for p in program.params.values()),
        "bytes": program.weight_bytes(),
        "blocks": sum(is_block(s.name) for s in program.segments),
    }


def kind_of(site: Any) -> str:
    """What overrides call the site: its role, or the kind of thing that it is."""
    return str(getattr(site, "role", getattr(site, "kind", "")))


def own_call(
    call: Call, overrides: Iterable[Override], site: Any, analysis: Analysis, out: list[Refusal]
) -> Call | None:
    """The call as it stands at one site; None, and a refusal in ``out``, where it does not."""
    block = analysis.block_of(site.segment)
    own = at_site(call, list(overrides), site.id, kind_of(site), block, len(analysis.blocks))
    if own is None:
        node = getattr(site, "node", getattr(site, "value", site.id))
        out.append(Refusal(call.name, node, "the recipe skips it here", "override"))
        return None
    again = own.made.test(site) if own is not call else None
    if again is not None:
        out.append(again)
        return None
    return own
