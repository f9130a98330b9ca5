"""tt_embed: an embedding table as tensor trains, of each row or of the whole table."""

from __future__ import annotations

from dataclasses import dataclass
from math import prod
from typing import Any

import torch
from torch import Tensor

from ..compiler.analysis.tables import TableSite
from ..compiler.ir.errors import UsageError
from ..compiler.ir.events import Event
from ..compiler.ir.graph import Program
from ..compiler.pipeline.analysis import Analysis
from ..compiler.pipeline.base import Example, Lossy, knob
from ..compiler.pipeline.structure import Choice, Context
from ..compiler.pipeline.tables import (
    Swap,
    TablePass,
    bias_of,
    found_tables,
    part_name,
    token_counts,
)
from ..compiler.solvers.tensor_train import (
    capped,
    cluster_order,
    factors,
    fitting,
    full_ranks,
    nearest_shape,
    numbers,
    padded,
    tt_svd,
)


@dataclass(frozen=True)
class Layout:
    """How one table is stored.

    Attributes:
        shape: d₁ … d_N, whose product is a row's width; rows: v₁ … v_N, () for a train per row.
        ranks: r₁ … r_{N-1}; ordered: whether places of tokens are stored.
    """

    shape: tuple[int, ...]
    rows: tuple[int, ...]
    ranks: tuple[int, ...]
    ordered: bool

    @property
    def sizes(self) -> tuple[int, ...]:
        """Sizes of the tensor that is made a train: of one row, or of the table."""
        return tuple(v * d for v, d in zip(self.rows, self.shape, strict=False)) or self.shape

    def cores(self, vocab: int) -> list[tuple[int, int, int, int]]:
        """Shapes of the stored cores."""
        bonds = (1, *self.ranks, 1)
        counts = self.rows or (vocab,) * len(self.shape)
        return [
            (n, bonds[k], d, bonds[k + 1])
            for k, (n, d) in enumerate(zip(counts, self.shape, strict=True))
        ]

    def bytes(self, site: TableSite) -> int:
        """Of cores, scales and places."""
        held = sum(map(prod, self.cores(site.vocab))) + site.vocab
        return held * site.itemsize + 4 * site.vocab * self.ordered


