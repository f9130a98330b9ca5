"""Lazy safetensors checkpoints: headers are checked up front, tensors read when asked for."""

from __future__ import annotations

import json
import struct
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from ..ir.errors import ModelError, nearest

# Names of dtypes in the safetensors header (format specification of the safetensors project).
DTYPES = {
    "F64": torch.float64, "F32": torch.float32, "F16": torch.float16, "BF16": torch.bfloat16,
    "I64": torch.int64, "I32": torch.int32, "I16": torch.int16, "I8": torch.int8,
    "U8": torch.uint8, "BOOL": torch.bool,
    "F8_E4M3": torch.float8_e4m3fn, "F8_E5M2": torch.float8_e5m2,
}  # fmt: skip
# The format's own bound on the header; a larger length is a broken or hostile file.
_HEADER_LIMIT = 100_000_000
_SINGLE, _INDEX = "model.safetensors", "model.safetensors.index.json"
_PICKLES = ("*.bin", "*.pt", "*.pth", "*.ckpt")


@dataclass(frozen=True)
class Entry:
    """Where one tensor lies: file, shape, dtype and its byte range in the file."""

    file: Path
    shape: tuple[int, ...]
    dtype: torch.dtype
    start: int
    stop: int


def _unique(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    out: dict[str, Any] = {}
    for key, value in pairs:
        if key in out:
            raise ModelError(f"expected each key once, found {key!r} twice")
        out[key] = value
    return out


def read_json(path: Path) -> dict[str, Any]:
    """A JSON object from a file.

    Raises:
        ModelError: unreadable, not UTF-8 JSON, a duplicate key, or not an object.
    """
    try:
        value = json.loads(path.read_text(encoding="utf-8"), object_pairs_hook=_unique)
    except ModelError as e:
        raise ModelError(e.message, where=path.name) from None
    except (OSError, UnicodeDecodeError, ValueError, RecursionError) as e:
        reason = e.strerror if isinstance(e, OSError) else type(e).__name__
        raise ModelError(f"expected a JSON object, found {reason}", where=path.name) from None
    if not isinstance(value, dict):
        raise ModelError(f"expected a JSON object, found a {type(value).__name__}", where=path.name)
    return value


def read_header(path: Path) -> dict[str, Entry]:
    """The tensors of one safetensors file, from its header alone.

    Raises:
        ModelError: truncated file, bad header, unknown dtype, sizes that do not fit their range,
            ranges that overlap or leave holes, duplicate names.
    """
    where = path.name
    try:
        size = path.stat().st_size
        with path.open("rb") as f:
            first = f.read(8)
            if len(first) < 8:
                raise ModelError(f"expected at least 8 bytes, found {len(first)}", where=where)
            (length,) = struct.unpack("<Q", first)
            if length > min(size - 8, _HEADER_LIMIT):
                raise ModelError(
                    f"expected a header that fits the file of {size} bytes, found one of {length}",
                    where=where,
                    hint="the file is truncated or not safetensors; fetch it again",
                )
            raw = f.read(length)
    except OSError as e:
        raise ModelError(f"expected a readable file, found: {e.strerror}", where=where) from None
    try:
        header = json.loads(raw, object_pairs_hook=_unique)
    except ModelError as e:
        raise ModelError(e.message, where=where) from None
    except (UnicodeDecodeError, ValueError, RecursionError):
        raise ModelError("expected a JSON header, found other bytes", where=where) from None
    if not isinstance(header, dict):
        raise ModelError("expected a header with an object of tensors", where=where)
    header.pop("__metadata__", None)
    base = 8 + length
    out = {name: _entry(path, name, fields, base, size) for name, fields in header.items()}
    end, last = base, ""
    for name, entry in sorted(out.items(), key=lambda item: (item[1].start, item[1].stop)):
        if entry.start != end:
            kind = "an overlap with" if entry.start < end else "a hole after"
            raise ModelError(
                f"expected adjoining tensors, found {kind} {last!r} at {name!r}", where=where
            )
        end, last = entry.stop, name
    if end != size:
        raise ModelError(
            f"expected {end} bytes by the header, found {size}",
            where=where,
            hint="the file is truncated or has a tail; fetch it again",
        )
    return out


def _entry(path: Path, name: str, fields: Any, base: int, size: int) -> Entry:
    where = f"{path.name}, tensor {name!r}"
    ok = isinstance(fields, dict) and set(fields) == {"dtype", "shape", "data_offsets"}
    if not ok:
        raise ModelError("expected dtype, shape and data_offsets", where=where)
    shape, offsets = fields["shape"], fields["data_offsets"]
    numbers = isinstance(shape, list) and isinstance(offsets, list) and len(offsets) == 2
    if not numbers or not all(type(n) is int and n >= 0 for n in [*shape, *offsets]):
        raise ModelError("expected shape and offsets of whole numbers", where=where)
    dtype = DTYPES.get(str(fields["dtype"]))
    if dtype is None:
        raise ModelError(
            f"expected a dtype of {sorted(DTYPES)}, found {fields['dtype']!r}", where=where
        )
    need, have = torch.Size(shape).numel() * dtype.itemsize, offsets[1] - offsets[0]
    if need != have:
        raise ModelError(f"expected {need} bytes for {shape}, found {have}", where=where)
    if base + offsets[1] > size:
        raise ModelError(
            f"expected at least {base + offsets[1]} bytes in the file, found {size}",
            where=where,
            hint="the file is truncated; fetch it again",
        )
    return Entry(path, tuple(shape), dtype, base + offsets[0], base + offsets[1])


class Checkpoint:
    """A model folder's tensors. Opening reads headers only; :meth:`load` maps one tensor.

    Attributes:
        folder: the model folder.
        entries: what each tensor name stands for.
        loads: how many tensors were loaded so far.
    Raises:
        ModelError: no folder, no model in it, pickled weights only, or a file that is not sound.
    """

    def __init__(self, folder: str | Path) -> None:
        self.folder = Path(folder)
        self.loads = 0
        if not self.folder.is_dir():
            raise ModelError(f"expected a model folder, found nothing at {str(folder)!r}")
        if not (self.folder / "config.json").is_file():
            raise ModelError(
                "expected config.json in the model folder, found none", where=str(folder),
                hint="point at the folder that save_pretrained wrote",
            )  # fmt: skip
        self.entries: dict[str, Entry] = {}
        for name in self._files():
            for key, entry in read_header(self.folder / name).items():
                if key in self.entries:
                    other = self.entries[key].file.name
                    raise ModelError(
                        f"expected each tensor once, found {key!r} in {other} and {name}"
                    )
                self.entries[key] = entry
        self._check_index()
        self._open: dict[Path, Any] = {}

    def _files(self) -> list[str]:
        index = self.folder / _INDEX
        if (self.folder / _SINGLE).is_file():
            return [_SINGLE]
        if index.is_file():
            table = read_json(index).get("weight_map")
            if not isinstance(table, dict) or not all(isinstance(v, str) for v in table.values()):
                raise ModelError("expected a weight_map of tensor names to files", where=_INDEX)
            self._index = {str(k): str(v) for k, v in table.items()}
            return sorted({self._inside(name) for name in self._index.values()})
        found = sorted(p.name for p in self.folder.glob("*.safetensors"))
        if found:
            return [self._inside(name) for name in found]
        pickles = sorted(p.name for glob in _PICKLES for p in self.folder.glob(glob))
        if pickles:
            raise ModelError(
                f"expected safetensors, found the pickle {pickles[0]}", where=str(self.folder),
                hint="pickles run code when read; convert it where you trust it: "
                "AutoModelForCausalLM.from_pretrained(folder).save_pretrained(out)",
            )  # fmt: skip
        raise ModelError("expected *.safetensors weights, found none", where=str(self.folder))

    def _inside(self, name: str) -> str:
        path = self.folder / name
        if Path(name).name != name or name in ("", ".", ".."):
            raise ModelError(f"expected a file of this folder, found {name!r}", where=_INDEX)
        if not path.is_file():
            raise ModelError(
                f"expected the file {name!r}, found none", where=str(self.folder),
                hint="the download is not complete",
            )  # fmt: skip
        if path.is_symlink() and not _same_store(path, self.folder):
            raise ModelError(
                f"expected a file of this folder, found the link {name!r} that leads outside",
                where=str(self.folder),
            )
        return name

    def _check_index(self) -> None:
        table = getattr(self, "_index", {})
        for key, name in table.items():
            entry = self.entries.get(key)
            if entry is None or entry.file.name != name:
                raise ModelError(f"expected {key!r} in {name}, as the index says, found none")

    def __contains__(self, name: object) -> bool:
        return name in self.entries

    def __iter__(self) -> Iterator[str]:
        return iter(self.entries)

    def load(self, name: str) -> torch.Tensor:
        """The tensor of that checkpoint key, as stored; floating tensors are checked to be finite.

        Raises:
            ModelError: no such tensor, the file changed since it was opened, or a NaN or infinity.
        """
        from safetensors import SafetensorError, safe_open

        entry = self.entries.get(name)
        if entry is None:
            raise ModelError(
                f"expected a tensor {name!r} in the checkpoint, found none",
                hint=nearest(name, self.entries),
            )
        try:
            if entry.file not in self._open:
                self._open[entry.file] = safe_open(str(entry.file), framework="pt").__enter__()
            tensor: torch.Tensor = self._open[entry.file].get_tensor(name)
        except (OSError, SafetensorError) as e:
            raise ModelError(
                f"expected to read tensor {name!r}, found: {' '.join(str(e).split())}",
                where=entry.file.name,
            ) from None
        self.loads += 1
        if tuple(tensor.shape) != entry.shape or tensor.dtype != entry.dtype:
            raise ModelError(f"expected {name!r} as its header says", where=entry.file.name)
        check_finite(tensor, name, entry.file.name)
        return tensor


def check_finite(tensor: torch.Tensor, name: str, where: str) -> None:
    """Refuse a floating tensor that holds a NaN or an infinity.

    Raises:
        ModelError: names the tensor and where it comes from.
    """
    if not tensor.is_floating_point() or tensor.numel() == 0:
        return
    wide = tensor if tensor.dtype.itemsize > 1 else tensor.to(torch.float32)
    # A sum is finite unless an entry is not or it overflows; only then look entry by entry.
    if not torch.isfinite(wide.sum()) and not bool(torch.isfinite(wide).all()):
        bad = int((~torch.isfinite(wide)).sum())
        raise ModelError(
            f"expected finite weights, found {bad} NaN or infinite in {name!r}", where=where
        )


def _same_store(path: Path, folder: Path) -> bool:
    """Whether a link stays in the folder, or in the blobs of the hub cache that holds it."""
    target, home = path.resolve(), folder.resolve()
    if target.is_relative_to(home):
        return True
    # A hub snapshot is <repo>/snapshots/<revision>/, its links point into <repo>/blobs/.
    return home.parent.name == "snapshots" and target.parent == home.parent.parent / "blobs"
