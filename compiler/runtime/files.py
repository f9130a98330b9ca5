"""Folders written whole or not at all, and files read as if a stranger had written them.

Writing: everything goes to ``<out>.tmp-<id>``, each file is synced, one rename makes it visible.
Reading: a size cap, no link of any kind, no path that leaves the folder, no duplicate JSON keys.
"""

from __future__ import annotations

import ctypes
import fcntl
import hashlib
import json
import os
import re
import shutil
import stat
import uuid
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any

from ..ir.errors import LlmcError, ModelError, ResourceError, UsageError

JSON_BYTES = 64 << 20
JSON_DEPTH = 64
_NAME = re.compile(r"[A-Za-z0-9_][A-Za-z0-9_.\-]{0,127}(/[A-Za-z0-9_][A-Za-z0-9_.\-]{0,127}){0,2}")


# ** writing **


def canonical_json(value: Any) -> bytes:
    """One byte form per value: sorted keys, no spaces, no NaN, a newline at the end.

    Raises:
        ValueError: a float is not finite.
    """
    text = json.dumps(
        value, sort_keys=True, separators=(",", ":"), ensure_ascii=False, allow_nan=False
    )
    return text.encode() + b"\n"


def sync(path: Path) -> None:
    """fsync a file or a folder."""
    fd = os.open(path, os.O_RDONLY)
    try:
        os.fsync(fd)
    finally:
        os.close(fd)


def _umask() -> int:
    """The bits that new files lack. The system tells them only by setting them."""
    bits = os.umask(0o077)
    os.umask(bits)
    return bits


class Folder:
    """A folder being written; only :func:`new_folder` makes one."""

    def __init__(self, path: Path) -> None:
        self.path = path

    def write(self, name: str, data: bytes) -> None:
        """Write and sync one file; ``name`` may have folders."""
        path = self._place(name)
        with open(path, "xb") as f:
            f.write(data)
            f.flush()
            os.fsync(f.fileno())

    def write_with(self, name: str, writer: Callable[[Path], None]) -> None:
        """Let ``writer`` create the file, then sync it; its mode is that of the other files."""
        path = self._place(name)
        writer(path)
        # safetensors makes files that only their owner may read.
        path.chmod(0o666 & ~_umask())
        sync(path)

    def adopt(self) -> None:
        """Sync the files that others wrote here, and give them the mode of new files."""
        for name in all_files(self.path):
            (self.path / name).chmod(0o666 & ~_umask())
            sync(self.path / name)

    def _place(self, name: str) -> Path:
        path = self.path / safe_name(name)
        path.parent.mkdir(parents=True, exist_ok=True)
        return path


@contextmanager
def new_folder(out: Path, *, needed: int, force: bool = False) -> Iterator[Folder]:
    """A folder that appears at ``out`` when the block ends well, and else leaves nothing.

    Args:
        needed: bytes that will be written; 5 % more must be free.
        force: an existing ``out`` is swapped by one rename, never before the new one is complete.
    Raises:
        UsageError: ``out`` exists without ``force``, or another process is writing it.
        ResourceError: no space, or the file system failed.
    """
    out = Path(os.path.abspath(out))
    temporary = out.with_name(f"{out.name}.tmp-{uuid.uuid4().hex[:12]}")
    changed = "nothing was changed"
    try:
        out.parent.mkdir(parents=True, exist_ok=True)
        with _lock(out):
            if os.path.lexists(out) and not force:
                raise UsageError(f"expected a new folder, found {out}", hint="--force replaces it")
            if os.path.lexists(out) and (out.is_symlink() or not out.is_dir()):
                raise UsageError(f"expected a folder, found a file or a link at {out}")
            # With the lock held no other writer lives: what is left here is from a killed one.
            # A folder set aside is thrown away only while its successor is in place.
            for end in ("tmp", "old") if out.exists() else ("tmp",):
                for stale in out.parent.glob(f"{out.name}.{end}-*"):
                    shutil.rmtree(stale, ignore_errors=True)
            free, wanted = shutil.disk_usage(out.parent).free, needed + needed // 20
            if free < wanted:
                raise ResourceError(
                    f"expected {wanted} free bytes for {out}, found {free}",
                    hint="free some space or choose another folder",
                )
            temporary.mkdir()
            try:
                yield Folder(temporary)
                for folder, _, _ in os.walk(temporary):
                    sync(Path(folder))
                _publish(temporary, out)
                changed = "the new folder is in place, but may not survive a power cut"
                sync(out.parent)
            finally:
                shutil.rmtree(temporary, ignore_errors=True)
    except OSError as e:
        raise ResourceError(
            f"expected to write {needed} bytes at {out}, found {e.strerror or e}", hint=changed
        ) from e
    except LlmcError:
        raise
    except Exception as e:
        # safetensors wraps the system's error in its own class.
        if "os error" not in str(e):
            raise
        raise ResourceError(
            f"expected to write {needed} bytes at {out}, found {e}", hint=changed
        ) from e


def _publish(temporary: Path, out: Path) -> None:
    """Rename into place; an existing folder trades places with the new one in one step."""
    if not os.path.lexists(out):
        os.rename(temporary, out)
    elif not _exchange(temporary, out):
        aside = out.with_name(f"{out.name}.old-{uuid.uuid4().hex[:12]}")
        os.rename(out, aside)
        try:
            os.rename(temporary, out)
        except BaseException:
            os.rename(aside, out)
            raise
        shutil.rmtree(aside, ignore_errors=True)


def _exchange(a: Path, b: Path) -> bool:
    """Swap two paths atomically; False where the system cannot (renameat2 is Linux's)."""
    at_cwd, exchange = -100, 2
    call = getattr(ctypes.CDLL(None, use_errno=True), "renameat2", None)
    if call is None:
        return False
    return bool(call(at_cwd, os.fsencode(a), at_cwd, os.fsencode(b), exchange) == 0)


