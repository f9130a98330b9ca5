"""The reverse sweep equals torch.autograd on the whole model, ties and all."""

from pathlib import Path

import pytest
import torch

from llmc.compiler.capture import capture
from llmc.compiler.ir.errors import ModelError
from llmc.compiler.ir.interpret import run
from llmc.compiler.pipeline import zoo
from llmc.compiler.pipeline.analysis import Analysis
from llmc.compiler.pipeline.measure import model_inputs, next_token_loss
from llmc.compiler.pipeline.reverse import fisher, gradients

PYLM = Path(__file__).parents[2] / "examples" / "pylm"


def whole(program, ids):
    """Loss and gradients by autograd over the unsplit graph."""
    params = {n: program.fetch(n).clone().requires_grad_() for n in program.params}
    params = {n: p for n, p in params.items() if program.params[n].trained}
    logits = run(program, model_inputs(ids), fetch=lambda n: params.get(n, program.fetch(n)))
    loss = next_token_loss(logits, ids)
    grads = torch.autograd.grad(loss, list(params.values()))
    return float(loss.detach()), dict(zip(params, grads, strict=True))


@pytest.mark.parametrize("name", ["llama_gqa", "layer_norm", "tied_head", "norm_feeds_add"])
def test_gradients_equal_autograd(name):
    program = zoo.build(name)
    Analysis(program)
    ids = torch.randint(0, 20, (3, 7), generator=torch.Generator().manual_seed(0))
    loss, want = whole(program, ids)
    found_loss, found = gradients(program, ids, want)
    assert found_loss == pytest.approx(loss, rel=1e-6)
    for n in want:
        torch.testing.assert_close(found[n], want[n], rtol=1e-5, atol=1e-6)


def test_fisher_of_the_demo_model_equals_autograd():
    program = capture(PYLM)
    Analysis(program)
    ids = torch.randint(0, 2048, (2, 48), generator=torch.Generator().manual_seed(0))
    names = [n for n, p in program.params.items() if p.trained]
    found = fisher(program, ids, names)
    want = {n: torch.zeros(program.params[n].shape) for n in names}
    for sample in ids.split(1):
        for n, g in whole(program, sample)[1].items():
            want[n] += g.pow(2)
    for n in names:
        top = want[n].max()
        assert (found[n].value - want[n]).abs().max() <= 1e-5 * top


def test_an_unsegmented_program_is_refused():
    with pytest.raises(ModelError, match="segmented"):
        gradients(zoo.decoder(), torch.zeros(1, 4, dtype=torch.int64), ["p1"])
