"""Sparse rows beside a weight: storage, addition, and what their shape rules refuse."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from llmc.compiler.ir.errors import ModelError
from llmc.compiler.ir.ops import row
from llmc.compiler.ir.ops.sparse import add_csr, csr, csr_linear, index_dtype
from llmc.compiler.ir.types import TensorType


@settings(max_examples=50, deadline=None)
@given(rows=st.integers(1, 5), columns=st.integers(1, 9), seed=st.integers(0, 99))
def test_stored_rows_give_the_matrix_back(rows: int, columns: int, seed: int) -> None:
    g = torch.Generator().manual_seed(seed)
    weight = torch.randn(rows, columns, generator=g, dtype=torch.float64)
    support = torch.rand(rows, columns, generator=g) < 0.4
    index, starts = csr(support)
    assert index.dtype == torch.int16
    assert starts.tolist() == [0, *support.sum(1).cumsum(0).tolist()]
    base = weight * ~support
    assert torch.equal(add_csr(base, weight[support], index, starts), weight)
    x = torch.randn(2, columns, generator=g, dtype=torch.float64)
    torch.testing.assert_close(
        csr_linear(x @ base.T, x, weight[support], index, starts), x @ weight.T
    )


def test_wide_matrices_take_wide_indices() -> None:
    assert index_dtype(1 << 15) == torch.int16
    assert index_dtype((1 << 15) + 1) == torch.int32
    support = torch.zeros(1, (1 << 15) + 1, dtype=torch.bool)
    support[0, 1 << 15] = True
    assert csr(support)[0].tolist() == [1 << 15]
    narrow = torch.ones(1, 1 << 15, dtype=torch.bool)
    assert int(csr(narrow)[0].max()) == (1 << 15) - 1


BASE, VALUES = TensorType((3, 8), torch.float32), TensorType((5,), torch.float32)
INDEX, STARTS = TensorType((5,), torch.int16), TensorType((4,), torch.int32)


@pytest.mark.parametrize(
    "types",
    [
        (BASE.with_dtype(torch.bfloat16), VALUES, INDEX, STARTS),
        (BASE.with_shape(2, 3, 8), VALUES, INDEX, STARTS),
        (BASE, VALUES, INDEX.with_dtype(torch.int32), STARTS),
        (BASE, VALUES, INDEX.with_shape(4), STARTS),
        (BASE, VALUES, INDEX, STARTS.with_shape(3)),
        (BASE, VALUES, INDEX, STARTS.with_dtype(torch.int64)),
        (BASE.with_shape(3, 1 << 16), VALUES, INDEX, STARTS),
    ],
)
def test_parts_that_do_not_fit_are_refused(types: tuple[TensorType, ...]) -> None:
    infer = row("llmc.add_csr").infer
    assert infer(BASE, VALUES, INDEX, STARTS) == BASE
    with pytest.raises(ModelError):
        infer(*types)
