"""The manifest: what lies in an artefact's folder, hash by hash, and what was done to the model."""

from __future__ import annotations

import hashlib
from collections.abc import Mapping
from typing import Any

from pydantic import BaseModel, ConfigDict, Field, ValidationError

from ..ir.errors import ModelError
from .files import canonical_json, parse_json, safe_name

FORMAT, VERSION = "llmc.artefact", 1
NAME = "manifest.json"
MANIFEST_BYTES = 64 << 20
_SHA = r"^[0-9a-f]{64}$"


class _Strict(BaseModel):
    model_config = ConfigDict(extra="forbid", strict=True, frozen=True)


class File(_Strict):
    """One file: its SHA-256 and size in bytes; ``content`` files enter the content hash."""

    sha256: str = Field(pattern=_SHA)
    size: int = Field(ge=0, lt=1 << 53)
    content: bool


class Tensor(_Strict):
    """One tensor: its file, dtype (llmc's short name), shape, role and SHA-256 of its bytes."""

    file: str = Field(max_length=200)
    dtype: str = Field(max_length=8)
    shape: list[int] = Field(max_length=8)
    role: str = Field(max_length=64)
    sha256: str = Field(pattern=_SHA)


class Manifest(_Strict):
    """All that an artefact promises.

    Attributes:
        content_hash: over the program, the schemes and the tensors: equal for equal models,
            whatever was typed, when and where.
        files: by name; the manifest itself is not among them.
        tensors: by parameter name.
        passes: what was applied, in order.
        fallbacks: where the planned solve was not possible, and what was done instead.
        versions: of the libraries that wrote it; outside the content hash.
        sealed: SHA-256 of the manifest without this field.
    """

    format: str
    format_version: int
    content_hash: str = Field(pattern=_SHA)
    files: dict[str, File]
    tensors: dict[str, Tensor]
    passes: list[Any]
    fallbacks: list[Any]
    versions: dict[str, str]
    sealed: str = Field(pattern=_SHA)


def make_manifest(
    files: Mapping[str, File],
    tensors: Mapping[str, Tensor],
    *,
    passes: list[Any],
    fallbacks: list[Any],
    versions: Mapping[str, str],
) -> bytes:
    """The manifest's bytes, in their one canonical form."""
    body: dict[str, Any] = {
        "format": FORMAT,
        "format_version": VERSION,
        "content_hash": content_hash(files, tensors),
        "files": {n: f.model_dump() for n, f in files.items()},
        "tensors": {n: t.model_dump() for n, t in tensors.items()},
        "passes": passes,
        "fallbacks": fallbacks,
        "versions": dict(versions),
    }
    return canonical_json(body | {"sealed": _seal(body)})


def _seal(body: Mapping[str, Any]) -> str:
    return hashlib.sha256(canonical_json(dict(body))).hexdigest()


def content_hash(files: Mapping[str, File], tensors: Mapping[str, Tensor]) -> str:
    """SHA-256 over content files and tensors; how tensors are spread over files does not matter."""
    lines = ["llmc content 1"]
    lines += [f"file {n} {f.sha256}" for n, f in sorted(files.items()) if f.content]
    for name, t in sorted(tensors.items()):
        shape = "x".join(map(str, t.shape))
        lines.append(f"tensor {name} {t.dtype} {shape} {t.role} {t.sha256}")
    return hashlib.sha256("\n".join(lines).encode()).hexdigest()


def read_manifest(data: bytes) -> Manifest:
    """A manifest from its bytes.

    Raises:
        ModelError: not JSON, not of this version, an unknown or missing field, or changed bytes.
    """
    body = parse_json(data, NAME)
    if not isinstance(body, dict) or body.get("format") != FORMAT:
        raise ModelError(f"expected an llmc artefact ({FORMAT})", where=NAME)
    if body.get("format_version") != VERSION:
        raise ModelError(
            f"expected artefact format {VERSION}, found {body.get('format_version')!r}",
            where=NAME,
            hint="compile again with this version of llmc",
        )
    try:
        out = Manifest.model_validate(body)
    except ValidationError as e:
        first = e.errors()[0]
        place = ".".join(str(p) for p in first["loc"])
        raise ModelError(f"expected {place}: {first['msg']}", where=NAME) from None
    rest = {k: v for k, v in body.items() if k != "sealed"}
    try:
        changed = canonical_json(body) != data or _seal(rest) != out.sealed
    except (ValueError, UnicodeEncodeError):
        changed = True
    if changed:
        raise ModelError("expected the manifest as it was sealed, found changed bytes", where=NAME)
    for name in [*out.files, *(t.file for t in out.tensors.values())]:
        safe_name(name)
    strange = sorted({t.file for t in out.tensors.values()} - set(out.files))
    if strange:
        raise ModelError(f"expected tensors in listed files, found {strange[0]}", where=NAME)
    if content_hash(out.files, out.tensors) != out.content_hash:
        raise ModelError("expected a content hash that fits the files listed", where=NAME)
    return out
