"""Solving one fold or one group of weights from statistics, on the working copy of the weights."""

from __future__ import annotations

import ctypes
import sys
import time
from collections.abc import Callable, Mapping
from dataclasses import replace
from functools import partial
from types import MappingProxyType
from typing import Any

import torch
from torch import Tensor, fx

from ..analysis.migrate import MigrationSite, migrated, shift_ready, shifted
from ..ir.errors import ModelError
from ..ir.graph import Segment
from ..ir.interpret import Fetch
from ..ir.scheme import Mask, Sparse
from ..solvers import NO_HESSIAN, Factor, MaskRule, Solution, prepare, solve
from ..solvers.grid import Fit
from . import encode, inputs, rotating
from .alternating import alternated
from .equivalence import Edge, Equivalence, Move, Planned
from .experts import Given, Solved, joined, solve_stack
from .griding import grid_of, outliers
from .plan import Decision, Migration, Plan
from .residual import compensate
from .statistics import Collection


class Work:
    """The working copy: fp32 tensors of what was rewritten, everything else from the source.

    Attributes:
        dense: rewritten parameters, fp32 whatever the program computes in.
        packed: finished canonical tensors by final parameter name.
        masks: decided masks by parameter, frozen for later rounds; extras: the weights beside
            them that came back. information: see :mod:`.sensitivity`.
        coded: parameters that end as codes, whatever dtype they came in.
        fits: ranges that were learned, and what learning them gave; see :mod:`.learning`.
        parts: solved experts of weights that stack some which are not.
        implementations: what stands for solved linears that read a rounded value, by node name.
    """

    def __init__(self, plan: Plan, device: torch.device) -> None:
        self.program, self.final, self.device = plan.source, plan.program, device
        self.coded = {
            d.site.param
            for stage in plan.stages
            for d in stage.decisions.values()
            if d.scheme.codes is not None
        }
        self.dense: dict[str, Tensor] = {}
        self.packed: dict[str, Tensor] = {}
        self.masks: dict[str, Tensor] = {}
        self.extras: dict[str, Tensor] = {}
        self.information: dict[str, Tensor] = {}
        self.fits: dict[str, Fit] = {}
        self.learned: dict[str, dict[str, Any]] = {}
        self.parts: dict[str, list[Solved]] = {}
        self.implementations: dict[str, Callable[..., Tensor]] = {}
        self._loaded: dict[str, Tensor] = {}

    def fetch(self, name: str) -> Tensor:
        """The parameter in compute dtype, loaded once per block."""
        if name not in self._loaded:
            self._loaded[name] = self._computed(name, self.dense)
        return self._loaded[name]

    def read(self, name: str) -> Tensor:
        """As ``fetch``, not kept."""
        held = self._loaded.get(name)
        return self._computed(name, self.dense) if held is None else held

    def frozen(self) -> Fetch:
        """``fetch`` of this moment, whatever is replaced later."""
        held, loaded = dict(self.dense), dict(self._loaded)

        def fetch(name: str) -> Tensor:
            if name not in loaded:
                loaded[name] = self._computed(name, held)
            return loaded[name]

        return fetch

    def _computed(self, name: str, dense: Mapping[str, Tensor]) -> Tensor:
        if name in dense:
            return dense[name].to(self.program.param_type(self.program.params[name]).dtype)
        return self.program.fetch(name).to(self.device)

    def load(self, name: str) -> Tensor:
        """The parameter without loss: fp32 where it was rewritten, else at least as stored.

        This makes the working copy a source of weights.
        """
        if name in self.dense:
            return self.dense[name]
        stored, compute = self.program.params[name].dtype, self.program.dtype
        if torch.promote_types(stored, compute) == compute:
            return self.fetch(name)
        return self.program.weights.load(name).to(self.device)

    def rescaled_as(self, site: MigrationSite) -> torch.dtype:
        """The narrowest dtype in which a matrix that the site rescales will be stored.

        fp32 where all of them become codes: nothing then rounds what is rescaled.
        """
        names = [p for _, p, _ in site.consumers] + [a.param for a in site.absorbers]
        params = [self.program.params[n] for n in names if n not in self.coded]
        kept = [p.dtype for p in params if len(p.shape) > 1]
        return min(kept, key=lambda d: d.itemsize, default=torch.float32)

    def weight(self, name: str) -> Tensor:
        """A parameter to solve, checked.

        Raises:
            ModelError: NaN or Inf.
        """
        w = self.load(name).float()
        if not bool(torch.isfinite(w).all()):
            names = self.program.params[name].names
            raise ModelError(
                f"expected finite weights, found NaN or Inf in {(names or (name,))[0]}"
            )
        return w

    def replace(self, name: str, tensor: Tensor) -> None:
        """Set a rewritten parameter."""
        self.dense[name] = tensor
        self._loaded.pop(name, None)

    def drop(self, segment: Segment, last: bool) -> None:
        """Forget what was loaded for a finished segment, so that memory stays that of one block.

        In the last round its weights are not solved again: masks go, and what is rewritten is kept
        only as it will be stored.
        """
        self._loaded.clear()
        for node in map(self.program.node, segment.nodes) if last else ():
            name = str(node.target)
            if node.op != "get_attr" or name not in self.dense:
                continue
            self.masks.pop(name, None)
            self.extras.pop(name, None)
            tensor = self.dense.pop(name)
            if name in self.final.params and name not in self.packed:
                self.dense[name] = tensor.to(self.final.params[name].dtype)
        give_back()


