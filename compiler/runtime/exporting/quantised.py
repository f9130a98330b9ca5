"""Checkpoints whose linears are stored as codes: what the formats of that kind share.

The model's config is found and proved as for ``hf``; then weights that are codes are written as the
format stores them, all others dense, and the folder is read back by llmc's own importer.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any, Protocol

import torch
from torch import Tensor

from ...analysis.linears import ExpertSite, LinearSite, linear_sites
from ...ir.errors import UsageError
from ...ir.types import short
from ..artefact import versions
from ..files import canonical_json, new_folder
from .codes import Coded, Parts, coded, decodes, without_grids
from .fused import check_fused
from .job import OVERHEAD, RECORD, Job


@dataclass(frozen=True)
class Whole:
    """A model as a format sees it.

    Attributes:
        weights: those that are codes, in the model's order.
        dense: modules of all other linears; heads: modules that give the logits.
        experts: modules that hold stacked experts, all dense.
        modules: module by parameter of the captured model.
    """

    weights: Sequence[Coded]
    dense: Sequence[str]
    heads: Sequence[str]
    experts: Sequence[str]
    modules: Mapping[str, str]


class Layout(Protocol):
    """One format: what it can hold, and how."""

    name: str

    def dtype(self, stored: torch.dtype) -> torch.dtype:
        """Of the dense weights, for a model that stores most of them so."""
        ...

    def check(self, weight: Coded) -> None:
        """Raises UsageError where the format has no place for the weight's scheme."""
        ...

    def check_whole(self, whole: Whole) -> None:
        """Raises UsageError where one config cannot say what all weights are."""
        ...

    def scale(self, dtype: torch.dtype) -> torch.dtype:
        """What scales are stored in, where dense weights have that dtype."""
        ...

    def tensors(self, weight: Coded, parts: Parts, in_scale: Tensor | None) -> dict[str, Tensor]:
        """What is stored, by suffix; scales come in the dtype of :meth:`scale`."""
        ...

    def config(self, whole: Whole) -> dict[str, Any]:
        """The quantization_config."""
        ...

    def notes(self, weights: Sequence[Coded]) -> list[str]:
        """What who loads the folder must know."""
        ...


def write(job: Job, layout: Layout) -> dict[str, Any]:
    """Write a job in a layout.

    Returns:
        Its record, see :func:`..export.export`.
    Raises:
        UsageError: what the format has no place for, the layer and the field named.
        GateError: reading back gives other codes or logits; nothing is left.
    """
    from ...capture import write_back
    from ...capture.configs import say
    from ...capture.fit import fit
    from .readback import check

    plain, grids = without_grids(job.program)
    job.tell("looking for the config")
    fitted = fit(plain, job.tell)
    whole = _whole(fitted, grids, layout.name)
    for weight in whole.weights:
        layout.check(weight)
    check_fused(fitted.captured.program, whole.weights, whole.modules)
    layout.check_whole(whole)
    dtype = job.dtype or layout.dtype(write_back.stored_dtype(plain))
    stored = {w.name: partial(_stored, job, layout, w, dtype) for w in whole.weights}
    size = write_back.bytes_of(fitted, dtype, stored) + _bytes(whole.weights, layout.scale(dtype))
    with new_folder(job.folder, needed=size + OVERHEAD, force=job.force) as out:
        job.tell(f"writing {job.folder}")
        write_back.write(fitted, out.path, dtype, job.side, stored, layout.config(whole))
        job.tell("reading it back and comparing codes and logits")
        apart, rounded = check(fitted, job.program, out.path, whole.weights, layout.scale(dtype))
        schemes = Counter(w.short for w in whole.weights)
        record = {
            "format": layout.name, "architecture": fitted.family.model.__name__,
            "changes": [*fitted.family.written, *say(fitted.changes)], "dtype": short(dtype),
            "bytes": sum(p.stat().st_size for p in out.path.glob("*.safetensors")),
            "left_out": list(plain.facts.get("unread") or ()),
            "difference": apart, "rounding": rounded, "tolerance": write_back.TOLERANCE,
            "versions": versions(), "quantised": len(whole.weights), "schemes": dict(schemes),
            "dense": list(whole.dense), "notes": layout.notes(whole.weights),
        }  # fmt: skip
        out.write(RECORD, canonical_json(record))
        out.adopt()
    return record


