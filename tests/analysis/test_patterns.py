"""Scale patterns: pulling back through moves agrees with running the moves on labels."""

from __future__ import annotations

import math
import random

import pytest
import torch

from llmc.compiler.analysis.patterns import Labels, only_on, pull_back
from llmc.compiler.ir.dims import BATCH, SEQ
from llmc.compiler.ir.interpret import run
from llmc.compiler.pipeline.zoo import Builder


def moved(seed: int) -> None:
    """A random chain of moves: labels pulled back to its input and pushed through must return."""
    r = random.Random(seed)
    b = Builder()
    x = b.input("x", torch.int64, BATCH, SEQ, r.choice([12, 24]))
    start, length = x, [b.call("aten.sym_size.int", x, d) for d in (0, 1)]
    chain = []
    for _ in range(r.randint(1, 4)):
        shape = x.meta["llmc"].type.shape
        kind = r.choice(["split", "merge", "swap", "unsqueeze", "squeeze", "slice"])
        last = shape[-1]
        if kind == "split" and len(shape) == 3 and shape[:2] == (BATCH, SEQ) and last % 4 == 0:
            x = b.call("aten.reshape.default", x, [*length, 4, last // 4])
        elif kind == "merge" and len(shape) == 4 and shape[:2] == (BATCH, SEQ):
            x = b.call("aten.reshape.default", x, [*length, shape[2] * shape[3]])
        elif kind == "swap" and len(shape) > 3:
            x = b.call("aten.transpose.int", x, r.choice([1, 2]), 3)
        elif kind == "unsqueeze":
            x = b.call("aten.unsqueeze.default", x, r.randrange(len(shape) + 1))
        elif kind == "squeeze" and 1 in shape:
            x = b.call("aten.squeeze.dim", x, shape.index(1))
        elif kind == "slice" and isinstance(last, int) and last > 2:
            x = b.call("aten.slice.Tensor", x, -1, 1, last - 1)
        else:
            continue
        chain.append(x)
    if not chain:
        return
    program = b.finish(x)
    shape = [d if isinstance(d, int) else 1 for d in x.meta["llmc"].type.shape]
    pattern = torch.arange(math.prod(shape)).reshape(shape)
    want = pattern
    for node in reversed(chain):
        back = pull_back(node, pattern)
        assert back is not None
        assert back[0].node is node.args[0]
        pattern = back[1]
    source = [d if isinstance(d, int) else 1 for d in start.meta["llmc"].type.shape]
    got = run(program, {"x": pattern.expand(source)})
    assert torch.equal(got, want)
    # What no output element comes from is unscaled.
    assert int((pattern >= 0).sum()) == want.numel()


@pytest.mark.parametrize("seed", range(60))
def test_random_moves(seed: int) -> None:
    moved(seed)


def test_a_symbolic_axis_with_scales_is_not_followed() -> None:
    b = Builder()
    x = b.input("x", torch.float32, BATCH, SEQ, 4)
    y = b.call("aten.reshape.default", x, [-1, 4])
    pattern = torch.arange(4).reshape(1, 4)
    found = pull_back(y, pattern)
    assert found is not None
    assert found[1].tolist() == [[[0, 1, 2, 3]]]
    z = b.call("aten.reshape.default", y, [-1])
    assert pull_back(z, torch.arange(4)) is None


def test_a_mixed_axis_is_not_followed() -> None:
    b = Builder()
    x = b.input("x", torch.float32, BATCH, SEQ, 4, 6)
    y = b.call("aten.flip.default", x, [3])
    assert pull_back(y, torch.arange(6).reshape(1, 1, 1, 6)) is None


def test_getitem_goes_to_its_own_piece() -> None:
    b = Builder()
    x = b.input("x", torch.float32, BATCH, SEQ, 7)
    pieces = b.call("aten.split_with_sizes.default", x, [3, 4], -1)
    one = b.call("operator.getitem", pieces, 1)
    first = pull_back(one, torch.arange(4).reshape(1, 1, 4))
    assert first is not None
    assert first[0].node is pieces
    assert first[0].part == 1
    second = pull_back(pieces, first[1], first[0].part)
    assert second is not None
    assert second[1].flatten().tolist() == [-1, -1, -1, 0, 1, 2, 3]


def test_labels_join_and_compact() -> None:
    labels = Labels(6)
    pattern = torch.tensor([[0, 1, 2], [3, 4, 5]])
    first = labels.constant_over(pattern, 0)
    assert first is not None
    assert first.tolist() == [[0, 1, 2]]
    count, index = labels.compact()
    assert count == 3
    assert index.tolist() == [0, 1, 2, 0, 1, 2]
    assert labels.constant_over(torch.tensor([[0, -1], [1, 2]]), 0) is None


def test_only_on() -> None:
    assert only_on(torch.zeros(1, 3, 1), (1,))
    assert not only_on(torch.zeros(2, 3, 1), (1,))
