"""Which recipes stand in the table of methods: made from the pass registry, so new passes join it.

Every pass that writes codes comes with each number of bits and each solver that it takes; passes
that keep the function come in front of a few grids; what gives back, rounds inputs or keeps caches
stands beside some. A short list adds the knobs that a paper is known for.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, field
from typing import Any

from llmc.compiler.ir.errors import UsageError
from llmc.compiler.pipeline.base import Exact, Knob, Pass
from llmc.compiler.pipeline.coding import RoundedCoding
from llmc.compiler.pipeline.recipe import from_strings
from llmc.compiler.pipeline.registry import all_passes

BITS = (4, 3, 2)
GRIDS = ("w4", "w3", "w2")
"""Uniform grids that every method of as many bits is held against."""
WEIGHTS, INPUTS, MOVED, BESIDE, CACHES, MIXED = (
    "weights", "weights and inputs", "scales moved first", "given back", "caches", "mixed",
)  # fmt: skip

KINDS = (WEIGHTS, MOVED, BESIDE, MIXED, INPUTS, CACHES)

# (kind, recipe): knobs that papers are known for, and strings of several parts.
CHOSEN = (
    (WEIGHTS, "w4:clip=absmax"),
    (WEIGHTS, "w4:clip=percentile"),
    (WEIGHTS, "w4:clip=output"),
    (WEIGHTS, "w4:clip=learned"),
    (WEIGHTS, "w2:clip=learned"),
    (WEIGHTS, "w4:act_order=true"),
    (WEIGHTS, "w2:act_order=true"),
    (WEIGHTS, "w4:symmetric=false"),
    (WEIGHTS, "w2:symmetric=false"),
    (WEIGHTS, "w4:group=row"),
    (WEIGHTS, "w4:group=32"),
    (WEIGHTS, "w2:group=32"),
    (WEIGHTS, "w4:group=auto"),
    (WEIGHTS, "w4:sweeps=2"),
    (WEIGHTS, "w3:sweeps=2"),
    (WEIGHTS, "w2:sweeps=2"),
    (WEIGHTS, "nf4:double=true,solver=rtn"),
    (WEIGHTS, "fp4:power=true"),
    (WEIGHTS, "spqr:bits=3,threshold=none"),
    (INPUTS, "w8a8:act=tensor"),
    (INPUTS, "w8a8:act=static,act_group=32"),
    (INPUTS, "zeroquant_fp:act_format=e2m1"),
    (INPUTS, "olive:act_bits=none"),
    (WEIGHTS, "w4:clip=absmax,solver=rtn"),
    (MOVED, "awq,w4:clip=absmax,solver=rtn"),
    (WEIGHTS, "w4:clip=absmax,symmetric=false,solver=rtn"),
    (MOVED, "awq,w4:clip=absmax,symmetric=false,solver=rtn"),
    (MOVED, "awq,w4:solver=rtn"),
    (MOVED, "awq,w3:solver=rtn"),
    (MOVED, "awq,w2:solver=rtn"),
    (MOVED, "awq,w4:clip=output"),
    (MOVED, "omniquant,w3:clip=learned"),
    (MOVED, "omniquant,w2:clip=learned"),
    (MOVED, "smooth,w8a8:act=static"),
    (MOVED, "smooth,w8a8:act=tensor"),
    (MOVED, "os_plus,w8a8:act=static"),
    (MOVED, "smooth,int8_split"),
    (MOVED, "rptq,w8a8:act=static,act_group=32"),
    (BESIDE, "smooth,w4,lorc"),
    (BESIDE, "awq,w2,lorc:rank=16"),
)
# What a pass that keeps the function is tried in front of.
BEHIND = ("w4", "w3", "w2", "w8a8")
# Bits per weight that a choice between grids is asked for: those of uniform w4 and w3 in groups of
# 128, and some between.
BUDGETS = (4.125, 3.625, 3.125, 2.625)


@dataclass(frozen=True)
class Row:
    """One line of the table: a recipe, what kind of method it is, options beside the recipe."""

    kind: str
    passes: str
    options: dict[str, Any] = field(default_factory=dict, compare=False)

    @property
    def key(self) -> str:
        """Names the row in the cache and on the command line."""
        return " ".join([self.passes, *(f"--{k} {v}" for k, v in self.options.items())]).strip()


def rows(of_layer: bool) -> list[Row]:
    """All lines by kind; of a single layer neither caches nor what needs a model's loss."""
    out = [*_grids(of_layer), *(Row(k, p) for k, p in CHOSEN if _known(p)), *_companions()]
    if not of_layer:
        out += [*_caches(), *_mixed()]
    else:
        # No channel of a single layer is free to be reordered: X and the outputs are given.
        out = [r for r in out if "permute" not in _stages(r.passes)]
    found = list({r.key: r for r in out}.values())
    return sorted(found, key=lambda r: KINDS.index(r.kind))


