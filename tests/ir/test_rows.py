"""Every op row against torch: shape rule, gradient, ties and cost, all on the row's own samples."""

from __future__ import annotations

import itertools
import math
from typing import Any

import pytest
import torch

from llmc.compiler.ir.ops import ROWS, flat
from llmc.compiler.ir.ops.base import OpRow, Tie
from llmc.compiler.ir.types import SymType, TensorType, show_type

# Rows that the generic samples cannot reach, each with the test that does.
NO_SAMPLES = {"llmc.cached_attention": "needs a state object: tests/ir/test_attention.py"}
# Rows from tensor to floating tensor without a gradient to check, each with the reason.
NO_GRADIENT = {
    "aten.floor.default": "a step function", "aten.ceil.default": "a step function",
    "aten.round.default": "a step function", "aten.sign.default": "a step function",
    "aten.histc.default": "counts have no gradient",
    "aten._to_copy.default": "the sample lowers the precision",
    "aten.to.dtype": "the sample lowers the precision",
    "aten.to.dtype_layout": "the sample lowers the precision",
    "aten.type_as.default": "the sample lowers the precision",
    "aten.empty_like.default": "uninitialised", "aten.new_empty.default": "uninitialised",
    "aten.zeros_like.default": "a constant", "aten.ones_like.default": "a constant",
    "aten.full_like.default": "a constant", "aten.new_zeros.default": "a constant",
    "aten.new_ones.default": "a constant", "aten.new_full.default": "a constant",
    "aten.detach.default": "cuts the gradient by definition",
    "aten.where.Scalar": "chooses between two numbers",
}  # fmt: skip


# Rows that read of an argument only its dtype or size, or one element of a tuple.
READS_NO_VALUES = {
    "aten.new_zeros.default", "aten.new_ones.default", "aten.new_empty.default",
    "aten.new_full.default", "aten.type_as.default", "aten.sym_size.int", "operator.getitem",
}  # fmt: skip


def type_of(value: Any) -> Any:
    if isinstance(value, torch.Tensor):
        return TensorType(tuple(value.shape), value.dtype)
    if isinstance(value, (list, tuple)):
        return type(value)(type_of(v) for v in value)
    if isinstance(value, dict):
        return {k: type_of(v) for k, v in value.items()}
    return value


CASES = [
    pytest.param(row, args, kwargs, id=f"{name}-{i}")
    for name, row in ROWS.items()
    for i, (args, kwargs) in enumerate(row.samples() if row.samples else ())
]


def test_every_row_has_samples() -> None:
    bare = {name for name, row in ROWS.items() if not (row.samples and row.samples())}
    assert bare == set(NO_SAMPLES)


@pytest.mark.parametrize(("row", "args", "kwargs"), CASES)
def test_shape_rule_gives_what_torch_gives(row: OpRow, args: Any, kwargs: Any) -> None:
    actual = row.reference(*args, **kwargs)
    inferred = row.infer(*type_of(args), **type_of(kwargs))
    if isinstance(inferred, SymType):
        assert inferred.expr == actual
        return
    found = tuple(type_of(actual)) if isinstance(actual, (list, tuple)) else type_of(actual)
    assert show_type(inferred) == show_type(found)


# ** gradients **


def floats(value: Any) -> list[torch.Tensor]:
    return [v for v in flat(value) if isinstance(v, torch.Tensor) and v.dtype == torch.float64]


def with_floats(value: Any, new: list[torch.Tensor]) -> Any:
    """``value`` with its fp64 tensors replaced in order."""
    if isinstance(value, (list, tuple)):
        return type(value)(with_floats(v, new) for v in value)
    if isinstance(value, torch.Tensor) and value.dtype == torch.float64:
        return new.pop(0)
    return value


def float_results(value: Any) -> list[torch.Tensor]:
    many = value if isinstance(value, (list, tuple)) else [value]
    return [v for v in many if isinstance(v, torch.Tensor) and v.dtype == torch.float64]


def differentiable(row: OpRow, args: Any, kwargs: Any) -> bool:
    return bool(floats(args)) and bool(float_results(row.reference(*args, **kwargs)))


