"""Statistics: streaming equals one shot, and each follows folds and slices exactly."""

import pytest
import torch

from llmc.compiler.ir.errors import LlmcError, UsageError
from llmc.compiler.pipeline.statistics import KINDS, Collection, Fisher, kind

CHANNELS = ["absmax", "absmean", "moments", "gram", "range"]


def parts(stat) -> list[torch.Tensor]:
    names = ("value", "variance", "mean")
    return [getattr(stat, n) for n in names if getattr(stat, n, None) is not None]


def same(a, b, tol=1e-10):
    assert a.tokens == b.tokens
    for x, y in zip(parts(a), parts(b), strict=True):
        torch.testing.assert_close(x, y, rtol=tol, atol=tol, check_dtype=False)


@pytest.fixture
def x():
    return torch.randn(60, 6, dtype=torch.float64, generator=torch.Generator().manual_seed(0)) + 2


@pytest.mark.parametrize("name", CHANNELS)
def test_streaming_and_merging_equal_one_shot(name, x):
    whole, stream, left, right = (kind(name)() for _ in range(4))
    whole.update(x)
    for part in x.split([1, 20, 39]):
        stream.update(part)
    left.update(x[:13])
    right.update(x[13:])
    left.merge(right)
    tol = 1e-6 if name in ("absmax", "absmean", "range") else 1e-10
    same(stream, whole, tol)
    same(left, whole, tol)


@pytest.mark.parametrize("name", CHANNELS)
def test_merge_with_an_empty_part(name, x):
    a, b = kind(name)(), kind(name)()
    a.merge(b)
    assert a.tokens == 0
    b.update(x)
    a.merge(b)
    same(a, b)


@pytest.mark.parametrize("name", CHANNELS)
def test_fold_and_take_equal_statistics_of_the_changed_value(name, x):
    factor = torch.tensor([0.5, 2.0, 4.0, 0.25, 1.0, 8.0], dtype=torch.float64)
    index = torch.tensor([3, 0, 5])
    base, folded, taken = (kind(name)() for _ in range(3))
    base.update(x)
    folded.update(x * factor)
    taken.update(x[:, index])
    tol = 1e-6 if name in ("absmax", "absmean", "range") else 1e-10
    same(base.scaled(factor), folded, tol)
    same(base.taken(index), taken, tol)


def test_moments_match_torch(x):
    m = KINDS["moments"]()
    for part in x.split(7):
        m.update(part)
    torch.testing.assert_close(m.mean, x.mean(0))
    torch.testing.assert_close(m.variance, x.var(0, correction=0))


def test_fisher_follows_a_fold():
    w = torch.randn(3, 4, dtype=torch.float64, requires_grad=True)
    x = torch.randn(5, 4, dtype=torch.float64)
    s = torch.tensor([1.0, 2.0, 4.0, 0.5], dtype=torch.float64)
    (g,) = torch.autograd.grad((x @ w.T).pow(2).sum(), w)
    v = (w.detach() / s).requires_grad_()
    (h,) = torch.autograd.grad(((x * s) @ v.T).pow(2).sum(), v)
    a, b = Fisher(), Fisher()
    a.update(g)
    b.update(h)
    torch.testing.assert_close(a.scaled(s).value, b.value)


def test_a_dead_hook_and_an_unknown_name_are_errors():
    c = Collection()
    c.want("x", "gram")
    with pytest.raises(LlmcError, match="see tokens"):
        c.get("x", "gram")
    with pytest.raises(UsageError, match="did you mean 'gram'"):
        c.want("x", "gramm")


def test_a_sample_depends_on_the_rows_and_not_on_how_they_come():
    x = torch.arange(3000.0)[:, None].expand(3000, 2)
    whole, stream = kind("sample")(), kind("sample")()
    whole.update(x)
    for part in x.split([1, 600, 7, 1392, 1000]):
        stream.update(part)
    assert torch.equal(whole.value, stream.value)
    assert whole.value[:, 0].diff().unique().tolist() == [whole.stride]
    assert 256 < len(whole.value) <= whole.MOST
    assert whole.tokens == stream.tokens == 3000


def test_a_range_swaps_its_ends_under_a_negative_factor():
    r = KINDS["range"]()
    r.update(torch.tensor([[-1.0, 2.0], [3.0, 5.0]]))
    assert r.scaled(torch.tensor([-2.0, 1.0])).value.tolist() == [[-6.0, 2.0], [2.0, 5.0]]
