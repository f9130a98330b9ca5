"""What is known of a quantised checkpoint that was read as it is: told like an artefact's records.

Nothing was solved, so there is no loss and no calibration; schemes, bits and bytes are exact.
"""

from __future__ import annotations

from collections.abc import Iterator
from math import prod
from pathlib import Path
from typing import Any

from torch import fx

from ..analysis.blocks import apply_segments
from ..analysis.linears import LinearSite, linear_sites
from ..ir.graph import Param, Program
from ..ir.scheme import Scheme, View
from .artefact import Loaded, versions
from .exporting.codes import Coded, coded, without_grids
from .manifest import Manifest

FACT = "quantised"
"""The fact by which capture says that a checkpoint held codes."""
_DECODES = ("llmc.dequantize", "llmc.lookup")


def imported(program: Program, path: Path) -> Loaded | None:
    """A program with its records, as if it had been an artefact; None for a dense model.

    No tensor is read. Its manifest lists no files and has no content hash; saving makes both.
    """
    if not isinstance(program.facts.get(FACT), dict):
        return None
    if not program.segments:
        apply_segments(program)
    method = str(program.facts[FACT].get("method"))
    found = dict(_weights(program))
    schemes = {name: _scheme(name, weight) for name, weight in found.items()}
    report = {
        "format_version": 1, "passes": f"read from {method}", "sites": _sites(program, found),
        "folds": [], "fallbacks": [], "refusals": [], "structure": [],
        "record": {"passes": f"read from {method}"},
    }  # fmt: skip
    manifest = Manifest.model_construct(
        format="", format_version=0, content_hash="", files={}, tensors={}, passes=[],
        fallbacks=[], versions=versions(), sealed="",
    )  # fmt: skip
    return Loaded(path, program, manifest, schemes, {}, report, {}, (), None)


def _weights(program: Program) -> Iterator[tuple[str, Coded]]:
    """Weights that are codes, by the name of the parameter that they stand for."""
    plain, grids = without_grids(program)
    for op in _DECODES:
        for node in plain.calls(op):
            param = plain.param_of(node.args[0])
            weight = None if param is None else coded(plain, "", param.name, node, grids)
            if param is not None and weight is not None:
                yield param.source, weight


def _scheme(name: str, weight: Coded) -> dict[str, Any]:
    grid = weight.inputs.grid if weight.inputs is not None else None
    return Scheme(View(name), weight.codes, input_grid=grid).to_json()


def _sites(program: Program, weights: dict[str, Coded]) -> list[dict[str, Any]]:
    """One row per coded weight, in graph order, as compiling writes them."""
    stored = program.stored_bytes()
    out = []
    for site in linear_sites(_dense(program)):
        weight = weights.get(site.param) if isinstance(site, LinearSite) else None
        if weight is None or not isinstance(site, LinearSite):
            continue
        after = stored[site.param]
        out.append({
            "site": site.id, "role": site.role, "scheme": weight.short,
            "shape": list(weight.shape), "param": site.param, "bytes_after": after,
            "bits": 8 * after / prod(weight.shape), "bytes_are": "exact", "ends": None,
        })  # fmt: skip
    return out


def _dense(program: Program) -> Program:
    """The program with a stored weight for each decoded one, without tensors, to find sites in."""
    out, _ = without_grids(program)
    for node in [n for op in _DECODES for n in out.calls(op)]:
        codes = out.param_of(node.args[0])
        assert isinstance(node, fx.Node)
        if codes is None:
            continue
        how: dict[str, Any] = dict(node.kwargs)
        shape = (codes.shape[0], int(how["columns"]))
        new = out.add_param(Param(codes.source, shape, out.dtype), None, before=node)
        node.replace_all_uses_with(new)
    out.prune()
    out.segments = []
    apply_segments(out)
    return out
