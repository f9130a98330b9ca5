"""Folders written whole or not at all; files read with suspicion."""

from __future__ import annotations

import errno
import os
import subprocess
import sys
import textwrap
import time
from contextlib import suppress
from pathlib import Path

import pytest

from llmc.compiler.ir.errors import ModelError, ResourceError, UsageError
from llmc.compiler.runtime import files


def names(folder: Path) -> list[str]:
    return sorted(p.name for p in folder.iterdir())


def make(out: Path, text: bytes = b"new", force: bool = False) -> None:
    with files.new_folder(out, needed=10, force=force) as folder:
        folder.write("a.json", text)
        folder.write("graphs/00-w4.json", b"{}")


def test_folder_appears_whole(tmp_path: Path) -> None:
    make(tmp_path / "out")
    assert names(tmp_path) == ["out"]
    assert files.all_files(tmp_path / "out") == ["a.json", "graphs/00-w4.json"]


def test_existing_folder_needs_force(tmp_path: Path) -> None:
    make(tmp_path / "out", b"old")
    with pytest.raises(UsageError, match="--force"):
        make(tmp_path / "out")
    assert (tmp_path / "out/a.json").read_bytes() == b"old"
    make(tmp_path / "out", b"new", force=True)
    assert (tmp_path / "out/a.json").read_bytes() == b"new"
    assert names(tmp_path) == ["out"]


@pytest.mark.parametrize("error", [KeyboardInterrupt, ValueError, ModelError])
def test_nothing_is_left_when_the_writer_fails(tmp_path: Path, error: type[BaseException]) -> None:
    make(tmp_path / "out", b"old")

    def write_half() -> None:
        with files.new_folder(tmp_path / "out", needed=1, force=True) as folder:
            folder.write("a.json", b"half")
            raise error("stop")

    with pytest.raises(error):
        write_half()
    assert names(tmp_path) == ["out"]
    assert (tmp_path / "out/a.json").read_bytes() == b"old"


@pytest.mark.parametrize("call", ["fsync", "rename", "open"])
@pytest.mark.parametrize("code", [errno.ENOSPC, errno.EIO, errno.EDQUOT, errno.EROFS])
def test_every_failing_system_call_leaves_one_whole_folder(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, call: str, code: int
) -> None:
    monkeypatch.setattr(files, "_exchange", lambda a, b: False)
    real = getattr(os, call)
    refused = 0
    for nth in range(20):
        make(tmp_path / "out", b"old", force=True)
        count = 0

        def broken(*args: object, nth: int = nth, **kwargs: object) -> object:
            nonlocal count
            count += 1
            if count == nth + 1:
                raise OSError(code, os.strerror(code))
            return real(*args, **kwargs)

        with monkeypatch.context() as patch:
            patch.setattr(os, call, broken)
            message = outcome(tmp_path / "out")
        if count <= nth:
            assert message == "written"
            break
        refused += message != "written"
        held = (tmp_path / "out/a.json").read_bytes()
        assert held == (b"old" if "nothing was changed" in message else b"new"), nth
        assert [n for n in names(tmp_path) if "tmp-" in n] == [], nth
    assert refused
    assert names(tmp_path) == ["out"]


def outcome(out: Path) -> str:
    try:
        make(out, b"new", force=True)
    except ResourceError as e:
        return str(e)
    return "written"


