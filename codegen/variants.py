"""The documented variants of every kernel row: what is compiled ahead of time and told of.

They follow from the row's own data: a problem that it is made for, the same with a zero point, with
every side input, behind a layer norm, with a norm of its result, joined in pairs, beside a product
of low rank and beside sparse entries, joined with factors kept apart, with an input that it puts on
a grid, each as far as the row serves it, at one token and at a tile of sixteen.
"""

from __future__ import annotations

import functools
import itertools
from collections.abc import Iterable, Iterator
from dataclasses import asdict, dataclass, replace
from typing import Any

from .problem import DEFAULTS, Problem
from .row import KernelRow, TileConfig

TARGETS = ("sm_80", "sm_90")
# Shared memory that a block may take, bytes.
SHARED = {"sm_80": 163 * 1024, "sm_90": 227 * 1024}
SIZE = 4096
# What is tried, in order, to find a problem that a row is made for.
_BITS = (4, 8, 3, 2, 16, 6, 5, 1)
_GROUPS = (128, 64, 256, 0)
_SPARSE = ((0, 0), (2, 4))
_EXPERTS = {"experts": 8, "chosen": 2}
_GATES = {"routed": "up", "pairs": "gate", "act": "silu"}
# Changes of the plain problem, each with the tokens of its tile.
_CHANGES: tuple[tuple[str, dict[str, Any], int], ...] = (
    ("plain", {}, 1),
    ("plain", {}, 16),
    ("zero points", {"asym": True, "x_dtype": "bf16"}, 16),
    ("sides", {"asym": True, "bias": True, "residual": True, "norm": True, "eps": 1e-6}, 1),
    ("sides", {"bias": True, "residual": True, "norm": True, "eps": 1e-6}, 1),
    ("layer norm", {"bias": True, "norm": True, "centred": True, "eps": 1e-5}, 1),
    ("norm behind", {"residual": True, "out_norm": True, "out_eps": 1e-6}, 1),
    ("norm behind", {"residual": True, "out_norm": True, "out_eps": 1e-6}, 16),
    ("gate", {"norm": True, "pairs": "gate", "act": "silu", "eps": 1e-6}, 1),
    ("rank 64", {"rank": 64}, 1),
    ("joined", {"spans": "2048x800 1024x300 1024x300", "rank": 1400}, 1),
    (
        "joined gate",
        {"spans": "2048x800 2048x600", "rank": 1400, "pairs": "gate", "act": "silu"},
        1,
    ),
    ("entries", {"sparse": True}, 1),
    ("columns", {"outliers": 32}, 16),
    ("groups of 16", {"group": 16, "asym": True}, 1),
    ("rounded", {"rounds": "int8 token", "norm": True, "eps": 1e-6}, 1),
    (
        "rotated",
        {"norm": True, "eps": 1e-6, "mixed": True, "out_mixed": "2048 1024 1024", "bias": True},
        1,
    ),
    (
        "rotated sum",
        {"smooth": True, "mixed": True, "out_mixed": "4096", "residual": True, "K": 14336},
        1,
    ),
    ("experts", {**_EXPERTS, **_GATES, "norm": True, "eps": 1e-6, "route": "softmax sum"}, 1),
    (
        "experts of groups",
        {
            **_EXPERTS,
            **_GATES,
            "norm": True,
            "eps": 1e-6,
            "experts": 64,
            "chosen": 12,
            "always": 4,
            "route": "sigmoid added groups=6:3:two sum+1e-20 times=2.5 gated",
        },
        1,
    ),
    ("experts told", {**_EXPERTS, **_GATES}, 1),
    ("experts summed", {**_EXPERTS, "routed": "down", "residual": True}, 1),
)
# Changes that are compiled for some rows alone, as they touch others at the same place.
_SOME = {
    "layer norm": ("w4a16", "w8a8", "round_int8"),
    "norm behind": ("w4a16",),
    "rounded": ("w16", "w4_float"),
    "rotated": ("w2_lut",),
    "rotated sum": ("w2_lut",),
    "groups of 16": ("w4a16", "w3a16", "w2a16"),
    "joined": ("factors", "w8_factors", "w3_factors", "w2_factors"),
    "joined gate": ("factors", "w4_factors"),
    "experts": ("w4a16",),
    "experts of groups": ("w4a16",),
    "experts told": ("w8a16",),
    "experts summed": ("w4a16",),
}
# Rows that are another's but for how a weight is decoded, with the changes that are compiled.
_FEW = dict.fromkeys(("w6a16", "w5a16", "w_signs", "w1_binary", "w4_pairs"), ("plain",))
# And of factors that are codes.
_OF_CODES: dict[str, tuple[str, ...]] = {
    "w4_factors": ("sides", "joined gate"), "w8_factors": ("joined",), "w3_factors": ("joined",),
    "w2_factors": ("joined",),
}  # fmt: skip