def give_back() -> None:
    """Hand freed memory back to the system where the C library can (glibc).

    It keeps freed blocks of up to 32 MiB otherwise, and a process grows with every layer.
    """
    trim = getattr(ctypes.CDLL(None), "malloc_trim", None) if sys.platform == "linux" else None
    if trim is not None:
        trim(0)


def fold(
    work: Work, m: Migration, stats: Collection,
    planned: Mapping[str, Decision] | None = None, move: Move | None = None,
) -> dict[str, Any]:  # fmt: skip
    """Migrate scales at one site: readers get W·s, absorbers 1/s; statistics follow.

    planned: by weight, what the recipe still makes of the readers. move: decided already.
    """
    began = time.perf_counter()
    site, made = m.site, m.call.made
    assert isinstance(made, Equivalence)
    weights, readers = [], []
    for _, param, axis in site.consumers:
        weights.append(work.weight(param).movedim(axis, -1))
        readers.append(_planned((planned or {}).get(param)))
    if move is None:
        known = {need: stats.get(site.value, need) for need in made.needs}
        shifts = shift_ready(work.program, site)
        stored = work.rescaled_as(site)
        move = made.decide(Edge(site, tuple(weights), tuple(readers), stored, known, shifts))
    s = move.scales
    spread = s[site.expand.to(s.device)]
    view = replace(work.program, weights=work)
    if move.shift is not None:
        for name, tensor in shifted(view, site, move.shift).items():
            work.replace(name, tensor)
    for name, tensor in migrated(view, site, s).items():
        work.replace(name, tensor)
    # Readers may see the value through moves, each under a name of its own.
    seen = (work.program.node(node).args[0] for node, _, _ in site.consumers)
    for value in dict.fromkeys(v.name for v in seen if isinstance(v, fx.Node)):
        stats.scale(value, 1.0 / spread)
    return {
        "site": site.id, "kind": site.kind, "pass": m.call.name, "scales": site.n_scales,
        "smallest": float(s.min()), "largest": float(s.max()),
        "moved": int((s != 1).sum()), "seconds": round(time.perf_counter() - began, 4),
        **({} if move.shift is None else {"shifted": int((move.shift != 0).sum())}),
        **move.record,
    }  # fmt: skip


def _planned(d: Decision | None) -> Planned:
    """What a decision says about the weight of a reader."""
    return (
        Planned()
        if d is None
        else Planned(grid_of(d.scheme.codes, d.options), d.needs_gram, d.scheme.input_grid)
    )


