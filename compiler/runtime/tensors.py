"""Tensors of an artefact in safetensors files: written in one order, read lazily and checked."""

from __future__ import annotations

import hashlib
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import torch

from ..ir.caches import cache_params
from ..ir.errors import ModelError
from ..ir.exits import CLASSIFIER
from ..ir.graph import Param, Program, Weights
from ..ir.types import DTYPES, short
from .files import Folder, checked_path, parse_json
from .manifest import Tensor

HEADER_BYTES = 100_000_000
FILE_BYTES = 1 << 42
# safetensors' names of the dtypes that an artefact may hold.
_STORED = {
    "F64": "f64", "F32": "f32", "F16": "f16", "BF16": "bf16", "I64": "i64", "I32": "i32",
    "I16": "i16", "I8": "i8", "U8": "u8", "BOOL": "b8",
}  # fmt: skip


# ** writing **


def files_of(program: Program) -> dict[str, list[str]]:
    """Parameters by file name: one file per segment, in the order in which the graph reads them.

    What no node reads, the classifier of early exits and what caches need, has files of its own.
    """
    home: dict[str, str] = {}
    for segment in program.segments:
        for node in segment.nodes:
            home.setdefault(node, segment.name)
    out: dict[str, list[str]] = {}
    for node in program.graph.nodes:
        if node.op != "get_attr":
            continue
        place = home.get(node.name, "main")
        out.setdefault(f"weights-{place}.safetensors", []).append(str(node.target))
    if program.exits is not None and program.exits.classifies:
        out["weights-exits.safetensors"] = [CLASSIFIER]
    kept = list(cache_params(program))
    if kept:
        out["weights-caches.safetensors"] = kept
    return out


def write_tensors(
    folder: Folder, name: str, params: Sequence[Param], weights: Weights, roles: Mapping[str, str]
) -> dict[str, Tensor]:
    """Write one file and return its tensors' records; only this file's tensors are in memory.

    Raises:
        ModelError: a tensor that is not what its parameter says, or is not finite.
    """
    from safetensors.torch import save_file

    tensors: dict[str, torch.Tensor] = {}
    records: dict[str, Tensor] = {}
    places: set[int] = set()
    for param in params:
        tensor = weights.load(param.name).detach().to("cpu").contiguous()
        _check(param.name, tensor, param.shape, param.dtype, name)
        # Views of one storage are written apart: a file never shares bytes.
        if tensor.untyped_storage().data_ptr() in places:
            tensor = tensor.clone()
        places.add(tensor.untyped_storage().data_ptr())
        tensors[param.name] = tensor
        records[param.name] = Tensor(
            file=name, dtype=short(param.dtype), shape=list(param.shape),
            role=roles.get(param.name, "unused"), sha256=tensor_sha256(tensor),
        )  # fmt: skip
    # One metadata key only: with more, the library writes them in random order.
    folder.write_with(name, lambda path: save_file(tensors, path, metadata={"format": "pt"}))
    return records


def tensor_sha256(tensor: torch.Tensor) -> str:
    """SHA-256 of a tensor's bytes, row-major."""
    flat = tensor.contiguous().reshape(-1)
    if not flat.numel():
        return hashlib.sha256(b"").hexdigest()
    return hashlib.sha256(flat.view(torch.uint8).numpy().data).hexdigest()


def _check(
    name: str, tensor: torch.Tensor, shape: Sequence[int], dtype: torch.dtype, file: str
) -> None:
    if tuple(tensor.shape) != tuple(shape) or tensor.dtype != dtype:
        raise ModelError(
            f"expected tensor {name} {short(dtype)}{list(shape)}, found "
            f"{short(tensor.dtype)}{list(tensor.shape)}",
            where=file,
        )
    if tensor.is_floating_point() and not bool(torch.isfinite(tensor).all()):
        raise ModelError(f"expected finite numbers in tensor {name}, found NaN or inf", where=file)


# ** reading **


