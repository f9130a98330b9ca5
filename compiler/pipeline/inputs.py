"""Input grids and outlier columns: how they become graph and tensors.

What linears read is rounded once for all of them. Outlier columns (LLM.int8, arXiv 2208.07339) are
read unrounded by a small dense linear of their own, whose result is added.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, replace
from functools import partial
from typing import Any

import torch
from torch import Tensor, fx

from ..ir.build import result_type
from ..ir.errors import UsageError
from ..ir.graph import Param, Program, info, tensor_type
from ..ir.ops import row_of
from ..ir.ops.compressed import groups_of
from ..ir.ops.pairs import USUAL
from ..ir.ops.rounding import round_input, scale_of
from ..ir.scheme import InputGrid, Scheme, Sparse
from ..solvers import Solution
from .clipping import clipped
from .magnitudes import Magnitudes
from .statistics import Collection

ROUND = "llmc.round_input"
SCALE, COLUMNS, BESIDE = "in_scale", "columns", "beside"
"""Ends of the names of a static scale, of outlier columns, and of the weights that read them."""


def most_columns(sparse: Sparse, inputs: int) -> int:
    """How many columns may stay beside the codes."""
    return min(inputs, -int(-sparse.share * inputs // 1))


def attributes(grid: InputGrid, inputs: int, sparse: Sparse | None = None) -> dict[str, Any]:
    """The attributes of the rounding call."""
    group = 0 if grid.group is None or grid.group >= inputs else grid.group
    given = {"kind": grid.kind, "bits": grid.bits, "per": grid.per, "group": group}
    limit = 0.0 if sparse is None or sparse.threshold == float("inf") else sparse.threshold
    return given | {"power": grid.power, "limit": limit}


def encode_input(
    program: Program, node: str, grid: InputGrid, sparse: Sparse | None = None, *, made_by: str
) -> list[str]:
    """Let linear(x, W) read grid(x), which all linears that read x share; nothing else sees it.

    sparse: kind ``columns``: the linear then reads grid(x) without them, and
    linear(x[columns], W[:, columns]) is added; after `encode_codes`. Returns the new parameters.
    Raises:
        UsageError: another linear reads x on another grid.
    """
    linear = program.node(node)
    x = linear.args[0]
    assert isinstance(x, fx.Node)
    inputs = int(tensor_type(x).shape[-1])
    wanted = attributes(grid, inputs, sparse)
    made: list[str] = []
    base = str(_stored(linear).target).partition(".")[0]
    if x.op == "call_function" and row_of(x).name == ROUND:
        raise UsageError(f"expected one pass that writes an input grid, found two for {base}")
    rounded = _shared(x, wanted, base)
    if rounded is None:
        first = min(u for u in x.users if _is_linear(u) and u.args[0] is x)
        new = partial(piece, program, base, first, linear, made_by, made)
        groups = groups_of(inputs, wanted["group"] or inputs)
        scale = new(SCALE, (groups,), torch.float32) if grid.static else None
        most = 0 if sparse is None else most_columns(sparse, inputs)
        columns = None if sparse is None else new(COLUMNS, (most,), torch.int32)
        rounded = program.emit(
            ROUND, x, scale, columns, **wanted, before=first, made_by=made_by, like=linear
        )
    linear.args = (rounded, *linear.args[1:])
    if sparse is not None:
        _beside(program, linear, x, rounded.args[2], partial(piece, program, base, linear, linear,
                made_by, made), made_by)  # fmt: skip
    return made


def _is_linear(node: fx.Node) -> bool:
    return node.op == "call_function" and row_of(node).name == "aten.linear.default"


def _stored(linear: fx.Node) -> fx.Node:
    """The parameter that the linear's weight decodes from."""
    source: Any = linear.args[1]
    while source.op == "call_function":
        source = source.all_input_nodes[0]
    assert isinstance(source, fx.Node)
    return source


