"""Render a kernel row to Triton source.

Only the templates shipped with the package are loaded, undefined names are errors, and the
constants that a template states on its first line are the ones it uses and the ones it is given.
"""

from __future__ import annotations

import functools
import hashlib
import re
from dataclasses import dataclass, fields
from typing import Any

import jinja2
import jinja2.meta

from ..compiler.ir.errors import UsageError
from . import coded, ending, spans
from .grids import Made, terms
from .literals import integer_bytes, integer_words
from .mixing import mixing
from .mixture import fit
from .mixture.choice import Choice, read_choice
from .problem import BEFORE, Problem
from .row import Argument, KernelRow

_STATED = re.compile(r"\{# constants: (?P<names>[A-Za-z0-9_]+(?:, [A-Za-z0-9_]+)*) #\}")

# Every constant that a template may state, with its type: the problem's own fields (`group` in
# dense columns), and what is said beside them.
CONSTANTS: dict[str, type] = {
    **{f.name: type(getattr(Problem(1, 1), f.name)) for f in fields(Problem)},
    "behind": dict,
    "choice": Choice,
    "among": int,
    "picked": int,
    "router_rows": int,
    "coded": bool,
    "interpret": bool,
    "made": dict,
    "name": str,
    "places": tuple,
    "ranks": int,
    "signature": str,
    "splits": bool,
    "step": int,
}


@dataclass(frozen=True)
class Rendered:
    """A kernel's source text: `name` is its function, `digest` the SHA-256 of the source."""

    row: str
    name: str
    source: str
    digest: str


def constants(row: KernelRow, problem: Problem, *, interpret: bool) -> dict[str, object]:
    """The typed constants of one variant; UsageError when the row does not serve the problem."""
    misfits = row.misfits(problem)
    if misfits:
        raise UsageError("; ".join(str(r) for r in misfits), where=f"kernel row {row.name}")
    made: dict[str, Any] = {}
    if makes(row, problem):  # then the rest reads it as it is
        made = terms(problem.rounds) if problem.rounds else {"static": False, "limited": False}
        mixed = mixing(problem.K) if problem.mixed else None
        made["mixing"] = mixed.terms() if mixed else {}
        made |= {n: getattr(problem, n) for n in ("norm", "centred", "smooth")}
    plain = problem.without(*BEFORE, "rounds") if made else problem
    behind = ending.terms(problem)
    if behind:
        plain = plain.without("bias", "residual", "pairs", "out_norm")
    return {
        **{f.name: getattr(plain, f.name) for f in fields(problem)},
        "made": made,
        "behind": behind,
        "group": problem.dense_group,
        "choice": read_choice(problem.route),
        "among": fit.among(problem),
        "picked": fit.picked(problem),
        "router_rows": fit.router_rows(problem),
        "coded": problem.coded,
        **({"weights": "int"} if problem.coded else {}),  # of either factor
        "interpret": interpret,
        "name": variant_name(row, problem),
        "places": coded.places(problem, row.step) if problem.coded else spans.places(problem),
        "ranks": spans.ranks(problem),
        "signature": signature(row, problem),
        "splits": shares(row),
        "step": row.step,
    }


def shares(row: KernelRow) -> bool:
    """Whether programs of this row leave each other what they found (see `workspace`)."""
    return any(a.name == "scratch" for a in row.args)


def makes(row: KernelRow, problem: Problem) -> bool:
    """Whether a kernel of this row makes x before it is multiplied."""
    return problem.made and any(isinstance(c, Made) for c in row.choices.values())


def arguments(row: KernelRow, problem: Problem) -> list[Argument]:
    """The tensor arguments that a variant has, in order."""
    return [a for a in row.args if a.flag is None or getattr(problem, a.flag)]


def signature(row: KernelRow, problem: Problem) -> str:
    """The parameters of a variant: pointers, sizes, strides, then what is compiled in."""
    given = arguments(row, problem)
    names = [f"{a.name}_ptr" for a in given] + ["M", "N"]
    names += [f"stride_{a.name}" for a in given if a.strided]
    fixed = ["K", *(["EPS"] if problem.norm else []), *(["OUT_EPS"] if problem.out_norm else [])]
    fixed += ["BM", "BN", "STAGES"]
    if shares(row):
        fixed += ["SPLIT", *(["RUNS", "MAKERS"] if problem.rank or problem.route else [])]
        fixed += ["HANDS"] if makes(row, problem) else []
        fixed += ["ENDERS"] if problem.out_mixed else []
    lines = names + [f"{name}: tl.constexpr" for name in fixed]
    return "\n".join(f"    {line}," for line in lines)


