"""A plan filled with the tensors of an artefact that was made from the same model elsewhere.

Weights are matched by their place in the graph, never by name, and then compared.
"""

from __future__ import annotations

from pathlib import Path

import torch
from torch import fx

from .analysis.linears import LinearSite
from .ir.errors import UsageError
from .ir.graph import Program
from .ir.ops import row_of
from .model import fold_params
from .pipeline.encode import refresh_types
from .pipeline.plan import Plan

# Cosine of a decoded weight with the original below which the two have nothing in common: 2 bits
# and half the weights gone leave about 0.7, folded scales lower it a little.
_ALIKE = 0.2


def own_params(program: Program, base: str) -> list[str]:
    """Names of the parameters that store a source parameter after the passes."""
    return [n for n, p in program.params.items() if p.source == base]


def fill_from_artefact(plan: Plan, folder: Path) -> None:
    """Fill the plan with an artefact's tensors; weights are matched by their place in the graph.

    Raises:
        UsageError: the artefact was made from another model, or rewrote a parameter that has no
            counterpart here.
    """
    from .runtime.artefact import load

    found = load(folder)
    theirs = {s["site"]: s["param"] for s in found.report["sites"]}
    folds: dict[str, list[str]] = {}
    for row in found.manifest.passes:
        folds |= row["folds"]
    mine = {d.site.id: d.site for s in plan.stages for d in s.decisions.values()}
    if set(mine) != set(theirs):
        odd = sorted(set(mine) ^ set(theirs))[0]
        raise UsageError(f"expected an artefact of this model, found other sites ({odd})",
                         where=str(folder))  # fmt: skip
    to_mine = {theirs[site]: at.param for site, at in mine.items()}
    for stage in plan.stages:
        for m in stage.migrations:
            params = fold_params(m, plan.source)
            if len(folds.get(m.site.id, ())) == len(params):
                to_mine |= dict(zip(folds[m.site.id], params, strict=True))
    lost = sorted({p for params in folds.values() for p in params} - set(to_mine))
    if lost:
        raise UsageError(
            f"expected a counterpart of every rewritten parameter, found none for {lost[0]}",
            where=str(folder),
        )
    for other, base in to_mine.items():
        for name in own_params(plan.program, base):
            tensor = found.program.weights.load(other + name[len(base) :])
            wanted = list(plan.program.params[name].shape)
            if list(tensor.shape) != wanted:
                raise UsageError(
                    f"expected {wanted}, found {list(tensor.shape)} for {name}", where=str(folder)
                )
            plan.program.set_tensor(name, tensor)
    refresh_types(plan.program)
    for site in mine.values():
        _check_alike(plan, site, folder)


def _check_alike(plan: Plan, site: LinearSite, folder: Path) -> None:
    """Raises UsageError unless a decoded weight points the way of the module's own."""
    dense = plan.source.fetch(site.param).float().flatten()
    node = plan.program.node(site.node).args[site.slot]
    assert isinstance(node, fx.Node)
    decoded = _constant(plan.program, node).float().flatten().to(dense.device)
    likeness = float(torch.nn.functional.cosine_similarity(dense, decoded, dim=0))
    if not likeness > _ALIKE:
        raise UsageError(
            f"expected an artefact of these very weights, found a likeness of {likeness:.2f} at "
            f"{site.id}",
            where=str(folder),
        )


def _constant(program: Program, node: fx.Node) -> torch.Tensor:
    """The value of a node that depends on parameters alone."""
    if node.op == "get_attr":
        return program.fetch(str(node.target))
    args = fx.map_arg(node.args, lambda n: _constant(program, n))
    kwargs = fx.map_arg(node.kwargs, lambda n: _constant(program, n))
    out: torch.Tensor = row_of(node).reference(*args, **kwargs)
    return out