def _whole(fitted: Any, grids: Mapping[str, Any], format: str) -> Whole:
    """What of the model is codes, and what is not.

    Raises:
        UsageError: no codes at all, or codes of something else than a linear of its own.
    """
    from ...capture.configs import quiet

    captured = fitted.captured.program
    with quiet():
        kinds = dict(fitted.family.make(fitted.changes)[0].named_modules())
    # Loaders replace this class by name; subclasses have a forward of their own.
    linears = {n for n, m in kinds.items() if type(m) is torch.nn.Linear}
    sites = linear_sites(captured)
    stacked = [s for s in sites if isinstance(s, ExpertSite)]
    of_experts = {name for s in stacked for name in (s.gate_up, s.down)}
    modules = {p.name: _module(p.names) for p in captured.params.values()}
    found = []
    for name in (n for n in captured.params if n in fitted.match.values):
        path, names, node = modules[name], captured.params[name].names, fitted.match.values[name]
        if name in of_experts and decodes(node):
            raise UsageError("experts: expected linears of their own, found codes of stacked "
                             "experts", where=path, hint=_DENSE)  # fmt: skip
        weight = coded(fitted.program, name, path, node, grids)
        if weight is None:
            continue
        if len(names) > 1:
            raise weight.refuse("tied", "a weight of one module", ", ".join(names), _DENSE)
        if path not in linears or names[0] != f"{path}.weight":
            kind = type(kinds[path]).__name__ if path in kinds else "parameter"
            raise weight.refuse("module", "a Linear", f"codes of a {kind}", _DENSE)
        found.append(weight)
    if not found:
        raise UsageError(
            f"expected weights that are codes, found none: {format} stores codes",
            hint="compile with w4 or w8a8, say; --format hf writes dense weights",
        )
    order = {p: i for i, p in enumerate(modules.values())}
    have = {w.path for w in found}
    heads = [modules[s.param] for s in sites if isinstance(s, LinearSite) and s.head]
    experts = [modules[s.gate_up] for s in stacked]
    read = {modules[p.name] for n in captured.calls("aten.linear.default")
            if (p := captured.param_of(n.args[1])) is not None}  # fmt: skip
    dense = sorted((linears | read) - have, key=lambda p: (order.get(p, len(order)), p))
    return Whole(found, dense, heads, list(dict.fromkeys(experts)), modules)


_DENSE = "leave it out when compiling, or save an artefact instead"


def _module(names: Sequence[str]) -> str:
    return names[0].rpartition(".")[0] if names else ""


def _stored(job: Job, layout: Layout, weight: Coded, dtype: torch.dtype) -> dict[str, Tensor]:
    """The tensors of one weight, by the checkpoint's names."""
    parts = weight.load()
    scale = rounded_scale(weight, parts.scale, layout.scale(dtype))
    static = weight.inputs.scale if weight.inputs is not None else None
    in_scale = None if static is None else job.program.fetch(static)
    made = layout.tensors(weight, Parts(parts.codes, scale, parts.zero), in_scale)
    return {f"{weight.path}.{suffix}": t.contiguous() for suffix, t in made.items()}


def rounded_scale(weight: Coded, scale: Tensor, dtype: torch.dtype) -> Tensor:
    """Scales in the dtype in which they are stored.

    Raises:
        UsageError: the dtype turns one into 0 or infinity.
    """
    out = scale.to(dtype)
    if not bool(torch.isfinite(out).all()) or bool(((out == 0) & (scale != 0)).any()):
        raise weight.refuse("scale", f"scales that {short(dtype)} can hold", "one that it cannot",
                            "--dtype f32 holds them, where the format takes it")  # fmt: skip
    return out


def _bytes(weights: Sequence[Coded], scale: torch.dtype) -> int:
    """Bytes that codes, scales and zero points take, and a little for what is beside them."""
    total = 0
    for w in weights:
        rows, columns = w.shape
        groups = -(-columns // (w.codes.group or columns))
        total += rows * columns * w.codes.bits // 8 + rows * groups * (scale.itemsize + 1)
        total += 4 * columns + 4096
    return total
