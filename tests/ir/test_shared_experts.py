"""Experts with shared factors: the op against weights written out, shapes, ties, cost."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor

from llmc.compiler.analysis.ties import ties_of
from llmc.compiler.ir.dims import BATCH, SEQ, evaluate
from llmc.compiler.ir.errors import ModelError
from llmc.compiler.ir.ops import cost
from llmc.compiler.ir.ops.semantic import experts
from llmc.compiler.pipeline.zoo import Builder

G = torch.Generator().manual_seed(0)
E, H, INNER, R, S, OUT = 3, 6, 5, 4, 2, 7


def make(*shape: int) -> Tensor:
    return torch.randn(*shape, generator=G, dtype=torch.float64)


X, WEIGHT = make(5, H), make(5, 2)
INDEX = torch.tensor([[0, 2], [2, 1], [2, 0], [0, 1], [1, 2]])
LEFT, RIGHT = make(2 * INNER, R), make(S, INNER)


@pytest.mark.parametrize("left", [None, LEFT])
@pytest.mark.parametrize("right", [None, RIGHT])
def test_factors_equal_the_weights_written_out(left: Tensor | None, right: Tensor | None) -> None:
    gate_up = make(E, 2 * INNER if left is None else R, H)
    down = make(E, OUT, INNER if right is None else S)
    seen: list[tuple[int, Tensor, Tensor]] = []
    args = (X, INDEX, WEIGHT, gate_up, down, left, right)
    made = experts(*args, act="silu", seen=lambda *a: seen.append(a))
    full = gate_up if left is None else left @ gate_up
    back = down if right is None else down @ right
    want = torch.zeros(5, OUT, dtype=torch.float64)
    for t in range(5):
        for k in range(2):
            gate, up = (full[INDEX[t, k]] @ X[t]).chunk(2)
            inner = torch.nn.functional.silu(gate) * up
            want[t] += WEIGHT[t, k] * (back[INDEX[t, k]] @ inner)
    torch.testing.assert_close(made, want, rtol=1e-10, atol=1e-12)
    assert [e for e, _, _ in seen] == [0, 1, 2]
    assert {tuple(i.shape[1:]) for _, _, i in seen} == {(down.shape[2],)}
    called = torch.ops.llmc.experts(*args, act="silu")
    assert torch.equal(called, made)


def call(shapes: dict[str, tuple[int, ...] | None]) -> Any:
    b = Builder()
    ids = b.input("x", torch.float32, BATCH * SEQ, H)
    index = b.input("index", torch.int64, BATCH * SEQ, 2)
    weight = b.input("weight", torch.float32, BATCH * SEQ, 2)
    parts = [None if s is None else b.param(*s) for s in shapes.values()]
    return b.call("llmc.experts", ids, index, weight, *parts, act="silu")


WHOLE: dict[str, tuple[int, ...] | None] = {
    "gate_up": (E, R, H), "down": (E, OUT, S), "left": (2 * INNER, R), "right": (S, INNER)
}  # fmt: skip


def test_the_result_is_as_wide_as_down_and_costs_what_is_multiplied() -> None:
    node = call(WHOLE)
    assert node.meta["llmc"].type.shape == (BATCH * SEQ, OUT)
    flops, _ = cost(node)
    want = 2 * (R * H + 2 * INNER * R + S * INNER + OUT * S)
    assert evaluate(flops, {"B": 1, "S": 3}) == 3 * 2 * want
    kinds = {t.kind for t in ties_of(node)}
    assert "mix" in kinds
    assert "twice" not in kinds  # neurons are no axis of the stacks any more
    plain = call({"gate_up": (E, 2 * INNER, H), "down": (E, OUT, INNER)})
    assert "twice" in {t.kind for t in ties_of(plain)}


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"left": (2 * INNER, R + 1)}, "expected a left factor"),
        ({"left": (2 * INNER,)}, "expected a left factor"),
        ({"left": (2 * INNER + 2, R)}, "rows together"),
        ({"right": (S + 1, INNER)}, "expected a right factor"),
        ({"right": (S, INNER, 1)}, "expected a right factor"),
        ({"right": None}, "rows together"),
        ({"gate_up": (E + 1, R, H)}, "expected expert weights that fit"),
        ({"gate_up": (E, R, H + 1)}, "expected expert weights that fit"),
        ({"down": (OUT, S)}, "rank 3"),
    ],
)
def test_factors_that_do_not_fit(change: dict[str, Any], message: str) -> None:
    with pytest.raises(ModelError, match=message):
        call(WHOLE | change)