@dataclass(frozen=True)
class TensorTrain(TablePass):
    """Each row of the table is a scale, its norm, times a train of cores; a lookup contracts those
    of the batch's tokens and nothing else.

    row: every token has small cores of its own, from its row as a tensor of the given shape.
    matrix: all tokens share the cores of one train over the factors of vocabulary and width; the
    vocabulary is padded, and tokens may be put in order first, as like rows must lie together. A
    tied head is contracted with the cores too, or untied: then it keeps the table, and the model
    grows by the cores. Σ of the σ² that are dropped is exactly the squared error of the rows at
    length 1.
    """

    variants = {"tt_embed": {}}
    effect = Lossy("perplexity")
    source = "TensorGPT, arXiv 2307.00526; TT-embeddings, arXiv 1901.10787; TT-SVD, Oseledets 2011"
    hits = (Example("llama_gqa"), Example("tied_head"))
    misses = (Example("reads_table", "looked_up_alone"),)

    granularity: str = knob("matrix", "what a train is made of", choices=("matrix", "row"))
    remove: float = knob(0.3, "share of the table's bytes to go, at least", lo=0.0, hi=0.999)
    rank: int | None = knob(None, "instead of remove: the largest rank between two cores", lo=1)
    cores: int = knob(3, "cores of a train, where no shape is given", lo=2, hi=8)
    shape: str | None = knob(None, "factors of the width, as in 4x8x8, or none for even ones")
    rows: str | None = knob(None, "with matrix: factors of the padded vocabulary, as in 8x16x16")
    order: str = knob(
        "cluster",
        "with matrix: which tokens lie together",
        choices=("none", "frequency", "cluster"),
    )
    head: str = knob("contract", "what a tied head reads", choices=("contract", "untie"))

    def check(self) -> None:
        if self.explicit("remove") and self.rank is not None:
            raise UsageError("tt_embed: expected one of remove and rank, found both")
        for name in ("rows", "order"):
            if self.granularity == "row" and self.explicit(name) and getattr(self, name):
                raise UsageError(
                    f"tt_embed:{name}: expected granularity=matrix beside it, found row",
                    hint="tt_embed:granularity=matrix",
                )
        shapes = [_sizes(f"tt_embed:{k}", getattr(self, k)) for k in ("shape", "rows")]
        if all(shapes) and len(shapes[0]) != len(shapes[1]):
            raise UsageError(
                f"tt_embed:rows: expected {len(shapes[0])} factors as in shape={self.shape}, "
                f"found {self.rows}"
            )

    def calibrated(self) -> bool:
        return self.granularity == "matrix" and self.order == "frequency"

    def forwards(self, sites: list[Any]) -> float:
        return 0.0

    def predict(self, analysis: Analysis, sites: list[TableSite]) -> Choice:
        found = {s.id: self._layout(s) for s in sites}
        data = {
            i: {"shape": list(a.shape), "rows": list(a.rows), "ranks": list(a.ranks),
                "ordered": a.ordered, "head": self.head}
            for i, a in found.items()
        }  # fmt: skip
        return Choice({"tables": data}, records=[self._record(s, found[s.id]) for s in sites])

    def decide(self, context: Context, sites: list[TableSite]) -> Choice:
        choice = self.predict(context.analysis, sites)
        for site, record in zip(sites, choice.records, strict=True):
            context.listener(Event("tick", {"where": site.id}))
            table = context.program.weights.load(site.param).to(context.options.device)
            parts, lost = self._solve(table, self._layout(site), context)
            record |= lost
            named = {part_name(context.program, site.param, k): t for k, t in parts.items()}
            choice.tensors.update(named)
        choice.records.extend(self.told_losses(context, choice))
        return choice

    def apply(self, program: Program, choice: Choice) -> list[str]:
        sites, added = found_tables(program), list[str]()
        for name, told in choice.data["tables"].items():
            shape, factors_of, ranks = (tuple(told[k]) for k in ("shape", "rows", "ranks"))
            layout = Layout(shape, factors_of, ranks, told["ordered"])
            swap = Swap(program, sites[name], choice.tensors, self.called or "tt_embed")
            vocab = sites[name].vocab
            scale = swap.param("scale", (vocab,))
            order = swap.param("order", (vocab,), torch.int32) if layout.ordered else None
            cores = [swap.param(f"core{k}", c) for k, c in enumerate(layout.cores(vocab))]
            train, rows = (scale, order, cores), list(layout.rows)
            for node in swap.lookups:
                new = swap.call("llmc.tt_lookup", node.args[1], *train, at=node, rows=rows)
                swap.replace(node, new)
            for node in swap.heads if told["head"] == "contract" else ():
                new = swap.call("llmc.tt_linear", node.args[0], *train, at=node, rows=rows)
                bias = bias_of(node)
                if bias is not None:
                    new = swap.call("aten.add.Tensor", new, bias, at=node)
                swap.replace(node, new)
            added += swap.added
        return added

    # ** layout **

    def _layout(self, site: TableSite) -> Layout:
        shape = self._shape(site)
        rows = self._rows(site, len(shape)) if self.granularity == "matrix" else ()
        ordered = bool(rows) and self.order != "none"
        bare = Layout(shape, rows, (1,) * (len(shape) - 1), ordered)
        each = 1 if rows else site.vocab
        if self.rank is not None:
            full = max(full_ranks(bare.sizes))
            if self.rank > full:
                raise UsageError(
                    f"tt_embed:rank: expected at most {full}, found {self.rank}", where=site.id
                )
            made = Layout(shape, rows, capped(bare.sizes, self.rank), ordered)
            self.saves(site, made.bytes(site), f"rank {self.rank} of shape {_text(shape)}")
            return made
        beside = bare.bytes(site) - each * numbers(bare.sizes, bare.ranks) * site.itemsize
        most = (self.budget(site, self.remove) - beside) // (each * site.itemsize)
        if most < numbers(bare.sizes, bare.ranks):
            share = 1 - bare.bytes(site) / site.bytes
            raise UsageError(
                f"tt_embed:remove: expected at most {int(1000 * share) / 1000:g}, which ranks of 1 "
                f"give with shape {_text(shape)}, found {self.remove:g}", where=site.id,
            )  # fmt: skip
        made = Layout(shape, rows, fitting(bare.sizes, most), ordered)
        self.saves(site, made.bytes(site), f"remove={self.remove:g} with shape {_text(shape)}")
        return made

    def _shape(self, site: TableSite) -> tuple[int, ...]:
        given = _sizes("tt_embed:shape", self.shape)
        if not given:
            count = len(_sizes("tt_embed:rows", self.rows)) or self.cores
            found = factors(site.width, count)
            if found is None:
                fits = [n for n in range(count - 1, 1, -1) if factors(site.width, n)]
                hint = f"cores={fits[0]}" if fits else "lowrank_embed takes any width"
                raise UsageError(
                    f"tt_embed: expected a width of {count} factors above 1, found {site.width}",
                    where=site.id, hint=hint,
                )  # fmt: skip
            return found
        if prod(given) != site.width:
            near = nearest_shape(site.width, given)
            hint = f"shape={_text(near)}" if near else "fewer factors, or none for even ones"
            raise UsageError(
                f"tt_embed:shape: expected factors of {site.width}, found {_text(given)} = "
                f"{prod(given)}", where=site.id, hint=hint,
            )  # fmt: skip
        return given

    def _rows(self, site: TableSite, count: int) -> tuple[int, ...]:
        given = _sizes("tt_embed:rows", self.rows)
        # The most significant digit of a place is paired with the smallest factor of the width.
        found = given or padded(site.vocab, count)[::-1]
        if len(found) != count:
            raise UsageError(f"tt_embed:rows: expected {count} factors, found {self.rows}")
        if prod(found) < site.vocab:
            near = _text(padded(site.vocab, count)[::-1])
            raise UsageError(
                f"tt_embed:rows: expected factors of {site.vocab} or more, found {_text(found)} = "
                f"{prod(found)}", where=site.id, hint=f"rows={near}",
            )  # fmt: skip
        return found

    def _record(self, site: TableSite, made: Layout) -> dict[str, Any]:
        stays = bool(site.heads) and self.head == "untie"
        return {
            "site": site.id, "table": f"{site.vocab}x{site.width}", "shape": _text(made.shape),
            "rows": _text(made.rows) or "each", "ranks": "+".join(map(str, made.ranks)),
            "head": self.head if site.heads else "none", "bytes_before": site.bytes,
            "bytes_after": made.bytes(site) + site.bytes * stays,
        }  # fmt: skip

    # ** solving **

    def _solve(
        self, table: Tensor, made: Layout, context: Context
    ) -> tuple[dict[str, Tensor], dict[str, float]]:
        """Stored parts by the ends of their names, and the share of the rows' energy that is lost.

        ``loss`` counts rows alike, ``loss_by_norm`` by their squared norm.
        """
        wide = table.double()
        norms = wide.norm(dim=1)
        unit = wide / torch.where(norms > 0, norms, 1.0)[:, None]
        places = torch.arange(len(table), device=table.device)
        if made.ordered:
            if self.order == "frequency":
                ordered = token_counts(context.data, len(table)).argsort(
                    descending=True, stable=True
                )
            else:
                ordered = cluster_order(unit, made.rows)
            places[ordered.to(table.device)] = torch.arange(len(table), device=table.device)
        if made.rows:
            whole = unit.new_zeros(prod(made.rows), unit.shape[1])
            whole[places] = unit
            count = len(made.shape)
            pairs = [a for k in range(count) for a in (k, count + k)]
            tensors = whole.reshape(*made.rows, *made.shape).permute(pairs).reshape(1, *made.sizes)
        else:
            tensors = unit.reshape(len(unit), *made.shape)
        train = tt_svd(tensors, made.ranks)
        cores = list(train.cores)
        if made.rows:
            sizes = zip(cores, made.rows, made.shape, strict=True)
            cores = [c[0].unflatten(1, (v, d)).transpose(0, 1) for c, v, d in sizes]
        parts = {f"core{k}": c.to(table.dtype).contiguous().cpu() for k, c in enumerate(cores)}
        parts["scale"] = norms.to(table.dtype).cpu()
        if made.ordered:
            parts["order"] = places.to(torch.int32).cpu()
        rows = int((norms > 0).sum())
        lost = {"loss": float(train.dropped.sum()) / max(rows, 1)}
        if not made.rows:
            energy = norms.square()
            share = float((train.dropped * energy).sum() / energy.sum().clamp_min(1e-300))
            lost["loss_by_norm"] = share
        return parts, lost


def _sizes(where: str, text: str | None) -> tuple[int, ...]:
    """The factors of a text as in 4x8x8; () for None.

    Raises:
        UsageError: something else, fewer than two or more than eight factors, or one below 2.
    """
    if text is None:
        return ()
    try:
        found = tuple(int(part) for part in text.split("x"))
    except ValueError:
        found = ()
    if not 2 <= len(found) <= 8 or min(found) < 2 or prod(found) > 1 << 40:
        raise UsageError(f"{where}: expected two to eight factors as in 4x8x8, found {text!r}")
    return found


def _text(sizes: tuple[int, ...]) -> str:
    return "x".join(map(str, sizes))
