"""A written folder of codes is read back by llmc's own importer before anyone sees it."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch

from ...ir.errors import GateError
from ...ir.graph import Program
from .codes import Coded, Parts, coded, without_grids


def check(
    fitted: Any, source: Program, folder: Path, weights: Sequence[Coded], scale: torch.dtype
) -> tuple[float, float]:
    """Compare codes, scales, zero points, input grids and logits with what was meant.

    Args:
        fitted: of :func:`...capture.fit.fit`. source: with its input grids.
        scale: the dtype in which scales were stored.
    Returns:
        See :func:`...capture.write_back.compare`.
    Raises:
        GateError: something differs; the layer and the part are named.
    """
    from ...capture import capture
    from ...capture.configs import quiet
    from ...capture.write_back import compare, logits

    with quiet():
        again = capture(folder)
    plain, grids = without_grids(again)
    found = {}
    for node in [*plain.calls("llmc.dequantize"), *plain.calls("llmc.lookup")]:
        param = plain.param_of(node.args[0])
        assert param is not None
        path = param.names[0].removesuffix(".weight.codes")
        found[path] = coded(plain, "", path, node, grids)
    instead = {}
    for weight in weights:
        have = found.pop(weight.path, None)
        if have is None:
            raise GateError("expected codes, found none", where=weight.path)
        instead[weight.name] = _same(weight, have, scale, source, again)
    for path in found:
        raise GateError("expected a dense weight, found codes", where=path)
    return compare(fitted, lambda inputs: logits(plain, inputs), instead)


def _same(
    want: Coded, have: Coded, scale: torch.dtype, ours: Program, theirs: Program
) -> torch.Tensor:
    """The decoded weight, after each part was compared."""
    parts, read = want.load(), have.load()
    stored = Parts(parts.codes, parts.scale.to(scale), parts.zero)
    middle = torch.full((), 1 << (want.codes.bits - 1), dtype=torch.uint8)
    pairs = {
        "codes": (stored.codes, read.codes),
        "scale": (stored.scale.float(), read.scale.float()),
        "zero": tuple(middle if z is None else z for z in (stored.zero, read.zero)),
    }
    for name, (a, b) in pairs.items():
        if name == "zero":
            a, b = torch.broadcast_tensors(a, b)
        if a.shape != b.shape or not torch.equal(a, b):
            raise GateError(f"expected the {name} that were written, found others", where=want.path)
    grids = [c.inputs.grid if c.inputs else None for c in (want, have)]
    if grids[0] != grids[1] or _statics(want, ours) != _statics(have, theirs):
        raise GateError(f"expected inputs on {grids[0]}, found {grids[1]}", where=want.path)
    return stored.dense(want.codes)


def _statics(weight: Coded, program: Program) -> list[float]:
    """The static scale of what a weight reads, where there is one."""
    name = weight.inputs.scale if weight.inputs is not None else None
    return [] if name is None else program.weights.load(name).float().tolist()
