"""Rotations in fp64: orthogonal for every width, undone exactly, checked where they are stored."""

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from llmc.compiler.ir.errors import ModelError, VerifierError
from llmc.compiler.ir.graph import Param
from llmc.compiler.ir.ops import row
from llmc.compiler.ir.ops.rotation import MOST_ODD, mix, mixed_by, rotate
from llmc.compiler.ir.types import TensorType
from llmc.compiler.ir.verifier import verify_tensors
from llmc.compiler.pipeline import zoo

F64 = torch.float64


def randn(*shape, seed=0):
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=F64)


@settings(max_examples=40, deadline=None)
@given(st.integers(1, 400))
def test_the_mix_is_symmetric_and_its_own_inverse(n):
    m = mix(torch.eye(n, dtype=F64))
    torch.testing.assert_close(m, m.t(), rtol=0, atol=1e-13)
    torch.testing.assert_close(m @ m, torch.eye(n, dtype=F64), rtol=0, atol=1e-12)
    # No channel goes mostly to one place, however prime the width.
    assert float(m.abs().max()) <= (2 / n) ** 0.5 + 1e-12


@pytest.mark.parametrize("n", [2, 64, 128, 1024, 8192])
def test_powers_of_two_are_mixed_by_hadamard(n):
    x = randn(3, n)
    want = x.clone()
    width = 1
    while width < n:
        a, b = want.view(3, -1, 2, width).unbind(2)
        want = torch.stack([a + b, a - b], 2).reshape(3, n)
        width *= 2
    torch.testing.assert_close(mix(x), want / n**0.5, rtol=1e-12, atol=1e-12)


@pytest.mark.parametrize("shape", [(5,), (2, 3, 12), (4, 1), (0, 8), (2, 96)])
@pytest.mark.parametrize("dtype", [F64, torch.float32, torch.bfloat16])
def test_the_inverse_undoes_it(shape, dtype):
    x = randn(*shape).to(dtype)
    scale = randn(shape[-1], seed=1).abs() + 0.2
    back = rotate(rotate(x, scale), scale, inverse=True)
    assert back.dtype == dtype
    tolerance = {F64: 1e-12, torch.float32: 1e-5, torch.bfloat16: 0.1}[dtype]
    torch.testing.assert_close(back, x, rtol=tolerance, atol=tolerance)


def test_signs_keep_lengths_and_angles():
    x = randn(6, 56)
    signs = (randn(56, seed=2) > 0).to(torch.int8) * 2 - 1
    y = rotate(x, signs)
    torch.testing.assert_close(y @ y.t(), x @ x.t(), rtol=1e-12, atol=1e-12)


def test_the_largest_odd_factor_is_bounded():
    assert mixed_by(11008) == (43, 16, 16)
    assert mixed_by(1) == (1,)
    for n in (0, MOST_ODD + 1 - MOST_ODD % 2 + 2, 2 * 4099):
        with pytest.raises(ModelError, match="odd factor"):
            mixed_by(n)


@pytest.mark.parametrize(
    ("x", "scale", "why"),
    [
        (((2, 8), torch.int64), ((8,), torch.int8), "floats"),
        (((2, 8), F64), ((7,), torch.int8), "scale"),
        (((2, 8), F64), ((1, 8), F64), "scale"),
        (((2, 8), F64), ((8,), torch.bool), "scale"),
        (((2, 4099), F64), ((4099,), F64), "odd factor"),
    ],
)
def test_the_shape_rule_refuses(x, scale, why):
    with pytest.raises(ModelError, match=why):
        row("llmc.rotate").infer(TensorType(*x), TensorType(*scale))


def stored(tensor, named=False):
    b = zoo.Builder()
    x = b.call("aten.mul.Tensor", b.param(3, 8), b.param(3, 8))
    param = Param("p.turn_in", tuple(tensor.shape), tensor.dtype, keep=True)
    scale = b.program.add_param(param, tensor, before=b.end)
    return b.finish(
        b.call("llmc.rotate", x, scale=scale) if named else b.call("llmc.rotate", x, scale)
    )


def test_stored_scales_are_checked():
    good = torch.tensor([1, -1, 1, 1, -1, -1, 1, 1])
    verify_tensors(stored(good.to(torch.int8)))
    verify_tensors(stored(good.half() * 3))
    broken = [good * 2, good * 0, good.index_fill(0, torch.tensor([3]), -128)]
    broken = [t.to(torch.int8) for t in broken] + [good.half() * 0, good.half() * float("inf")]
    for tensor in (*broken, good.half() * float("nan")):
        with pytest.raises(VerifierError, match="signs or scales"):
            verify_tensors(stored(tensor))
    with pytest.raises(VerifierError, match="signs or scales"):
        verify_tensors(stored(good.half() * 0, named=True))
