"""Every op row against torch: the shape rule, the gradient, the ties, the cost."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import pytest
import torch

from llmc.compiler.ir.dims import same
from llmc.compiler.ir.errors import ModelError
from llmc.compiler.ir.ops import ROWS, flat
from llmc.compiler.ir.ops.base import OpRow, Tie
from llmc.compiler.ir.types import SymType, TensorType, show_type

# Rows that the generic samples cannot reach, each with the test that does.
NO_SAMPLES = {
    "llmc.cached_attention": "needs a state object: tests/ir/test_attention.py",
}
# Rows with a floating result that has no gradient to check, each with the reason.
NO_GRADIENT = {
    "aten.floor.default": "a step function", "aten.ceil.default": "a step function",
    "aten.round.default": "a step function", "aten.sign.default": "a step function",
    "aten._to_copy.default": "the sample lowers the precision",
    "aten.to.dtype": "the sample lowers the precision",
    "aten.to.dtype_layout": "the sample lowers the precision",
    "aten.type_as.default": "the sample lowers the precision",
    "aten.empty_like.default": "uninitialised", "aten.new_empty.default": "uninitialised",
    "aten.zeros_like.default": "a constant", "aten.ones_like.default": "a constant",
    "aten.full_like.default": "a constant", "aten.new_zeros.default": "a constant",
    "aten.new_ones.default": "a constant", "aten.new_full.default": "a constant",
    "aten.histc.default": "counts",
}  # fmt: skip


def type_of(value: Any) -> Any:
    if isinstance(value, torch.Tensor):
        return TensorType(tuple(value.shape), value.dtype)
    if isinstance(value, (list, tuple)):
        return type(value)(type_of(v) for v in value)
    if isinstance(value, dict):
        return {k: type_of(v) for k, v in value.items()}
    return value


def cases() -> list[Any]:
    for name, row in ROWS.items():
        for i, (args, kwargs) in enumerate(row.samples() if row.samples else ()):
            yield pytest.param(row, args, kwargs, id=f"{name}-{i}")


@pytest.mark.parametrize(("row", "args", "kwargs"), cases())
def test_shape_rule_gives_what_torch_gives(row: OpRow, args: Any, kwargs: Any) -> None:
    actual = row.reference(*args, **kwargs)
    inferred = row.infer(*type_of(args), **type_of(kwargs))
    if isinstance(inferred, SymType):
        assert inferred.expr == actual
        return
    found = tuple(type_of(actual)) if isinstance(actual, (list, tuple)) else type_of(actual)
    assert show_type(inferred) == show_type(found)