def _shared(x: fx.Node, wanted: dict[str, Any], base: str) -> fx.Node | None:
    """The call that rounds x already.

    Raises:
        UsageError: it rounds to another grid.
    """
    for user in x.users:
        if user.op == "call_function" and row_of(user).name == ROUND:
            differ = {k: v for k, v in user.kwargs.items() if v != wanted[k]}
            if differ:
                raise UsageError(
                    f"expected one input grid for all that read {x.name}, found {differ} and "
                    f"{ {k: wanted[k] for k in differ} }", where=base,
                    hint="what reads one value is rounded alike, or skipped",
                )  # fmt: skip
            return user
    return None


def piece(
    program: Program, base: str, before: fx.Node, like: fx.Node, made_by: str, made: list[str],
    suffix: str, shape: tuple[int, ...], dtype: torch.dtype, keep: bool = True,
) -> fx.Node:  # fmt: skip
    """A new parameter beside the weight called ``base``, placed before a node."""
    made.append(f"{base}.{suffix}")
    source = program.params[str(_stored(like).target)].names
    names = tuple(f"{n.removesuffix('.codes')}.{suffix}" for n in source)
    param = Param(made[-1], shape, dtype, names, trained=True, keep=keep)
    return program.add_param(param, None, before=before, made_by=made_by, like=like)


def _beside(
    program: Program, linear: fx.Node, x: fx.Node, columns: Any, new: Any, made_by: str
) -> None:
    """Add what the outlier columns give, read from x as it is."""
    where: dict[str, Any] = {"made_by": made_by, "like": linear}
    selected = next((u for u in x.users if u.args[1:] == (-1, columns)), None)
    if selected is None:
        rounded = linear.args[0]
        assert isinstance(rounded, fx.Node)
        selected = program.emit(
            "aten.index_select.default", x, -1, columns, before=rounded, **where
        )
    rows, most = tensor_type(linear).shape[-1], tensor_type(columns).shape[0]
    weight = new(BESIDE, (int(rows), int(most)), program.dtype, False)
    readers = list(linear.users)
    after = linear.next
    part = program.emit("aten.linear.default", selected, weight, before=after, **where)
    total = program.emit("aten.add.Tensor", linear, part, before=after, **where)
    for reader in readers:
        reader.replace_input_with(linear, total)
    if program.output in readers:
        program.output.meta["llmc"] = replace(
            info(program.output), type=result_type(program.output.args[0])
        )


# ** tensors **


def outlier_columns(absmax: Tensor, sparse: Sparse) -> tuple[Tensor, tuple[str, ...]]:
    """Columns that reach the threshold, ascending, and what had to be given up.

    Args:
        absmax: [n], of the values as calibration saw them, after folds.
    """
    found = absmax >= sparse.threshold
    most = most_columns(sparse, len(absmax))
    if int(found.sum()) <= most:
        return found.nonzero()[:, 0], ()
    top = absmax.masked_fill(~found, -1.0).topk(most).indices.sort().values
    note = f"columns: {int(found.sum())} reach {sparse.threshold:g}, the largest {most} are kept"
    return top, (note,)


def static_scale(
    absmax: Tensor, grid: InputGrid, columns: Tensor | None = None, absmean: Tensor | None = None,
    seen: Magnitudes | None = None,
) -> Tensor:  # fmt: skip
    """fp32 [G]: the scale with which nothing that calibration saw is clipped, or what pays.

    Args:
        absmax: [n], per channel. columns: those that are rounded nowhere.
        absmean: [n], mean of |x|, for pairs: where usual values reach less than outliers.
        seen: how large values are, where the grid does not end at the largest.
    """
    width = len(absmax) if grid.group is None else min(grid.group, len(absmax))

    def folded(x: Tensor) -> Tensor:
        x = x.float() if columns is None else x.float().index_fill(0, columns, 0.0)
        return torch.nn.functional.pad(x, (0, -len(x) % width)).view(-1, width)

    size = folded(absmax).amax(-1)
    if absmean is not None:
        size = torch.minimum(size, USUAL * folded(absmean).mean(-1))
    if seen is not None:
        size = clipped(seen, size, grid, columns)
    return scale_of(size, grid.kind, grid.bits, grid.power)


