"""compressed-tensors checkpoints: pack-quantized, int-quantized and float-quantized.

Stored of a linear [N, K] are ``weight_packed`` int32 [N, ⌈K·b/32⌉] with ``weight_shape``, or
``weight`` int8 or fp8 [N, K]; ``weight_scale`` [N, G]; where asymmetric ``weight_zero_point``;
``input_scale`` of static inputs. w = (q - z)·s, q signed. Source: the compressed-tensors package.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from ...ir.errors import ModelError
from ...ir.ops.compressed import groups_of
from ...ir.packing import pack, packed_words, unpack
from ...ir.scheme import Codes, InputGrid
from ...ir.types import short
from ..checkpoint import Checkpoint
from .base import (
    CONFIG,
    FLOATS,
    Layer,
    Piece,
    check_shape,
    choice,
    codes_piece,
    entry,
    group_of,
    wrong,
)
from .targets import matches

MARKS = (
    ".weight_packed", ".weight_shape", ".weight_scale", ".weight_zero_point", ".input_scale",
    ".input_zero_point", ".weight_g_idx", ".weight_global_scale", ".input_global_scale",
)  # fmt: skip
FORMATS = ("pack-quantized", "int-quantized", "float-quantized")
_ARGUMENTS = (
    "num_bits", "type", "symmetric", "strategy", "group_size", "block_structure", "dynamic",
    "actorder", "scale_dtype", "zp_dtype", "observer", "observer_kwargs",
)  # fmt: skip


@dataclass(frozen=True)
class _Group:
    """One entry of config_groups: its targets, its format, and what it states."""

    name: str
    targets: tuple[str, ...]
    format: str
    bits: int
    kind: str
    group: int | None
    tensor: bool
    symmetric: bool
    inputs: InputGrid | None


def read(
    settings: Mapping[str, Any], checkpoint: Checkpoint, names: Mapping[str, str],
    linears: Mapping[str, str],
) -> list[Layer]:  # fmt: skip
    """The coded linears of a checkpoint; only headers and shapes are read.

    Args:
        settings: its quantization_config. names: module of the model by path in the checkpoint.
        linears: path in the checkpoint by every linear module of the model.
    Raises:
        ModelError: a field that is not supported, or tensors that do not fit it.
    """
    choice(settings, "quantization_status", ("compressed",), "compressed")
    for key, what in (("kv_cache_scheme", "a scheme"), ("transform_config", "rotations")):
        if settings.get(key):
            raise wrong(key, "null", what, "llmc reads weights and inputs only")
    sparsity = settings.get("sparsity_config") or {}
    kind = sparsity.get("format", "dense") if isinstance(sparsity, dict) else sparsity
    if kind != "dense":
        raise wrong("sparsity_config.format", "dense", kind,
                    "the sparse formats are gone: decompress it with an older package")  # fmt: skip
    if settings.get("format") not in (None, "mixed-precision", *FORMATS):
        raise _unknown(settings["format"])
    ignored = _texts(settings.get("ignore") or [], "ignore")
    groups = [_group(name, given, settings) for name, given in _groups(settings).items()]
    out = []
    for module, path in linears.items():
        group = next((g for g in groups if any(matches(t, module, "Linear") for t in g.targets)),
                     None)  # fmt: skip
        if any(matches(t, module, "Linear") for t in ignored):
            group = None
        if group is not None:
            out.append(_layer(checkpoint, path, group))
        elif path in names:
            raise ModelError(
                f"expected {path!r} dense, as ignore or no target says, found it quantised",
                where=str(checkpoint.folder), hint="targets and ignore disagree with the weights",
            )  # fmt: skip
    return out


def _texts(value: Any, key: str) -> tuple[str, ...]:
    if not isinstance(value, list) or not all(isinstance(v, str) for v in value):
        raise wrong(key, "a list of names", value)
    return tuple(value)


def _groups(settings: Mapping[str, Any]) -> dict[str, Any]:
    groups = settings.get("config_groups")
    if not isinstance(groups, dict) or not groups:
        raise wrong("config_groups", "an object of at least one group", groups)
    return groups


def _group(name: str, given: Any, settings: Mapping[str, Any]) -> _Group:
    at = f"config_groups.{name}"
    if not isinstance(given, dict):
        raise wrong(at, "an object with targets and weights", given)
    kind = given.get("format") or settings.get("format")
    if kind not in FORMATS:
        raise _unknown(kind)
    if given.get("output_activations"):
        raise wrong(f"{at}.output_activations", "null", "a scheme")
    weights = _arguments(given.get("weights"), f"{at}.weights")
    choice(weights, "dynamic", (False,), False)
    if weights.get("actorder") not in (None, False, "weight", "static"):
        raise wrong(f"{at}.weights.actorder", "null, weight or static", weights["actorder"])
    strategies = ("group", "channel", "tensor")
    strategy = weights.get("strategy") or ("group" if weights.get("group_size") else "tensor")
    choice({"strategy": strategy}, "strategy", strategies)
    floats = kind == "float-quantized"
    choice(weights, "type", ("float",) if floats else ("int",), "int")
    bits = choice(weights, "num_bits", tuple(range(2, 9)) if kind == "pack-quantized" else (8,), 8)
    symmetric = choice(weights, "symmetric", (True,) if floats else (True, False), True)
    group = group_of(weights) if strategy == "group" else None
    if strategy != "group" and weights.get("group_size") not in (None, -1):
        raise wrong(f"{at}.weights.group_size", f"null beside strategy {strategy}",
                    weights["group_size"])  # fmt: skip
    return _Group(
        at, _texts(given.get("targets"), f"{at}.targets"), kind, bits,
        "e4m3" if floats else "uniform", group, strategy == "tensor", symmetric,
        _inputs(given.get("input_activations"), f"{at}.input_activations"),
    )  # fmt: skip


def _unknown(kind: Any) -> ModelError:
    hint = "llmc reads no other; decompress it with the compressed-tensors package"
    return wrong("format", " or ".join(FORMATS), kind, hint)


def _arguments(given: Any, at: str) -> dict[str, Any]:
    if not isinstance(given, dict):
        raise wrong(at, "an object", given)
    for key in given:
        if key not in _ARGUMENTS:
            raise wrong(at, f"fields of {', '.join(_ARGUMENTS)}", key)
    return given


def _inputs(given: Any, at: str) -> InputGrid | None:
    if given is None:
        return None
    given = _arguments(given, at)
    choice(given, "num_bits", (8,), 8)
    choice(given, "symmetric", (True,), True)
    kind = {"int": "int", "float": "e4m3"}[choice(given, "type", ("int", "float"), "int")]
    dynamic = choice(given, "dynamic", (True, False), False)
    default = "token" if dynamic else "tensor"
    strategy = choice(given, "strategy", ("token", "tensor") if dynamic else ("tensor",), default)
    return InputGrid(8, strategy if dynamic else "static", kind)


def _layer(checkpoint: Checkpoint, path: str, group: _Group) -> Layer:
    packed = group.format == "pack-quantized"
    stem = f"{path}.weight"
    if packed and stem in checkpoint:
        raise ModelError(
            f"expected {stem}_packed, as {group.name} says, found the dense {stem}",
            where=CONFIG, hint=f"add {path!r} to ignore if it was never quantised",
        )  # fmt: skip
    if f"{path}.weight_g_idx" in checkpoint:
        raise ModelError(f"expected no {path}.weight_g_idx, found one",
                         hint="a stored order of inputs has no place in this format")  # fmt: skip
    keys = []
    if packed:
        code = entry(checkpoint, f"{stem}_packed", (torch.int32,))
        told = entry(checkpoint, f"{stem}_shape", (torch.int64, torch.int32))
        keys = [f"{stem}_packed", f"{stem}_shape"]
        check_shape(told, keys[1], (2,), "outputs and inputs")
        rows, columns = (int(n) for n in checkpoint.load(keys[1]))
        if rows < 1 or columns < 1 or columns > 1 << 24:
            raise ModelError(f"expected sizes in {keys[1]}, found {rows} and {columns}",
                             where=told.file.name)  # fmt: skip
        why = f"{group.bits} bits of the shape in {keys[1]}"
        check_shape(code, keys[0], (rows, packed_words(columns, group.bits)), why)
    else:
        kinds = (torch.float8_e4m3fn,) if group.kind == "e4m3" else (torch.int8,)
        code = entry(checkpoint, stem, kinds)
        keys = [stem]
        if len(code.shape) != 2:
            raise ModelError(f"expected a matrix {stem!r}", where=code.file.name)
        rows, columns = code.shape
    if group.group is not None and columns % group.group:
        raise ModelError(f"expected {stem!r} with inputs in whole groups of {group.group}, found "
                         f"{columns}", where=code.file.name)  # fmt: skip
    count = groups_of(columns, group.group or columns)
    scale = entry(checkpoint, f"{stem}_scale", FLOATS)
    keys.append(f"{stem}_scale")
    shapes: set[tuple[int, ...]] = {(1,), (), (1, 1)} if group.tensor else {(rows, count)}
    if count == 1 and not group.tensor:
        shapes.add((rows,))
    if scale.shape not in shapes:
        check_shape(scale, keys[-1], max(shapes, key=len), group.name)
    width = group.group if group.group is not None and group.group < columns else None
    codes = Codes(group.bits, width, group.symmetric, group.kind, scale_dtype=short(scale.dtype))
    pieces = {
        "codes": codes_piece((rows, columns), group.bits, _codes(checkpoint, keys[0], group)),
        "scale": Piece((rows, count), scale.dtype,
                       lambda: _wide(checkpoint.load(f"{stem}_scale"), rows, count)),
    }  # fmt: skip
    if not group.symmetric:
        pieces["zero"] = _zero(checkpoint, f"{stem}_zero_point", group, (rows, count))
        keys.append(f"{stem}_zero_point")
    elif f"{stem}_zero_point" in checkpoint:
        raise ModelError(f"expected no {stem}_zero_point beside symmetric=true, found one",
                         where=group.name)  # fmt: skip
    if group.inputs is not None and group.inputs.static:
        name = f"{path}.input_scale"
        found = entry(checkpoint, name, FLOATS)
        if found.shape != ():
            check_shape(found, name, (1,), "one scale for all inputs")
        pieces["in_scale"] = Piece((1,), torch.float32,
                                   lambda: checkpoint.load(name).float().reshape(1))  # fmt: skip
        keys.append(name)
    return Layer(path, (rows, columns), codes, group.inputs, pieces, tuple(keys))


def _wide(tensor: Tensor, rows: int, count: int) -> Tensor:
    """One number per row and group, from as many or from one of all."""
    return tensor.reshape(-1, count).expand(rows, -1).contiguous()


def _codes(checkpoint: Checkpoint, key: str, group: _Group) -> Any:
    """Packed words as they are, else bytes packed: signed ones shifted, floats bit for bit."""

    def load() -> Tensor:
        stored = checkpoint.load(key)
        if group.format == "pack-quantized":
            return stored
        if group.kind == "e4m3":
            return pack(stored.view(torch.uint8), 8)
        return pack((stored.to(torch.int16) + 128).to(torch.uint8), 8)

    return load


def _zero(checkpoint: Checkpoint, key: str, group: _Group, shape: tuple[int, int]) -> Piece:
    """Zero points uint8 [N, G]: packed along outputs beside packed codes, else signed bytes."""
    rows, count = shape
    found = entry(checkpoint, key, (torch.int32, torch.int8))
    if found.dtype == torch.int32:
        check_shape(found, key, (packed_words(rows, group.bits), count), "packed along outputs")

        def load() -> Tensor:
            words = checkpoint.load(key).t().contiguous()
            return unpack(words, group.bits, rows).t().contiguous()
    else:
        if found.shape not in ((rows, count), (1,)):
            check_shape(found, key, (rows, count), "one per scale")
        middle = 1 << (group.bits - 1)

        def load() -> Tensor:
            wide = checkpoint.load(key).to(torch.int16) + middle
            return _wide(wide.to(torch.uint8), rows, count)

    return Piece(shape, torch.uint8, load)
