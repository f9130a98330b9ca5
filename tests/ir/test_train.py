"""Tables as tensor trains: both ops against the table written out, shapes and hostile tensors."""

from __future__ import annotations

import itertools
from typing import Any

import pytest
import torch
from torch import Tensor

from llmc.compiler.analysis.blocks import apply_segments
from llmc.compiler.analysis.tokenwise import prove_tokenwise
from llmc.compiler.ir.errors import ModelError, VerifierError
from llmc.compiler.ir.graph import Program
from llmc.compiler.ir.ops import train
from llmc.compiler.ir.ops.train import tt_linear, tt_lookup
from llmc.compiler.ir.serial import from_json, to_json
from llmc.compiler.ir.verifier import verify, verify_tensors
from llmc.compiler.pipeline.compile import compile_plan
from llmc.compiler.pipeline.plan import make_plan
from llmc.compiler.pipeline.recipe import from_strings
from llmc.compiler.pipeline.zoo import decoder

G = torch.Generator().manual_seed(0)


def make(*shape: int) -> Tensor:
    return torch.randn(*shape, generator=G, dtype=torch.float64)


SCALE = make(10)
OWN = [make(10, 1, 2, 2), make(10, 2, 3, 4), make(10, 4, 2, 1)]
SHARED = [make(2, 1, 2, 2), make(3, 2, 3, 4), make(2, 4, 2, 1)]
ORDER = torch.tensor([11, 3, 0, 7, 2, 9, 1, 4, 10, 5], dtype=torch.int32)
CASES: list[tuple[Tensor | None, list[Tensor], list[int]]] = [
    (None, OWN, []), (None, SHARED, [2, 3, 2]), (ORDER, SHARED, [2, 3, 2])
]  # fmt: skip


def table(order: Tensor | None, cores: list[Tensor], rows: list[int]) -> Tensor:
    """The definition, one number at a time."""
    out = torch.zeros(10, 12, dtype=torch.float64)
    for token in range(10):
        place = token if order is None else int(order[token])
        digits = (token,) * 3 if not rows else list(itertools.product(*map(range, rows)))[place]
        for column, at in enumerate(itertools.product(range(2), range(3), range(2))):
            made = torch.ones(1, 1, dtype=torch.float64)
            for core, digit, d in zip(cores, digits, at, strict=True):
                made = made @ core[digit][:, d]
            out[token, column] = SCALE[token] * made[0, 0]
    return out


@pytest.mark.parametrize(("order", "cores", "rows"), CASES)
def test_a_lookup_is_a_row_of_the_table(
    order: Tensor | None, cores: list[Tensor], rows: list[int]
) -> None:
    ids = torch.tensor([[0, 9, 3], [3, 5, 1]])
    want = table(order, cores, rows)[ids]
    torch.testing.assert_close(tt_lookup(ids, SCALE, order, cores, rows=rows), want)
    half = [c.bfloat16() for c in cores]
    made = tt_lookup(ids.int(), SCALE.bfloat16(), order, half, rows=rows)
    assert made.dtype == torch.bfloat16
    assert float((made - want).norm() / want.norm()) < 0.03


@pytest.mark.parametrize("tokens", [1, 2, 3, 7])
@pytest.mark.parametrize(("order", "cores", "rows"), CASES)
def test_a_head_multiplies_with_the_table(
    monkeypatch: pytest.MonkeyPatch, order: Tensor | None, cores: list[Tensor], rows: list[int],
    tokens: int,
) -> None:  # fmt: skip
    x = make(1, tokens, 12)
    want = x @ table(order, cores, rows).t()
    torch.testing.assert_close(tt_linear(x, SCALE, order, cores, rows=rows), want)
    monkeypatch.setattr(train, "ROWS_AT_ONCE", 3)
    monkeypatch.setattr(train, "NUMBERS_AT_ONCE", 1)
    torch.testing.assert_close(tt_linear(x, SCALE, order, cores, rows=rows), want)


