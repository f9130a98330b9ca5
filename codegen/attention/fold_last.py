"""Keys of which all heads share the last channels, which alone are rotated (multi-head latents).

They need not be spread over heads, rotated and joined by calls of their own: the launch that writes
keys into the cache takes both parts. Source: DeepSeek-V2, arXiv 2405.04434 §2.1.3.
"""

from __future__ import annotations

from dataclasses import dataclass

from torch import fx

from ...compiler.ir.dims import same
from ...compiler.ir.graph import Program, tensor_type
from ...compiler.ir.ops import row_of
from .parts import call, cut, give
from .problem import COS, K_LAST


@dataclass(frozen=True)
class _Joined:
    """Channels that stay, [.., N], and what is rotated and joined behind them, [.., R].

    ``how``: cosines, sines, whether pairs lie side by side, and whether they are taken apart.
    ``made`` are calls that attention alone may read.
    """

    stays: fx.Node
    turned: fx.Node
    how: tuple[fx.Node, fx.Node, bool, bool]
    made: tuple[fx.Node, ...]


def fold_last(program: Program, node: fx.Node) -> str | None:
    """Fold rotations of last channels, in place; why not where queries and keys both have them."""
    q, k = (_joined(a) for a in node.args[:2])
    if q is None or k is None:
        return None
    source, width = _whole(q), tensor_type(k.turned)
    if source is None:
        return "the channels of queries that are rotated do not lie behind the others"
    if not same(width.shape[1], 1):
        return f"expected last channels [B, 1, S, R] of keys for all heads, found {width}"
    if q.how != k.how:
        return "queries and keys are rotated by different angles"
    if any(len(n.users) > 1 for n in (*q.made, *k.made)):
        return "something beside attention reads rotated queries or keys"
    cos, sin, interleaved, woven = q.how
    kind = tensor_type(cos)
    if kind.rank != 4 or not same(kind.shape[1], 1) or not same(kind.shape[3], width.shape[3]):
        return f"expected cosines [B, 1, S, {width.shape[3]}], found {kind}"
    give(node, {0: source, 1: k.stays, COS: cos, COS + 1: sin, K_LAST: k.turned})
    how = {"interleaved": interleaved, "rotate": True, "last": True, "woven": woven}
    node.kwargs = {**node.kwargs, **how}
    return None


def _joined(value: object) -> _Joined | None:
    """What a value is joined of, where its last channels are rotated; None where it is not."""
    joined = call(value, "aten.cat.default")
    if joined is None or joined.args[1:] not in ((3,), (-1,)):
        return None
    parts = joined.args[0]
    if not isinstance(parts, (list, tuple)) or len(parts) != 2:
        return None
    stays, last = parts
    spread = call(last, "aten.expand.default")
    rope = call(last if spread is None else spread.args[0], "llmc.rope")
    if rope is None or not isinstance(stays, fx.Node) or call(stays, "llmc.rope") is not None:
        return None
    source, cos, sin = rope.args[:3]
    assert isinstance(source, fx.Node)
    assert isinstance(cos, fx.Node)
    assert isinstance(sin, fx.Node)
    pairs, apart = bool(rope.kwargs.get("interleaved", False)), _apart(source)
    woven = apart is not None and not pairs
    made = (joined, rope, *([] if spread is None else [spread]))
    return _Joined(
        stays, apart if woven and apart is not None else source, (cos, sin, pairs, woven), made
    )


def _apart(node: fx.Node) -> fx.Node | None:
    """What a value holds the even channels of, and then the odd ones."""
    joined = call(node, "aten.cat.default")
    if joined is None or joined.args[1:] not in ((3,), (-1,)):
        return None
    parts = joined.args[0]
    assert isinstance(parts, (list, tuple))
    slices = [call(p, "aten.slice.Tensor") for p in parts]
    if len(slices) != 2 or slices[0] is None or slices[1] is None:
        return None
    source = slices[0].args[0]
    assert isinstance(source, fx.Node)
    width = tensor_type(source).shape[-1]
    for i, part in enumerate(slices):
        assert part is not None
        axis, start, stop, step = [*part.args[1:], 1][:4]
        whole = isinstance(width, int) and isinstance(stop, int) and stop >= width
        if part.args[0] is not source or axis not in (3, -1) or not whole:
            return None
        if (start, step) != (i, 2) or int(str(width)) % 2:
            return None
    return source


def _whole(q: _Joined) -> fx.Node | None:
    """What both parts of queries are slices of: one value, as it is."""
    first, last = (call(n, "aten.slice.Tensor") for n in (q.stays, q.turned))
    if first is None or last is None or first.args[0] is not last.args[0]:
        return None
    source, width = first.args[0], tensor_type(first).shape[3]
    assert isinstance(source, fx.Node)
    ends = (0, width), (width, tensor_type(source).shape[3])
    fits = all(cut(s, *e) for s, e in zip((first, last), ends, strict=True))
    return source if fits and row_of(source).name != "aten.cat.default" else None