@dataclass(frozen=True)
class Reading:
    """What calibration says about a value that is rounded.

    columns: int64 [c], outlier columns, ascending; None without any kept. scale: fp32 [G], where it
    is static. notes: what had to be given up.
    """

    columns: Tensor | None = None
    scale: Tensor | None = None
    notes: tuple[str, ...] = ()


def reading(scheme: Scheme, stats: Collection, value: str) -> Reading:
    """What the scheme wants to know of the value that a weight reads."""
    grid, sparse = scheme.input_grid, scheme.sparse
    split = sparse is not None and sparse.kind == "columns"
    if grid is None or not (split or grid.static):
        return Reading()
    absmax: Any = stats.get(value, "absmax")
    columns: Tensor | None = None
    notes: tuple[str, ...] = ()
    if split:
        assert sparse is not None
        columns, notes = outlier_columns(absmax.value, sparse)
    if not grid.static:
        return Reading(columns, notes=notes)
    mean: Any = stats.get(value, "absmean") if grid.kind == "pairs" else None
    absmean = None if mean is None else mean.value
    seen: Any = None if grid.clip == "absmax" else stats.get(value, "magnitudes")
    return Reading(columns, static_scale(absmax.value, grid, columns, absmean, seen), notes)


def needs(scheme: Scheme) -> tuple[str, ...]:
    """Statistics that the scheme's input grid and outlier columns take."""
    split = scheme.sparse is not None and scheme.sparse.kind == "columns"
    static = scheme.input_grid is not None and scheme.input_grid.static
    if not (split or static):
        return ()
    grid = scheme.input_grid
    if static and grid is not None and grid.clip != "absmax":
        return ("absmax", "magnitudes")
    return ("absmax", "absmean") if grid is not None and grid.kind == "pairs" else ("absmax",)


def rounded_linear(scheme: Scheme, read: Reading, inputs: int) -> Callable[..., Tensor]:
    """What stands for a solved linear(x, W, b) while the blocks behind it are calibrated."""
    assert scheme.input_grid is not None
    columns = read.columns
    sparse = None if columns is None else scheme.sparse
    wanted = attributes(scheme.input_grid, inputs, sparse)

    def call(x: Tensor, weight: Tensor, bias: Tensor | None = None) -> Tensor:
        rounded = round_input(x, read.scale, columns, **wanted)
        if columns is not None:
            rounded = rounded.index_copy(-1, columns, x.index_select(-1, columns))
        return torch.nn.functional.linear(rounded, weight, bias)

    return call


def columns_mask(weight: Tensor, read: Reading) -> Tensor | None:
    """bool [m, n]: the weights of outlier columns; None without any."""
    if read.columns is None:
        return None
    mask = torch.zeros(weight.shape, dtype=torch.bool, device=weight.device)
    return mask.index_fill_(1, read.columns, True)


def split_off(
    scheme: Scheme, solution: Solution, read: Reading, stored: torch.dtype
) -> tuple[Scheme, Solution, dict[str, Tensor]]:
    """Scheme and solution without outlier columns, and the weights of those, by suffix."""
    if read.columns is None:
        return scheme, solution, {}
    weight = solution.weight.index_fill(1, read.columns, 0.0)
    beside = solution.weight[:, read.columns].to(stored).contiguous()
    return replace(scheme, sparse=None), replace(solution, weight=weight, extra=None), {
        BESIDE: beside
    }  # fmt: skip


def tensors(program: Program, node: str, read: Reading) -> dict[str, Tensor]:
    """What the call that rounds for a linear of the planned program reads, by parameter name."""
    rounded = program.node(node).args[0]
    assert isinstance(rounded, fx.Node)
    out: dict[str, Tensor] = {}
    given = (read.scale, None if read.columns is None else read.columns.to(torch.int32))
    for arg, tensor in zip(rounded.args[1:], given, strict=False):
        param = program.param_of(arg)
        if param is not None and tensor is not None:
            out[param.name] = tensor
    return out
