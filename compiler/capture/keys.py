"""Which checkpoint tensor is which parameter: prefixes, legacy keys, fused experts, ties."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from typing import TYPE_CHECKING, Any

import torch

from ..ir.errors import ModelError, nearest
from .checkpoint import Checkpoint
from .sources import Leaf, constant

if TYPE_CHECKING:
    from .foreign.base import View


def leaves_by_name(model: Any, checkpoint: Checkpoint | View) -> dict[str, Leaf]:
    """A leaf for every parameter and buffer name of a model built without weights.

    Tied names share one leaf. Non-persistent buffers keep the tensor that the model computed.
    Raises:
        ModelError: a parameter that the checkpoint does not hold, or holds in another shape.
    """
    found = _converted(model, checkpoint)
    names: dict[int, list[str]] = {}
    tensors: dict[int, torch.Tensor] = {}
    persistent = set(model.state_dict())
    for name, tensor in [
        *model.named_parameters(remove_duplicate=False),
        *model.named_buffers(remove_duplicate=False),
    ]:
        names.setdefault(id(tensor), []).append(name)
        tensors[id(tensor)] = tensor
    out: dict[str, Leaf] = {}
    for key, group in names.items():
        tensor = tensors[key]
        stored = next((found[n] for n in group if n in found), None)
        trained = isinstance(tensor, torch.nn.Parameter)
        if stored is not None:
            if stored.shape != tuple(tensor.shape):
                raise ModelError(
                    f"expected {group[0]!r} of shape {tuple(tensor.shape)}, found {stored.shape}",
                    where=str(checkpoint.folder), hint="config.json and the weights disagree",
                )  # fmt: skip
            stored.names, stored.trained = tuple(group), trained
            stored.keep = not stored.dtype.is_floating_point
            leaf = stored
        elif not trained and tensor.device.type != "meta":
            # Older checkpoints lack buffers that the model can compute, such as position tables.
            leaf = constant(group[0], tensor)
        else:
            kind = "parameter" if trained else "buffer"
            raise ModelError(
                f"expected the {kind} {group[0]!r} in the checkpoint, found none",
                where=str(checkpoint.folder),
                hint=nearest(group[0], checkpoint.entries) if group[0] in persistent else None,
            )
        for name in group:
            out[name] = leaf
    return out


def unread(model: Any, checkpoint: Checkpoint | View) -> list[str]:
    """Checkpoint tensors that the model has no place for, e.g. layers beyond its config."""
    return [key for key, name, _ in _matches(model, checkpoint)[0] if name is None]


def places(model: Any, keys: Iterable[str]) -> dict[str, tuple[str, bool]]:
    """(the model's name, whether it is one part of a stack) of each checkpoint key."""
    found, _ = _matches(model, keys)
    return {key: (name or key, pattern is not None) for key, name, pattern in found}


def stacks(model: Any, keys: Iterable[str], where: str) -> dict[str, list[str]]:
    """Keys of the parts of each stacked parameter, in the order of its rows: expert by expert.

    Raises:
        ModelError: parts that do not stack.
    """
    found, converters = _matches(model, keys)
    parts: dict[str, dict[str, list[str]]] = {}
    for key, name, pattern in found:
        if name is not None and pattern is not None:
            parts.setdefault(name, {}).setdefault(pattern, []).append(key)
    out = {}
    for name, by_pattern in parts.items():
        converter = next(c for c in converters if set(by_pattern) <= set(c.source_patterns))
        groups = _groups(name, converter, by_pattern, where)
        out[name] = [key for expert in zip(*groups, strict=True) for key in expert]
    return out


def _matches(
    model: Any, checkpoint: Iterable[str]
) -> tuple[list[tuple[str, str | None, str | None]], list[Any]]:
    """(checkpoint key, the model's name or None, converter pattern or None) by transformers' own
    renaming and conversion tables, and the converters."""
    from transformers.conversion_mapping import get_model_conversion_mapping
    from transformers.core_model_loading import WeightConverter, dot_natural_key, rename_source_key

    transforms = get_model_conversion_mapping(model)
    converters = [t for t in transforms if isinstance(t, WeightConverter)]
    renamings = [t for t in transforms if not isinstance(t, WeightConverter)]
    wanted = model.state_dict()
    out: list[tuple[str, str | None, str | None]] = []
    for key in sorted(checkpoint, key=dot_natural_key):
        name, pattern = rename_source_key(
            key, renamings, converters, model.base_model_prefix, wanted
        )  # fmt: skip
        if name not in wanted and key in wanted:
            name, pattern = key, None
        out.append((key, name if name in wanted else None, pattern))
    return out, converters


def _converted(model: Any, checkpoint: Checkpoint | View) -> dict[str, Leaf]:
    """Leaves by the model's names."""
    matches, converters = _matches(model, checkpoint)
    out: dict[str, Leaf] = {}
    parts: dict[str, dict[str, list[str]]] = {}
    for key, name, pattern in matches:
        if name is None:
            continue
        if pattern is None:
            entry = checkpoint.entries[key]
            out[name] = Leaf((name,), entry.shape, entry.dtype, _loader(checkpoint, key))
        else:
            parts.setdefault(name, {}).setdefault(pattern, []).append(key)
    for name, by_pattern in parts.items():
        converter = next(c for c in converters if set(by_pattern) <= set(c.source_patterns))
        out[name] = _fused(checkpoint, name, converter, by_pattern)
    return out


def _loader(checkpoint: Checkpoint | View, key: str) -> Callable[[], torch.Tensor]:
    return lambda: checkpoint.load(key)


def _fused(
    checkpoint: Checkpoint | View, name: str, converter: Any, by_pattern: dict[str, list[str]]
) -> Leaf:
    """One leaf from per-expert tensors: stacked over experts, then gate and up side by side."""
    where = str(checkpoint.folder)
    groups = _groups(name, converter, by_pattern, where)
    rows = [checkpoint.entries[g[0]] for g in groups]
    for group, first in zip(groups, rows, strict=True):
        for key in group:
            entry = checkpoint.entries[key]
            if entry.shape != first.shape or entry.dtype != rows[0].dtype:
                raise ModelError(
                    f"expected experts of one shape and dtype, found {key!r}", where=where
                )
    height, width = sum(r.shape[0] for r in rows), rows[0].shape[1]

    def load() -> torch.Tensor:
        stacks = [torch.stack([checkpoint.load(k) for k in group]) for group in groups]
        return stacks[0] if len(stacks) == 1 else torch.cat(stacks, 1)

    return Leaf((name,), (len(groups[0]), height, width), rows[0].dtype, load)


def _groups(
    name: str, converter: Any, by_pattern: dict[str, list[str]], where: str
) -> list[list[str]]:
    """Keys per source pattern, one for each expert, of a parameter whose parts lie side by side.

    Raises:
        ModelError: another conversion, or other counts.
    """
    steps = [(type(op).__name__, getattr(op, "dim", None)) for op in converter.operations]
    known = (
        [("MergeModulelist", 0)],
        [("MergeModulelist", 0), ("Concatenate", 1)],
    )
    groups = [by_pattern.get(p, []) for p in converter.source_patterns]
    if steps not in known:
        raise ModelError(f"expected stacked experts, found the conversion {steps}", where=name)
    counts = {len(g) for g in groups}
    if len(counts) != 1 or 0 in counts:
        raise ModelError(f"expected equally many tensors per expert for {name!r}", where=where)
    return groups