def _classes() -> dict[type[Pass], list[str]]:
    found: dict[type[Pass], list[str]] = {}
    for name, made in all_passes().items():
        found.setdefault(made, []).append(name)
    return found


def _stages(passes: str) -> set[str]:
    return {c.made.stage for c in from_strings([passes]).calls}


def _known(passes: str) -> bool:
    """Whether every pass of the string exists and takes its knobs."""
    try:
        from_strings([passes])
    except UsageError:
        return False
    return True


def _bits(made: type[Pass], name: str) -> list[int | None]:
    """Values of the knob ``bits`` to try; None where the variant has set it or has none."""
    knobs = made.knobs()
    if "bits" not in knobs or "bits" in made.variants[name]:
        return [None]
    default = _default(knobs["bits"])
    return [b for b in (8, *BITS) if b == default or b in BITS]


def _default(k: Knob) -> int:
    return int(k.default)


def _text(name: str, **knobs: Any) -> str:
    given = [f"{k}={v}" for k, v in knobs.items() if v is not None]
    return name + (":" + ",".join(given) if given else "")


def _grids(of_layer: bool) -> Iterator[Row]:
    """Every pass that writes codes, by bits, solver and, for inputs, how they are scaled."""
    for made, names in _classes().items():
        if made.stage != "grid":
            continue
        knobs = made.knobs()
        solvers = [None, *(s for s in knobs["solver"].choices if s != knobs["solver"].default)]
        rounds = issubclass(made, RoundedCoding)
        # Only a whole model has the loss whose Fisher information this would be.
        weigh = "gram" if of_layer and "weigh" in knobs else None
        for name in names:
            for bits in _bits(made, name):
                shown = None if bits is not None and bits == _default(knobs["bits"]) else bits
                texts = [_text(name, bits=shown, solver=s, weigh=weigh) for s in solvers]
                if rounds:
                    texts.append(_text(name, bits=shown, act="static"))
                kind = INPUTS if rounds else WEIGHTS
                yield from (Row(kind, t) for t in texts if _known(t))


def _companions() -> Iterator[Row]:
    """Passes that stand beside a grid: exact ones before it, low rank behind it, input grids."""
    for made, names in _classes().items():
        for name in names:
            if isinstance(made.effect, Exact):
                texts, kind = [f"{name},{g}" for g in BEHIND], MOVED
            elif made.stage == "compensation":
                texts, kind = [f"{g},{name}" for g in GRIDS], BESIDE
            elif made.stage == "inputs":
                texts, kind = [f"{g},{name}" for g in ("w4", "nf4")], INPUTS
            else:
                continue
            yield from (Row(kind, t) for t in texts if _known(t))


def _caches() -> Iterator[Row]:
    for made, names in _classes().items():
        for name in names if made.stage == "kv" else ():
            for bits in _bits(made, name):
                default = bits is None or bits == _default(made.knobs()["bits"])
                if _known(text := _text(name, bits=None if default else bits)):
                    yield Row(CACHES, text)


def _mixed() -> Iterator[Row]:
    """Bits chosen for each fused group of weights under a budget of stored bits."""
    yield from (Row(MIXED, "w4", {"bits": b}) for b in BUDGETS)
    yield Row(MIXED, "awq,w4", {"bits": BUDGETS[0]})