@contextmanager
def _lock(out: Path) -> Iterator[None]:
    """One writer per folder; the system drops the lock of a killed process."""
    path = out.with_name(f".{out.name}.lock")
    fd = os.open(path, os.O_CREAT | os.O_RDWR | os.O_CLOEXEC, 0o600)
    try:
        held = False
        with suppress(BlockingIOError):
            fcntl.flock(fd, fcntl.LOCK_EX | fcntl.LOCK_NB)
            # A writer that has just ended removes the file: what we hold must still be its name.
            held = path.exists() and path.stat().st_ino == os.fstat(fd).st_ino
        if not held:
            raise UsageError(
                f"expected no other writer of {out}, found one", hint="wait for it to end"
            )
        try:
            yield
        finally:
            path.unlink(missing_ok=True)
    finally:
        os.close(fd)


# ** reading **


def safe_name(name: str) -> str:
    """A relative file name of letters, digits, ``_ . -`` and at most two folders.

    Raises:
        ModelError: anything else, such as ``..``, an absolute path or a hidden file.
    """
    if not _NAME.fullmatch(name):
        raise ModelError(f"expected a plain relative file name, found {name!r}")
    return name


def checked_path(root: Path, name: str, limit: int) -> Path:
    """The path of a regular file of ``root``, reached through no link, of at most ``limit`` bytes.

    Raises:
        ModelError: naming the file and what is wrong with it.
    """
    path = root
    parts = safe_name(name).split("/")
    for i, part in enumerate(parts):
        path = path / part
        try:
            seen = path.lstat()
        except OSError:
            raise ModelError(f"expected file {name}, found none", where=str(root)) from None
        if stat.S_ISLNK(seen.st_mode):
            raise ModelError(f"expected no symbolic link, found {name}", where=str(root))
        if i < len(parts) - 1:
            if not stat.S_ISDIR(seen.st_mode):
                raise ModelError(f"expected a folder at {part}, found a file", where=str(root))
            continue
        if not stat.S_ISREG(seen.st_mode):
            raise ModelError(f"expected a regular file, found {name}", where=str(root))
        if seen.st_nlink != 1:
            raise ModelError(f"expected no hard link, found {name}", where=str(root))
        if seen.st_size > limit:
            raise ModelError(
                f"expected {name} of at most {limit} bytes, found {seen.st_size}", where=str(root)
            )
    return path


def read_bytes(root: Path, name: str, limit: int = JSON_BYTES) -> bytes:
    """A checked file's bytes.

    Raises:
        ModelError: see :func:`checked_path`; or the file cannot be read.
    """
    path = checked_path(root, name, limit)
    try:
        fd = os.open(path, os.O_RDONLY | os.O_NOFOLLOW)
        with os.fdopen(fd, "rb") as f:
            data = f.read(limit + 1)
    except OSError as e:
        raise ModelError(f"expected to read {name}, found {e.strerror}", where=str(root)) from e
    if len(data) > limit:
        raise ModelError(f"expected {name} of at most {limit} bytes", where=str(root))
    return data


def parse_json(data: bytes, name: str) -> Any:
    """JSON without duplicate keys, NaN or deep nesting.

    Raises:
        ModelError: naming the file and the fault.
    """
    try:
        text = data.decode("utf-8")
    except UnicodeDecodeError as e:
        raise ModelError(f"expected UTF-8, found byte {e.start}", where=name) from None
    if _depth(text) > JSON_DEPTH:
        raise ModelError(f"expected JSON nested at most {JSON_DEPTH} deep", where=name)

    def pairs(items: list[tuple[str, Any]]) -> dict[str, Any]:
        out: dict[str, Any] = {}
        for key, value in items:
            if key in out:
                raise ModelError(f"expected each key once, found {key[:80]!r} twice", where=name)
            out[key] = value
        return out

    def constant(word: str) -> Any:
        raise ModelError(f"expected finite numbers, found {word}", where=name)

    try:
        return json.loads(text, object_pairs_hook=pairs, parse_constant=constant)
    except ValueError as e:
        raise ModelError(f"expected JSON, found ({str(e)[:120]})", where=name) from None


# A string that never ends matches up to the end, so no text is scanned twice.
_TOKENS = re.compile(r'"[^"\\]*(?:\\.[^"\\]*)*"?|[\[{\]}]', re.DOTALL)


def _depth(text: str) -> int:
    """Deepest nesting of brackets outside strings, found before any parser recurses."""
    depth = deepest = 0
    for match in _TOKENS.finditer(text):
        first = match.group()[0]
        if first in "[{":
            depth += 1
            if depth > deepest:
                deepest = depth
                if deepest > JSON_DEPTH:
                    break
        elif first in "]}":
            depth -= 1
    return deepest


def read_json(root: Path, name: str, limit: int = JSON_BYTES) -> Any:
    """:func:`read_bytes`, then :func:`parse_json`."""
    return parse_json(read_bytes(root, name, limit), name)


def file_sha256(path: Path) -> str:
    """SHA-256 of a file's bytes, in hex."""
    with open(path, "rb") as f:
        return hashlib.file_digest(f, "sha256").hexdigest()


def all_files(root: Path) -> list[str]:
    """Every file below ``root``, relative, sorted; links count as files and are not followed."""
    out: list[str] = []
    for folder, dirs, files in os.walk(root):
        base = Path(folder)
        linked = [d for d in dirs if (base / d).is_symlink()]
        out += [(base / n).relative_to(root).as_posix() for n in [*files, *linked]]
    return sorted(out)