def read_header(root: Path, name: str) -> dict[str, tuple[str, list[int]]]:
    """(dtype, shape) of each tensor of a safetensors file, from its header alone.

    Raises:
        ModelError: a header that is too large, has duplicate or unknown fields, or whose tensors
            do not cover the file exactly, in order and without holes.
    """
    path = checked_path(root, name, FILE_BYTES)
    with open(path, "rb") as f:
        length = int.from_bytes(f.read(8), "little")
        if not 2 <= length <= min(HEADER_BYTES, path.stat().st_size - 8):
            raise ModelError(f"expected a safetensors header, found length {length}", where=name)
        data = f.read(length)
    header = parse_json(data, name)
    if not isinstance(header, dict):
        raise ModelError("expected a safetensors header, found no object", where=name)
    if header.pop("__metadata__", {"format": "pt"}) != {"format": "pt"}:
        raise ModelError("expected no metadata but the format, found more", where=name)
    out: dict[str, tuple[str, list[int]]] = {}
    spans: list[tuple[int, int]] = []
    for key, entry in header.items():
        out[key], span = _entry(key, entry, name)
        spans.append(span)
    end = 0
    for start, stop in sorted(spans):
        if start != end:
            raise ModelError(f"expected tensors side by side, found a gap at {end}", where=name)
        end = stop
    if end != path.stat().st_size - 8 - length:
        raise ModelError(f"expected {end} bytes of tensors, found another size", where=name)
    return out


def _entry(key: str, entry: Any, name: str) -> tuple[tuple[str, list[int]], tuple[int, int]]:
    fields = {"dtype", "shape", "data_offsets"}
    if not isinstance(entry, dict) or set(entry) != fields:
        raise ModelError(f"expected {sorted(fields)} of tensor {key[:80]!r}", where=name)
    dtype, shape, span = entry["dtype"], entry["shape"], entry["data_offsets"]
    if not isinstance(dtype, str) or dtype not in _STORED:
        raise ModelError(f"expected a known dtype of tensor {key[:80]}, found {dtype}", where=name)
    if not _sizes(shape, 8) or not _sizes(span, 2) or len(span) != 2:
        raise ModelError(f"expected sizes of tensor {key[:80]}, found others", where=name)
    count = DTYPES[_STORED[dtype]].itemsize
    for size in shape:
        count *= size
    if span[1] - span[0] != count:
        raise ModelError(
            f"expected {count} bytes of tensor {key[:80]}, found {span[1] - span[0]}", where=name
        )
    return (_STORED[dtype], shape), (span[0], span[1])


def _sizes(values: Any, most: int) -> bool:
    return (
        isinstance(values, list)
        and len(values) <= most
        and all(type(v) is int and 0 <= v < 1 << 48 for v in values)
    )


class ArtefactWeights:
    """Tensors of an artefact, memory-mapped, each checked when it is loaded.

    All files are mapped at once, so that what was checked is what is read, even when the folder is
    replaced in the meantime.
    Args:
        root: the folder; tensors: the manifest's records.
    Raises:
        ModelError: a file that safetensors cannot open.
    """

    def __init__(self, root: Path, tensors: Mapping[str, Tensor]) -> None:
        from safetensors import safe_open

        self.root, self.tensors = root, tensors
        self._open: dict[str, Any] = {}
        for name in sorted({t.file for t in tensors.values()}):
            path = checked_path(root, name, FILE_BYTES)
            try:
                self._open[name] = safe_open(path, framework="pt")
            except Exception as e:  # the library has an exception class of its own per fault
                raise ModelError(f"expected tensors, found ({str(e)[:100]})", where=name) from e

    def load(self, name: str) -> torch.Tensor:
        """The tensor of that name.

        Raises:
            ModelError: unknown, of another shape or dtype than the manifest says, or not finite.
        """
        record = self.tensors.get(name)
        if record is None:
            raise ModelError(f"expected a tensor named {name!r}, found none", where=str(self.root))
        try:
            tensor: torch.Tensor = self._open[record.file].get_tensor(name)
        except Exception as e:  # the library has an exception class of its own per fault
            raise ModelError(
                f"expected tensor {name}, found ({str(e)[:100]})", where=record.file
            ) from e
        _check(name, tensor, record.shape, DTYPES[record.dtype], record.file)
        return tensor


def check_headers(root: Path, tensors: Mapping[str, Tensor]) -> Iterator[str]:
    """What the files' headers say against the manifest: one message per missing, extra or odd one.

    Raises:
        ModelError: a header that cannot be read at all.
    """
    by_file: dict[str, dict[str, Tensor]] = {}
    for name, t in tensors.items():
        by_file.setdefault(t.file, {})[name] = t
    for file, mine in sorted(by_file.items()):
        found = read_header(root, file)
        for name in sorted(mine.keys() - found.keys()):
            yield f"expected tensor {name} in {file}, found none"
        for name in sorted(found.keys() - mine.keys()):
            yield f"expected no tensor {name[:80]} in {file}, found one"
        for name in sorted(found.keys() & mine.keys()):
            (dtype, shape), want = found[name], mine[name]
            if (want.dtype, want.shape) != (dtype, shape):
                yield (
                    f"expected tensor {name} {want.dtype}{want.shape} in {file}, "
                    f"found {dtype}{shape}"
                )
