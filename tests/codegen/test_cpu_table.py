"""Which way is taken at how many tokens: the user's table, the shipped one, else the usual."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from lowering_programs import Maker, Weight, hidden

from llmc.codegen import cpu
from llmc.codegen.cpu import compiled, table
from llmc.codegen.cpu.dtypes import compute_dtype
from llmc.codegen.cpu.nibbles import NIBBLES
from llmc.codegen.problem import Problem
from llmc.codegen.targets import lower
from llmc.codegen.tuning.cache import Entry, Table, write
from llmc.compiler.ir.errors import ResourceError
from llmc.compiler.ir.graph import Program
from llmc.compiler.ir.interpret import run

P = Problem(64, 128, group=32, x_dtype="bf16")
KEY = "int4 g32 64x128"


@pytest.fixture(autouse=True)
def cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A cache of the test's own."""
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    return tmp_path


def keep(*entries: Entry) -> None:
    """Write a table of this machine."""
    write(Table(table.machine(), entries))


def test_ways_cross_between_measured_tokens() -> None:
    """int4pack t, decode 8: they meet at 8 tokens on the straight lines."""
    keep(*(Entry(KEY, t, {"int4pack": t, "decode": 8.0}) for t in (1, 4, 16)))
    choice = cpu.ways_by_tokens(NIBBLES, P)
    assert choice.steps == ((1, "int4pack"), (9, "decode"))
    assert [choice.at(t) for t in (1, 8, 9, 5000)] == ["int4pack", "int4pack", "decode", "decode"]
    assert choice.source == "measured here"
    assert choice.key == KEY
    assert str(choice) == "int4pack, M>=9 decode (measured here)"


def test_a_way_that_is_linear_in_tokens_goes_on_beyond_the_last() -> None:
    keep(Entry(KEY, 1, {"int4pack": 1.0, "decode": 9.0}),
         Entry(KEY, 16, {"int4pack": 16.0, "decode": 17.0}))  # fmt: skip
    assert cpu.ways_by_tokens(NIBBLES, P).at(1000) == "int4pack"


def test_the_nearest_shape_of_the_scheme_serves() -> None:
    keep(
        Entry("int4 g32 4096x4096", 1, {"int4pack": 9.0, "decode": 1.0}),
        Entry("int4 g32 128x128", 1, {"int4pack": 1.0, "decode": 9.0}),
        Entry("int4 g64 64x128", 1, {"int4pack": 9.0, "decode": 1.0}),
    )
    choice = cpu.ways_by_tokens(NIBBLES, P)
    assert choice.key == "int4 g32 128x128"
    assert choice.at(1) == "int4pack"


def test_the_shipped_table_names_its_machine(monkeypatch: pytest.MonkeyPatch) -> None:
    choice = cpu.ways_by_tokens(NIBBLES, P)
    shipped = table.shipped()
    assert shipped is not None
    assert choice.source == f"shipped, measured on {shipped.machine.name}"
    assert choice.at(1) == "int4pack"
    assert choice.at(1024) == "decode"
    assert {e.key.partition(" ")[0] for e in shipped.entries} == {"dense", "int4", "int4x2", "int8"}
    monkeypatch.setattr(table, "shipped", lambda: None)
    choice = cpu.ways_by_tokens(NIBBLES, P)
    assert choice.steps == NIBBLES.usual
    assert "nothing measured" in choice.source


def test_a_foreign_table_is_not_used() -> None:
    entry = Entry(KEY, 1, {"int4pack": 9.0, "decode": 1.0})
    path = write(Table(table.machine(), (entry,)))
    path.write_text(path.read_text().replace(torch.__version__, "1.0"))
    assert cpu.ways_by_tokens(NIBBLES, P).at(1) == "int4pack"
    assert "expected torch" in table.measured().reason


def test_instructions_decide_the_dtype_where_nothing_was_measured(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    from llmc.codegen.cpu import dtypes

    for names, dtype in (("X, avx2, amx_bf16", torch.bfloat16), ("X, avx2", torch.float32)):
        machine = table.Machine("cpu", names)
        monkeypatch.setattr(dtypes, "machine", lambda machine=machine: machine)
        found, why = compute_dtype()
        assert found == dtype
        assert "bf16" in why


def one(weight: Weight, dtype: torch.dtype = torch.bfloat16) -> Program:
    """A single linear."""
    m = Maker(dtype)
    return m.output(m.linear(m.input("h", weight.K), "w", weight, True))


def test_the_plan_says_which_way_and_where_from() -> None:
    keep(Entry(KEY, 1, {"int4pack": 1.0, "decode": 2.0}))
    (placed,) = lower(one(Weight(64, 128)), "cpu").placed
    assert "int4pack (measured here)" in placed.note


@pytest.mark.parametrize("compile_", [False, True])
def test_the_plan_says_that_a_mask_saves_no_time(
    compile_: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(compiled, "attach", lambda kernel, _, *others: (kernel, *others))
    (placed,) = lower(one(Weight(64, 128, sparse=True)), "cpu", compiled=compile_).placed
    words = "2:4 spread to dense codes: its mask saves size on disk, not memory or time here"
    assert words in placed.note


def test_dense_leaves_the_decoding_to_whoever_keeps_constants() -> None:
    program, x = one(Weight(64, 128)), hidden(torch.bfloat16, 128)
    lowered = lower(program, "cpu", dense=True)
    assert not lowered.placed
    assert "resident=dense" in lowered.refused[0].reason
    assert torch.equal(run(lowered.program, {"h": x}), run(program, {"h": x}))


@pytest.mark.parametrize("without", ["compiler", "processor", "layout"])
def test_nothing_is_compiled_without_what_it_takes(
    without: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    if without == "compiler":
        monkeypatch.setenv("CXX", "no-such-compiler")
    else:
        monkeypatch.setenv("CXX", "true")
        has = "X, avx2" if without == "processor" else "X, avx2, amx_bf16"
        monkeypatch.setattr(compiled, "machine", lambda: table.Machine("cpu", has))
        monkeypatch.setattr(compiled, "block_rows", lambda: 32)
    words = {"compiler": r"C\+\+ compiler", "processor": "amx_bf16", "layout": "64 rows"}[without]
    with pytest.raises(ResourceError, match=rf"cannot compile for cpu: expected .*{words}") as e:
        lower(one(Weight(64, 128)), "cpu", compiled=True)
    assert "\n" not in str(e.value)
