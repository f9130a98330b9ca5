"""Texts that the printer does not write are refused, with line and column."""

from __future__ import annotations

import ast
from collections.abc import Callable

import pytest

from llmc.compiler.ir.errors import ModelError
from llmc.compiler.ir.graph import Program
from llmc.compiler.ir.parser import parse_python
from llmc.compiler.ir.printer import print_python


def changed(old: str, new: str) -> Callable[[str], str]:
    def f(text: str) -> str:
        assert old in text
        return text.replace(old, new, 1)

    return f


HOSTILE = {
    "import": changed("import operator", "import os"),
    "import under a name": changed("import operator", "import os as operator"),
    "call of a builtin": changed("torch.ops.aten.embedding.default(", "eval("),
    "op without a row": changed("torch.ops.aten.embedding.default(", "torch.ops.aten.from_file("),
    "attribute walk": changed("torch.ops.aten.embedding.default(", "torch.os.system("),
    "argument that calls": changed("1e-05", "print(1)"),
    "argument that computes": changed("1e-05", "1e-05 + 0"),
    "comprehension": changed("1e-05", "[x for x in p]"),
    "unknown value": changed("position_ids, position_ids", "position_ids, nothing"),
    "later value": changed("rms_norm.default(embedding_default", "rms_norm.default(norm2"),
    "star": changed("scale=0.5", "*p"),
    "double star": changed("scale=0.5", "**p"),
    "big integer": changed("window=3", f"window={1 << 70}"),
    "unknown torch name": changed("1e-05", "torch.hub"),
    "unknown parameter": changed('p["norm1"]', 'p["norm9"]'),
    "parameter of another table": changed('p["norm1"]', 'q["norm1"]'),
    "two statements of one name": changed("norm2 = p", "norm1 = p"),
    "loop": changed("    return ", "    for i in p: pass\n    return "),
    "bare expression": changed("    return ", "    print(1)\n    return "),
    "after the return": lambda t: t + "    x = p['gate']\n",
    "no return": lambda t: t[: t.rindex("    return")],
    "two functions": lambda t: t + "\n\ndef forward(p):\n    return 1\n",
    "class": lambda t: t + "\n\nclass A: pass\n",
    "decorator": changed("def forward", "@print\ndef forward"),
    "default argument": changed("position_ids):", "position_ids=print()):"),
    "annotation": changed("position_ids):", "position_ids: print()):"),
    "another input": changed("def forward(p, input_ids,", "def forward(p, input_idz,"),
    "missing table": changed("FACTS = ", "FACT = "),
    "dtype": changed('DTYPE = "f32"', 'DTYPE = "f31"'),
    "input type": changed('"i64[B, S]"', '"i64[B, S, f()]"'),
    "symbolic parameter": changed('"f32[6, 8]"', '"f32[6, S]"'),
    "parameter flags": changed('"trained"', '"trained always"'),
    "one name twice": changed('"up": (', '"gate": ('),
    "keyword as name": changed("norm1 = p[", "None = p["),
    "not Python": lambda t: t + ")",
    "null byte": lambda t: t + "\0",
    "shape that misfits": changed('"f32[6, 8]"', '"f32[6, 9]"'),
}  # fmt: skip


@pytest.mark.parametrize("name", HOSTILE)
def test_other_text_is_refused(name: str, toy: Callable[..., Program]) -> None:
    text = HOSTILE[name](print_python(toy()))
    with pytest.raises(ModelError) as e:
        parse_python(text)
    if name not in ("missing table", "not Python", "null byte", "no return"):
        assert e.value.where is not None
        assert e.value.where.startswith("line ")


def test_deep_and_long_literals_are_refused(toy: Callable[..., Program]) -> None:
    text = print_python(toy())
    for value in ("[" * 60 + "]" * 60, "[" + "1, " * 70000 + "]", '"' + "x" * (1 << 21) + '"'):
        with pytest.raises(ModelError):
            parse_python(text.replace("1e-05", value, 1))


def test_the_place_of_an_error_is_right(toy: Callable[..., Program]) -> None:
    text = print_python(toy()).replace("window=3", "window=nothing", 1)
    line = next(i for i, x in enumerate(text.splitlines(), 1) if "nothing" in x)
    column = text.splitlines()[line - 1].index("nothing") + 1
    with pytest.raises(ModelError, match=f"line {line} column {column}"):
        parse_python(text)


def test_the_parser_never_runs_anything() -> None:
    import llmc.compiler.ir.parser as module

    with open(module.__file__, encoding="utf-8") as f:
        tree = ast.parse(f.read())
    called = {n.func.id for n in ast.walk(tree)
              if isinstance(n, ast.Call) and isinstance(n.func, ast.Name)}  # fmt: skip
    assert not called & {"eval", "exec", "compile", "__import__", "getattr"}