def test_a_failed_write_names_the_bytes_needed(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def full(fd: int) -> None:
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    monkeypatch.setattr(os, "fsync", full)
    with pytest.raises(ResourceError, match=r"10 bytes at .*No space left") as caught:
        make(tmp_path / "out")
    assert caught.value.exit_code == 5
    assert "\n" not in str(caught.value)
    assert names(tmp_path) == []


def test_too_little_space_is_known_before_writing(tmp_path: Path) -> None:
    with (
        pytest.raises(ResourceError, match=f"expected {1 << 60 | (1 << 60) // 20} free bytes"),
        files.new_folder(tmp_path / "out", needed=1 << 60),
    ):
        pytest.fail("the block must not run")
    assert names(tmp_path) == []


def test_second_writer_is_refused(tmp_path: Path) -> None:
    with files.new_folder(tmp_path / "out", needed=1) as folder:
        folder.write("a.json", b"first")
        with pytest.raises(UsageError, match="other writer"):
            make(tmp_path / "out")
    assert (tmp_path / "out/a.json").read_bytes() == b"first"


def test_killed_writer_leaves_nothing_that_counts(tmp_path: Path) -> None:
    code = textwrap.dedent(
        """
        import os, signal, sys
        from pathlib import Path
        from llmc.compiler.runtime import files
        with files.new_folder(Path(sys.argv[1]), needed=1) as folder:
            folder.write("a.json", b"half")
            os.kill(os.getpid(), signal.SIGKILL)
        """
    )
    done = subprocess.run([sys.executable, "-c", code, str(tmp_path / "out")], check=False)
    assert done.returncode == -9
    assert not (tmp_path / "out").exists()
    make(tmp_path / "out")
    assert names(tmp_path) == ["out"]


@pytest.mark.parametrize(
    "name", ["../a", "/etc/passwd", "a/../../b", ".hidden", "a//b", "", "a\x00b", "a/b/c/d", "a\\b"]
)
def test_names_that_leave_the_folder_are_refused(tmp_path: Path, name: str) -> None:
    with pytest.raises(ModelError, match="plain relative file name"):
        files.read_bytes(tmp_path, name)


def test_links_are_refused(tmp_path: Path) -> None:
    (tmp_path / "real").write_bytes(b"x")
    (tmp_path / "soft").symlink_to(tmp_path / "real")
    with pytest.raises(ModelError, match="symbolic link, found soft"):
        files.read_bytes(tmp_path, "soft")
    (tmp_path / "folder").symlink_to(tmp_path)
    with pytest.raises(ModelError, match="symbolic link"):
        files.read_bytes(tmp_path, "folder/real")
    os.link(tmp_path / "real", tmp_path / "hard")
    with pytest.raises(ModelError, match="hard link, found hard"):
        files.read_bytes(tmp_path, "hard")


def test_device_files_and_folders_are_refused(tmp_path: Path) -> None:
    os.mkfifo(tmp_path / "pipe")
    with pytest.raises(ModelError, match="regular file"):
        files.read_bytes(tmp_path, "pipe")
    with pytest.raises(ModelError, match="expected file gone"):
        files.read_bytes(tmp_path, "gone")


def test_size_cap(tmp_path: Path) -> None:
    (tmp_path / "big").write_bytes(b"x" * 11)
    with pytest.raises(ModelError, match="at most 10 bytes, found 11"):
        files.read_bytes(tmp_path, "big", 10)


@pytest.mark.parametrize(
    ("data", "message"),
    [
        (b'{"a":1,"a":2}', "'a' twice"),
        (b'{"x":{"a":1,"a":2}}', "'a' twice"),
        (b"[" * 100_000, "nested at most"),
        (b'{"a":' * 70 + b"1" + b"}" * 70, "nested at most"),
        (b"NaN", "NaN"),
        (b"[Infinity]", "Infinity"),
        (b"\xff", "UTF-8"),
        (b"{", "expected JSON"),
        (b"1" * 10_000, "expected JSON"),
    ],
)
def test_bad_json_is_refused(data: bytes, message: str) -> None:
    with pytest.raises(ModelError, match=message) as caught:
        files.parse_json(data, "plan.json")
    assert "plan.json" in str(caught.value)
    assert "\n" not in str(caught.value)


def test_depth_is_found_in_one_scan() -> None:
    text = b'"' + b'\\"' * 3_000_000
    start = time.perf_counter()
    for data in (text, text + b'"', b"[" + b'"[",' * 1_000_000 + b"0]"):
        with suppress(ModelError):
            files.parse_json(data, "f")
    assert time.perf_counter() - start < 20


def test_brackets_in_strings_do_not_count() -> None:
    assert files.parse_json(b'{"a":"' + b"[" * 1000 + b'\\"["}', "f")["a"].startswith("[[")


def test_canonical_json_is_one_form() -> None:
    assert files.canonical_json({"b": 1, "a": "é"}) == '{"a":"é","b":1}\n'.encode()
    with pytest.raises(ValueError, match="float"):
        files.canonical_json(float("nan"))
