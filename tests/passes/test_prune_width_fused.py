"""prune_width where one matrix reads heads and neurons side by side, as fused outputs do."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor, nn

from llmc.compiler.analysis.blocks import apply_segments
from llmc.compiler.analysis.groups import dependency_groups
from llmc.compiler.capture import capture
from llmc.compiler.ir.graph import Program
from llmc.compiler.ir.interpret import run
from llmc.compiler.pipeline import recipe
from llmc.compiler.pipeline.compensate import biases, compensations
from llmc.compiler.pipeline.compile import compile_plan
from llmc.compiler.pipeline.measure import Options
from llmc.compiler.pipeline.plan import make_plan

OPTIONS = Options(batch=3)


class Fused(nn.Module):
    """x + o([attention, gelu(mlp)]): the output matrix reads two groups."""

    def __init__(self, bias: bool) -> None:
        super().__init__()
        self.norm = nn.RMSNorm(16, eps=1e-5)
        self.qkv = nn.Linear(16, 48, bias=False)
        self.up = nn.Linear(16, 24, bias=False)
        self.out = nn.Linear(16 + 24, 16, bias=bias)

    def forward(self, x: Tensor) -> Tensor:
        h = self.norm(x)
        batch, length, _ = x.shape
        q, k, v = (
            z.view(batch, length, 4, 4).transpose(1, 2) for z in self.qkv(h).chunk(3, -1)
        )  # fmt: skip
        y = nn.functional.scaled_dot_product_attention(q, k, v, is_causal=True)
        y = y.transpose(1, 2).reshape(batch, length, 16)
        return x + self.out(torch.cat([y, nn.functional.gelu(self.up(h))], -1))


class Model(nn.Module):
    def __init__(self, bias: bool) -> None:
        super().__init__()
        self.table = nn.Embedding(96, 16)
        self.blocks = nn.ModuleList([Fused(bias), Fused(bias)])
        self.norm = nn.RMSNorm(16, eps=1e-5)
        self.head = nn.Linear(16, 96, bias=False)

    def forward(self, input_ids: Tensor) -> Tensor:
        x = self.table(input_ids)
        for block in self.blocks:
            x = block(x)
        return self.head(self.norm(x))


def ids() -> Tensor:
    g = torch.Generator().manual_seed(0)
    return torch.randint(3, 90, (6, 12), generator=g)


def program(bias: bool) -> Program:
    torch.manual_seed(0)
    out = capture(Model(bias).eval(), inputs={"input_ids": ids()[:2]})
    apply_segments(out)
    return out


def observed(made: Program, name: str) -> Tensor:
    seen: dict[str, Tensor] = {}
    run(made, {"input_ids": ids()}, observe=lambda n, v: seen.setdefault(n.name, v))
    return seen[name].double()


@pytest.mark.parametrize("bias", [False, True])
@pytest.mark.parametrize("budget", [1, 1 << 30])
def test_one_shift_and_one_refit_of_all_lost_columns(bias, budget):
    """Against least squares over what the matrix reads; a tight budget splits the two groups."""
    made = program(bias)
    both = {
        g: torch.arange(g.units // 2)
        for g in dependency_groups(made)
        if g.id in ("block0/head0", "block0/neuron0")
    }
    assert len(both) == 2
    (place,) = biases(made, list(both))
    assert place.new != bias
    options = Options(batch=3, budget=budget)
    found = {
        kind: compensations(made, both, kind, 1e-9, ids(), options)
        for kind in ("bias", "weights", "both")
    }
    reader = made.node(place.node)
    x = observed(made, reader.args[0].name).flatten(0, 1)
    weight = made.weights.load(place.weight).double()
    old = made.weights.load(place.param).double() if bias else torch.zeros(16).double()
    kept = torch.cat([torch.arange(8), 16 + torch.arange(12)])
    mean = x.mean(0)
    for kind, moments in (("weights", x), ("both", x - mean)):
        want = torch.linalg.lstsq(moments[:, kept], moments @ weight.T).solution.T
        torch.testing.assert_close(
            found[kind][place.weight].double(), want, rtol=1e-3, atol=1e-3
        )  # fmt: skip
    now = {"bias": weight[:, kept], "both": found["both"][place.weight].double()}
    for kind, after in now.items():
        want = old + weight @ mean - after @ mean[kept]
        torch.testing.assert_close(found[kind][place.param].double(), want, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("bias", [False, True])
@pytest.mark.parametrize("repair", ["bias", "weights", "both"])
def test_the_first_output_comes_closer(bias, repair):
    made = program(bias)
    first = [g for g in dependency_groups(made) if g.id == "block0/neuron0"]
    (place,), error = biases(made, first), {}
    for kind in ("none", repair):
        knobs = f"prune_width:remove=0.4,multiple=1,method=flap,compensate={kind}"
        done = compile_plan(make_plan(made, recipe.from_strings([knobs])), ids(), OPTIONS)
        assert {k.split("/")[1] for k in done.structure[0]["choice"]["keep"]} == {
            "head0", "neuron0",
        }  # fmt: skip
        off = observed(done.program, place.node) - observed(made, place.node)
        error[kind] = float(off.square().mean())
    assert error[repair] < error["none"]
