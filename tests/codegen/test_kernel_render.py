"""Rendering: goldens, typed constants, and a row and its template that must agree both ways."""

from __future__ import annotations

import ast
import dataclasses
from collections.abc import Callable

import jinja2
import pytest

from llmc.codegen import render as rendering
from llmc.codegen.kernels import ROWS, register, rows
from llmc.codegen.problem import Problem
from llmc.codegen.render import CONSTANTS, check_template, render, render_template
from llmc.codegen.row import KernelRow
from llmc.codegen.rows.int4 import W4A16, W4A16_24
from llmc.compiler.ir.errors import UsageError

DENSE = Problem(N=256, K=512)
SPARSE = Problem(N=256, K=512, group=64, n=2, m=4)
GOLDENS = [
    ("w4a16_g128_sym_fp16", W4A16, DENSE, False),
    ("w4a16_g128_sym_fp16_interpret", W4A16, DENSE, True),
    (
        "w4a16_g64_asym_bf16_sides",
        W4A16,
        dataclasses.replace(
            DENSE, group=64, asym=True, x_dtype="bf16", scale_dtype="bf16",
            bias=True, residual=True, norm=True,
        ),
        False,
    ),
    ("w4a16_row_sym_fp32", W4A16, dataclasses.replace(DENSE, group=0, x_dtype="fp32"), False),
    ("w4a16_24_g128_sym_fp16", W4A16_24, SPARSE, False),
    (
        "w4a16_24_g256_asym_bf16_norm",
        W4A16_24,
        dataclasses.replace(SPARSE, group=128, asym=True, x_dtype="bf16", norm=True),
        False,
    ),
]  # fmt: skip


@pytest.mark.parametrize(
    ("name", "row", "problem", "interpret"), GOLDENS, ids=lambda v: str(v)[:40]
)
def test_rendered_source_is_the_golden(
    name: str, row: KernelRow, problem: Problem, interpret: bool, golden: Callable[[str, str], None]
) -> None:
    """The source is Python, names its function, and is the committed text."""
    rendered = render(row, problem, interpret=interpret)
    functions = [n.name for n in ast.parse(rendered.source).body if isinstance(n, ast.FunctionDef)]
    assert functions[-1] == rendered.name
    assert "{%" not in rendered.source
    golden(name, rendered.source)


def test_rendering_is_deterministic_and_the_digest_tells_variants_apart() -> None:
    """Same problem, same digest; shapes are not in the source; another scheme is another digest."""
    first = render(W4A16, DENSE)
    assert first == render(W4A16, dataclasses.replace(DENSE, N=1024, K=4096))
    others = [{"group": 64}, {"asym": True}, {"x_dtype": "bf16"}, {"bias": True}, {"norm": True}]
    digests = {render(W4A16, dataclasses.replace(DENSE, **c)).digest for c in others}  # type: ignore[arg-type]
    assert len(digests | {first.digest, render(W4A16, DENSE, interpret=True).digest}) == 7


@pytest.mark.parametrize("row", ROWS, ids=lambda r: r.name)
def test_templates_state_what_rows_give(row: KernelRow) -> None:
    """The first line of each shipped template is the list of constants."""
    assert check_template(row.template) <= set(CONSTANTS)


def test_a_row_that_gives_too_little_or_too_much_is_refused() -> None:
    """Both directions of the mismatch name the constants."""
    values = rendering.constants(W4A16, DENSE, interpret=False)
    with pytest.raises(UsageError, match=r"missing \['asym'\]"):
        render_template(W4A16.template, "w4a16", {k: v for k, v in values.items() if k != "asym"})
    with pytest.raises(UsageError, match=r"surplus \['colour'\]"):
        render_template(W4A16.template, "w4a16", {**values, "colour": "red"})


@pytest.mark.parametrize(
    ("name", "text", "words"),
    [
        ("silent", "x = {{ group }}\n", "the first line must be"),
        ("uses_more", "{# constants: group #}\nx = {{ group + bits }}\n", "but uses"),
        ("states_more", "{# constants: bits, group #}\nx = {{ group }}\n", "but uses"),
        ("invents", "{# constants: colour #}\nx = {{ colour }}\n", "no constants"),
    ],
)
def test_a_template_that_hides_a_constant_is_refused(
    name: str, text: str, words: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """No first line, an unstated name, or a stated name that is not used."""
    environment = jinja2.Environment(
        loader=jinja2.DictLoader({name: text}), undefined=jinja2.StrictUndefined
    )
    monkeypatch.setattr(rendering, "environment", lambda: environment)
    with pytest.raises(UsageError, match=words):
        check_template(name)


def test_constants_are_typed_and_templates_are_the_shipped_ones() -> None:
    """A number where a flag belongs, and a path out of the folder, are refused."""
    values = rendering.constants(W4A16, DENSE, interpret=False)
    with pytest.raises(UsageError, match="constant asym must be bool, found 1"):
        render_template(W4A16.template, "w4a16", {**values, "asym": 1})
    with pytest.raises(UsageError, match="no shipped template"):
        render_template("../kernels.py", "w4a16", values)


def test_a_problem_outside_the_requirements_is_not_rendered() -> None:
    """The error names row and field."""
    with pytest.raises(UsageError, match=r"group=48, expected 16, 32, 64.*kernel row w4a16"):
        render(W4A16, dataclasses.replace(DENSE, group=48))


def test_an_own_row_must_bring_new_names() -> None:
    """The names of shipped rows and templates are taken; nothing is added then."""
    with pytest.raises(UsageError, match="expected a new name for a kernel row, found 'w4a16'"):
        register(W4A16, "{# constants: name #}")
    renamed = dataclasses.replace(W4A16, name="mine")
    with pytest.raises(UsageError, match=r"expected a new name for a template, found 'w4a16"):
        register(renamed, "{# constants: name #}")
    assert rows() == ROWS
