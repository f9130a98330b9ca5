"""Linears of one input: which are joined to one call, and how much around them joins it."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace

from torch import fx

from ..compiler.ir.refusal import Refusal
from .fuse_before import Before, norm_refusal, read_before
from .fuse_chain import Core, halves
from .fuse_nodes import Accept, Unfit, argument, is_op, only_user, refusal
from .fuse_unit import Unit, alike

LONE = "its weight is dense and nothing around it can be taken in: torch's own product serves"


class Family:
    """Linears of one input: which are joined, and what they take in.

    What lies before them is taken in by all or by none: where one needs it as it is, it is made
    anyway.
    """

    def __init__(
        self, cores: list[Core], accept: Accept, features: frozenset[str], home: dict[str, str],
        sums: dict[fx.Node, fx.Node], norms: dict[fx.Node, fx.Node],
    ) -> None:  # fmt: skip
        self.cores, self.features, self.accept = cores, features, accept
        self.home, self.sums, self.norms = home, sums, norms
        self.refused: list[Refusal] = []

    def solve(self) -> list[Unit]:
        """The units that all have kernels; fills ``refused``."""
        before, why = self.before()
        least = 1 if any(c.rounding is not None for c in self.cores) else 0
        reason = "no kernel"
        for joined in (True, False):
            units = self.units(joined)
            for depth in range(len(before), least - 1, -1):
                found = self.at(units, before[:depth])
                if isinstance(found, list):
                    if depth < len(before):
                        self.refused.append(refusal(before[depth].node, reason, "kernel"))
                    elif why is not None:
                        self.refused.append(why)
                    return found
                reason = found
            for unit in units:
                if len(unit.cores) > 1:
                    names = ", ".join(c.linear.name for c in unit.cores[1:])
                    text = f"{names} of the same input is not joined to it: {reason}"
                    self.refused.append(refusal(unit.cores[0].linear, text, "concat"))
        self.refused += [refusal(c.linear, reason, "kernel") for c in self.cores]
        return []

    def at(self, units: list[Unit], before: Sequence[Before]) -> list[Unit] | str:
        """Every unit with as much behind it as has a kernel, or why one has none."""
        chosen, left = [], []
        for plain in units:
            unit = replace(plain, before=tuple(before))
            why = self.accept(unit.problem)
            for smaller, what, node in unit.fewer():
                if why is None:
                    break
                left.append(refusal(node, f"the {what} is not fused: {why}", "kernel"))
                unit, why = smaller, self.accept(smaller.problem)
            if why is not None:
                return why
            if unit.lone:
                left.append(refusal(unit.cores[0].linear, LONE, "around"))
            else:
                chosen.append(unit)
        self.refused += left
        return chosen

    def units(self, concat: bool) -> list[Unit]:
        """What may be joined with what, and what is behind it."""
        concat = concat and "concat" in self.features
        by_result = {c.result: c for c in self.cores}
        left = dict.fromkeys(self.cores)
        found = []
        for core in self.cores:
            gate = only_user(core.result)
            if core not in left or not is_op(gate, "llmc.gated"):
                continue
            assert gate is not None
            pair = [by_result.get(a) for a in gate.args]  # type: ignore[arg-type]
            if None in pair or pair[0] is pair[1] or not concat or "pairs" not in self.features:
                continue
            both = tuple(c for c in pair if c is not None)
            if all(only_user(c.result) is gate for c in both) and self.fit(both):
                found.append(self.whole(Unit(both, gate=gate, apart="spans" in self.features)))
                for c in both:
                    del left[c]
        groups: dict[object, list[Core]] = {}
        for core in left:
            unit = self.alone(core)
            if unit.act or unit.gate or unit.norm or unit.add or not concat:
                found.append(unit)
            else:
                key = (self.scheme(core), self.home.get(core.linear.name))
                groups.setdefault(key, []).append(core)
        for group in groups.values():
            whole = [group] if self.joins(group[0]) else [[c] for c in group]
            found += [Unit(tuple(cores), apart="spans" in self.features) for cores in whole]
        if len(groups) > 1:
            first, other = (g[0].linear for g in list(groups.values())[:2])
            text = f"{other.name} of the same input is stored in another way, so it is not joined"
            self.refused.append(refusal(first, text, "concat"))
        return found

    def alone(self, core: Core) -> Unit:
        """One linear with its activation, or the product of its halves, and what is behind."""
        split = halves(core) if "pairs" in self.features else None
        if split is not None and self.home.get(split[0].name) == self.home.get(core.linear.name):
            return self.whole(Unit((core,), gate=split[0], cuts=split[1]))
        act = only_user(core.result)
        if not is_op(act, "llmc.activation") or "act" not in self.features:
            act = None
        if act is not None and self.home.get(act.name) != self.home.get(core.linear.name):
            act = None
        return self.whole(Unit((core,), act=act))

    def whole(self, unit: Unit) -> Unit:
        """The same with the norm of its result and the sum behind."""
        tail = unit.root
        assert tail is not None
        norm = self.norms.get(tail)
        return replace(unit, norm=norm, add=self.sums.get(norm or tail))

    def scheme(self, core: Core) -> object:
        """What linears that are joined have in common, outlier columns included."""
        return alike(core.problem), core.parts.get("columns"), core.rounding, core.shared

    def fit(self, cores: Sequence[Core]) -> bool:
        homes = {self.home.get(c.linear.name) for c in cores}
        same = len({self.scheme(c) for c in cores}) == len(homes) == 1
        return same and self.joins(cores[0])

    def joins(self, core: Core) -> bool:
        """Whether it may be joined to its like: factors on a diagonal would mostly be zeros."""
        return core.problem.weights != "factors" or "spans" in self.features

    def before(self) -> tuple[list[Before], Refusal | None]:
        """What may be taken in, nearest first, and why the next thing may not."""
        inside = set().union(*(c.nodes for c in self.cores))
        found: list[Before] = []
        for step in read_before(self.cores[0].reads):
            if step.kind not in self.features:
                return found, None
            why = norm_refusal(step.node) if step.kind == "norm" else None
            drops = step.kind == "rounds" and argument(step.node, 2, "columns") is not None
            if drops and any(c.rounding is not step.node for c in self.cores):
                why = Unfit("the rounding drops columns that nothing brings back", "columns")
            others = [u.name for u in step.node.users if u not in inside]
            what = {"rounds": "rounding", "mixed": "rotation"}.get(step.kind, step.kind)
            if others and why is None:
                names = ", ".join(sorted(others))
                text = f"the {what} is also read by {names}, which is not fused whole"
                why = Unfit(text, "all_readers_fused")
            if why is not None:
                return found, refusal(step.node, why.reason, why.predicate)
            found.append(step)
            inside.add(step.node)
        return found, None
