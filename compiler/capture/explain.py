"""Why a program is no model of its config: the first difference that nothing could remove."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass
from typing import Any

from torch import fx

from ..ir.errors import UsageError
from ..ir.graph import Program, info
from .bisimulate import Difference

# The likeliest cause first: a size that differs makes other things differ too.
_ORDER = ("bias", "size", "constant", "number", "param", "op")


@dataclass(frozen=True)
class Barred:
    """A change of one field, from ``old`` to ``new``, that the model's class refused, and how."""

    change: str
    old: Any
    new: Any
    words: str


def refusal(
    program: Program,
    differences: list[Difference],
    given: dict[str, tuple[Any, Any]],
    barred: Iterable[Barred],
) -> UsageError:
    """The error that names layer, and size, bias or op, and what to do.

    Args:
        differences: what is left under the nearest config; not empty.
        given: (wanted, given) shape by name of every parameter.
        barred: changes that would have given a size that is wanted, were they allowed.
    """
    stored = [d for d in differences if d.kind == "size" and d.axis >= 0]
    if stored:
        for b in barred:
            alike = [d for d in stored if b.words and d.theirs * b.new == d.ours * b.old]
            if alike:
                return _size(alike[0], given, f"its class refuses {b.change}: {b.words}")
        return _size(stored[0], given, "")
    first = min(differences, key=lambda d: _ORDER.index(d.kind))
    more = f" ({len(differences) - 1} more)" if len(differences) > 1 else ""
    node = program.node(first.node)
    where = f"{first.path or 'node ' + first.node}, node {first.node}"
    match first.kind:
        case "bias":
            return UsageError(
                f"expected no bias beside {first.name}, its model has no place for one, found one "
                f"of {first.ours} added by {_maker(node.args[2:])}{more}", where=where,
                hint="compile with compensate=none, which adds no biases",
            )  # fmt: skip
        case "constant":
            return UsageError(
                f"expected {first.name} to be {_short(first.theirs)}, as the model computes it "
                f"from its config, found {_short(first.ours)}{more}", where=where,
                hint="keep the size that it is computed from",
            )  # fmt: skip
        case "size" | "number":
            return UsageError(
                f"expected {first.theirs}, as the config gives it, found {first.ours}; no field of "
                f"the config changes it alone{more}", where=where,
                hint="keep what depends on it uniform, or save an artefact instead",
            )  # fmt: skip
        case "param":
            return UsageError(
                f"expected one tensor for {first.name}, found two ({first.theirs} and {first.ours})"
                f"{more}", where=where,
                hint="the model stores both as one: leave them equal",
            )  # fmt: skip
    made = info(node).made_by
    return UsageError(
        f"expected {first.theirs}, as the model computes, found {first.ours}, made by {made}{more}",
        where=where, hint="its model has no place for this; save an artefact instead",
    )  # fmt: skip


def _size(d: Difference, given: dict[str, tuple[Any, Any]], told: str) -> UsageError:
    """A parameter of the wrong length: not uniform, or tied to another size by the config."""
    for name, (want, have) in given.items():
        if name == d.name or want != have:
            continue
        # What the nearest config says of both is true of this one.
        if _alike(name, d.name) and d.theirs in have:
            return UsageError(
                f"expected one size in every block, found {d.ours} in {d.name} and {d.theirs} in "
                f"{name}", where=d.path,
                hint="prune with uniform=true to export, or save an artefact instead",
            )  # fmt: skip
    return UsageError(
        f"expected {d.theirs} along axis {d.axis} of {d.name}, as the config gives it, found "
        f"{d.ours}: no field of the config changes that size alone", where=d.path,
        hint=told
        or "this structure cannot be cut in this architecture's config; save an artefact instead",
    )  # fmt: skip


def _maker(values: Any) -> str:
    """The pass that made an argument."""
    return next((info(v).made_by for v in values if isinstance(v, fx.Node)), "a pass")


def _alike(one: str, two: str) -> bool:
    """Whether two names are one parameter of two blocks: they differ in one number."""
    a, b = one.split("."), two.split(".")
    if len(a) != len(b):
        return False
    apart = [(x, y) for x, y in zip(a, b, strict=True) if x != y]
    return len(apart) == 1 and all(x.isdigit() for x in apart[0])


def _short(value: Any) -> str:
    return f"{float(value):.6g}" if value.numel() == 1 else f"a tensor {list(value.shape)}"
