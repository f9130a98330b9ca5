"""Fast cached attention is the reference's function, whatever the mask."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch

from llmc.compiler.ir.graph import Program
from llmc.compiler.runtime import attend
from llmc.compiler.runtime.attend import attention_implementations
from llmc.compiler.runtime.cache import add_cache
from llmc.compiler.runtime.executor import Runner

Make = Callable[..., Program]


@pytest.mark.parametrize(
    "attrs",
    [
        {}, {"window": 3}, {"softcap": 2.0}, {"masked": False}, {"window": 1, "first": 1},
        {"window": 2, "dilation": 2}, {"window": 2, "dilation": 3, "first": 2},
    ],
)  # fmt: skip
@pytest.mark.parametrize("padded", [False, True])
@pytest.mark.parametrize("cuts", [[1] * 8, [5, 1, 2], [8]])
def test_equals_the_reference(
    make_tiny: Make, attrs: dict[str, Any], padded: bool, cuts: list[int]
) -> None:
    program = add_cache(make_tiny(**attrs))
    plain, fast = Runner(program), Runner(program, attention_implementations(program))
    ids = torch.randint(0, 32, (3, 8), generator=torch.Generator().manual_seed(0))
    valid = torch.ones(3, 8, dtype=torch.bool)
    if padded:
        valid[1, :2] = False
        valid[2, :4] = False
    for turn in range(2):
        caches = plain.start(3), fast.start(3)
        for part, real in zip(ids.split(cuts, 1), valid.split(cuts, 1), strict=True):
            want = plain.forward(part, real, cache=caches[0])
            got = fast.forward(part, real, cache=caches[1])
            torch.testing.assert_close(got, want, rtol=1e-4, atol=1e-4, msg=f"turn {turn}")


@pytest.mark.parametrize("attrs", [{"window": 2, "dilation": 2, "first": 1}, {"window": 5}])
def test_queries_in_parts(
    make_tiny: Make, monkeypatch: pytest.MonkeyPatch, attrs: dict[str, Any]
) -> None:
    monkeypatch.setattr(attend, "TOGETHER", 3)
    test_equals_the_reference(make_tiny, attrs, True, [5, 1, 2])
    test_equals_the_reference(make_tiny, attrs, True, [8])


@pytest.mark.parametrize(
    ("attrs", "read"),
    [
        ({"window": 3}, [27, 28, 29]), ({"window": 3, "dilation": 3}, [23, 26, 29]),
        ({"window": 2, "dilation": 5, "first": 2}, [0, 1, 24, 29]), ({}, list(range(30))),
    ],
)  # fmt: skip
def test_a_step_reads_the_keys_in_its_window_alone(
    make_tiny: Make, monkeypatch: pytest.MonkeyPatch, attrs: dict[str, Any], read: list[int]
) -> None:
    program = add_cache(make_tiny(**attrs))
    seen: list[torch.Tensor] = []
    call = torch.nn.functional.scaled_dot_product_attention

    def watch(q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, **more: Any) -> torch.Tensor:
        seen.append(k)
        return call(q, k, v, **more)

    fast = Runner(program, attention_implementations(program))
    cache = fast.start(1)
    fast.forward(torch.arange(29)[None], cache=cache)
    monkeypatch.setattr(torch.nn.functional, "scaled_dot_product_attention", watch)
    fast.forward(torch.tensor([[3]]), cache=cache)
    state = cache.states["kv0"]
    want = state._kv[0][:, :, read]
    assert torch.equal(seen[0], want)


def test_rewound_steps_get_masks_of_their_own(make_tiny: Make) -> None:
    program = add_cache(make_tiny(window=4))
    plain, fast = Runner(program), Runner(program, attention_implementations(program))
    caches = plain.start(1), fast.start(1)
    ids = torch.arange(12)[None]
    for runner, cache in zip((plain, fast), caches, strict=True):
        runner.forward(ids[:, :6], cache=cache)
        runner.forward(ids[:, 6:9], cache=cache)
        cache.rewind(2)
    want = plain.forward(ids[:, 7:10], cache=caches[0])
    torch.testing.assert_close(
        fast.forward(ids[:, 7:10], cache=caches[1]), want, rtol=1e-4, atol=1e-4
    )
