"""Op rows: one record per op with its shape rule, dim ties, reference and cost.

A row is all that llmc knows about an op. An op without a row is refused, never guessed.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import fx
from torch._compile import _disable_dynamo

from ..dims import Dim, dim, numel
from ..errors import ModelError, nearest
from ..types import SymType, TensorType, ValueType, total_bytes


@dataclass(frozen=True)
class Tie:
    """How axes of the arguments become axes of the result.

    Kinds:
        same     every ``ins`` axis and every ``outs`` axis is one and the same dim
        split    one axis, outer to inner, becomes ``outs``
        merge    ``ins`` axes, outer to inner, become one axis
        repeat   each index of the axis is repeated ``factor`` times in place (GQA)
        concat   the axis lies at ``offset`` of the result's axis
        slice    the result's axis is ``offset : offset+size`` of the axis
        contract the ``ins`` axes are summed over together (matrix product)
        norm     the axis is normalised over; it can be cut when the divisor (count) is kept
        pair     as same, and elements i and i + n/2 of the axis rotate together (with ``factor`` 2,
                 elements 2i and 2i + 1)
        choose   as same, and entries compete by value along it (softmax, top-k): one that is cut
                 is one that is masked with -inf
        pick     the axis is read at the indices that argument ``offset`` holds
        twice    the first axis is both halves of the second (gate rows, then up rows)
        source   the result counts along the axis: a cut selects from it
        mix      the axis is mixed in a way that forbids cutting (sort, cumsum)
    ``ins`` holds (argument index, axis); list arguments count on: cat([a, b]) has 0 and 1, and
    so do the elements of a tuple value: getitem((a, b), 1) reads argument 1. None counts too.
    ``outs`` holds axes of the result, of its element ``result`` where the result is a tuple.
    """

    kind: str
    ins: tuple[tuple[int, int], ...]
    outs: tuple[int, ...] = ()
    factor: Dim = 1
    offset: int = 0
    result: int = 0


@dataclass(frozen=True)
class OpRow:
    """One op.

    Attributes:
        name: e.g. ``aten.linear.default`` or ``llmc.rms_norm``.
        target: what the fx node calls.
        infer: (types of the arguments) -> type of the result; raises ModelError on a misfit.
        reference: differentiable torch function that defines the op.
        ties: (result type, *argument types) -> ties; None blocks every dim.
        flops: (result type, *argument types) -> multiply and add operations.
        stateful: takes a ``state`` name that the executor resolves.
        samples: small fp64 argument lists for the generic gradient test.
        resize: (keep, args, kwargs) -> (args, kwargs) with size literals fitted to a cut (see
            :mod:`.resize`); None where a call of this row holds no literal that a cut changes.
    """

    name: str
    target: Callable[..., Any]
    infer: Callable[..., ValueType]
    reference: Callable[..., Any]
    ties: Callable[..., Sequence[Tie]] | None = None
    flops: Callable[..., Dim] | None = None
    stateful: bool = False
    samples: Callable[[], Sequence[tuple[tuple[Any, ...], dict[str, Any]]]] | None = None
    resize: Callable[..., tuple[tuple[Any, ...], dict[str, Any]]] | None = None


ROWS: dict[str, OpRow] = {}
_BY_TARGET: dict[Any, OpRow] = {}
_LIBRARY = torch.library.Library("llmc", "DEF")


def register(row: OpRow) -> OpRow:
    """Add a row; a second row of one name or target is a bug."""
    if row.name in ROWS or row.target in _BY_TARGET:
        raise ModelError(f"expected one row per op, found a second one for {row.name}")
    ROWS[row.name] = row
    _BY_TARGET[row.target] = row
    return row


def aten(name: str, infer: Callable[..., ValueType], **fields: Any) -> OpRow:
    """A row for an aten overload, e.g. ``linear.default``; the overload is its own reference."""
    packet, overload = name.split(".")
    target = getattr(getattr(torch.ops.aten, packet), overload)
    fields.setdefault("reference", target)
    return register(OpRow(f"aten.{name}", target, infer, **fields))


def llmc_op(
    name: str,
    schema: str,
    infer: Callable[..., ValueType],
    reference: Callable[..., Any],
    **fields: Any,
) -> OpRow:
    """A row for an op of ours; it becomes ``torch.ops.llmc.<name>``, so graphs print and export."""
    _LIBRARY.define(name + schema)
    # A compiled graph calls the op as a whole: what it is made of is not traced again.
    _LIBRARY.impl(name, _disable_dynamo(reference), "CompositeExplicitAutograd")

    def fake(*args: Any, **kwargs: Any) -> Any:
        known: dict[Dim, Any] = {}
        out = infer(*_map(args, _fake_type(known)), **_map(kwargs, _fake_type(known)))
        return _materialise(out, args, known)

    torch.library.register_fake(f"llmc::{name}", fake, lib=_LIBRARY)
    target = getattr(torch.ops.llmc, name).default
    return register(OpRow(f"llmc.{name}", target, infer, reference, **fields))


def _fake_type(known: dict[Dim, Any]) -> Callable[[Any], Any]:
    def one(value: Any) -> Any:
        if isinstance(value, torch.SymInt):
            known[dim(value)] = value
            return SymType(dim(value))
        if not isinstance(value, torch.Tensor):
            return value
        shape = tuple(dim(d) for d in value.shape)
        known.update(zip(shape, value.shape, strict=True))
        return TensorType(shape, value.dtype)

    return one


def _materialise(out: ValueType, args: Any, known: dict[Dim, Any]) -> Any:
    if isinstance(out, tuple):
        return tuple(_materialise(o, args, known) for o in out)
    if not isinstance(out, TensorType):
        return out
    like = next(_tensors(args))
    # Under export a dim is torch's own symbol; ours must go back as the very SymInt it came from.
    return like.new_empty(
        [d if isinstance(d, int) else known[d] for d in out.shape], dtype=out.dtype
    )


def _tensors(value: Any) -> Iterator[torch.Tensor]:
    if isinstance(value, torch.Tensor):
        yield value
    elif isinstance(value, (tuple, list)):
        for v in value:
            yield from _tensors(v)


def row(name: str) -> OpRow:
    """The row of that name.

    Raises:
        ModelError: no such row, with the nearest name.
    """
    found = ROWS.get(name)
    if found is None:
        raise ModelError(
            f"expected an op that llmc knows, found {name!r}", hint=nearest(name, ROWS)
        )
    return found


def row_for(target: Any) -> OpRow | None:
    """The row of a call target, or None."""
    return _BY_TARGET.get(target)


def row_of(node: fx.Node) -> OpRow:
    """The row of a call node.

    Raises:
        ModelError: the op has no row.
    """
    found = _BY_TARGET.get(node.target)
    if found is None:
        raise ModelError(
            f"expected an op that llmc knows, found {node.target}",
            where=f"node {node.name}",
            hint="add its op row in compiler/ir/ops",
        )
    return found


def _map(value: Any, f: Callable[[Any], Any]) -> Any:
    if isinstance(value, (tuple, list)):
        return type(value)(_map(v, f) for v in value)
    if isinstance(value, dict):
        return {k: _map(v, f) for k, v in value.items()}
    return f(value)


def types_of(node: fx.Node) -> tuple[tuple[Any, ...], dict[str, Any]]:
    """The call's arguments with every node replaced by its recorded type."""

    def one(v: Any) -> Any:
        return v.meta["llmc"].type if isinstance(v, fx.Node) else v

    args = tuple(_map(list(node.args), one))
    kwargs = _map(dict(node.kwargs), one)
    return args, kwargs


