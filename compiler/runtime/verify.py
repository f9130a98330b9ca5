"""Every check of an artefact, without stopping at the first fault."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path

from ..ir.errors import LlmcError, ModelError, VerifierError
from ..ir.graph import Program
from ..ir.verifier import verify_tensors
from .artefact import check_file, load, open_manifest
from .manifest import Manifest
from .tensors import ArtefactWeights, check_headers, tensor_sha256


@dataclass(frozen=True)
class Finding:
    """One fault: what was checked, and one line saying what was found and where."""

    check: str
    message: str

    def __str__(self) -> str:
        return f"[{self.check}] {self.message}"


def verify(path: str | Path) -> list[Finding]:
    """Faults of an artefact; an empty list means that every check passed.

    Checks: files and sizes, hashes, headers, tensors (shape, finite, hash), the program's laws,
    and the laws of packed tensors (code ranges, mask positions, scales).
    """
    root = Path(path)
    try:
        manifest = open_manifest(root)
    except ModelError as e:
        return [Finding("files", str(e))]
    found = [Finding("hash", m) for m in _hashes(root, manifest)]
    found += [Finding("header", m) for m in _headers(root, manifest)]
    found += [Finding("tensor", m) for m in _tensors(root, manifest)]
    program: list[Program] = []
    found += _try("program", lambda: program.append(load(root, verify=False).program))
    for p in program:
        found += _try("packed", lambda p=p: verify_tensors(p))  # type: ignore[misc]
    return found


def _try(check: str, call: Callable[[], None]) -> list[Finding]:
    try:
        call()
    except (ModelError, VerifierError) as e:
        return [Finding(check, str(e))]
    return []


def _hashes(root: Path, manifest: Manifest) -> Iterator[str]:
    for name, record in manifest.files.items():
        try:
            check_file(root, name, record)
        except ModelError as e:
            yield str(e)


def _headers(root: Path, manifest: Manifest) -> Iterator[str]:
    try:
        yield from check_headers(root, manifest.tensors)
    except ModelError as e:
        yield str(e)


def _tensors(root: Path, manifest: Manifest) -> Iterator[str]:
    try:
        weights = ArtefactWeights(root, manifest.tensors)
    except ModelError as e:
        yield str(e)
        return
    for name, record in manifest.tensors.items():
        try:
            same = tensor_sha256(weights.load(name)) == record.sha256
        except LlmcError as e:
            yield str(e)
            continue
        if not same:
            yield f"expected tensor {name} of {record.file} as it was written, found other bytes"
