"""Cases made from what rows say of themselves: their choices, their predicates and their tiles.

`sample` covers every allowed value of every field of every row, every tile, every way that x may
lie in memory and the edges of each size, then draws on. `near_misses` are problems that differ from
a served one in one field, by as little as makes a requirement fail. The long run:

    TRITON_INTERPRET=1 python tests/codegen/numerics_cases.py --count 2000 --shard 0/8
"""

from __future__ import annotations

import argparse
import itertools
import random
import sys
from collections.abc import Iterator
from dataclasses import fields, replace
from typing import Any

import torch
from numerics import STRIDES, Case, answered, judge

from llmc.codegen import formula
from llmc.codegen.coded import ROLES
from llmc.codegen.grids import Made
from llmc.codegen.kernels import ROWS
from llmc.codegen.mixing import mixing
from llmc.codegen.problem import DEFAULTS, FEATURES, PARTS, Problem, Requirement
from llmc.codegen.row import KernelRow, TileConfig
from llmc.compiler.ir.levels import WIDTHS

TOKENS = (1, 2, 3, 5, 8, 9, 16, 17, 33)
# Small, as an interpreted step takes milliseconds; with one, odd ones and both sides of a tile.
NUMBERS: dict[str, tuple[int, ...]] = {
    "N": (1, 2, 7, 16, 33, 34, 64, 65, 70, 96, 128, 130, 193),
    "K": (16, 17, 32, 40, 96, 100, 130, 136, 160, 200, 256, 260, 264, 328, 512, 520),
    "bits": (1, 2, 3, 4, 5, 6, 7, 8, 16, 32),
    "group": (0, 8, 16, 32, 64, 128, 256),
    "n": (0, 1, 2, 4),
    "m": (0, 4, 8),
    "rank": (0, 1, 4, 16, 40),
    "outliers": (0, 1, 3, 8),
}
# Grids that x may be put on by a row that takes any; each row meets three of them.
GRIDS = (
    "int8 token", "int8 token limit=2.0", "int8 static", "int8 token group=32", "int4 token power",
    "int4 static group=64", "e4m3 token", "e4m3 token power", "e5m2 static", "e2m1 token group=16",
    "pairs4 token", "pairs8 static group=16",
)  # fmt: skip
STEPS = 16  # of 32 columns that a case may take
_INTEGRAL = ("N", "K", "bits", "group", "n", "m")
# Experts are given their tokens in tensors of the call: they have tests of their own.
_APART = ("routed", "route")
# Parts that a case may spoil; indices of compressed rows would no longer be any.
_FIXED = ("csr_index", "csr_starts")


def allowed(row: KernelRow, name: str) -> list[Any]:
    """Values of a field that the row may serve, by its choices and its predicates of one field."""
    if name in _APART:
        return [DEFAULTS[name]]
    if isinstance(row.choices.get(name), Made):
        # Nothing more often, as what is put on a grid is neither mixed nor read beside columns.
        return [*[""] * 6, *random.Random(row.name).sample(GRIDS, 3)]
    if name in row.choices:
        known = NUMBERS.get(name, ()) if hasattr(row.choices[name], "most") else row.choices[name]
        return [v for v in known if v in row.choices[name]]
    if name in FEATURES:
        return [DEFAULTS[name]]
    values = list(NUMBERS[name])
    for need in row.requires:
        if formula.names(need.test) == (name,) and name != "group":
            values = [v for v in values if formula.holds(need.test, {name: v})]
    return values


