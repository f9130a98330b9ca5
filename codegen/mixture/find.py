"""What a layer of experts is made of, read from the graph: weights, router, what lies around it."""

from __future__ import annotations

from collections.abc import Collection, Iterator, Mapping
from dataclasses import dataclass, replace

from torch import fx

from ...compiler.ir.graph import info, tensor_type
from ...compiler.ir.refusal import Refusal
from ...compiler.ir.types import same_type
from ..fuse_before import Before, centred
from ..fuse_chain import DENSE, calls_of, read_weight
from ..fuse_find import needs
from ..fuse_nodes import Unfit, argument, constant, is_op, is_sum, only_user, refusal
from ..problem import Problem, dtype_name
from .groups import FLAT
from .route import Route, read_norm, read_route, sizes_of
from .shared import Shared, odd, read_shared

EXPERTS = "llmc.experts"


@dataclass(frozen=True, eq=False)
class Side:
    """The weights of all experts for one of the two products.

    Attributes:
        problem: what a kernel must serve, without what lies around the layer.
        parts: by role, the node whose value that part is. nodes: the calls that make the weights.
    """

    problem: Problem
    parts: Mapping[str, fx.Node]
    nodes: frozenset[fx.Node]


@dataclass(frozen=True, eq=False)
class Mixture:
    """A call of experts with what may be taken in around it.

    Attributes:
        experts: the call. up, down: its weights. route: how it is routed; None: a kernel is told.
        norm: what made its input, and inside, the calls which that takes in; only with a route.
        shared: the expert that all tokens go to; only with a route.
        back: the reshape behind, where there is one that can be told by its sizes; sizes: of what
            these are asked. behind: the last of these calls. add: the sum behind.
    """

    experts: fx.Node
    up: Side
    down: Side
    route: Route | None = None
    norm: Before | None = None
    inside: frozenset[fx.Node] = frozenset()
    shared: Shared | None = None
    back: fx.Node | None = None
    behind: fx.Node | None = None
    add: fx.Node | None = None
    sizes: Mapping[fx.Node, tuple[fx.Node, int]] | None = None

    @property
    def h(self) -> fx.Node:
        """What experts read, [T, H]."""
        h = self.experts.args[0]
        assert isinstance(h, fx.Node)
        return h

    @property
    def x(self) -> fx.Node:
        """What the kernels read."""
        return self.norm.reads if self.norm is not None else self.h

    @property
    def root(self) -> fx.Node:
        """The call whose value it gives."""
        return self.add or self.tip

    @property
    def tip(self) -> fx.Node:
        """The call whose value it gives but for the sum behind."""
        return self.behind or self.experts

    @property
    def residual(self) -> fx.Node | None:
        """What is added."""
        if self.add is None:
            return None
        a, b = self.add.args
        other = b if a is self.tip else a
        assert isinstance(other, fx.Node)
        return other

    @property
    def told(self) -> tuple[fx.Node, ...]:
        """Index and weight, where the graph makes them."""
        return () if self.route is not None else tuple(self.experts.args[1:3])  # type: ignore[arg-type]

    @property
    def nodes(self) -> frozenset[fx.Node]:
        """All calls that it stands for."""
        around = [n for n in (self.back, self.add) if n is not None]
        route = self.route.nodes if self.route is not None else frozenset[fx.Node]()
        shared = self.shared.nodes if self.shared is not None else frozenset[fx.Node]()
        weights = self.up.nodes | self.down.nodes | shared
        return weights | route | self.inside | {self.experts, *around}

    @property
    def problems(self) -> tuple[Problem, Problem]:
        """What kernels must serve: gate and up, then down."""
        up, down = self.up.problem, self.down.problem
        if self.route is not None:
            up = replace(up, route=self.route.kind)
        if self.shared is not None:
            up, down = self.shared.around(up), self.shared.around(down)
        if self.norm is not None:
            node = self.norm.node
            up = replace(up, norm=True, centred=centred(node), eps=float(str(node.kwargs["eps"])))
        return up, replace(down, residual=self.add is not None)

    def fewer(self) -> Iterator[tuple[Mixture, tuple[str, ...]]]:
        """The same with less and less around it; with each the names of what was left out."""
        for less, names in self._fewer():
            if self.shared is None or less.shared_whole:
                yield less, names

    @property
    def shared_whole(self) -> bool:
        """Whether all that the expert of all tokens needs is there."""
        if self.shared is None or self.route is None:
            return False
        known = self.inside | {self.h} if self.norm is not None else {self.h}
        return self.behind is not None and self.shared.reads <= known

    def _fewer(self) -> Iterator[tuple[Mixture, tuple[str, ...]]]:
        summed = [self] if self.add is None else [self, self._without_sum()]
        names = {"residual": self.add, "norm": self.norm, "route": self.route}

        def left(m: Mixture) -> tuple[str, ...]:
            now = {"residual": m.add, "norm": m.norm, "route": m.route}
            return tuple(n for n in names if names[n] is not None and now[n] is None)

        for m in summed:
            yield m, left(m)
        if self.norm is not None:
            for m in summed:
                less = replace(m, norm=None, inside=frozenset[fx.Node]())
                less = less._told_by(less.h)
                yield less, left(less)
        if self.route is not None:
            for m in summed:
                less = replace(m, norm=None, inside=frozenset[fx.Node](), route=None)
                less = less._told_by(less.h)
                yield less, left(less)

    def _without_sum(self) -> Mixture:
        return replace(self, add=None)._told_by(self.x)

    def _told_by(self, x: fx.Node) -> Mixture:
        """The same, whose reshape asks other tensors for its sizes; without where none tells."""
        if self.back is None:
            return self
        given = [t for t in (self.residual, x) if t is not None]
        sizes = sizes_of(self.back, given)
        like, made = tensor_type(given[0]).shape, tensor_type(self.back).shape
        if sizes is None or like[:-1] != made[:-1]:
            return replace(self, back=None, behind=None, add=None, sizes=None)
        return replace(self, sizes=sizes)