def variant_name(row: KernelRow, problem: Problem) -> str:
    """The function name of a variant, e.g. ``w4a16_g128_asym_bf16_norm``."""
    sides = ("norm", "centred", "smooth", "bias", "residual", "sparse")
    flags = [f for f in sides if getattr(problem, f)]
    flags += [w for w in (problem.levels, problem.table, problem.act, problem.pairs) if w]
    # Limits differ from layer to layer and are no part of the code; a group is.
    rounds = re.sub(r"=[.\d]+e?[-+\d]*$", "", problem.rounds or problem.rounded * problem.limited)
    flags += [re.sub(r"\W", "_", rounds)] if rounds else []
    flags += [f"mixed{problem.K}"] if problem.mixed else []
    flags += ["out_mixed" + problem.out_mixed.replace(" ", "_")] if problem.out_mixed else []
    flags += ["out_norm"] if problem.out_norm else []
    flags += [f"rank{problem.rank}"] if problem.rank else []
    flags += ["spans"] if problem.spans else []
    if problem.routed:
        flags += [f"{problem.routed}{problem.chosen}of{problem.experts}"]
        flags += [f"always{problem.always}"] if problem.always else []
        flags += [re.sub(r"\W", "_", word) for word in problem.route.split()]
    group = f"g{problem.dense_group}" if problem.dense_group else "row"
    zero = "asym" if problem.asym else "sym"
    return "_".join([row.name, group, zero, problem.x_dtype, f"s{problem.scale_dtype}", *flags])


@functools.lru_cache(4096)
def render(row: KernelRow, problem: Problem, *, interpret: bool = False) -> Rendered:
    """The Triton source of `row` for `problem`.

    `interpret` widens operands to fp32 before each product, because the Triton interpreter
    computes bf16 wrongly. UsageError when a requirement fails or row and template disagree.
    """
    values = constants(row, problem, interpret=interpret)
    return render_template(row.template, row.name, values)


def render_template(template: str, row: str, values: dict[str, object]) -> Rendered:
    """Render `template` with the constants it states; UsageError on any mismatch."""
    stated = check_template(template)
    missing, surplus = sorted(stated - set(values)), sorted(set(values) - set(CONSTANTS))
    if missing or surplus:
        raise UsageError(
            f"template {template} states {sorted(stated)}, row gives {sorted(values)}: "
            f"missing {missing}, surplus {surplus}",
            where=f"kernel row {row}",
        )
    for key, value in values.items():
        if type(value) is not CONSTANTS[key]:
            raise UsageError(
                f"constant {key} must be {CONSTANTS[key].__name__}, found {value!r}",
                where=f"kernel row {row}",
            )
    source = environment().get_template(template).render({k: values[k] for k in stated})
    digest = hashlib.sha256(source.encode()).hexdigest()
    return Rendered(row, str(values["name"]), source, digest)


@functools.cache
def check_template(template: str) -> frozenset[str]:
    """The constants that `template` and the files it includes state on their first lines.

    UsageError when such a line is absent, names what is no constant, or is not what the file uses.
    """
    env = environment()
    assert env.loader is not None
    try:
        text = env.loader.get_source(env, template)[0]
    except jinja2.TemplateNotFound as error:
        raise UsageError(f"no shipped template {template!r}") from error
    match = _STATED.match(text)
    if match is None:
        raise UsageError(
            "the first line must be '{# constants: a, b #}'", where=f"template {template}"
        )
    tree = env.parse(text)
    stated = frozenset(match["names"].split(", "))
    used = jinja2.meta.find_undeclared_variables(tree)
    if stated != used:
        raise UsageError(
            f"template states {sorted(stated)} but uses {sorted(used)}",
            where=f"template {template}",
            hint="make the first line list exactly the constants used",
        )
    unknown = sorted(stated - set(CONSTANTS))
    if unknown:
        raise UsageError(f"no constants {unknown}", where=f"template {template}")
    for other in jinja2.meta.find_referenced_templates(tree):
        if other is None:
            raise UsageError("imports must be literal names", where=f"template {template}")
        stated |= check_template(other)
    return stated


# Templates that a program has added to its own process, by name.
_OWN: dict[str, str] = {}


def add_template(name: str, text: str) -> None:
    """Let `name` be a template in this process. UsageError when there is one of that name."""
    if name in environment().list_templates():
        raise UsageError(f"expected a new name for a template, found {name!r}")
    _OWN[name] = text


@functools.cache
def environment() -> jinja2.Environment:
    """The Jinja environment: shipped templates and added ones, undefined names raise."""
    shipped = jinja2.PackageLoader(__package__ or "llmc.codegen", "templates")
    made = jinja2.Environment(
        loader=jinja2.ChoiceLoader([shipped, jinja2.DictLoader(_OWN)]),
        undefined=jinja2.StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
        keep_trailing_newline=True,
    )
    made.filters["integer_bytes"] = integer_bytes
    made.filters["integer_words"] = integer_words
    return made
