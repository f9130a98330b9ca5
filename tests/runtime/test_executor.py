"""The flattened runner: the interpreter's numbers, weights counted as they lie in memory."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import fx

from llmc.compiler.ir import packing
from llmc.compiler.ir.dims import BATCH
from llmc.compiler.ir.errors import ModelError, UsageError
from llmc.compiler.ir.graph import Program
from llmc.compiler.ir.interpret import run
from llmc.compiler.pipeline.zoo import Builder
from llmc.compiler.runtime.executor import Runner
from llmc.compiler.runtime.sizes import roles, sizes

Make = Callable[..., Program]


def packed(b: Any, n: int, k: int) -> fx.Node:
    """A 4-bit matrix with two groups per row."""
    q = torch.randint(0, 16, (n, k), generator=b.generator)
    scale = (torch.rand(n, 2, generator=b.generator) * 0.1).half()
    codes = b.tensor(packing.pack(q, 4), trained=False, keep=True)
    parts = (codes, b.tensor(scale, trained=False, keep=True))
    return b.emit("llmc.dequantize", *parts, bits=4, group=k // 2, columns=k)


def inputs_of(ids: torch.Tensor) -> dict[str, torch.Tensor]:
    return {
        "input_ids": ids,
        "position_ids": torch.arange(ids.shape[1]).expand_as(ids),
        "attention_mask": torch.ones_like(ids, dtype=torch.bool),
    }


IDS = torch.tensor([[3, 1, 4, 1, 5], [9, 2, 6, 5, 3]])


@pytest.mark.parametrize("resident", ["packed", "dense"])
@pytest.mark.parametrize("matrix", [None, packed])
def test_equals_the_interpreter(make_tiny: Make, matrix: Any, resident: Any) -> None:
    program = make_tiny(matrix=matrix)
    want = run(program, inputs_of(IDS))
    assert torch.equal(Runner(program, resident=resident).forward(IDS), want)


def test_codes_stay_packed_unless_asked(make_tiny: Make) -> None:
    program = make_tiny(matrix=packed, layers=2)
    codes = [n for n, r in roles(program).items() if r == "codes"]
    small = Runner(program).memory_report()
    large = Runner(program, resident="dense").memory_report()
    assert small.stored == large.stored == program.weight_bytes()
    assert set(codes) < set(small.weights)
    assert small.computed == {}
    assert set(large.weights).isdisjoint(codes)
    dense = sum(4 * p for p in _elements(program))
    assert sum(large.computed.values()) == dense


def _elements(program: Program) -> list[int]:
    return [
        n.kwargs["columns"] * program.params[str(n.args[0].target)].shape[0]
        for n in program.calls("llmc.dequantize")
    ]


def test_packed_codes_are_what_is_resident(make_builder: Any) -> None:
    b = make_builder()
    ids = b.input("input_ids", torch.int64)
    x = b.emit("aten.embedding.default", b.param(8, 256, dtype=torch.bfloat16), ids)
    program = b.done(b.emit("aten.linear.default", x, packed(b, 512, 256)))
    report = Runner(program).memory_report()
    assert report.weights == {"p0": 8 * 256 * 4, "p1": 512 * 32 * 4, "p2": 512 * 2 * 2}
    assert report.computed == {}
    assert report.total == sum(report.weights.values())
    dense = Runner(program, resident="dense").memory_report()
    assert list(dense.computed.values()) == [512 * 256 * 4]
    assert dense.to_json()["total"] == dense.total == 512 * 256 * 4 + 8 * 256 * 4


def test_implementations_replace_nodes_by_name(make_tiny: Make) -> None:
    program = make_tiny()
    node = list(program.calls("aten.linear.default"))[-1]
    calls = []

    def twice(x: torch.Tensor, w: torch.Tensor) -> torch.Tensor:
        calls.append(x.shape)
        return 2 * torch.nn.functional.linear(x, w)

    got = Runner(program, {node.name: twice}).forward(IDS)
    assert torch.equal(got, 2 * Runner(program).forward(IDS))
    assert calls == [(2, 5, 16)]


def test_mask_and_default_positions(make_tiny: Make) -> None:
    runner = Runner(make_tiny())
    padded = torch.cat([torch.zeros(2, 3, dtype=torch.int64), IDS], 1)
    mask = torch.cat([torch.zeros(2, 3), torch.ones(2, 5)], 1)
    got = runner.forward(padded, mask)[:, 3:]
    torch.testing.assert_close(got, runner.forward(IDS), rtol=1e-4, atol=1e-4)


def test_padding_without_a_mask_input_is_refused(make_tiny: Make) -> None:
    runner = Runner(make_tiny(masked=False))
    with pytest.raises(ModelError, match="one length"):
        runner.forward(IDS, torch.tensor([[0, 1, 1, 1, 1], [1, 1, 1, 1, 1]]))


def test_cache_is_asked_for_and_refused(make_tiny: Make) -> None:
    from llmc.compiler.runtime.cache import add_cache

    plain, cached = Runner(make_tiny()), Runner(add_cache(make_tiny()))
    with pytest.raises(ModelError, match="expected a cache, found none"):
        cached.forward(IDS)
    with pytest.raises(ModelError, match="expected no cache"):
        plain.forward(IDS, cache=cached.start(2))
    with pytest.raises(ModelError, match="add_cache"):
        plain.start(2)


def test_unknown_inputs_and_policies_are_refused(make_builder: Any, make_tiny: Make) -> None:
    b = make_builder()
    pixels = b.input("pixel_values", torch.float32)
    with pytest.raises(ModelError, match="pixel_values"):
        Runner(b.done(pixels))
    with pytest.raises(UsageError, match="'lazy'"):
        Runner(make_tiny(), resident="lazy")  # type: ignore[arg-type]


def test_weights_are_read_once(make_tiny: Make) -> None:
    program = make_tiny()
    reads: list[str] = []
    real = program.weights.load

    class Counting:
        def load(self, name: str) -> torch.Tensor:
            reads.append(name)
            return real(name)

    program.weights = Counting()
    runner = Runner(program)
    runner.forward(IDS)
    runner.forward(IDS)
    assert sorted(reads) == sorted(program.params)


def test_sizes_count_what_linears_multiply_with(make_tiny: Make) -> None:
    dense = sizes(make_tiny(dtype=torch.bfloat16))
    assert dense.bits_per_weight == 16
    per_layer = 16 * 16 * 2 + 8 * 16 * 2 + 3 * 24 * 16
    assert dense.linear_weights == 2 * per_layer
    assert dense.by_role["embedding"] == (32 + 64) * 16 * 2
    assert dense.by_role["head"] == 32 * 16 * 2
    assert dense.by_role["gain"] == 4 * 16 * 4
    assert sum(dense.by_role.values()) == dense.total
    small = sizes(make_tiny(matrix=packed))
    assert small.linear_weights == 2 * per_layer
    # 16 columns: 2 words and 2 scales of 16 bits per row; 24 columns: 3 words and 2 scales.
    rows16, rows24 = 2 * (16 + 8 + 8 + 16 + 24 + 24), 2 * 16
    assert small.linear_bytes == rows16 * (8 + 4) + rows24 * (12 + 4)
    assert small.to_json()["bits_per_linear_weight"] == small.bits_per_weight


def test_a_role_is_not_read_through_what_changes_numbers() -> None:
    b = Builder()
    x = b.input("x", torch.float32, BATCH, 4)
    moved = b.call("aten.transpose.int", b.param(4, 3), 0, 1)
    changed = b.call("aten.tanh.default", b.param(3, 4))
    both = [b.call("aten.linear.default", x, w) for w in (moved, changed)]
    kinds = roles(b.finish(b.call("aten.add.Tensor", *both)))
    assert kinds["p1"] == "operand"
    assert kinds["p0"] in ("head", "weight")
