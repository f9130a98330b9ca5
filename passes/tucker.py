"""tucker: stacked weights of experts as small cores between factors that all experts share."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from math import prod
from typing import Any, ClassVar

from torch import Tensor

from ..compiler.analysis.linears import ExpertSite
from ..compiler.ir.errors import UsageError
from ..compiler.ir.graph import Program
from ..compiler.ir.refusal import Refusal
from ..compiler.pipeline.analysis import Analysis
from ..compiler.pipeline.base import Example, Lossy, Precondition, knob
from ..compiler.pipeline.sites import Protecting
from ..compiler.pipeline.stacks import factorise, part_name, roots, stacks, stored
from ..compiler.pipeline.structure import Choice, Context, Structural
from ..compiler.solvers.factor import Root
from ..compiler.solvers.ranks import step_of
from ..compiler.solvers.tucker import SWEEPS, Sizes, cheapest, check_ranks, even, kept, stack


def _experts(analysis: Analysis) -> Iterator[ExpertSite | Refusal]:
    """Pattern: every call of experts with stacked weights."""
    found = [s for s in analysis.linears if isinstance(s, ExpertSite)]
    yield from found
    if not found:
        first = next(iter(analysis.program.calls("aten.linear.default")), analysis.program.output)
        why = "no call of experts has stacked weights of its own; svdllm factors single ones"
        yield Refusal("tucker", first.name, why, "has_experts", analysis.path(first.name))


def _factored_once(made: Any, site: ExpertSite) -> str | None:
    if site.shared:
        return f"its experts share {' and '.join(site.shared)} already"
    return None


@dataclass(frozen=True)
class Tucker(Structural, Protecting):
    """Experts' stacked weights W_e become left · core_e · right; all experts share left and right.

    What all read is multiplied by its right factor once per token, what all write by its left
    factor once per token behind the weighted sum; the other two stand inside, on either side of the
    nonlinearity. Ranks and factors by HOSVD and HOOI, in a metric of what the experts read. An axis
    that keeps its whole size has no factor; a weight that would save nothing stays as it is.
    """

    variants = {"tucker": {}}
    stage = "experts"
    effect = Lossy("perplexity")
    source = "HOSVD and HOOI, De Lathauwer, De Moor and Vandewalle 2000; Tucker 1966"
    pattern = _experts
    preconditions: ClassVar[tuple[Precondition, ...]] = (
        Precondition("factored_once", _factored_once),
    )
    hits = (Example("moe"),)
    misses = (Example("llama_gqa", "has_experts"),)

    metric: str = knob(
        "activations",
        "what errors are weighed by: what the experts read, all of them together, or nothing",
        choices=("activations", "weights"),
    )
    remove: float = knob(0.3, "share of each stacked weight's parameters that goes, below 1")
    ranks: str | None = knob(
        None, "instead: ranks of rows and columns of both weights, as in 64x32"
    )
    alloc: str = knob(
        "error",
        "of remove: the pair of ranks that loses least in these parameters, or even shares of both",
        choices=("error", "even"),
    )
    experts_rank: int | None = knob(
        None, "experts are mixtures of so many cores, mixed anew in every call", lo=1
    )
    multiple: int = knob(
        8, "ranks are multiples of it; less for small weights unless given", lo=1, hi=4096
    )
    sweeps: int = knob(SWEEPS, "of HOOI, at most; 0: HOSVD alone", lo=0, hi=1000)

    # ** knobs **

    def check(self) -> None:
        if not 0 < self.remove < 1:
            raise UsageError(
                f"tucker:remove: expected a share above 0 and below 1, found {self.remove:g}",
                hint="0.3 takes three tenths of the parameters away",
            )
        if self.ranks is None:
            return
        for name in ("remove", "alloc", "multiple"):
            if self.explicit(name):
                raise UsageError(f"tucker: expected one of ranks and {name}, found both")
        self._given()

    def _given(self) -> tuple[int, int] | None:
        """Ranks of rows and of columns as given.

        Raises:
            UsageError: not two numbers of at least 1.
        """
        if self.ranks is None:
            return None
        parts = self.ranks.split("x")
        if len(parts) != 2 or not all(p.isascii() and p.isdigit() and int(p) > 0 for p in parts):
            raise UsageError(f"tucker:ranks: expected two ranks as in 64x32, found {self.ranks!r}")
        return int(parts[0]), int(parts[1])

    def calibrated(self) -> bool:
        return self.metric == "activations"

    def forwards(self, sites: list[Any]) -> float:
        return float(self.calibrated())

    def held(self, sites: list[ExpertSite]) -> int:
        """Grams of one block's two values, and the solve of the largest stack, all in fp64."""
        shapes = [shape for s in sites for _, shape in stacks(s).values()]
        grams: dict[str, int] = {}
        for s in sites:
            both = s.into[1] ** 2 + s.back[1] ** 2
            grams[s.segment] = grams.get(s.segment, 0) + both * self.calibrated()
        side = max(max(r, c) for _, r, c in shapes)
        return 8 * (max(grams.values()) + 3 * side**2 + 8 * max(map(prod, shapes)))

    # ** places **

    def sites(self, analysis: Analysis) -> tuple[list[ExpertSite], list[Refusal]]:
        """Calls of experts of which at least one weight takes fewer numbers."""
        found, refused = super().sites(analysis)
        self._fit(found)
        out = []
        for site in found:
            if self._sizes(site):
                out.append(site)
                continue
            shapes = ("x".join(map(str, s)) for _, s in stacks(site).values())
            why = f"ranks {self.ranks} save nothing of {' and '.join(shapes)}"
            refused.append(Refusal("tucker", site.node, why, "saves", analysis.path(site.node)))
        return out, refused

    def _fit(self, found: list[ExpertSite]) -> None:
        """Raises UsageError for ranks that no stack has."""
        shapes = [s for site in found for _, s in stacks(site).values()]
        if not shapes:
            return
        limits = dict(zip(("experts_rank", "rows", "columns"), map(max, *shapes), strict=True))
        q, pair = self.experts_rank, self._given() or (None, None)
        for name, k in zip(limits, (q, *pair), strict=True):
            if k is not None and k > limits[name]:
                where = name if name == "experts_rank" else f"ranks of {name}"
                raise UsageError(f"tucker:{where}: expected at most {limits[name]}, found {k}")

    def _sizes(self, site: ExpertSite) -> dict[str, Sizes]:
        """Sizes of both weights as far as shapes tell them; without those that save nothing.

        Raises:
            UsageError: more is to go than ranks of one step leave.
        """
        out, pair = {}, self._given()
        for name, (_, shape) in stacks(site).items():
            q = min(self.experts_rank or shape[0], shape[0])
            if pair is None:
                try:
                    out[name] = even(shape, q, self._steps(shape), self._room(shape))
                except UsageError as e:
                    raise UsageError(f"tucker:remove: {e.message}", where=f"{site.id}.{name}",
                                     hint="remove less, or give multiple=1") from None  # fmt: skip
                continue
            r, s = (min(k, n) for k, n in zip(pair, shape[1:], strict=True))
            try:
                check_ranks(shape, (q, r, s))
            except UsageError as e:
                raise UsageError(f"tucker:{e.message}", where=f"{site.id}.{name}") from None
            made = Sizes(shape, (q, r, s))
            if made.numbers < made.dense:
                out[name] = made
        return out

    def _room(self, shape: tuple[int, int, int]) -> int:
        dense = shape[0] * shape[1] * shape[2]
        return int((1 - self.remove) * dense * (1 + 1e-12) + 1e-6)

    def _steps(self, shape: tuple[int, int, int]) -> tuple[int, int]:
        if self.explicit("multiple"):
            return min(self.multiple, shape[1]), min(self.multiple, shape[2])
        return tuple(step_of(n, n, self.multiple) for n in shape[1:])  # type: ignore[return-value]

    # ** decisions **

    def predict(self, analysis: Analysis, sites: list[ExpertSite]) -> Choice:
        found = {s.id: self._sizes(s) for s in sites}
        return Choice(_data(found), exact=self.ranks is not None or self.alloc == "even")

    def decide(self, context: Context, sites: list[ExpertSite]) -> Choice:
        program, options = context.program, context.options
        tokens = context.data if self.calibrated() else None
        found: dict[str, dict[str, Sizes]] = {}
        tensors: dict[str, Tensor] = {}
        records: list[dict[str, Any]] = []
        for site, metrics in roots(program, sites, tokens, options, context.listener):
            found[site.id] = {}
            for name, sizes in self._sizes(site).items():
                param = stacks(site)[name][0]
                weight = program.weights.load(param).to(options.device)
                sizes = self._measured(weight, metrics[name], sizes)
                made = stack(weight, metrics[name], sizes.ranks, self.sweeps)
                found[site.id][name] = sizes
                where, dtype = f"{site.id}.{name}", program.params[param].dtype
                for part, tensor in stored(made, sizes, dtype, where).items():
                    tensors[part_name(program, param, part)] = tensor
                unit = 1.0 / made.whole if made.whole > 0 else 0.0
                records.append({
                    "site": where, "stack": "x".join(map(str, sizes.stack)),
                    "ranks": "x".join(map(str, sizes.ranks)),
                    "bytes_before": sizes.dense * dtype.itemsize,
                    "bytes_after": sizes.numbers * dtype.itemsize,
                    "loss": made.dropped * unit, "loss_hosvd": made.history[0] * unit,
                    "sweeps": len(made.history) - 1, "fallbacks": list(made.notes),
                })  # fmt: skip
        choice = Choice(_data(found), tensors)
        return Choice(choice.data, tensors, records + self.told_losses(context, choice))

    def _measured(self, weight: Tensor, root: Root, start: Sizes) -> Sizes:
        """The ranks of least error in the numbers of those that the shape alone gives."""
        if self.ranks is not None or self.alloc == "even":
            return start
        q = start.ranks[0]
        worth = kept(weight, root, q)
        return cheapest(start.stack, q, self._steps(start.stack), start.numbers, worth)

    def apply(self, program: Program, choice: Choice) -> list[str]:
        sites = {s.id: s for s in Analysis(program).linears if isinstance(s, ExpertSite)}
        made: list[str] = []
        for name, told in choice.data["stacks"].items():
            site = sites[name]
            sizes = {
                n: Sizes(stacks(site)[n][1], (ranks[0], ranks[1], ranks[2]))
                for n, ranks in told.items()
            }
            made += factorise(program, site, sizes, choice.tensors, made_by=self.called or "tucker")
        return made


def _data(found: dict[str, dict[str, Sizes]]) -> dict[str, Any]:
    """What ``apply`` reads: ranks of the cores by site and weight."""
    return {"stacks": {i: {n: list(s.ranks) for n, s in by.items()} for i, by in found.items()}}
