"""What a quantised checkpoint says of one linear, and how its settings are read and refused."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, replace
from functools import partial
from typing import Any

import torch
from torch import Tensor

from ...ir import packing
from ...ir.errors import ModelError, nearest
from ...ir.ops.compressed import dequantize
from ...ir.ops.lookup import lookup
from ...ir.scheme import Codes, InputGrid
from ..checkpoint import Checkpoint, Entry
from ..sources import Load

CONFIG = "config.json, quantization_config"


@dataclass(frozen=True)
class Piece:
    """One tensor of our own storage: shape, dtype, and how it is made of what is stored."""

    shape: tuple[int, ...]
    dtype: torch.dtype
    load: Load


@dataclass(frozen=True)
class Layer:
    """One linear [N, K] whose weight is stored as codes.

    Attributes:
        path: what the checkpoint's keys of it begin with.
        shape: (N, K).
        codes, inputs: what the weight and what it reads are rounded to.
        pieces: ``codes`` int32 [N, words], ``scale`` [N, G], ``zero`` uint8 [N, G], ``in_scale``
            fp32 [1] and ``order`` int32 [K], the input of each column; the last three where needed.
        keys: of the checkpoint, all that belong to it.
        dtype: of its scales, as stored.
    """

    path: str
    shape: tuple[int, int]
    codes: Codes
    inputs: InputGrid | None
    pieces: Mapping[str, Piece]
    keys: tuple[str, ...]

    @property
    def dtype(self) -> torch.dtype:
        return self.pieces["scale"].dtype

    @property
    def short(self) -> str:
        """A few characters for tables."""
        return " ".join([self.codes.short, *([self.inputs.short] if self.inputs else [])])

    def dense(self) -> Tensor:
        """The decoded weight fp32 [N, K]."""
        parts = {k: p.load() for k, p in self.pieces.items() if k in ("codes", "scale", "zero")}
        columns = self.shape[1]
        how: dict[str, Any] = {"bits": self.codes.bits, "columns": columns}
        how["group"] = self.codes.group or columns
        if self.codes.grid == "uniform":
            out = dequantize(parts["codes"], parts["scale"], parts.get("zero"), **how)
        else:
            out = lookup(parts["codes"], parts["scale"], levels=self.codes.grid, **how)
        if "order" in self.pieces:
            order = self.pieces["order"].load().long()
            out = torch.empty_like(out).index_copy_(1, order, out)
        return out


def stacked(name: str, layers: Sequence[Layer]) -> Layer:
    """The linears of a stack's experts as one, their rows below each other.

    Raises:
        ModelError: they have different schemes, or round or reorder what they read.
    """
    first = layers[0]
    for layer in layers:
        if layer.codes != first.codes or layer.shape[1] != first.shape[1]:
            raise ModelError(f"expected one scheme for all experts, found {first.short} and "
                             f"{layer.short}", where=layer.path)  # fmt: skip
        if layer.inputs is not None or "order" in layer.pieces:
            what = "an order of inputs" if layer.inputs is None else layer.inputs.short
            raise ModelError(f"expected experts that read inputs as they come, found {what}",
                             where=layer.path, hint="capture the original checkpoint")  # fmt: skip
    pieces = {
        part: Piece(
            (sum(x.pieces[part].shape[0] for x in layers), *piece.shape[1:]), piece.dtype,
            partial(_rows, [x.pieces[part] for x in layers]),
        )
        for part, piece in first.pieces.items()
    }  # fmt: skip
    shape = (sum(layer.shape[0] for layer in layers), first.shape[1])
    return Layer(name, shape, first.codes, None, pieces, tuple(k for x in layers for k in x.keys))


def _rows(pieces: Sequence[Piece]) -> Tensor:
    return torch.cat([piece.load() for piece in pieces])


class View:
    """A checkpoint whose coded linears look like dense weights; nothing is read before ``load``.

    Attributes:
        base: the checkpoint. layers: by the key of the weight that each stands for.
    """

    def __init__(self, base: Checkpoint, layers: Iterable[Layer]) -> None:
        self.base, self.folder = base, base.folder
        self.layers = {f"{layer.path}.weight": layer for layer in layers}
        hidden = {key for layer in self.layers.values() for key in layer.keys}
        self.entries = {k: e for k, e in base.entries.items() if k not in hidden}
        for key, layer in self.layers.items():
            like = base.entries[layer.keys[0]]
            self.entries[key] = replace(like, shape=layer.shape, dtype=layer.dtype)

    def __contains__(self, name: object) -> bool:
        return name in self.entries

    def __iter__(self) -> Any:
        return iter(self.entries)

    def load(self, name: str) -> Tensor:
        """A tensor; the weight of a coded linear is decoded."""
        found = self.layers.get(name)
        return self.base.load(name) if found is None else found.dense().to(found.dtype)


# ** settings **


def wrong(key: str, expected: str, found: Any, hint: str | None = None) -> ModelError:
    """The error of one field of a quantization_config."""
    text = f"'{found[:40]}'" if isinstance(found, str) else str(found)[:60]
    return ModelError(f"{key}: expected {expected}, found {text}", where=CONFIG, hint=hint)


def choice(given: Mapping[str, Any], key: str, known: tuple[Any, ...], default: Any = None) -> Any:
    """A field that is one of few values.

    Raises:
        ModelError: it is none of them.
    """
    value = given.get(key)
    value = default if value is None else value
    # 1 == True, so that types count too.
    if not any(type(value) is type(k) and value == k for k in known):
        words = " or ".join(str(k) for k in known)
        hint = nearest(value, [str(k) for k in known]) if isinstance(value, str) else None
        raise wrong(key, words, value, hint or "llmc reads no other; convert the checkpoint")
    return value


def group_of(given: Mapping[str, Any], key: str = "group_size", default: Any = None) -> int | None:
    """A group size; None for -1, one scale per row.

    Raises:
        ModelError: neither -1 nor positive.
    """
    value = given.get(key, default)
    if type(value) is not int or (value != -1 and not 0 < value <= 1 << 20):
        raise wrong(key, "a number of inputs, or -1 for rows", value)
    return None if value == -1 else value


# ** tensors **


def entry(checkpoint: Checkpoint, key: str, dtypes: tuple[torch.dtype, ...]) -> Entry:
    """The header of a tensor that must be there, in one of these dtypes.

    Raises:
        ModelError: it is missing, or of another dtype.
    """
    found = checkpoint.entries.get(key)
    if found is None:
        raise ModelError(
            f"expected a tensor {key!r} in the checkpoint, found none",
            where=str(checkpoint.folder), hint="the checkpoint is not whole: fetch it again",
        )  # fmt: skip
    if found.dtype not in dtypes:
        names = " or ".join(str(d).removeprefix("torch.") for d in dtypes)
        raise ModelError(
            f"expected {key!r} of {names}, found {str(found.dtype).removeprefix('torch.')}",
            where=found.file.name,
        )
    return found


def check_shape(entry: Entry, key: str, want: tuple[int, ...], why: str) -> None:
    """Raises ModelError where a header says another shape."""
    if entry.shape != want:
        raise ModelError(
            f"expected {key!r} {list(want)} ({why}), found {list(entry.shape)}",
            where=entry.file.name, hint="quantization_config and the weights disagree",
        )  # fmt: skip


def codes_piece(shape: tuple[int, int], bits: int, load: Callable[[], Tensor]) -> Piece:
    """The piece of packed codes of a weight of that shape."""
    return Piece((shape[0], packing.packed_words(shape[1], bits)), torch.int32, load)


FLOATS = (torch.float16, torch.bfloat16, torch.float32)
"""What scales are stored in."""
