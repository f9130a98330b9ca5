"""Laws of the methods on whole programs that hold for any knob, not at one value of it."""

import pytest
import torch

from llmc.compiler.ir.interpret import run
from llmc.compiler.pipeline import recipe, zoo
from llmc.compiler.pipeline.compile import compile_plan
from llmc.compiler.pipeline.measure import model_inputs
from llmc.compiler.pipeline.plan import make_plan


def tokens() -> torch.Tensor:
    return torch.randint(0, 20, (6, 16), generator=torch.Generator().manual_seed(1))


def looked(program, site):
    """Logits, and per channel the largest magnitudes of a site's value and of its readers."""
    seen = {}
    out = run(program, model_inputs(tokens()), observe=lambda n, v: seen.setdefault(n.name, v))
    weights = [program.fetch(p).movedim(axis, -1).abs() for _, p, axis in site.consumers]
    top = torch.stack([w.flatten(0, -2).amax(0) for w in weights]).amax(0)
    return out, seen[site.value].abs().flatten(0, -2).amax(0), top


@pytest.mark.parametrize("alpha", [0.2, 0.5, 0.85])
@pytest.mark.parametrize("attrs", [{}, {"norm": "layer", "mlp": "relu", "bias": True}])
def test_smoothing_moves_size_and_nothing_else(alpha, attrs):
    """algorithms.md 2.5 e: max|x_j|·max|W_:j| of each channel and the logits stay, to 1e-5."""
    program = zoo.decoder(seed=7, **attrs)
    text = f"smooth:alpha={alpha},round=none"
    done = compile_plan(make_plan(program, recipe.from_strings([text])), tokens())
    sites = [m.site for m in done.plan.stages[0].migrations]
    moved = {a.param for site in sites for a in site.absorbers}
    # A matrix that takes another site's division in its rows has other columns for that reason.
    alone = [site for site in sites if moved.isdisjoint(p for _, p, _ in site.consumers)]
    assert alone
    for site in alone:
        old, x, w = looked(program, site)
        new, small, large = looked(done.program, site)
        assert (new - old).abs().max() <= 1e-5 * old.abs().max()
        torch.testing.assert_close(small * large, x * w, rtol=1e-5, atol=0)
        assert not torch.equal(small, x)