def test_every_floating_row_has_a_gradient_sample_or_a_reason() -> None:
    checked = {p.values[0].name for p in CASES if differentiable(*p.values)}
    floating = {
        p.values[0].name
        for p in CASES
        if any(isinstance(v, torch.Tensor) for v in flat(p.values[1]))
        and any(
            isinstance(v, torch.Tensor) and v.is_floating_point()
            for v in flat([p.values[0].reference(*p.values[1], **p.values[2])])
        )
    }
    assert floating - checked <= set(NO_GRADIENT)
    assert set(NO_GRADIENT) & set(ROWS) <= floating


@pytest.mark.parametrize(
    ("row", "args", "kwargs"),
    [p for p in CASES if p.values[0].name not in NO_GRADIENT and differentiable(*p.values)],
)
def test_gradient_is_that_of_the_function(row: OpRow, args: Any, kwargs: Any) -> None:
    def call(*new: torch.Tensor) -> tuple[torch.Tensor, ...]:
        return tuple(float_results(row.reference(*with_floats(args, list(new)), **kwargs)))

    leaves = [t.clone().requires_grad_() for t in floats(args)]
    assert torch.autograd.gradcheck(call, leaves, eps=1e-6, atol=1e-5)


# ** ties **


def ties_of(row: OpRow, args: Any, kwargs: Any) -> tuple[list[Tie], list[Any], list[Any]]:
    out = row.reference(*args, **kwargs)
    types = type_of(args)
    shown = tuple(type_of(out)) if isinstance(out, (list, tuple)) else type_of(out)
    assert row.ties is not None
    found = list(row.ties(shown, *types, **type_of(kwargs)))
    return found, flat(args), list(out) if isinstance(out, (list, tuple)) else [out]


TIED = [p for p in CASES if p.values[0].ties is not None]


@pytest.mark.parametrize(("row", "args", "kwargs"), TIED)
def test_tied_axes_exist_and_their_sizes_agree(row: OpRow, args: Any, kwargs: Any) -> None:
    ties, values, results = ties_of(row, args, kwargs)
    for tie in ties:
        ins = [values[i].shape[a] for i, a in tie.ins]
        outs = [results[tie.result].shape[a] for a in tie.outs]
        match tie.kind:
            case "same":
                assert len({*ins, *outs}) == 1
            case "split" | "merge":
                assert math.prod(ins) == math.prod(outs)
                assert len(ins) == 1 or len(outs) == 1
            case "repeat":
                assert outs == [ins[0] * tie.factor]
            case "concat":
                assert ins[0] + tie.offset <= outs[0]
            case "slice":
                assert tie.offset + outs[0] <= ins[0]
            case "pair":
                assert len({*ins, *outs}) == 1
                assert ins[0] % 2 == 0
            case "choose":
                assert len({*ins, *outs}) == 1
            case "twice":
                assert not outs
                assert ins[1] == 2 * ins[0]
            case "pick":
                assert not values[tie.offset].dtype.is_floating_point
            case "source":
                assert not ins
                assert len(outs) == 1
            case _:
                assert tie.kind in ("contract", "norm", "mix")


@pytest.mark.parametrize(("row", "args", "kwargs"), TIED)
def test_every_axis_of_every_argument_is_tied(row: OpRow, args: Any, kwargs: Any) -> None:
    """An axis that no tie names would count as free to cut."""
    if row.name in READS_NO_VALUES:
        return
    ties, values, _ = ties_of(row, args, kwargs)
    named = {pair for tie in ties for pair in tie.ins}
    for i, v in enumerate(values):
        if isinstance(v, torch.Tensor):
            loose = [a for a in range(v.dim()) if v.shape[a] > 1 and (i, a) not in named]
            assert not loose, f"argument {i} axes {loose}"


