"""Where an attention's keys are rotated, and whether the rotation may move behind the cache.

It may where k is a rotation and nothing else, of one angle per position for all heads and rows:
cosines and sines must come from positions and constants alone, and one position of one token must
say all. Keys that no position reaches on the way from a matrix are not rotated at all.
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass

from torch import fx

from ..ir.caches import sizes_of
from ..ir.dims import same
from ..ir.errors import ModelError
from ..ir.graph import Program, tensor_type
from ..ir.ops import row_of
from ..ir.refusal import Refusal
from ..ir.types import TensorType
from .cacheable import cache_refusals

_MATRICES = frozenset({
    "aten.linear.default", "aten.matmul.default", "aten.mm.default", "aten.addmm.default",
    "aten.bmm.default", "aten.embedding.default", "llmc.csr_linear", "llmc.fused",
    "llmc.tt_lookup",
})  # fmt: skip


@dataclass(frozen=True)
class CacheSite:
    """One attention, whose keys and values are kept.

    Attributes:
        id: ``block0/kv0``; segment: its block; node: the attention.
        heads: key heads; k, v: channels of a key and of a value; slot: its number in the program.
        turn: how its keys are rotated, see :func:`rotation_of`.
    """

    id: str
    segment: str
    node: str
    heads: int
    k: int
    v: int
    slot: int
    turn: Rotation | str | None

    @property
    def kind(self) -> str:
        return "kv"


@dataclass(frozen=True)
class Rotation:
    """Keys before their rotation, its cosines and sines, and how channels pair up."""

    keys: fx.Node
    cos: fx.Node
    sin: fx.Node
    interleaved: bool


def rotation_of(node: fx.Node) -> Rotation | str | None:
    """The rotation of an attention's keys, None where there is none; a reason where unproved."""
    k, q_pos = node.args[1], node.args[3] if len(node.args) > 3 else node.kwargs.get("q_pos")
    assert isinstance(k, fx.Node)
    if row_of(k).name != "llmc.rope":
        found = _positions_before_matrix(k)
        if found is None:
            return None
        return f"{found.name} brings positions into the keys, and they are no llmc.rope's result"
    x, cos, sin = k.args[:3]
    assert isinstance(x, fx.Node)
    if _positions_before_matrix(x) is not None:
        return f"positions come into the keys before {k.name} as well"
    for part in (cos, sin):
        if not isinstance(part, fx.Node) or not isinstance(q_pos, fx.Node):
            return f"{k.name} has no cosines and sines of positions"
        wrong = _inputs(part) - {q_pos}
        if q_pos.op != "placeholder" or wrong:
            more = f", found {min(n.name for n in wrong)}" if wrong else ""
            return f"the angles of {k.name} do not come from the attention's positions alone{more}"
        t, keys = tensor_type(part), tensor_type(x)
        shape = t.shape
        over = t.rank == 4 and same(shape[1], 1) and same(shape[2], keys.shape[2])
        if not over or not same(shape[3], keys.shape[3]):
            return f"the angles of {k.name} are {t}, not one row per token for all heads"
    assert isinstance(cos, fx.Node)
    assert isinstance(sin, fx.Node)
    return Rotation(x, cos, sin, bool(k.kwargs.get("interleaved", False)))


def cache_sites(program: Program) -> list[CacheSite | Refusal]:
    """Every attention of a segmented program that can have a KV cache; why, where it cannot."""
    refused = cache_refusals(program)
    if refused:
        return [*refused]
    home = {n: s.name for s in program.segments for n in s.nodes}
    count: dict[str, int] = {}
    out: list[CacheSite | Refusal] = []
    for slot, node in enumerate(program.calls("llmc.attention")):
        segment = home.get(node.name, "main")
        i = count[segment] = count.get(segment, -1) + 1
        name = f"{segment}/kv{i}"
        out.append(CacheSite(name, segment, node.name, *sizes_of(node), slot, rotation_of(node)))
    return out


def check_rotations(program: Program) -> None:
    """Raises ModelError where a record wants keys before a rotation that is not proved."""
    nodes = {n.name: n for n in program.calls("llmc.attention")}
    for name, scheme in program.caches.items():
        node = nodes.get(name)
        if node is not None and scheme.turned != isinstance(found := rotation_of(node), Rotation):
            if scheme.kind != "kvquant":
                continue
            why = found if isinstance(found, str) else "the record does not say what the graph does"
            raise ModelError(f"expected keys that can be kept before their rotation: {why}",
                             where=f"node {name}")  # fmt: skip


def _positions_before_matrix(node: fx.Node) -> fx.Node | None:
    """A value of positions or angles that reaches ``node`` behind the last matrix, else None."""
    todo, seen = [node], {node}
    while todo:
        at = todo.pop()
        if at.op == "placeholder":
            return at
        if at.op != "call_function" or row_of(at).name in _MATRICES:
            continue
        if row_of(at).name == "llmc.rope":
            return at
        for used in at.all_input_nodes:
            if used not in seen and _is_tensor(used):
                seen.add(used)
                todo.append(used)
    return None


def _is_tensor(node: fx.Node) -> bool:
    return isinstance(node.meta["llmc"].type, TensorType)


def _inputs(node: fx.Node) -> set[fx.Node]:
    """Inputs whose values ``node`` depends on; sizes of inputs are not values."""
    out: set[fx.Node] = set()
    todo: list[fx.Node] = [node]
    seen: set[fx.Node] = set()
    while todo:
        at = todo.pop()
        if at in seen or not _is_tensor(at):
            continue
        seen.add(at)
        if at.op == "placeholder":
            out.add(at)
        todo += _read(at.all_input_nodes)
    return out


def _read(nodes: Iterable[fx.Node]) -> list[fx.Node]:
    return [n for n in nodes if _is_tensor(n)]