def test_a_lookup_reads_no_other_token(monkeypatch: pytest.MonkeyPatch) -> None:
    """NaN in every core slice but those of the batch's tokens changes nothing."""
    ids = torch.tensor([3])
    poisoned = [c.clone().fill_(float("nan")) for c in OWN]
    for p, c in zip(poisoned, OWN, strict=True):
        p[3] = c[3]
    want = tt_lookup(ids, SCALE, None, OWN, rows=[])
    assert torch.equal(tt_lookup(ids, SCALE, None, poisoned, rows=[]), want)


def types(order: Any, cores: Any, rows: Any, scale: Tensor = SCALE) -> None:
    with torch._subclasses.FakeTensorMode() as mode:
        parts = [mode.from_tensor(t) for t in cores]
        index = None if order is None else mode.from_tensor(order)
        ids = mode.from_tensor(torch.zeros(3, dtype=torch.int64))
        torch.ops.llmc.tt_lookup(ids, mode.from_tensor(scale), index, parts, rows=rows)


@pytest.mark.parametrize(
    ("order", "cores", "rows", "scale", "told"),
    [
        (None, SHARED, [2, 3], SCALE, "3 factors"),
        (None, SHARED, [2, 2, 2], SCALE, "at least 10 rows"),
        (None, SHARED, [3, 2, 2], SCALE, r"a core \[3, 1"),
        (None, SHARED, [], SCALE, r"a core \[10, 1"),
        (None, SHARED[:2], [2, 5], SCALE, r"a core \[5, 2"),
        (None, [SHARED[0], make(5, 2, 3, 4)], [2, 5], SCALE, "a last core"),
        (None, [make(2, 1, 2)], [10], SCALE, "rank 4"),
        (None, [], [], SCALE, "rank 4"),
        (None, [make(10, 1, 0, 1)], [], SCALE, r"a core \[10, 1"),
        (ORDER, OWN, [], SCALE, "places"),
        (ORDER.long(), SHARED, [2, 3, 2], SCALE, "places"),
        (ORDER[:4], SHARED, [2, 3, 2], SCALE, "places"),
        (None, SHARED, [2, 3, 2], make(2, 5), "a scale per token"),
        (None, SHARED, [-2, -3, 2], SCALE, "3 factors"),
    ],
)
def test_parts_that_do_not_fit(order: Any, cores: Any, rows: Any, scale: Any, told: str) -> None:
    with pytest.raises(ModelError, match=told):
        types(order, cores, rows, scale)


# ** in a program **


def compiled(passes: str, *, tied: bool = True) -> Program:
    program = decoder(tied=tied)
    apply_segments(program)
    return compile_plan(make_plan(program, from_strings([passes])), None).program


@pytest.fixture(scope="module")
def program() -> Program:
    return compiled("tt_embed:cores=2")


def test_the_laws_hold(program: Program) -> None:
    verify(program)
    verify_tensors(program)
    assert prove_tokenwise(program) == []
    again = from_json(to_json(program), program.weights)
    verify(again)
    assert to_json(again) == to_json(program)


@pytest.mark.parametrize(
    ("part", "change", "rule"),
    [
        ("order", lambda t: t.clone().fill_(1), "train"),
        ("order", lambda t: t - 1, "train"),
        ("order", lambda t: t + 10_000, "train"),
        ("order", lambda t: t.long(), "stored"),
        ("core1", lambda t: t / 0 * 0, "train"),
        ("core0", lambda t: t[:1], "stored"),
        ("scale", lambda t: t * float("inf"), "scale"),
        ("scale", lambda t: t.double(), "stored"),
    ],
)
def test_hostile_tensors(program: Program, part: str, change: Any, rule: str) -> None:
    broken = program.clone()
    name = next(n for n in broken.params if n.endswith(part))
    broken.weights.tensors[name] = change(broken.weights.load(name))  # type: ignore[attr-defined]
    with pytest.raises(VerifierError) as caught:
        verify_tensors(broken)
    assert caught.value.rule == rule


@pytest.mark.parametrize(
    "rows", [[], [1, 1], [2], [1 << 40, 1 << 40], [5, -4], [0, 0], "no", [2.5, 2]]
)
def test_hostile_rows(program: Program, rows: Any) -> None:
    data = to_json(program)
    for node in data["nodes"]:
        if "rows" in node.get("kwargs", {}):
            node["kwargs"]["rows"] = rows
    with pytest.raises((VerifierError, ModelError)):
        verify(from_json(data, program.weights))
