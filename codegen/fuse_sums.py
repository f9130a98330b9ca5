"""Which linear takes which sum behind it into its kernel.

Attention and MLP side by side leave (a + b) + r, with a sum behind neither of the linears a and b
alone. It is read as b + (a + r), where a is ready first: both sums then stand behind a linear.
"""

from __future__ import annotations

from collections.abc import Sequence

from torch import fx

from ..compiler.ir.graph import Program, info
from ..compiler.ir.types import same_type
from .fuse_chain import Core, halves
from .fuse_nodes import is_op, is_sum, only_user

Order = dict[fx.Node, int]


def sums_of(
    program: Program, cores: Sequence[Core], home: dict[str, str], norms: dict[fx.Node, fx.Node]
) -> dict[fx.Node, fx.Node]:
    """Value of a linear, an activation or a gate product -> the sum that is its only reader.

    norms: by such a value the norm behind it, which takes its place. Where both addends could take
    a sum the later one does, so the other one is ready by then. Sums of two such values and a third
    are turned first.
    """
    order = {node: i for i, node in enumerate(program.graph.nodes)}
    tails = {norms.get(tail, tail): None for tail in tails_of(cores)}
    inside = set[fx.Node]().union(*(c.nodes for c in cores))
    for outer in list(program.graph.nodes):
        if is_sum(outer) and outer not in inside:
            turn(outer, tails, order, home)
    found: dict[fx.Node, fx.Node] = {}
    taken: set[fx.Node] = set()
    for tail in sorted(tails, key=order.__getitem__, reverse=True):
        add = only_user(tail)
        if add is None or not is_sum(add) or add in taken:
            continue
        if _alike(add.args, tail) and home.get(add.name) == home.get(tail.name):
            taken.add(add)
            found[tail] = add
    return found


def tails_of(cores: Sequence[Core]) -> dict[fx.Node, None]:
    """The last value of each linear that its kernel may give, norm and sum aside."""
    tails: dict[fx.Node, None] = {}
    for core in cores:
        only, split = only_user(core.result), halves(core)
        behind = only if is_op(only, "llmc.gated") or is_op(only, "llmc.activation") else None
        behind = behind if split is None else split[0]
        tails[behind or core.result] = None
    return tails


def turn(outer: fx.Node, tails: dict[fx.Node, None], order: Order, home: dict[str, str]) -> None:
    """(a + b) + r -> b + (a + r), in place, where a and b are values of linears and r is none."""
    for inner, r in (outer.args, outer.args[::-1]):
        assert isinstance(inner, fx.Node)
        assert isinstance(r, fx.Node)
        if not is_sum(inner) or only_user(inner) is not outer:
            continue
        both = [a for a in inner.args if isinstance(a, fx.Node) and a in tails]
        alone = all(only_user(a) is inner for a in both)
        free = r in tails and only_user(r) is outer
        one = len({home.get(n.name) for n in (outer, inner, *both)}) == 1
        if len(both) < 2 or not alone or free or not one or order[r] > order[inner]:
            continue
        if _alike((*both, r, inner), outer):
            first, later = sorted(both, key=order.__getitem__)
            inner.args, outer.args = (first, r), (later, inner)
            return


def _alike(nodes: Sequence[object], like: fx.Node) -> bool:
    wanted = info(like).type
    return all(isinstance(n, fx.Node) and same_type(info(n).type, wanted) for n in nodes)