def reach(
    tie: Tie, index: tuple[int, ...], sizes: list[int], outs: list[int]
) -> set[tuple[int, ...]]:
    """Indices along ``tie.outs`` that the index along ``tie.ins`` may touch, as the tie claims."""
    match tie.kind:
        case "same":
            return {index * len(outs)}
        case "pair":
            if tie.factor == 2:
                return {index, (index[0] ^ 1,)}
            half = outs[0] // 2
            return {index, ((index[0] + half) % outs[0],)}
        case "slice":
            return {(index[0] - tie.offset,)}
        case "concat":
            return {(index[0] + tie.offset,)}
        case "repeat":
            return {(index[0] * int(tie.factor) + r,) for r in range(int(tie.factor))}
    where = 0
    for i, n in zip(index, sizes, strict=True):
        where = where * n + i
    place = []
    for n in reversed(outs):
        place.append(where % n)
        where //= n
    return {tuple(reversed(place))}


def touched(
    row: OpRow, args: Any, kwargs: Any, arg: int, axes: Any, index: Any, result: int
) -> torch.Tensor:
    """bool like the result: entries that change when one index of an argument changes."""
    tensors = floats(args)
    which = [i for i, v in enumerate(flat(args)) if any(v is t for t in tensors)]
    changed = [t.clone() for t in tensors]
    target = changed[which.index(arg)]
    spot: list[Any] = [slice(None)] * target.dim()
    for a, i in zip(axes, index, strict=True):
        spot[a] = i
    target[tuple(spot)] += 0.37
    before = row.reference(*args, **kwargs)
    after = row.reference(*with_floats(args, changed), **kwargs)
    pick = (lambda v: v[result]) if isinstance(before, (list, tuple)) else (lambda v: v)
    return pick(before) != pick(after)


MAPPED = ("same", "slice", "concat", "repeat", "split", "merge", "pair")


@pytest.mark.parametrize(
    ("row", "args", "kwargs"),
    [p for p in TIED if differentiable(*p.values) and "empty" not in p.values[0].name],
)
def test_ties_say_where_a_change_goes(row: OpRow, args: Any, kwargs: Any) -> None:
    """Change one index of an argument: only the indices that its tie names may change."""
    ties, values, results = ties_of(row, args, kwargs)
    mixing = {p for t in ties if t.kind not in MAPPED for p in t.ins}
    for tie in ties:
        if tie.kind not in MAPPED or not tie.outs:
            continue
        # Several inputs of "same" are claims about each; those of "merge" are one claim.
        groups = [[p] for p in tie.ins] if tie.kind in ("same", "pair") else [list(tie.ins)]
        for group in groups:
            arg, axes = group[0][0], [a for _, a in group]
            v = values[arg]
            if v.dtype != torch.float64 or mixing & set(group):
                continue
            sizes = [v.shape[a] for a in axes]
            out = results[tie.result]
            outs = [out.shape[a] for a in tie.outs]
            for index in itertools.product(*map(range, sizes)):
                hit = touched(row, args, kwargs, arg, axes, index, tie.result)
                others = [a for a in range(out.dim()) if a not in tie.outs]
                along = hit.permute(*tie.outs, *others)
                along = along.flatten(len(outs)).any(-1) if others else along
                found = {tuple(map(int, i)) for i in along.nonzero()}
                assert found <= reach(tie, index, sizes, outs)


# ** cost **


@pytest.mark.parametrize(("row", "args", "kwargs"), CASES)
def test_flops_are_a_number_of_at_least_zero(row: OpRow, args: Any, kwargs: Any) -> None:
    if row.flops is None:
        return
    out = row.infer(*type_of(args), **type_of(kwargs))
    assert int(row.flops(out, *type_of(args), **type_of(kwargs))) >= 0


def test_square_of_a_relu_is_one_activation() -> None:
    """Zero below zero, x² above it; infinity and NaN stay what they are."""
    x = torch.tensor([-3.0, -0.0, 0.5, 3.0, math.inf, math.nan], dtype=torch.float64)
    want = torch.tensor([0.0, 0.0, 0.25, 9.0, math.inf, math.nan], dtype=torch.float64)
    found = ROWS["llmc.activation"].reference(x, act="relu2")
    torch.testing.assert_close(found, want, rtol=0, atol=0, equal_nan=True)
    up = torch.arange(6, dtype=torch.float64) - 2
    found = ROWS["llmc.gated"].reference(x, up, act="relu2")
    torch.testing.assert_close(found, want * up, rtol=0, atol=0, equal_nan=True)