def infer(node: fx.Node) -> ValueType:
    """The type that the row's shape rule gives for the node's arguments.

    Raises:
        ModelError: the rule refuses the arguments; the message names the node.
    """
    args, kwargs = types_of(node)
    try:
        found = row_of(node).infer(*args, **kwargs)
    except ModelError as e:
        raise ModelError(e.message, where=f"node {node.name}", hint=e.hint) from None
    except (TypeError, AttributeError, IndexError, ValueError) as e:
        raise ModelError(
            f"expected arguments that fit {row_of(node).name}, found ({e})",
            where=f"node {node.name}",
        ) from None
    if not isinstance(found, (TensorType, SymType, tuple)):
        # A rule that hands an argument through was given a number in a tensor's place.
        raise ModelError(
            f"expected tensors for {row_of(node).name}, found {found!r}", where=f"node {node.name}"
        )
    return found


def as_dim(value: Any) -> Dim:
    """A dim from an int, a sympy expression or a SymType argument."""
    return value.expr if isinstance(value, SymType) else dim(value)


def cost(node: fx.Node) -> tuple[Dim, Dim]:
    """(flops, bytes read and written) of a call node, expressions of the input symbols."""
    args, kwargs = types_of(node)
    out: ValueType = node.meta["llmc"].type
    r = row_of(node)
    moved: Dim = total_bytes(out)

    def add(v: Any) -> Any:
        nonlocal moved
        if isinstance(v, TensorType):
            moved = moved + v.bytes
        return v

    _map(list(args), add)
    _map(kwargs, add)
    if r.flops is not None:
        flops: Dim = r.flops(out, *args, **kwargs)
    else:
        flops = numel(out.shape) if isinstance(out, TensorType) else 0
    return dim(flops), dim(moved)
