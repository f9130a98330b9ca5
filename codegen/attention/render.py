"""Render a row of cached attention to Triton source, from the shipped templates alone."""

from __future__ import annotations

import functools
import hashlib
import re

import jinja2.meta

from ...compiler.ir.errors import UsageError
from ..render import Rendered, environment
from .problem import AttentionProblem
from .row import AttentionRow

_SET = frozenset({"coded", "dense", "planes"})
_STATED = re.compile(r"\{# constants: (?P<names>[a-z0-9_]+(?:, [a-z0-9_]+)*) #\}")


@functools.lru_cache(4096)
def render(row: AttentionRow, problem: AttentionProblem, *, interpret: bool = False) -> Rendered:
    """The Triton source of `row` for `problem`; sizes are compiled in later, and not in the text.

    UsageError when a requirement fails.
    """
    misfits = row.misfits(problem)
    if misfits:
        raise UsageError("; ".join(str(m) for m in misfits), where=f"kernel row {row.name}")
    values: dict[str, object] = {
        n: getattr(problem, n)
        for n in ("bits", "cache", "causal", "counted", "dilation", "first", "keys", "sinks",
                  "slopes", "softcap", "valid", "window", "x_dtype")
    }  # fmt: skip
    return render_stated(
        row.template,
        row.name,
        {**values, "interpret": interpret, "joined": joined(problem), "name": _name(row, problem)},
    )


def joined(problem: AttentionProblem) -> int:
    """Shifts of a word of codes that make one product, so that it is 32 channels wide or more.

    Narrower ones take twice the instructions and registers.
    """
    width, shifts = min(padded(problem.D), padded(problem.E)) * problem.bits // 16, 1
    while width * shifts < 32 and shifts < 16 // problem.bits:
        shifts *= 2
    return shifts


def padded(size: int) -> int:
    """The next power of two."""
    return 1 << (size - 1).bit_length()


def render_stated(template: str, row: str, values: dict[str, object]) -> Rendered:
    """Render `template` with exactly the constants that it states on its first line.

    UsageError when it states others than it uses, or than `values` has.
    """
    stated = check(template)
    if stated != frozenset(values):
        raise UsageError(
            f"template {template} states {sorted(stated)}, row gives {sorted(values)}",
            where=f"kernel row {row}",
        )
    source = environment().get_template(template).render(values)
    digest = hashlib.sha256(source.encode()).hexdigest()
    return Rendered(row, str(values["name"]), source, digest)


@functools.cache
def check(template: str) -> frozenset[str]:
    """The constants that `template` states; UsageError unless they are those that it uses."""
    env = environment()
    assert env.loader is not None
    text = env.loader.get_source(env, template)[0]
    match = _STATED.match(text)
    stated = frozenset(match["names"].split(", ")) if match else frozenset[str]()
    tree = env.parse(text)
    used = set(jinja2.meta.find_undeclared_variables(tree))
    for other in jinja2.meta.find_referenced_templates(tree):
        # What the template itself sets for its parts is no constant of a row.
        used |= check(str(other)) - _SET
    if stated != used:
        raise UsageError(
            f"template states {sorted(stated)} but uses {sorted(used)}",
            where=f"template {template}",
        )
    return stated


def _name(row: AttentionRow, problem: AttentionProblem) -> str:
    """The function's name, e.g. ``attention_kivi_b4_bf16_w4096_valid``."""
    parts = [row.name, problem.x_dtype]
    if problem.cache == "kivi":
        parts.insert(1, f"b{problem.bits}")
    elif problem.keys:
        parts.insert(1, problem.keys)
    parts += [f"w{problem.window}"] if problem.window else []
    parts += [f"d{problem.dilation}"] if problem.dilation > 1 else []
    parts += [f"f{problem.first}"] if problem.first else []
    flags = ("softcap", "sinks", "slopes", "valid", "counted")
    return "_".join([*parts, *(f for f in flags if getattr(problem, f)),
                     *([] if problem.causal else ["both"])])  # fmt: skip
