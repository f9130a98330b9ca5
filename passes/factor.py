"""svd, fwsvd, asvd, svdllm: a weight becomes two thinner ones, each linear two linears."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from math import prod
from typing import Any, ClassVar

from torch import Tensor

from ..compiler.analysis.linears import ExpertSite, LinearSite
from ..compiler.ir.errors import UsageError
from ..compiler.ir.graph import Program
from ..compiler.ir.refusal import Refusal
from ..compiler.pipeline import rank_search
from ..compiler.pipeline.analysis import Analysis
from ..compiler.pipeline.base import Example, Lossy, Precondition, knob
from ..compiler.pipeline.factored import factorise
from ..compiler.pipeline.factoring import (
    METRICS,
    Factoring,
    How,
    Unit,
    output_information,
    tails,
    units,
)
from ..compiler.pipeline.sites import BLOCK_WEIGHT, Protecting
from ..compiler.pipeline.structure import Choice, Context, Structural
from ..compiler.solvers import ranks as split
from ..compiler.solvers.ranks import Ranks

ALLOCATIONS = ("uniform", "global", "asvd")
WEIGHS = ("auto", "fisher", "loss", "output", "none")


def _dense(analysis: Analysis) -> Iterator[LinearSite | Refusal]:
    """Pattern: every matrix that multiplies a value, x @ Wᵀ."""
    for site in analysis.linears:
        if isinstance(site, ExpertSite):
            why = f"{site.experts} stacked experts are one call, whose weights tucker factors"
            yield Refusal("svd", site.node, why, "not_experts", analysis.path(site.node))
        else:
            yield site


@dataclass(frozen=True)
class Factor(Structural, Protecting):
    """y = W x + b → y = A (B x) + b, A·B the best of its rank for W in a metric of the inputs.

    svd: all errors alike; fwsvd: columns by their Fisher information; asvd: by mean |x|^alpha;
    svdllm: the error of the outputs on calibration data, by whitening with XᵀX. Both factors are
    ordinary weights in the dtype of the one that they replace, which the passes after this one
    see. Where no rank would save bytes a weight stays dense.
    """

    variants = {
        "svd": {"metric": "weights"},
        "fwsvd": {"metric": "fisher"},
        "asvd": {"metric": "absmean"},
        "svdllm": {"metric": "gram"},
    }
    stage = "factor"
    effect = Lossy("perplexity")
    source = "SVD-LLM, arXiv 2403.07378; ASVD, arXiv 2312.05821; FWSVD, arXiv 2207.00112"
    pattern = _dense
    preconditions: ClassVar[tuple[Precondition, ...]] = BLOCK_WEIGHT
    hits = (Example("llama_gqa"), Example("layer_norm"), Example("with_bias"), Example("moe"))
    misses = (Example("moe", "not_experts"), Example("moe", "not_router"))

    metric: str = knob("gram", "what errors are weighed by", choices=tuple(METRICS))
    remove: float = knob(0.2, "share of the factored weights' parameters that goes, below 1")
    rank: int | None = knob(None, "instead: rank of every factored weight", lo=1)
    params: int | None = knob(None, "instead: parameters that the model keeps at most", lo=1)
    multiple: int = knob(
        8, "ranks are multiples of it; less for small weights unless given", lo=1, hi=4096
    )
    alloc: str = knob(
        "uniform",
        "ranks: one share of all; global: least predicted loss in the same bytes; asvd: threshold "
        "on the model's loss with one weight factored",
        choices=ALLOCATIONS,
    )
    weigh: str = knob(
        "auto",
        "what a weight's truncation counts for alloc=global: by squared gradients of its outputs, "
        "the model's loss with it alone factored, its outputs' energy, or as it is; auto is the "
        "first, for fwsvd the last",
        choices=WEIGHS,
    )
    update: str = knob(
        "none",
        "closed: A is the least squares of the dense outputs on what the factors read",
        choices=("none", "closed"),
    )
    sequential: bool = knob(False, "measure each block behind the factors before it")
    share: bool = knob(False, "linears that read one value share B, the latent")
    alpha: float = knob(0.5, "of asvd: power of the mean |x|", lo=0.0, hi=2.0)
    jitter: float = knob(0.0, "of svdllm: added to XᵀX, relative to its diagonal", lo=0.0, hi=1.0)
    samples: int = knob(16, "windows of gradients and of losses that decide", lo=1, hi=100_000)
    randomised: bool = knob(False, "a range finder instead of the full spectrum")
    seed: int = knob(0, "of randomised=true", lo=0)

    # ** knobs **

    def check(self) -> None:
        if not 0 < self.remove < 1:
            raise UsageError(
                f"{self.called}:remove: expected a share above 0 and below 1, "
                f"found {self.remove:g}", hint="0.2 takes a fifth of the parameters away",
            )  # fmt: skip
        targets = [n for n in ("remove", "rank", "params") if self.explicit(n)]
        if len(targets) > 1:
            raise UsageError(f"{self.called}: expected one target, found {' and '.join(targets)}")
        idle = {
            "alpha": self.metric != "absmean", "jitter": self.metric != "gram",
            "weigh": self.alloc != "global", "seed": not self.randomised,
            "alloc": self.rank is not None and self.alloc != "uniform",
            "sequential": METRICS[self.metric] is None and self.update == "none",
        }  # fmt: skip
        for name in (n for n, unused in idle.items() if unused and self.explicit(n)):
            raise UsageError(
                f"{self.called}:{name}: expected it where it is read, found it beside "
                + ("rank=" if name == "alloc" else f"alloc={self.alloc}, metric {self.metric}"),
                hint=f"drop {name}=",
            )

    @property
    def how(self) -> How:
        """What the engine is to do."""
        return How(
            self.metric, self.alpha, self.jitter, "randomised" if self.randomised else "auto",
            self.seed, self.samples, self.update == "closed", self.sequential,
        )  # fmt: skip

    def calibrated(self) -> bool:
        decided = self.alloc == "asvd" or (self.alloc == "global" and self._swept)
        return self.metric != "weights" or self.update == "closed" or decided

    @property
    def _swept(self) -> bool:
        return self._counts in ("fisher", "loss")

    @property
    def _counts(self) -> str:
        auto = "none" if self.metric == "fisher" else "fisher"
        return auto if self.weigh == "auto" else self.weigh

    def forwards(self, sites: list[Any]) -> float:
        walks = float(METRICS[self.metric] is not None or self.update == "closed")
        more = float(self.update == "closed") + float(self.sequential)
        return walks * (1 + (self.alloc != "uniform")) + more

    def held(self, sites: list[Any]) -> int:
        """Grams of one block's inputs, and the solve of the largest weight, all in fp64."""
        grams: dict[str, dict[str, int]] = {}
        stacks: dict[Any, int] = {}
        for s in sites:
            grams.setdefault(s.segment, {})[s.reads] = s.in_features**2
            key = (s.segment, s.reads) if self.share else s.id
            stacks[key] = stacks.get(key, 0) + s.in_features * s.out_features
        each = (self.metric == "gram") + 3 * (self.update == "closed")
        block = each * max(sum(values.values()) for values in grams.values())
        widest = max(s.in_features**2 for s in sites)
        swept = sum(stacks.values()) if self.metric == "fisher" else 0
        return 8 * (block + widest + 5 * max(stacks.values())) + 4 * swept

    # ** places **

    def sites(self, analysis: Analysis) -> tuple[list[LinearSite], list[Refusal]]:
        """Linears of which a smaller rank saves bytes."""
        found, refused = super().sites(analysis)
        full = max((min(s.in_features, s.out_features) for s in found), default=0)
        if self.rank is not None and 0 < full < self.rank:
            raise UsageError(
                f"{self.called}:rank: expected at most {full}, the largest full rank that there "
                f"is, found {self.rank}"
            )
        out: list[LinearSite] = []
        idle: list[Refusal] = []
        for unit in self._units(analysis.program, found):
            part = unit.part
            rank = self.rank or part.step
            if 0 < rank * part.each < part.dense:
                out += unit.sites
                continue
            stored, full = rank * part.each, part.full
            why = f"rank {rank} of {part.rows}x{part.columns} saves nothing: "
            why += f"{stored} numbers instead of {part.dense}" + (
                f", and {full} is full" if rank > full else ""
            )
            idle += [
                Refusal(self.called or "svd", s.node, why, "saves", analysis.path(s.node))
                for s in unit.sites
            ]
        order = {s.id: i for i, s in enumerate(found)}
        return sorted(out, key=lambda s: order[s.id]), idle + refused

    def _units(self, program: Program, sites: list[LinearSite]) -> list[Unit]:
        exact = self.explicit("multiple")
        return units(program, sites, self.multiple, share=self.share, exact=exact)

    # ** decisions **

    def predict(self, analysis: Analysis, sites: list[LinearSite]) -> Choice:
        found = self._units(analysis.program, sites)
        ranks = self._uniform(analysis.program, found)
        return Choice(_data(found, ranks), exact=self.alloc == "uniform")

    def decide(self, context: Context, sites: list[LinearSite]) -> Choice:
        program, found = context.program, self._units(context.program, sites)
        work = Factoring(
            program, found, self.how, context.tokens, context.options, context.listener
        )
        ranks, told = self._uniform(program, found), dict[str, Any]()
        if self.alloc == "global":
            ranks, told = self._global(context, work, ranks)
        elif self.alloc == "asvd":
            ranks, told = self._searched(context, work, ranks)
        solved = work.solve(ranks)
        tensors: dict[str, Tensor] = {}
        for one in solved.values():
            tensors.update(one.tensors)
        rows = [solved[u.part.id].record for u in found if u.part.id in solved]
        rows += [
            {"site": u.part.id, "stays": "dense", "full": u.part.full}
            for u in found if u.part.id not in solved
        ]  # fmt: skip
        choice = Choice(_data(found, ranks), tensors)
        rows += [told] if told else []
        return Choice(choice.data, tensors, rows + self.told_losses(context, choice))

    def apply(self, program: Program, choice: Choice) -> list[str]:
        sites = {s.id: s for s in Analysis(program).linears if isinstance(s, LinearSite)}
        made: list[str] = []
        for members in choice.data["units"]:
            rank = choice.data["ranks"][members[0]]
            made += factorise(
                program, [sites[m] for m in members], rank, choice.tensors,
                made_by=self.called or "svd",
            )  # fmt: skip
        return made

    def _uniform(self, program: Program, found: list[Unit]) -> Ranks:
        """One rank, or one share of every unit."""
        parts = [u.part for u in found]
        if self.rank is not None:
            return {p.id: self.rank for p in parts}
        keep = 1 - self.remove
        dense = sum(p.dense for p in parts)
        if self.params is not None:
            whole = sum(prod(p.shape) for p in program.params.values() if p.trained)
            keep = (self.params - (whole - dense)) / dense
            if not 0 < keep < 1:
                raise UsageError(
                    f"{self.called}:params: expected {whole - dense + 1} to {whole - 1}, of which "
                    f"{whole - dense} are not in factored weights, found {self.params}"
                )
        try:
            return split.uniform(parts, keep)
        except UsageError as e:
            name = "remove" if self.params is None else "params"
            raise UsageError(f"{self.called}:{name}: {e.message}", hint=e.hint) from None

    def _global(
        self, context: Context, work: Factoring, start: Ranks
    ) -> tuple[Ranks, dict[str, Any]]:
        """Ranks of least predicted loss in the bytes of the uniform ones."""
        parts, falls = [u.part for u in work.units], tails(work.spectra())
        weighs = self._weighs(context, work, falls, start)
        ranks = split.best(parts, falls, weighs, start)
        told = {
            "site": "all", "weigh": self._counts,
            "predicted": split.predicted(parts, falls, weighs, ranks),
            "predicted_uniform": split.predicted(parts, falls, weighs, start),
            "bytes_of": split.stored(parts, ranks), "bytes_uniform": split.stored(parts, start),
        }  # fmt: skip
        return ranks, told

    def _weighs(
        self, context: Context, work: Factoring, falls: Mapping[str, Tensor], start: Ranks
    ) -> dict[str, float]:
        """What a unit of squared error costs, by part."""
        found = {u.part.id: u for u in work.units}
        whole = {name: float(t[0]) for name, t in falls.items()}
        if self._counts == "none":
            return dict.fromkeys(found, 1.0)
        if self._counts == "output":
            return {name: 1.0 / w if w > 0 else 0.0 for name, w in whole.items()}
        if self._counts == "loss":
            tried = {name: [start[name]] for name in found}
            slice_ = context.data[: self.samples]
            losses, dense = rank_search.sensitivities(work, tried, slice_)
            rises = {name: max(losses[name][start[name]] - dense, 0.0) for name in found}
            # A rise that is noise must not make a weight free: it counts a little.
            least = 0.01 * max(rises.values(), default=0.0)
            lost = {name: float(t[min(start[name], len(t) - 1)]) for name, t in falls.items()}
            return {
                name: max(rises[name], least) / lost[name] if lost[name] > 0 else 0.0
                for name in found
            }
        sites = [s for u in work.units for s in u.sites]
        costs = output_information(context.program, sites, context.data[: self.samples])
        return {
            name: sum(costs[s.node] * s.out_features for s in u.sites) / u.part.rows
            for name, u in found.items()
        }

    def _searched(
        self, context: Context, work: Factoring, start: Ranks
    ) -> tuple[Ranks, dict[str, Any]]:
        """The smallest ranks below the lowest threshold on the loss that fits."""
        parts = {u.part.id: u.part for u in work.units}
        budget = split.stored(list(parts.values()), start)
        dense = sum(p.bytes(None) for p in parts.values())
        tried = {}
        for name, p in parts.items():
            tried[name] = sorted({
                split.uniform([p], share)[name]
                for share in rank_search.shares(budget / dense)
                if share * p.dense >= p.step * p.each
            }) or [p.most]  # fmt: skip
        losses, before = rank_search.sensitivities(work, tried, context.data[: self.samples])
        try:
            ranks, level = split.below(list(parts.values()), losses, budget)
        except UsageError as e:
            raise UsageError(f"{self.called}:alloc: {e.message}", hint="remove less") from None
        told = {"site": "all", "threshold": level, "dense_loss": before,
                "bytes_of": split.stored(list(parts.values()), ranks)}  # fmt: skip
        return ranks, told


def _data(found: list[Unit], ranks: Ranks) -> dict[str, Any]:
    """What ``apply`` reads: the rank of each factored site, and which share a right factor."""
    chosen = [u for u in found if u.part.id in ranks]
    return {
        "ranks": {s.id: ranks[u.part.id] for u in chosen for s in u.sites},
        "units": [[s.id for s in u.sites] for u in chosen],
    }