def sane(p: Problem) -> bool:
    """Whether a problem is one at all: fields that only make sense together."""
    table = p.weights == "table"
    return all((
        p.m == 0 or (0 < p.n < p.m and p.K % p.m == 0),
        p.m > 0 or p.n == 0,
        not (p.bitmap and p.m),
        table == bool(p.levels or p.table) and not (p.levels and p.table),
        not p.levels or p.bits in WIDTHS.get(p.levels, ()),
        p.weights not in ("int", "table") or p.bits <= 8,
        p.weights != "dense" or p.bits >= 16,
        p.weights not in ("dense", "factors") or p.bits < 16 or not p.asym,
        not p.coded or (p.bits <= 8 and bool(p.scale_dtype)),
        not table or not p.asym,
        p.weights not in ("int", "signs") or bool(p.scale_dtype),
        p.weights != "signs" or p.bits <= 5,
        p.weights != "paired" or bool(p.scale_dtype),
        p.weights not in ("dense", "factors") or not p.group or bool(p.scale_dtype),
        p.weights != "factors" or p.rank > 0,
        p.rank < min(p.N, p.K) or not p.rank,
        p.outliers < p.K,
        not p.pairs or (p.N % 2 == 0 and bool(p.act)),
        p.norm or not p.centred,
    ))  # fmt: skip


def drawn(row: KernelRow, rng: random.Random, wanted: dict[str, Any]) -> Problem | None:
    """A problem that the row serves, with the wanted values; None when chance finds none."""
    names = dict.fromkeys([*_INTEGRAL, *FEATURES, *row.choices])
    pools = {name: allowed(row, name) for name in names}
    for _ in range(300):
        values = {n: rng.choice(pool) for n, pool in pools.items()} | wanted
        if values["norm"]:
            values["eps"] = 1e-5
        if values["out_norm"]:
            values["out_eps"] = 1e-5
        # Fields that follow from others, unless a case asks for them.
        if not values["m"]:
            values["n"] = wanted.get("n", 0)
        if values["weights"] in ("dense", "factors") and row.factor is None:
            values |= {n: wanted.get(n, v) for n, v in (("bits", 16), ("group", 0))}
        if values["rank"] > 2 and "spans" in row.choices:
            values["spans"] = wanted.get("spans", sections(values))
        if "32" in row.choices.get("out_mixed", ()) and not values["spans"]:
            values["out_mixed"] = wanted.get("out_mixed", mixed_back(values))
        problem = Problem(**values)
        if (
            sane(problem)
            and all(_holds(n, problem) for n in row.requires)
            and not row.misfits(problem)
        ):
            return problem
    return None