@dataclass(frozen=True)
class Variant:
    """One kernel to compile: a row by name, a problem, a tile and a machine."""

    row: str
    what: str
    problem: Problem
    config: TileConfig
    target: str

    @property
    def fields(self) -> dict[str, Any]:
        """Fields of the problem that do not stand at their default."""
        told = asdict(self.problem).items()
        return {k: v for k, v in told if k in ("N", "K") or v != DEFAULTS.get(k)}


@functools.lru_cache(256)
def typical(row: KernelRow, dtype: str = "fp16") -> Problem | None:
    """The plain 4096 x 4096 problem that a row is made for; None where it serves no such dtype."""
    # A choice that the row does not leave at its default, or names before it, is its own.
    forced = {f: o[0] for f, o in row.choices.items() if o and _first(f, o)}
    scales = row.choices.get("scale_dtype", ("",))
    widths = _BITS if row.product == "float" else (8, *_BITS)
    for (n, m), bits, group, scale, own in itertools.product(
        _SPARSE, widths, _GROUPS, ("fp16", ""), list(_own(row, forced))
    ):
        if scale not in scales:
            continue
        stored = group * n // m if m else group
        values = {**own, "bits": bits, "group": stored, "n": n, "m": m, "scale_dtype": scale}
        problem = Problem(SIZE, SIZE, **{"x_dtype": dtype, **values})
        if not row.misfits(problem):
            return problem
    return None


def _first(field: str, options: tuple[object, ...]) -> bool:
    default = DEFAULTS.get(field)
    return default not in options or (isinstance(default, bool) and options[0] != default)


def _own(row: KernelRow, forced: dict[str, Any]) -> Iterator[dict[str, Any]]:
    """What makes weights a row's own: levels or tables, and a rank or columns it cannot miss."""
    levels = [v for v in row.choices.get("levels", ()) if v]
    tables = [v for v in row.choices.get("table", ()) if v]
    kinds = [{}, *({"levels": v} for v in levels), *({"table": v} for v in tables)]
    ranks: list[dict[str, Any]] = [{"rank": 64}, {"rank": SIZE // 4}]
    beside: list[dict[str, Any]] = [{}, {"outliers": 32}, *ranks, {"rounds": "int8 token"}]
    for kind, more in itertools.product(kinds, beside):
        table = bool(kind)
        values = {**forced, **kind, **more}
        if table == (values.get("weights", "int") == "table"):
            yield values


def variants(
    rows: Iterable[KernelRow], targets: Iterable[str] = TARGETS, dtype: str = "fp16"
) -> list[Variant]:
    """All documented variants of rows on machines, without those that are the same."""
    found: dict[tuple[Any, ...], Variant] = {}
    machines = list(targets)
    for row in rows:
        base = typical(row, dtype)
        if base is None:
            continue
        told: set[tuple[str, int]] = set()
        for what, change, tokens in _CHANGES:
            fits = change if dtype == "fp16" else {**change, "x_dtype": dtype}
            problem = replace(base, **fits)
            few = _OF_CODES.get(row.name) or _FEW.get(row.name, (what,))
            own = row.name in _SOME.get(what, (row.name,)) and what in few
            if not own:
                continue
            if row.misfits(problem) or (what, tokens) in told or (base.rank and what == "rank 64"):
                continue
            told.add((what, tokens))
            config = row.default_config(problem, tokens)
            if tokens > 1:
                config = _widest(row, problem, config)
            for target in machines:
                made = Variant(row.name, what, problem, config, target)
                found.setdefault((row.name, problem, config, target), made)
    return list(found.values())


def _widest(row: KernelRow, problem: Problem, config: TileConfig) -> TileConfig:
    """The tile of as many tokens and most features: its matrix instruction is the largest."""
    same = [c for c in row.configs(problem) if c.BM == config.BM and c.stages == config.stages]
    return max(same, key=lambda c: (c.BN, -c.split))


def unsupported(row: KernelRow, target: str) -> str | None:
    """Why a row does not exist on a machine; None where it does. No error: others serve there."""
    if target in row.targets:
        return None
    return f"{row.name} is for {' and '.join(row.targets)}"