def rule_of(mask: Mask | None, sparse: Sparse | None = None) -> MaskRule | None:
    """The solver's mask rule for a scheme's mask and for what comes back of it."""
    if mask is None:
        return None
    if mask.structured:
        recover = sparse.share if sparse is not None and sparse.kind == "csr" else 0.0
        return MaskRule("nm", mask.n, mask.m, recover=recover)
    return MaskRule("unstructured", sparsity=mask.sparsity)


def solve_group(work: Work, members: list[Decision], stats: Collection) -> list[dict[str, Any]]:
    """Solve weights that read one value: one Hessian, one factor."""
    first = members[0]
    factor: Factor | None = None
    tokens = 0
    if first.site.stacked:
        return [record for d in members for record in _solve_experts(work, d, stats)]
    if first.needs_gram:
        gram: Any = stats.get(first.site.reads, "gram")
        tokens = gram.tokens
        turned = rotating.turns(work, members, gram.value.diagonal())
        value = gram.value if turned[0] is None else turned[0].gram(gram.value)
        factor = prepare(value, first.options.get("damp", 0.01))
    else:
        turned = rotating.turns(work, members, None)
    read = inputs.reading(first.scheme, stats, first.site.reads)
    return [
        _solve_one(work, d, factor, read, tokens, turn)
        for d, turn in zip(members, turned, strict=True)
    ]


def _solve_experts(work: Work, d: Decision, stats: Collection) -> list[dict[str, Any]]:
    """Solve the experts of one part; the last part gives the record of them all."""
    began = time.perf_counter()
    read, param = inputs.Reading(), d.site.param
    done = work.parts.setdefault(param, [])
    done += solve_stack(d, _given(work, d), stats, partial(_answer, d, read))
    if len(done) < d.site.experts:
        return []
    solution, told = joined(work.parts.pop(param))
    record = _settled(work, d, work.weight(param), None, read, None, solution)
    return [{**record, **told, "seconds": round(time.perf_counter() - began, 4)}]


def _given(work: Work, d: Decision) -> Given:
    """The weight as it stands, the rows of all experts as one matrix, and what is known of it."""
    param = d.site.param
    known = work.information.get(param)
    return Given(
        work.weight(param).flatten(0, -2), None if known is None else known.flatten(0, -2),
        work.masks.get(param), work.extras.get(param), work.fits.get(param),
    )  # fmt: skip


def _answer(
    d: Decision, read: inputs.Reading, given: Given, factor: Factor | None,
    instead: Mapping[str, Any] = MappingProxyType({}),
) -> Solution:  # fmt: skip
    """Solve one matrix as a decision says, with some options instead of its own."""
    o, frozen = {**d.options, **instead}, given.keep
    weight, known = given.weight, given.sensitivity
    out = outliers(weight, d.scheme.sparse, o, factor, known, frozen)
    if out is None and (out := inputs.columns_mask(weight, read)) is not None:
        out = out if frozen is None else out & frozen
    return solve(
        weight,
        grid=grid_of(d.scheme.codes, o, d.scheme.mask),
        mask=rule_of(d.scheme.mask, d.scheme.sparse) if frozen is None else None,
        grid_solver=o.get("grid_solver", "gptq"),
        mask_solver=o.get("mask_solver", "sparsegpt"),
        act_order=o.get("act_order", False),
        factor=factor,
        keep=frozen,
        extra=given.extra if out is None else out,
        sensitivity=known,
        sweeps=o.get("sweeps", 0),
        refit=o.get("refit", True),
        mask_search=o.get("mask_search", False),
        fit=given.fit,
        threshold=o.get("threshold"),
        most=1.0 if d.scheme.sparse is None else d.scheme.sparse.share,
    )


def _solve_one(
    work: Work, d: Decision, factor: Factor | None, read: inputs.Reading, tokens: int,
    turn: rotating.Turn | None,
) -> dict[str, Any]:  # fmt: skip
    began = time.perf_counter()
    given = _given(work, d)
    weight = given.weight if turn is None else turn.weight(given.weight)

    def answer(rest: Tensor) -> Solution:
        return _answer(d, read, given._replace(weight=rest), factor)

    low, o = d.scheme.low_rank, d.options
    if low is None or "rounds" not in o:
        solution = answer(weight)
    else:
        how = (o["residual"], factor, read.columns, o["rounds"], o["start"])
        solution = alternated(answer, weight, low, *how)
    record = _settled(work, d, weight, factor, read, turn, solution)
    return {**record, "tokens": tokens, "seconds": round(time.perf_counter() - began, 4)}


