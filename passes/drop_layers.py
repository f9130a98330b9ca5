"""drop_layers: leave out whole blocks."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

from torch import Tensor

from ..compiler.analysis.depth import Span, depth_sites, leave_out, own_bytes, spans
from ..compiler.ir.errors import UsageError
from ..compiler.ir.graph import Program
from ..compiler.ir.refusal import Refusal
from ..compiler.pipeline.analysis import Analysis
from ..compiler.pipeline.base import Example, Lossy, knob
from ..compiler.pipeline.listed import block_numbers
from ..compiler.pipeline.skipping import Skipping, course
from ..compiler.pipeline.structure import Choice, Context, Structural


def whole_blocks(analysis: Analysis) -> Iterator[Span | Refusal]:
    """Pattern: every block that only the residual stream leaves."""
    yield from depth_sites(analysis.program)


@dataclass(frozen=True)
class DropLayers(Structural):
    """h + f(h) → h for the blocks f that matter least: the stream goes past them.

    sleb drops the block without which the calibration loss is lowest, again and again; influence
    the blocks that turn the stream least, 1 - mean cos(h, h + f(h)) over all tokens; angular the
    run of blocks around which the last token's stream turns least; list those that are named. What
    the blocks alone read goes with them; the KV cache has one state less for each.
    """

    variants = {"drop_layers": {}}
    stage = "depth"
    effect = Lossy("perplexity")
    source = (
        "SLEB, arXiv 2402.09025; ShortGPT, arXiv 2403.03853; "
        "The Unreasonable Ineffectiveness of the Deeper Layers, arXiv 2403.17887"
    )
    pattern = whole_blocks
    hits = (Example("four_blocks"),)
    misses = (Example("gives_keys", "one_way_out"),)

    n: int = knob(1, "blocks to drop", lo=1, hi=10000)
    remove: float | None = knob(None, "instead of n: the share of blocks to drop", lo=0.0, hi=1.0)
    method: str = knob(
        "sleb", "how blocks are chosen", choices=("sleb", "influence", "angular", "list")
    )
    blocks: str | None = knob(None, "with method=list: which, as in 3+5; -1 is the last")
    protect_first: int = knob(1, "blocks at the start that stay; a list may name them", lo=0)
    protect_last: int = knob(1, "blocks at the end that stay; a list may name them", lo=0)
    samples: int | None = knob(None, "calibration windows that are used, or none for all", lo=1)
    losses: bool = knob(True, "measure the loss after each drop; a list needs no data without")

    def check(self) -> None:
        if (self.blocks is not None) != (self.method == "list"):
            raise UsageError(
                f"drop_layers: expected blocks= with method=list and only there, found "
                f"method={self.method}, blocks={self.blocks}",
                hint="drop_layers:method=list,blocks=3+5",
            )
        counted = [k for k in ("n", "remove") if self.explicit(k)]
        if len(counted) > 1 or (counted and self.method == "list"):
            raise UsageError(
                f"drop_layers: expected one of n, remove and blocks, found {' and '.join(counted)}"
                f"{' and blocks' if self.method == 'list' else ''}"
            )
        self._named()

    def calibrated(self) -> bool:
        return self.method != "list" or self.losses

    def forwards(self, sites: list[Any]) -> float:
        drops = self._count(len(sites))
        if self.method == "sleb":
            return 1 + drops * len(sites) / 2
        return (self.method != "list") + self.losses * (1.0 + drops)

    def predict(self, analysis: Analysis, sites: list[Any]) -> Choice:
        free, count = self._candidates(analysis, sites)
        size = own_bytes(analysis.program)
        cost = [size[s.block] for s in free]
        exact = self.method == "list" or len(set(cost)) == 1
        if self.method == "angular":
            first = min(self._runs(free, count), key=lambda i: (sum(cost[i : i + count]), -i))
            return _choice(free[first : first + count], exact=exact)
        order = sorted(range(len(free)), key=lambda i: (cost[i], -i))
        return _choice([free[i] for i in order[:count]], exact=exact)

    def decide(self, context: Context, sites: list[Any]) -> Choice:
        free, count = self._candidates(context.analysis, sites)
        if not self.calibrated():
            return _choice(free)
        tokens = context.data[: self.samples]
        records: list[dict[str, Any]] = []
        chosen = free
        if self.method in ("influence", "angular"):
            chosen = self._by_stream(context, tokens, free, count, records)
        if self.method != "sleb" and not self.losses:
            return _choice(chosen, records)
        names = [s.block for s in (free if self.method == "sleb" else chosen)]
        skipping = Skipping(context.program, names, tokens, context.options, context.listener)
        before = skipping.loss(())
        records.append({"drop": 0, "block": None, "loss": before, "change": 0.0})
        if self.method == "sleb":
            found = {s.block: s for s in free}
            drops = skipping.greedy(names, count)
            chosen = [found[block] for block, _, _ in drops]
            after = [loss for _, loss, _ in drops]
            records[:0] = [
                {"drop": i, "without": found[block].index, "loss": loss}
                for i, (_, _, tried) in enumerate(drops, 1)
                for block, loss in tried.items()
            ]
        else:
            after = [skipping.loss(names[: i + 1]) for i in range(len(names))]
        for i, (span, loss) in enumerate(zip(chosen, after, strict=True), 1):
            row = {"drop": i, "block": span.index, "loss": loss, "change": loss - before}
            records.append(row)
        return _choice(chosen, records)

    def apply(self, program: Program, choice: Choice) -> list[str]:
        found = spans(program)
        leave_out(program, [found[i].block for i in choice.data["blocks"]])
        return []

    def _by_stream(
        self, context: Context, tokens: Tensor, free: list[Span], count: int,
        records: list[dict[str, Any]],
    ) -> list[Span]:  # fmt: skip
        """The blocks that turn the stream least, in the order in which they go."""
        seen = course(context.program, tokens, context.options, context.listener)
        if self.method == "influence":
            order = sorted(free, key=lambda s: seen.influence[s.index])
            records += [{"block": s.index, "influence": seen.influence[s.index]} for s in free]
            return order[:count]
        angles = {i: seen.angle(free[i].index, count) for i in self._runs(free, count)}
        records += [
            {"first": free[i].index, "blocks": count, "angle": a} for i, a in angles.items()
        ]  # fmt: skip
        first = min(angles, key=angles.__getitem__)
        return free[first : first + count]

    def _candidates(self, analysis: Analysis, sites: list[Span]) -> tuple[list[Span], int]:
        """The blocks that may go and how many will.

        Raises:
            UsageError: more than may go, or a listed block that is not there or may not go.
        """
        total = len(analysis.blocks)
        known = {s.index: s for s in sites}
        if self.method == "list":
            wanted = block_numbers(self.blocks or "", "drop_layers:blocks", total)
            for given, i in zip(self._named(), wanted, strict=True):
                if i not in known:
                    raise UsageError(
                        f"drop_layers:blocks: expected a block that may be left out, found {given}",
                        hint="llmc explain drop_layers MODEL says why it may not",
                    )
            if len(set(wanted)) != len(wanted):
                raise UsageError(f"drop_layers:blocks: expected each once, found {self.blocks}")
            if len(wanted) == total:
                raise UsageError(f"drop_layers:blocks: expected a block to stay, found {total} "
                                 f"of {total} listed")  # fmt: skip
            return [known[i] for i in wanted], len(wanted)
        last = total - self.protect_last
        free = [s for s in sites if self.protect_first <= s.index < last]
        count = self._count(total)
        where = "n" if self.remove is None else "remove"
        most = min(len(free), total - 1)
        if not 0 < count <= most:
            raise UsageError(
                f"drop_layers:{where}: expected 1..{most} of {total} blocks, found {count}",
                hint=f"protect_first={self.protect_first}, protect_last={self.protect_last} stay",
            )
        if self.method == "angular" and not self._runs(free, count):
            raise UsageError(
                f"drop_layers:{where}: expected {count} blocks in a row that may be left out, "
                "found no such run"
            )
        return free, count

    def _count(self, total: int) -> int:
        if self.method == "list":
            return len(self._named())
        return self.n if self.remove is None else int(self.remove * total + 0.5)

    def _named(self) -> list[int]:
        """The listed blocks.

        Raises:
            UsageError: something else than numbers with + between.
        """
        return [] if self.blocks is None else block_numbers(self.blocks, "drop_layers:blocks")

    @staticmethod
    def _runs(free: list[Span], count: int) -> list[int]:
        """Where runs of ``count`` neighbouring blocks start in ``free``."""
        ends = range(len(free) - count + 1)
        return [i for i in ends if free[i + count - 1].index - free[i].index == count - 1]


def _choice(
    chosen: list[Span], records: list[dict[str, Any]] | None = None, *, exact: bool = True
) -> Choice:
    return Choice({"blocks": sorted(s.index for s in chosen)}, {}, records or [], exact)