def read_mixture(
    experts: fx.Node, features: Collection[str], home: Mapping[str, str], shared: bool = False
) -> tuple[Mixture, list[Refusal]]:
    """A call of experts with all that may be taken in, and why more may not.

    shared: with the expert that all tokens go to, where there is one.

    Raises:
        Unfit: its weights are stored in no form that a kernel could read.
    """
    up, down = read_sides(experts)
    missing = next((w for s in (up, down) for w in needs(s.problem) if w not in features), None)
    if missing is not None:
        what = DENSE if missing == "dense" else f"the target has no kernel for {missing} weights"
        raise Unfit(what, "decoded" if missing == "dense" else "kernel")
    found, refused = Mixture(experts, up, down), list[Refusal]()
    place = home.get(experts.name)

    def near(nodes: Collection[fx.Node]) -> bool:
        return all(home.get(n.name) == place for n in nodes)

    if "route" in features:
        try:
            route = read_route(experts, up.problem.experts)
            found = replace(found, route=route) if near(route.nodes) else found
        except Unfit as why:
            refused.append(refusal(experts, why.reason, why.predicate))
    if found.route is not None and "norm" in features:
        try:
            before = read_norm(found.h, {experts, *found.route.nodes})
            if before is not None and near(before[1]):
                found = replace(found, norm=before[0], inside=before[1])
        except Unfit as why:
            refused.append(refusal(found.h, why.reason, why.predicate))
    found = _reshaped(found, home)
    if shared:
        try:
            one = read_shared(found.tip, up.problem, down.problem)
            if one is not None and found.route is None:
                raise odd("the router of the others stays in the graph")
            if one is not None and near(one.nodes):
                found = replace(found, shared=one, behind=one.sum)
                found = found if found.back is not None else _reshaped(found, home)
        except Unfit as why:
            refused.append(refusal(experts, why.reason, why.predicate))
    return _summed(found, features, home), refused


def _reshaped(found: Mixture, home: Mapping[str, str]) -> Mixture:
    """The same with the reshape that alone reads its result."""
    after = only_user(found.tip)
    if after is None or not any(is_op(after, op) for op in FLAT) or after.args[0] is not found.tip:
        return found
    near = home.get(after.name) == home.get(found.experts.name)
    return replace(found, back=after, behind=after) if near else found


def _summed(found: Mixture, features: Collection[str], home: Mapping[str, str]) -> Mixture:
    """The same with the sum that alone reads its result."""
    after = only_user(found.tip)
    if after is not None and is_sum(after) and "residual" in features:
        alike = same_type(info(after).type, info(found.tip).type)
        other = replace(found, add=after).residual
        fits = alike and other is not None and same_type(info(other).type, info(after).type)
        if fits and home.get(after.name) == home.get(found.experts.name):
            found = replace(found, add=after)
    return found._told_by(found.x)


# ** weights **


def read_sides(experts: fx.Node) -> tuple[Side, Side]:
    """Gate and up, and down, of a call of experts.

    Raises:
        Unfit: they are stored in no form that a kernel could read, or share a factor.
    """
    for at, name in ((5, "left"), (6, "right")):
        if argument(experts, at, name) is not None:
            raise Unfit(f"its experts share a {name} factor, which no kernel reads", "shared")
    index = tensor_type(experts.args[1])  # type: ignore[arg-type]
    dtype = dtype_name(tensor_type(experts).dtype)
    chosen = int(index.shape[1])
    how = {"experts": 0, "chosen": chosen, "x_dtype": dtype}
    sides = []
    for weight, routed in zip(experts.args[3:5], ("up", "down"), strict=True):
        assert isinstance(weight, fx.Node)
        count, rows, columns = map(int, tensor_type(weight).shape)
        parts: dict[str, fx.Node] = {}
        if not constant(weight):
            raise Unfit("the weights of its experts are computed from the inputs", "stored")
        facts = read_weight(_matrix(weight), parts)
        if any(len(part.users) != 1 for part in parts.values()):
            raise Unfit("the weights of its experts are read by others too", "one_reader")
        facts |= how | {"N": count * rows, "K": columns, "experts": count, "routed": routed}
        if routed == "up":
            facts |= {"pairs": "gate", "act": str(experts.kwargs["act"])}
        sides.append(Side(Problem(**facts), parts, frozenset(calls_of(weight))))
    return sides[0], sides[1]


def _matrix(weight: fx.Node) -> fx.Node:
    """The matrix [E * R, C] that a stack of experts is, where it is stored as one."""
    if any(is_op(weight, op) for op in FLAT):
        if len(weight.users) != 1:
            raise Unfit(f"the decoded weight {weight.name} is read {len(weight.users)} times",
                        "one_reader")  # fmt: skip
        source = weight.args[0]
        assert isinstance(source, fx.Node)
        columns = tensor_type(weight).shape[-1]
        if tensor_type(source).rank == 2 and tensor_type(source).shape[-1] == columns:
            return source
        raise Unfit(f"its experts' weights are {tensor_type(source)} put in another shape",
                    "matrix")  # fmt: skip
    return weight