def _settled(
    work: Work, d: Decision, weight: Tensor, factor: Factor | None, read: inputs.Reading,
    turn: rotating.Turn | None, solution: Solution,
) -> dict[str, Any]:  # fmt: skip
    """Put a solution in the place of the weight; its record."""
    param, o = d.site.param, d.options
    work.information.pop(param, None)
    work.fits.pop(param, None)
    stored = work.program.params[param].dtype
    solution = _as_stored(solution, stored)
    for name in [n for n in work.packed if n == param or n.startswith(param + ".")]:
        del work.packed[name]
    scheme, rest, beside_codes = inputs.split_off(d.scheme, solution, read, stored)
    work.packed.update(encode.tensors(param, scheme, rest, stored))
    work.packed.update({f"{param}.{suffix}": t for suffix, t in beside_codes.items()})
    work.packed.update({} if turn is None else turn.tensors)
    if d.scheme.input_grid is not None:
        work.packed.update(inputs.tensors(work.final, d.site.node, read))
        rounded = inputs.rounded_linear(d.scheme, read, d.site.in_features)
        work.implementations[d.site.node] = rounded
    if solution.mask is not None:
        work.masks[param] = solution.mask
    recovered = d.scheme.sparse is not None and d.scheme.sparse.kind == "csr"
    if solution.extra is not None and recovered:
        work.extras[param] = solution.extra
    dense = solution.weight if d.scheme.codes is not None else solution.weight.to(stored).float()
    dense = dense if turn is None else turn.back(dense)
    given_back: dict[str, Any] = {}
    if d.scheme.low_rank is not None:
        made, more, given_back = compensate(
            weight, dense, d.scheme.low_rank, o["residual"], factor, read.columns
        )
        work.packed.update({f"{param}.{suffix}": t for suffix, t in made.items()})
        dense = dense + more
    work.replace(param, dense.view(work.program.params[param].shape))
    beside = 0.0 if solution.extra is None else _share(solution.extra)
    what = "recovered" if recovered else "outliers"
    stay = solution.mask
    if stay is not None and solution.extra is not None:
        stay = stay | solution.extra
    # A solve that asked for no statistic has lost nothing by having none.
    fallbacks = [f for f in solution.fallbacks if f != NO_HESSIAN or d.needs_gram]
    fallbacks += [*read.notes, *given_back.pop("notes", ())]
    return {
        "site": d.site.id, "role": d.site.role, "passes": list(d.passes),
        "scheme": d.scheme.short, "loss": solution.loss, "damp": solution.damp,
        "tokens": 0, "rows_rtn": solution.rows_rtn, "fallbacks": fallbacks,
        "zeros": 0.0 if stay is None else 1 - _share(stay),
        **({} if solution.extra is None else {what: beside}),
        **given_back, **work.learned.pop(param, {}),
        "rows": _rows(solution, given_back.get("loss")),
    }  # fmt: skip


def _rows(solution: Solution, last: float | None) -> Tensor | None:
    """Relative loss of each output row; all fall alike where low rank lowered that of the whole."""
    rows = solution.rows
    if rows is None or last is None or solution.loss <= 0:
        return rows
    return rows * (last / solution.loss)


def _as_stored(solution: Solution, stored: torch.dtype) -> Solution:
    """The solution with its sparse weights as their dtype holds them."""
    if solution.extra is None:
        return solution
    under = 0.0 if solution.under is None else solution.under
    rounded = under + (solution.weight - under).to(stored).float()
    return replace(solution, weight=torch.where(solution.extra, rounded, solution.weight))


def _share(mask: Tensor) -> float:
    return float(mask.float().mean())
