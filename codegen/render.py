"""Render a kernel row to Triton source.

Only the templates shipped with the package are loaded, undefined names are errors, and the
constants that a template states on its first line are the ones it uses and the ones it is given.
"""

from __future__ import annotations

import functools
import hashlib
import re
from dataclasses import dataclass

import jinja2
import jinja2.meta

from ..compiler.ir.errors import UsageError
from .kernels import KernelRow, Problem

_STATED = re.compile(r"\{# constants: (?P<names>[a-z0-9_]+(?:, [a-z0-9_]+)*) #\}")

# Every constant that a row gives its template, with its type.
CONSTANTS: dict[str, type] = {
    "asym": bool,
    "bias": bool,
    "group": int,
    "interpret": bool,
    "name": str,
    "norm": bool,
    "residual": bool,
    "scale_dtype": str,
    "x_dtype": str,
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
    return {
        "asym": problem.asym,
        "bias": problem.bias,
        "group": problem.dense_group,
        "interpret": interpret,
        "name": variant_name(row, problem),
        "norm": problem.norm,
        "residual": problem.residual,
        "scale_dtype": problem.scale_dtype,
        "x_dtype": problem.x_dtype,
    }


def variant_name(row: KernelRow, problem: Problem) -> str:
    """The function name of a variant, e.g. ``w4a16_g128_asym_bf16_norm``."""
    flags = [f for f in ("norm", "bias", "residual") if getattr(problem, f)]
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
    """Render `template` with exactly the constants it states; UsageError on any mismatch."""
    stated = check_template(template)
    missing, surplus = sorted(stated - set(values)), sorted(set(values) - stated)
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
    source = environment().get_template(template).render(values)
    digest = hashlib.sha256(source.encode()).hexdigest()
    return Rendered(row, str(values["name"]), source, digest)


@functools.cache
def check_template(template: str) -> frozenset[str]:
    """The constants that `template` states on its first line.

    UsageError when the line is absent, or when the template and the files it imports use a
    name that is not stated, or when none of them uses a stated one.
    """
    stated, used = _stated_and_used(template)
    if stated != used:
        raise UsageError(
            f"template states {sorted(stated)} but uses {sorted(used)}",
            where=f"template {template}",
            hint="make the first line list exactly the constants used",
        )
    return stated


def _stated_and_used(template: str) -> tuple[frozenset[str], frozenset[str]]:
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
    used = set(jinja2.meta.find_undeclared_variables(tree))
    for other in jinja2.meta.find_referenced_templates(tree):
        if other is None:
            raise UsageError("imports must be literal names", where=f"template {template}")
        used |= check_template(other)
    return frozenset(match["names"].split(", ")), frozenset(used)


@functools.cache
def environment() -> jinja2.Environment:
    """The Jinja environment: shipped templates only, undefined names raise."""
    return jinja2.Environment(
        loader=jinja2.PackageLoader(__package__ or "llmc.codegen", "templates"),
        undefined=jinja2.StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
        keep_trailing_newline=True,
    )
