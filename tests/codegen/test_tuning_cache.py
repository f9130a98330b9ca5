"""Tables of measurements: kept per machine and version, never used elsewhere, never half-read."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path

import pytest

from llmc.codegen.tuning.cache import Entry, Machine, Table, parse, path_of, read, write
from llmc.codegen.tuning.tuners import tuner
from llmc.compiler.ir.errors import ModelError, ResourceError, UsageError

HERE = Machine("cpu", "A processor, avx2", "2.0", "1.0")
ENTRY = Entry("int4 g128 64x64", 4, {"fast": 1e-3, "slow": 2e-3})


@pytest.fixture(autouse=True)
def cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A cache of the test's own."""
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    return tmp_path


def test_a_table_comes_back_as_it_was_written() -> None:
    assert ENTRY.best == "fast"
    table = Table(HERE, (ENTRY,))
    path = write(table)
    found = read(HERE)
    assert found.table == table
    assert found.path == path
    assert not found.reason
    more = table.with_entries([replace(ENTRY, seconds={"slow": 1.0}), replace(ENTRY, tokens=1)])
    assert [e.tokens for e in more.of(ENTRY.key)] == [1, 4]
    assert more.of(ENTRY.key)[1].best == "slow"


@pytest.mark.parametrize("field", ["torch", "llmc"])
def test_another_version_is_not_used(field: str) -> None:
    write(Table(HERE, (ENTRY,)))
    found = read(replace(HERE, **{field: "3.0"}))
    assert found.table is None
    assert f"expected {field} 3.0, found" in found.reason


def test_another_machine_is_not_used() -> None:
    write(Table(HERE, (ENTRY,)))
    other = replace(HERE, name="Another processor")
    found = read(other)
    assert found.table is None
    assert found.reason == "nothing was measured on this machine (1 of other machines are not used)"
    path_of(other).write_text(path_of(HERE).read_text())
    assert "expected name Another processor, found A processor, avx2" in read(other).reason


@pytest.mark.parametrize(
    ("text", "words"),
    [
        ("", "JSONDecodeError"),
        ("[]", "TypeError"),
        ('{"format": 99}', "expected format 1, found 99"),
        ('{"format": 1, "machine": {}, "entries": []}', "TypeError"),
        ('{"format": 1, "entries": [{"key": "a", "tokens": 0, "seconds": {"b": 1}}], '
         '"machine": {"target": "cpu", "name": "x"}}', "times above 0"),
    ],
)  # fmt: skip
def test_a_spoilt_table_says_so(text: str, words: str) -> None:
    path = write(Table(HERE, (ENTRY,)))
    path.write_text(text)
    found = read(HERE)
    assert found.table is None
    assert words in found.reason
    with pytest.raises(ModelError, match=words):
        parse(text, "here")


def test_a_cache_that_cannot_be_written_is_an_error_of_resources(cache: Path) -> None:
    (cache / "llmc").write_text("in the way")
    with pytest.raises(ResourceError, match="cannot write measurements"):
        write(Table(HERE, (ENTRY,)))


def test_unknown_targets_have_no_tuner() -> None:
    with pytest.raises(UsageError, match="found 'cqu'; did you mean 'cpu'"):
        tuner("cqu")


def test_json_names_machine_and_fastest(cache: Path) -> None:
    raw = json.loads(write(Table(HERE, (ENTRY,))).read_text())
    assert raw["machine"] == {"target": "cpu", "name": HERE.name, "torch": "2.0", "llmc": "1.0"}
    assert raw["entries"][0]["best"] == "fast"
