"""Narrower heads: nothing changes at full rank, and the error is the dropped part, in fp64."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from llmc.compiler.solvers.heads import Heads, metric
from llmc.compiler.solvers.latents import narrow_keys, narrow_values


def problem(seed: int, kv: int, repeat: int, size: int, n: int = 12, m: int = 10) -> Heads:
    g = torch.Generator().manual_seed(seed)

    def made(*shape: int) -> torch.Tensor:
        return torch.randn(*shape, generator=g, dtype=torch.float64)

    h = kv * repeat
    return Heads(made(h, size, n), made(kv, size, n), made(kv, size, n), made(h, size, m))


def root_of(seed: int, n: int = 12) -> torch.Tensor:
    x = torch.randn(40, n - 1, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)
    return metric(x.T @ x / len(x), x.mean(0))


def behind(heads: Heads) -> torch.Tensor:
    """What each query head's values add behind the projection, per input: [H, m, n]."""
    repeat = len(heads.q) // len(heads.k)
    return heads.o.mT @ heads.v.repeat_interleave(repeat, 0)


def scores(heads: Heads) -> torch.Tensor:
    """[H, n, n]: what queries and keys multiply to."""
    repeat = len(heads.q) // len(heads.k)
    return heads.q.mT @ heads.k.repeat_interleave(repeat, 0)


@pytest.mark.parametrize(("kv", "repeat"), [(1, 1), (2, 3), (4, 1)])
def test_all_channels_change_nothing(kv: int, repeat: int) -> None:
    heads, root = problem(0, kv, repeat, 6), root_of(1)
    made, told = narrow_values(heads, 6, root)
    torch.testing.assert_close(behind(made), behind(heads), rtol=1e-9, atol=1e-9)
    assert float(told[:, 0].abs().max()) == 0.0
    made, told = narrow_keys(heads, 6, root, root)
    torch.testing.assert_close(scores(made), scores(heads), rtol=1e-9, atol=1e-9)


@settings(max_examples=20, deadline=None)
@given(st.integers(0, 1000), st.integers(1, 3), st.integers(1, 3), st.integers(1, 5))
def test_the_error_is_what_was_dropped(seed: int, kv: int, repeat: int, rank: int) -> None:
    heads, root = problem(seed, kv, repeat, 5), root_of(seed + 1)
    made, told = narrow_values(heads, rank, root)
    assert not made.v[:, rank:].any()
    per_head = ((behind(heads) - behind(made)) @ root).square().sum((1, 2))
    torch.testing.assert_close(per_head.view(kv, repeat).sum(1), told[:, 0], rtol=1e-7, atol=1e-7)
    made, told = narrow_keys(heads, rank, root, root)
    per_head = (root.T @ (scores(heads) - scores(made)) @ root).square().sum((1, 2))
    torch.testing.assert_close(per_head.view(kv, repeat).sum(1), told[:, 0], rtol=1e-7, atol=1e-7)


def test_no_other_choice_of_channels_loses_less() -> None:
    heads, root = problem(3, 1, 2, 6), root_of(4)
    _, told = narrow_values(heads, 2, root)
    whole = behind(heads).flatten(0, 1) @ root
    for seed in range(20):
        g = torch.Generator().manual_seed(seed)
        some = torch.linalg.qr(torch.randn(6, 2, generator=g, dtype=torch.float64)).Q
        cut = (heads.o.mT @ some @ some.T @ heads.v).flatten(0, 1) @ root
        assert float((whole - cut).square().sum()) >= float(told[0, 0]) * (1 - 1e-9)


def test_heads_with_fewer_inputs_than_channels() -> None:
    heads = problem(5, 1, 1, 6, n=3, m=2)
    root = torch.eye(3, dtype=torch.float64)
    made, _ = narrow_values(heads, 2, root)
    torch.testing.assert_close(behind(made), behind(heads), rtol=1e-9, atol=1e-9)
    made, _ = narrow_keys(heads, 3, root, root)
    torch.testing.assert_close(scores(made), scores(heads), rtol=1e-9, atol=1e-9)
