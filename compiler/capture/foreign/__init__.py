"""Other tools' quantised checkpoints, read as programs whose weights are codes with schemes.

One file per format has ``read``: from settings and headers to :class:`.base.Layer` objects. The
model is captured as if its linears were dense; then :func:`.attach.attach` puts decode steps in.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import torch

from ...ir.errors import ModelError, nearest
from ..checkpoint import Checkpoint, read_json
from ..keys import places, stacks
from . import awq, compressed_tensors, gptq
from .base import Layer, View, stacked, wrong

READERS = {"compressed-tensors": compressed_tensors, "gptq": gptq, "awq": awq}
_SIDE = "quantize_config.json"


@dataclass(frozen=True)
class Coded:
    """A quantised checkpoint that was understood.

    Attributes:
        method: a key of :data:`READERS`.
        view: the checkpoint as if it were dense.
        layers: by the model's name of the weight.
    """

    method: str
    view: View
    layers: Mapping[str, Layer]

    def facts(self) -> dict[str, Any]:
        """What inspect shows: the format, and how many linears have which scheme."""
        count = Counter(layer.short for layer in self.layers.values())
        return {"method": self.method, "schemes": dict(count.most_common())}


def settings_of(checkpoint: Checkpoint) -> dict[str, Any] | None:
    """The quantization_config of a checkpoint, None where it is dense.

    Raises:
        ModelError: it is no object, or of a method that llmc does not read.
    """
    given = read_json(checkpoint.folder / "config.json").get("quantization_config")
    side = checkpoint.folder / _SIDE
    if given is None and side.is_file():
        given = {"quant_method": "gptq"} | read_json(side)
    if given is None:
        return None
    if not isinstance(given, dict):
        raise wrong("quantization_config", "an object", given)
    if not given:
        return None
    method = given.get("quant_method")
    if not isinstance(method, str) or method not in READERS:
        known = ", ".join(READERS)
        hint = nearest(method, READERS) if isinstance(method, str) else None
        raise wrong("quant_method", f"one of {known}", method,
                    hint or "capture the original checkpoint, or convert this one")  # fmt: skip
    return given


def read(checkpoint: Checkpoint, model: Any) -> Coded | None:
    """The coded linears of a checkpoint, None where it is dense; only headers are read.

    Args:
        model: built for its config without weights, all linears dense.
    Raises:
        ModelError: a quantization_config that is not supported, or tensors that do not fit it.
    """
    settings = settings_of(checkpoint)
    if settings is None:
        _refuse_unlabelled(checkpoint, model)
        return None
    method = str(settings["quant_method"])
    reader = READERS[method]
    names = _modules(checkpoint, model, reader.MARKS, method)
    paths = {module: path for path, module in names.items()}
    linears = {n: paths.get(n, n) for n, m in model.named_modules() if _is_linear(m)}
    experts = _experts(checkpoint, model, names)
    linears |= {path: path for some in experts.values() for path in some}
    layers = reader.read(settings, checkpoint, names, linears)
    found = {layer.path: layer for layer in layers}
    _refuse_left_over(checkpoint, reader.MARKS, found)
    inside = {path for some in experts.values() for path in some}
    by_name = {f"{names.get(p, p)}.weight": x for p, x in found.items() if p not in inside}
    for name, some in experts.items():
        if not found.keys().isdisjoint(some):
            by_name[name] = stacked(name, [_coded(found, path) for path in some])
    return Coded(method, View(checkpoint, layers), by_name)


def _coded(layers: Mapping[str, Layer], path: str) -> Layer:
    """Raises ModelError where an expert is dense and others of its stack are not."""
    if path not in layers:
        raise ModelError(f"expected codes of all experts of a stack, found {path!r} dense")
    return layers[path]


def _experts(checkpoint: Checkpoint, model: Any, names: Mapping[str, str]) -> dict[str, list[str]]:
    """Paths of the parts of each stacked parameter that has coded parts, in the order of rows."""
    inside = [f"{path}.weight" for path in names]
    inside += [key for key in checkpoint if key.endswith(".weight") and key not in inside]
    found = stacks(model, inside, str(checkpoint.folder))
    return {
        name: [key.removesuffix(".weight") for key in keys]
        for name, keys in found.items()
        if any(key.removesuffix(".weight") in names for key in keys)
    }


def _is_linear(module: Any) -> bool:
    return isinstance(module, torch.nn.Linear)


def _modules(
    checkpoint: Checkpoint, model: Any, marks: tuple[str, ...], method: str
) -> dict[str, str]:
    """The model's module by path in the checkpoint, for all that have tensors of the format.

    One of an expert, whose weight the model stacks, has the name of its path.

    Raises:
        ModelError: one that the model does not have, or that is no linear.
    """
    paths = sorted({k.removesuffix(m) for k in checkpoint for m in marks if k.endswith(m)})
    modules = dict(model.named_modules())
    out: dict[str, str] = {}
    for path, (name, fused) in places(model, [f"{p}.weight" for p in paths]).items():
        module, path = name.removesuffix(".weight"), path.removesuffix(".weight")
        if fused:
            out[path] = path
            continue
        if module not in modules:
            raise ModelError(
                f"expected {method} tensors of the model's linears, found those of {path!r}",
                where=str(checkpoint.folder), hint=nearest(path, modules),
            )  # fmt: skip
        if not _is_linear(modules[module]):
            raise ModelError(
                f"expected a Linear at {module!r}, found a {type(modules[module]).__name__}",
                where=str(checkpoint.folder), hint=f"llmc reads {method} weights of linears only",
            )  # fmt: skip
        out[path] = module
    return out


def _refuse_left_over(
    checkpoint: Checkpoint, marks: tuple[str, ...], layers: Mapping[str, Layer]
) -> None:
    """Raises ModelError for a tensor of the format that no layer reads."""
    read = {key for layer in layers.values() for key in layer.keys}
    for key in checkpoint:
        if any(key.endswith(m) for m in marks) and key not in read:
            raise ModelError(f"expected no tensor {key!r} beside what quantization_config says, "
                             "found one", where=checkpoint.entries[key].file.name)  # fmt: skip


def _refuse_unlabelled(checkpoint: Checkpoint, model: Any) -> None:
    """Raises ModelError for tensors of a quantised checkpoint whose config does not say so."""
    marks = sorted({m for r in READERS.values() for m in r.MARKS})
    known = model.state_dict()
    for key in checkpoint:
        mark = next((m for m in marks if key.endswith(m)), None)
        if mark is not None and key not in known:
            raise ModelError(
                f"expected a quantization_config beside {key!r}, found none", where="config.json",
                hint="the checkpoint is quantised and its config.json was changed: fetch it again",
            )  # fmt: skip