def sections(values: dict[str, Any]) -> str:
    """Rows x rank of two or three sections, for one problem in two that can have them."""
    rng, N, rank = random.Random(repr(values)), values["N"], values["rank"]
    pairs = bool(values["pairs"])
    rows = [N // 2] * 2 if pairs else [64] * ((N - 1) // 64)
    rows = rows if pairs else [*rows, N - sum(rows)]
    if len(rows) < 2 or rng.random() < 0.5:
        return ""
    cuts = [0, *sorted(rng.sample(range(1, rank), len(rows) - 1)), rank]
    ranks = [b - a for a, b in itertools.pairwise(cuts)]
    return " ".join(f"{n}x{r}" for n, r in zip(rows, ranks, strict=True))


def mixed_back(values: dict[str, Any]) -> str:
    """Widths of one or two sections, for most problems whose rows can be mixed so."""
    rng, N = random.Random(repr(values)), values["N"]
    sections = [[N], *([n, N - n] for n in (16, 48, 64) if n < N)]
    some = ["", *(" ".join(map(str, widths)) for widths in sections if all(map(mixing, widths)))]
    return rng.choice(some)


def _holds(need: Requirement, p: Problem) -> bool:
    """What most draws fall at, without the fields that no predicate reads."""
    named = formula.names(need.test)
    given = {n: p.dense_group if n == "group" else getattr(p, n) for n in named}
    return formula.holds(need.test, given)


def cases_of(row: KernelRow, count: int, seed: int) -> Iterator[Case]:
    """`count` cases of a row; the first ones cover, as far as `count` lets them."""
    rng = random.Random(f"{row.name} {seed}")
    names = dict.fromkeys([*_INTEGRAL, *FEATURES, *row.choices])
    missing: dict[str, list[Any]] = {n: allowed(row, n) for n in names}
    missing = {n: rng.sample(v, len(v)) for n, v in missing.items() if len(v) > 1}
    tokens, strides = list(TOKENS), list(STRIDES)
    tiles = list(row.tiles)
    spoils: dict[str, int] = {}
    # Beside these, a tile holds fewer sums.
    bare = {n: DEFAULTS[n] for n in ("norm", "rank", "sparse") if DEFAULTS[n] in allowed(row, n)}
    for at in range(count):
        problem = _covering(row, rng, missing)
        for trial in range(300):
            # A tile that no case had yet; the widest fit few problems, so the last are drawn anew.
            grid = [c for c in row.configs(problem) if not tiles or (c.BM, c.BN) in tiles]
            if not grid and (problem.spans or problem.out_mixed):  # sections fit fewer tiles
                problem = replace(problem, spans="", out_mixed="")
                grid = [c for c in row.configs(problem) if (c.BM, c.BN) in tiles]
            if grid or at < count - 6:
                break
            more = bare if trial > 9 else {}
            problem = drawn(row, rng, {"N": 193 + at % 2, **more}) or problem
        config = rng.choice(grid or row.configs(problem))
        tiles = [t for t in tiles if t != (config.BM, config.BN)]
        M = tokens.pop(rng.randrange(len(tokens))) if tokens else rng.choice(TOKENS)
        problem, M = _cheap(row, problem, config, M)
        stride = strides.pop() if strides else rng.choice(STRIDES)
        values = {f.name: getattr(problem, f.name) for f in fields(problem)}
        told = {n: v for n, v in values.items() if n in "NK" or v != DEFAULTS.get(n)}
        tile_of = (config.BM, config.BN, config.stages, config.warps, config.split)
        case = Case(row.name, told, M, stride, tile_of, "", rng.randrange(1 << 20))
        for n in missing:
            missing[n] = [v for v in missing[n] if v != values[n]]
        # Each part is spoiled before one is spoiled again; a third of the cases are.
        parts = [p for p in parts_named(problem) if p not in _FIXED]
        spoil = min(parts, key=lambda p: spoils.get(p, 0))
        if at % 6 == 0 or spoil not in spoils:
            spoils[spoil] = spoils.get(spoil, 0) + 1
            case = replace(case, spoil=spoil)
        yield case


def _cheap(row: KernelRow, p: Problem, config: TileConfig, M: int) -> tuple[Problem, int]:
    """The same with one tile of features and fewer tokens where it took many interpreted steps.

    15 ms go by for each 32 columns of a tile.
    """
    columns = -(-p.K // row.step) * row.step // 32
    if columns * -(-p.N // config.BN) > STEPS:
        less = replace(p, N=config.BN - (2 if p.pairs else 1), spans="")
        if p.out_mixed:
            less = replace(p, N=config.BN, out_mixed=str(config.BN))
        if not row.misfits(less) and config in row.configs(less):
            p = less
    while M > 1 and columns * -(-p.N // config.BN) * -(-M // config.BM) > STEPS:
        M = max(t for t in (1, *TOKENS) if t < M)
    return p, M


def _covering(row: KernelRow, rng: random.Random, missing: dict[str, list[Any]]) -> Problem:
    """A problem with as many values as fit of those that no case had yet."""
    due = [(n, v[0]) for n, v in missing.items() if v]
    rng.shuffle(due)
    problem, wanted = drawn(row, rng, {}), dict[str, Any]()
    for name, value in due:
        other = drawn(row, rng, wanted | {name: value})
        if other is not None:
            problem, wanted[name] = other, value
    if problem is None:
        raise AssertionError(f"no problem that {row.name} serves was found by chance")
    return problem


def parts_named(p: Problem) -> list[str]:
    """The canonical parts that a problem has, in the order of `PARTS`."""
    coded = dict.fromkeys((f"{side}_{role}" for side in ("left", "right") for role in ROLES), True)
    has = {
        "codes": p.weights in ("int", "table", "paired"), "zero": p.asym,
        "scale": bool(p.scale_dtype) and p.weights != "signs",
        **dict.fromkeys(("signs", "factors"), p.weights == "signs"),
        "table": bool(p.table), "meta": p.m > 0, "bitmap": p.bitmap, "values": p.weights == "dense",
        "left": p.rank > 0, "right": p.rank > 0, "columns": p.outliers > 0, "gain": p.norm,
        "column_weights": p.outliers > 0, "smooth": p.smooth, "in_scale": p.static,
        "bias": p.bias, "shift": p.centred, "out_gain": p.out_norm, "out_turn": bool(p.out_mixed),
        **dict.fromkeys(("csr_values", "csr_index", "csr_starts"), p.sparse),
    }  # fmt: skip
    if p.coded:
        bare = {"left_zero": p.asym, "right_zero": p.asym}
        has |= {"left": False, "right": False, "scale": False, "zero": False} | coded | bare
    # Parts of experts have tests of their own.
    return [name for name in PARTS if has.get(name)]


def sample(count: int, seed: int = 0, row: str = "") -> list[Case]:
    """About `count` cases over all rows, or all of one; the same for the same seed."""
    rows = [r for r in ROWS if row in ("", r.name)]
    each = -(-count // len(rows)) + 8  # a row has more tiles and values than some counts give
    return [case for r in rows for case in cases_of(r, each, seed)]


def ordered(cases: list[Case]) -> list[Case]:
    """The same cases, row after row in turn, so that a run cut short has seen all rows."""
    by_row: dict[str, list[Case]] = {}
    for case in cases:
        by_row.setdefault(case.row, []).append(case)
    turns = itertools.zip_longest(*by_row.values())
    return [case for turn in turns for case in turn if case is not None]


def near_misses(row: KernelRow) -> Iterator[tuple[Requirement, Problem, Problem]]:
    """(requirement or choice, a problem that is served, the nearest in one field that is not).

    Nearest by distance for numbers; AssertionError for a requirement that nothing near misses.
    """
    rng = random.Random(row.name)
    base = _covering(row, rng, {})
    for need in row.requires:
        names = list(formula.names(need.test))
        # A group of a problem with few columns is none: another problem has one.
        bases = [base, *(_covering(row, rng, {}) for _ in range(20))]
        found = ((b, _outside(row, b, need, names)) for b in bases)
        inside, outside = next(((b, o) for b, o in found if o), (base, None))
        if outside is None:
            raise AssertionError(f"{row.name}: nothing near misses {need.field}: {need.test}")
        yield need, inside, outside
    for name, options in row.choices.items():
        others: list[Any] = []
        if hasattr(options, "most"):
            others = [options.most + 1]
        elif all(isinstance(v, bool) for v in options):
            others = [v for v in (False, True) if v not in options]
        else:
            others = [v for v in ("fp64", "none such") if v not in options][:1]
        for value in others:
            yield Requirement(name, "", ""), base, replace(base, **{name: value})


def _outside(row: KernelRow, base: Problem, need: Requirement, names: list[str]) -> Problem | None:
    for distance in range(1, 4098):
        for name in names:
            for value in (getattr(base, name) - distance, getattr(base, name) + distance):
                if value < 0:
                    continue
                other = replace(base, **{name: value})
                if other.m and not other.n:
                    other = replace(other, n=1)
                if not _holds(need, other):
                    return other
    return None


def main() -> int:
    """Make a shard of the long run's cases, judge their answers, exit 1 on any that is wrong."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--count", type=int, default=2000)
    parser.add_argument("--shard", default="0/1", help="which of how many, from 0")
    parser.add_argument("--row", default="", help="one row alone")
    parser.add_argument("--seed", type=int, default=0)
    args = parser.parse_args()
    torch.set_num_threads(1)
    at, shards = map(int, args.shard.split("/"))
    cases = sample(args.count, args.seed, args.row)[at::shards]
    wrong = 0
    for case in cases:
        if why := judge(case, answered(case)):
            wrong += 1
            print(f"{case.label}: {why}", flush=True)
    print(f"{len(cases)} cases, {wrong} wrong")
    return 1 if wrong else 0


if __name__ == "__main__":
    sys.exit(main())
