"""Which streams may turn: small programs with one call that keeps or breaks the proof."""

import pytest
import torch

from llmc.compiler.analysis.turning import TurnSite, turn_sites
from llmc.compiler.ir.dims import BATCH, SEQ
from llmc.compiler.ir.interpret import run
from llmc.compiler.pipeline import recipe, zoo
from llmc.compiler.pipeline.encode import refresh_types
from llmc.compiler.pipeline.measure import model_inputs
from llmc.compiler.pipeline.plan import make_plan

WIDTH = 12


def program(edit, norm="rms"):
    """Embedding, a matrix of the stream's norm, the edited stream, a head; in fp64."""
    b = zoo.Builder(seed=2)
    ids = b.input("input_ids", torch.int64, BATCH, SEQ)
    b.input("position_ids", torch.int64, BATCH, SEQ)
    b.input("attention_mask", torch.bool, BATCH, SEQ)

    def normed(x, kind=norm):
        gain = b.param(WIDTH, near=1.0, width=0.3)
        if kind == "layer":
            return b.call("llmc.layer_norm", x, gain, b.param(WIDTH), eps=1e-5)
        return b.call("llmc.rms_norm", x, gain, eps=1e-5)

    x = b.call("aten.embedding.default", b.param(20, WIDTH), ids)
    for _ in range(2):
        inner = b.call("aten.relu.default", b.linear(normed(x), 8, WIDTH))
        x = b.call("aten.add.Tensor", x, b.linear(inner, WIDTH, 8, bias=True))
        x = edit(b, x, normed)
    out = b.finish(b.linear(normed(x), 20, WIDTH))
    out.dtype = torch.float64
    for name in list(out.params):
        out.set_tensor(name, out.weights.load(name).double())
    refresh_types(out)
    return out


def per_token(b, x):
    """One number for each token."""
    return b.call("aten.sigmoid.default", b.linear(x, 1, WIDTH))


def through(b, x):
    """A matrix that reads and writes the stream, without a norm."""
    return b.call("aten.add.Tensor", x, b.linear(x, WIDTH, WIDTH))


KEEPS = {
    "nothing": lambda b, x, _: x,
    "a number": lambda b, x, _: b.call("aten.mul.Tensor", x, 0.7),
    "a sum of two streams": lambda b, x, _: b.call("aten.add.Tensor", x, x),
    "a stored bias": lambda b, x, _: b.call("aten.add.Tensor", x, b.param(WIDTH)),
    "a number for each token": lambda b, x, _: b.call("aten.mul.Tensor", x, per_token(b, x)),
    "a matrix on the stream": lambda b, x, _: through(b, x),
    "moves": lambda b, x, _: b.call("aten.transpose.int", b.call(
        "aten.transpose.int", x, 0, 1), 0, 1),
}  # fmt: skip
BREAKS = {
    "turns": {
        "a number added": lambda b, x, _: b.call("aten.add.Tensor", x, 0.5),
        "a number for each channel": lambda b, x, _: b.call("aten.mul.Tensor", x, b.param(WIDTH)),
        "a nonlinearity": lambda b, x, _: b.call("aten.relu.default", x),
        "a square": lambda b, x, _: b.call("aten.mul.Tensor", x, x),
        "a number of each token added": lambda b, x, _: b.call(
            "aten.add.Tensor", x, per_token(b, x)
        ),
        "a division by it": lambda b, x, _: b.call("aten.div.Tensor", b.param(WIDTH), x),
    },
    "gain_folds": {
        "a norm that is added": lambda b, x, normed: b.call("aten.add.Tensor", x, normed(x)),
        "a norm of a norm": lambda b, x, normed: b.call(
            "aten.add.Tensor", x, b.linear(normed(normed(x)), WIDTH, WIDTH)
        ),
    },
}  # fmt: skip


def ran(p):
    g = torch.Generator().manual_seed(1)
    return run(p, model_inputs(torch.randint(0, 20, (2, 5), generator=g)))


def turned(p):
    return make_plan(p, recipe.from_strings(["rotate"])).source


@pytest.mark.parametrize("name", KEEPS)
def test_what_lets_the_stream_turn(name):
    p = program(KEEPS[name])
    torch.testing.assert_close(ran(turned(p)), ran(p), rtol=1e-11, atol=1e-11)


@pytest.mark.parametrize(
    ("predicate", "name"), [(p, n) for p, found in BREAKS.items() for n in found]
)
def test_what_holds_it_fast(predicate, name):
    (refused,) = turn_sites(program(BREAKS[predicate][name]))
    assert not isinstance(refused, TurnSite)
    assert refused.predicate == predicate
    assert refused.node in refused.reason


@pytest.mark.parametrize("name", ["nothing", "a number", "a stored bias", "moves"])
def test_layer_norms_take_a_stream_without_a_mean(name):
    p = program(KEEPS[name], norm="layer")
    new = turned(p)
    assert not list(new.calls("llmc.layer_norm"))
    torch.testing.assert_close(ran(new), ran(p), rtol=1e-10, atol=1e-10)


@pytest.mark.parametrize(
    "edit",
    [
        lambda b, x, _: through(b, x),
        lambda b, x, normed: b.call("aten.add.Tensor", x, b.linear(normed(x, "rms"), WIDTH, WIDTH)),
    ],
    ids=["matrix", "rms_norm"],
)
def test_what_sees_the_mean_keeps_it(edit):
    (refused,) = turn_sites(program(edit, norm="layer"))
    assert refused.predicate == "mean_free"


def test_a_bias_that_two_calls_read_stays():
    def edit(b, x, _):
        shared = edit.bias = edit.bias or b.param(WIDTH)
        return b.call("aten.add.Tensor", x, shared)

    edit.bias = None
    (refused,) = turn_sites(program(edit))
    assert refused.predicate == "turns"
