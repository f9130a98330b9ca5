"""GPTQ checkpoints, versions 1 and 2: codes packed along inputs, zero points along outputs.

Stored are ``qweight`` int32 [K·b/32, N], ``qzeros`` int32 [G, N·b/32], ``scales`` [G, N] and
``g_idx`` int32 [K]; w = (q - z)·s. Version 1 stores z - 1. Source: AutoGPTQ and GPTQModel.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor

from ...ir.errors import ModelError
from ...ir.ops.compressed import groups_of
from ...ir.packing import pack, packed_words, unpack
from ...ir.scheme import Codes
from ...ir.types import short
from ..checkpoint import Checkpoint
from .base import FLOATS, Layer, Piece, check_shape, choice, codes_piece, entry, group_of, wrong

MARKS = (".qweight", ".qzeros", ".scales", ".g_idx")
BITS = (2, 3, 4, 8)


def read(
    settings: Mapping[str, Any], checkpoint: Checkpoint, names: Mapping[str, str],
    linears: Mapping[str, str],
) -> list[Layer]:  # fmt: skip
    """The coded linears of a checkpoint; only headers are read, and the order of ``desc_act``.

    Args:
        settings: its quantization_config. names: module of the model by path in the checkpoint.
    Raises:
        ModelError: a field that is not supported, or tensors that do not fit it.
    """
    choice(settings, "pack_dtype", ("int32",), "int32")
    choice(settings, "is_marlin_format", (False,), False)
    label = settings.get("checkpoint_format", settings.get("format"))
    version = choice({"checkpoint_format": label}, "checkpoint_format", ("gptq", "gptq_v2"), "gptq")
    for key in ("rotation", "activation"):
        if settings.get(key):
            raise wrong(key, "null", settings[key], "llmc reads plain weights only")
    ordered = choice(settings, "desc_act", (False, True), False)
    symmetric = choice(settings, "sym", (True, False), True)
    kinds = [(choice(settings, "bits", BITS), group_of(settings))]
    rules = settings.get("dynamic") or {}
    if not isinstance(rules, dict):
        raise wrong("dynamic", "an object of rules", rules)
    for rule in rules.values():
        if isinstance(rule, dict) and rule:
            both = {"bits": kinds[0][0], "group_size": kinds[0][1] or -1, **rule}
            kinds.append((choice(both, "bits", BITS), group_of(both)))
            symmetric = symmetric and rule.get("sym", True) is True
            ordered = ordered or rule.get("desc_act") is True
    return [
        _layer(checkpoint, path, list(dict.fromkeys(kinds)), version, symmetric, ordered)
        for path in names
    ]


def _layer(
    checkpoint: Checkpoint, path: str, kinds: list[tuple[int, int | None]], version: str,
    symmetric: bool, ordered: bool,
) -> Layer:  # fmt: skip
    packed = entry(checkpoint, f"{path}.qweight", (torch.int32,))
    zeros = entry(checkpoint, f"{path}.qzeros", (torch.int32,))
    scales = entry(checkpoint, f"{path}.scales", FLOATS)
    if not len(packed.shape) == len(zeros.shape) == len(scales.shape) == 2:
        raise ModelError(f"expected matrices for {path!r}", where=packed.file.name)
    rows, groups = packed.shape[1], scales.shape[0]
    fits = [(b, g) for b, g in kinds if _fits(b, g, packed.shape[0], rows, groups, zeros.shape)]
    if not fits:
        told = " or ".join(f"{b} bits, group {g or -1}" for b, g in kinds)
        raise ModelError(
            f"expected {path!r} of {told}, found qweight {list(packed.shape)}, "
            f"qzeros {list(zeros.shape)}, scales {list(scales.shape)}",
            where=packed.file.name, hint="quantization_config and the weights disagree",
        )  # fmt: skip
    bits, group = fits[0]
    columns = packed.shape[0] * 32 // bits
    check_shape(scales, f"{path}.scales", (groups, rows), "one scale per group and output")
    width = group if group is not None and group < columns else columns
    codes = Codes(bits, None if width == columns else width, symmetric,
                  scale_dtype=short(scales.dtype))  # fmt: skip
    keys = [f"{path}.qweight", f"{path}.qzeros", f"{path}.scales"]
    index = f"{path}.g_idx"
    order: Tensor | None = None
    if index in checkpoint:
        keys.append(index)
        check_shape(entry(checkpoint, index, (torch.int32, torch.int64)), index, (columns,),
                    "one group per input")  # fmt: skip
        order = _order(checkpoint.load(index), width, path) if ordered else None
    elif ordered:
        raise ModelError(
            f"expected {index!r}, as desc_act says, found none", where=packed.file.name
        )

    def zero() -> Tensor:
        stored = unpack(checkpoint.load(f"{path}.qzeros"), bits, rows)
        if version == "gptq" and bool((stored == (1 << bits) - 1).any()):
            raise ModelError(
                f"expected zero points of 1..{(1 << bits) - 1} in {path}.qzeros, found "
                f"{1 << bits}, which means 0 to some writers of version 1",
                where=zeros.file.name, hint="write the checkpoint as gptq_v2",
            )  # fmt: skip
        return (stored + (version == "gptq")).t().contiguous()

    def load() -> Tensor:
        if index in checkpoint and order is None:
            expected = torch.arange(columns) // width
            if not torch.equal(checkpoint.load(index).long(), expected):
                raise ModelError(f"expected {index!r} in order, as desc_act=false says",
                                 where=packed.file.name)  # fmt: skip
        if symmetric:
            _check_middle(zero(), bits, path, version)
        words = checkpoint.load(f"{path}.qweight").t().contiguous()
        if order is None:
            return words
        return pack(unpack(words, bits, columns)[:, order], bits)

    pieces = {
        "codes": codes_piece((rows, columns), bits, load),
        "scale": Piece((rows, groups), scales.dtype,
                       lambda: checkpoint.load(f"{path}.scales").t().contiguous()),
    }  # fmt: skip
    if not symmetric:
        pieces["zero"] = Piece((rows, groups), torch.uint8, zero)
    if order is not None:
        kept = order.to(torch.int32)
        pieces["order"] = Piece((columns,), torch.int32, lambda: kept)
    return Layer(path, (rows, columns), codes, None, pieces, tuple(keys))


def _fits(
    bits: int, group: int | None, words: int, rows: int, groups: int, zeros: tuple[int, ...]
) -> bool:
    """Whether bits and group give these shapes; inputs come in whole runs of 32 codes."""
    if words % bits or zeros != (groups, packed_words(rows, bits)):
        return False
    columns = words * 32 // bits
    return groups == groups_of(columns, group or columns)


def _order(index: Tensor, group: int, path: str) -> Tensor | None:
    """int64 [K]: the columns sorted by group; None where they lie so already.

    Raises:
        ModelError: groups that do not hold ``group`` inputs each.
    """
    expected = torch.arange(len(index)) // group
    order = index.long().argsort(stable=True)
    if not torch.equal(index.long()[order], expected):
        raise ModelError(f"expected {path}.g_idx with {group} inputs in each group, found others",
                         hint="such groups cannot be sorted into equal ones")  # fmt: skip
    return None if torch.equal(index.long(), expected) else order


def _check_middle(zero: Tensor, bits: int, path: str, version: str) -> None:
    """Raises ModelError unless all zero points of a symmetric weight are the middle code."""
    middle = 1 << (bits - 1)
    other = zero[zero != middle]
    if not other.numel():
        return
    found = int(other[0])
    swapped = middle + (1 if version == "gptq" else -1)
    label = "gptq_v2" if version == "gptq" else "gptq"
    raise ModelError(
        f"expected zero points of {middle} in {path}.qzeros, as sym=true says, found {found}",
        hint=f"the zeros look like those of checkpoint_format={label}: is the label wrong?"
        if found == swapped
        else "sym=false reads zero points as they are",
    )
