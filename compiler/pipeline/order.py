"""The pass algebra: one visible list of stages with a reason on each line, and what it forbids.

Inside one ``--passes`` string the planner sorts by this list; across barriers the typed order is
kept, and refused where it has no meaning.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from ..ir.errors import UsageError

# (stage, what it writes, why it stands here)
STAGES: tuple[tuple[str, str, str], ...] = (
    ("depth", "blocks", "whole blocks go first: nothing is measured in a block that will be gone"),
    (
        "attention",
        "what tokens read",
        "what tokens may read is settled before anything is measured on what they have read",
    ),
    (
        "heads",
        "shared heads",
        "heads are shared before widths are cut, so that what is cut is what stays",
    ),
    (
        "latents",
        "channels of heads",
        "heads are narrowed once it is known which of them there are, before widths are cut",
    ),
    (
        "width",
        "widths",
        "a new shape makes scales, zeros and codes stale, so widths come before all three",
    ),
    (
        "embedding",
        "embedding tables",
        "a table is factored in the width that it keeps, before anything is measured behind it",
    ),
    (
        "factor",
        "ranks",
        "a weight is factored in the width that it keeps, and its factors are what is folded, "
        "masked and put on grids",
    ),
    (
        "experts",
        "factors of experts",
        "experts are factored behind single weights, which leave the linears between alone",
    ),
    (
        "permute",
        "orders of channels",
        "channels are put in order before anything is measured that groups them",
    ),
    (
        "rotate",
        "rotations of channels",
        "a rotation mixes the channels, so what scales, masks or rounds single ones comes after it",
    ),
    (
        "equivalence",
        "scales",
        "scales must be folded before anything is measured on a grid or mask",
    ),
    ("inputs", "input grids", "a range is calibrated on the values that moved scales leave"),
    ("mask", "zeros", "OBS updates leave the grid, so zeros are chosen before or with codes"),
    ("grid", "codes", "codes are last: nothing may move a weight that is on its grid"),
    (
        "compensation",
        "low rank",
        "low rank gives back what codes and zeros of the same string have lost",
    ),
    ("kv", "caches", "what caches keep is measured on the weights that will make it"),
    ("exit", "exits", "exits are calibrated last, on the model that will take them"),
)
# Stages that change shapes or topology, before anything is written into a weight.
SHAPES = ("depth", "attention", "heads", "latents", "width", "embedding", "factor", "experts")
STALE = (
    "what changes shapes, or what tokens read, makes the scales, zeros and codes that are there "
    "stale"
)
RANK = {stage: i for i, (stage, _, _) in enumerate(STAGES)}
# Stages that are decided on the finished program.
LATE = ("kv", "exit")
# Stages whose facts are solved together when they stand in one string.
JOINT = ("inputs", "mask", "grid", "compensation")


@dataclass(frozen=True)
class Named:
    """A pass as typed: its name and its stage."""

    name: str
    stage: str


def resolve(passes: Sequence[Named]) -> list[int]:
    """Indices of one string's passes in the order in which they are applied.

    Raises:
        UsageError: two passes state the same fact about the same weights, or nothing has lost what
            one is to give back.
    """
    seen: dict[str, str] = {}
    for p in passes:
        # Two that move scales may speak about different edges; the plan refuses the same one.
        if p.stage in seen and (p.stage != "equivalence" or p.name == seen[p.stage]):
            what = next(w for s, w, _ in STAGES if s == p.stage)
            raise UsageError(
                f"expected one pass that writes {what} in --passes, "
                f"found {seen[p.stage]!r} and {p.name!r}",
                hint="give one of them, or use per-site overrides in a recipe",
            )
        seen[p.stage] = p.name
    alone = seen.get("compensation")
    if alone is not None and not {"mask", "grid"} & set(seen):
        raise UsageError(
            f"expected a grid or a mask beside {alone!r} in one --passes, found none: "
            "it gives back what they lose while they are solved",
            hint=f"--passes w4,{alone}",
        )
    return sorted(range(len(passes)), key=lambda i: RANK[passes[i].stage])


def check_barriers(strings: Sequence[Sequence[Named]]) -> None:
    """Refuse an order of barriers that has no meaning.

    Raises:
        UsageError: with the reason and the nearest legal order.
    """
    done: list[Named] = []
    for string in strings:
        for p in string:
            for earlier in done:
                # Scales that are measured anew multiply those that were folded before.
                again = earlier.stage == p.stage != "equivalence"
                if RANK[earlier.stage] > RANK[p.stage] or again:
                    stale = p.stage in SHAPES and earlier.stage not in SHAPES
                    why = STALE if stale else reason(earlier.stage)
                    legal = _legal([n for s in strings for n in s])
                    raise UsageError(
                        f"expected {p.name!r} before {earlier.name!r}, found it behind a barrier "
                        f"after it: {why}",
                        hint=f"nearest legal order: {legal}",
                    )
        done.extend(string)


def _legal(names: Sequence[Named]) -> str:
    kept: dict[str, Named] = {}
    for n in names:
        kept.setdefault(n.stage, n)
    ordered = sorted(kept.values(), key=lambda n: RANK[n.stage])
    return "--passes " + ",".join(n.name for n in ordered)


def reason(stage: str) -> str:
    """Why the stage stands where it does."""
    return next(r for s, _, r in STAGES if s == stage)
