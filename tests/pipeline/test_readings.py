"""Where groups are read: each matrix times its statistics' rows is what its call gives."""

from __future__ import annotations

import pytest
import torch

from llmc.compiler.ir.interpret import run
from llmc.compiler.pipeline import importance, readings, zoo
from llmc.compiler.pipeline.analysis import Analysis
from llmc.compiler.pipeline.importance import Scoring
from llmc.compiler.pipeline.measure import Options, model_inputs

OPTIONS = Options(batch=2)


def tokens() -> torch.Tensor:
    g = torch.Generator().manual_seed(2)
    return torch.randint(0, 20, (5, 9), generator=g)


def observed(program):
    seen: dict[str, list[torch.Tensor]] = {}
    run(program, model_inputs(tokens()), observe=lambda n, v: seen.setdefault(n.name, v))
    return seen


def inner(program, node, seen):
    """The inputs of an experts call's down projections, token by token, as the op defines it."""
    x, index, weight, both = (seen[a.name] for a in node.args[:4])
    experts, width = both.shape[0], both.shape[1] // 2
    out = torch.zeros(len(x), experts, width)
    for t in range(len(x)):
        for k in range(index.shape[1]):
            e = int(index[t, k])
            gate, up = (both[e] @ x[t]).split(width)
            out[t, e] += weight[t, k] * torch.nn.functional.silu(gate) * up
    return out.flatten(1)


@pytest.mark.parametrize("chunk", [1, 1 << 24])
def test_the_inside_of_experts_is_what_their_down_matrix_reads(chunk, monkeypatch):
    monkeypatch.setattr(readings, "_ELEMENTS", chunk)
    program = zoo.build("moe")
    groups = [g for g in Analysis(program).groups if g.kind in ("expert", "neuron")]
    reads = [r for g in groups for r in readings.readings(program, g)]
    inside = [r for r in reads if r.kind == "inside"]
    assert {len(r.unit_of) for r in inside} == {4 * 24}
    stats = readings.measured(program, inside, ["moments"], tokens(), OPTIONS)
    seen = observed(program)
    for r in inside:
        rows = inner(program, r.node, seen)
        down = r.matrix(program.weights.load(r.param.name))
        torch.testing.assert_close(rows @ down.T, seen[r.node.name], rtol=1e-4, atol=1e-5)
        found = stats.get(r.value, "moments")
        assert found.tokens == len(rows)
        torch.testing.assert_close(found.mean.float(), rows.mean(0), rtol=1e-4, atol=1e-6)
        want = rows.var(0, correction=0)
        torch.testing.assert_close(found.variance.float(), want, rtol=1e-4, atol=1e-6)


def test_units_of_experts_and_of_their_neurons():
    program = zoo.build("moe")
    groups = {g.kind: g for g in Analysis(program).groups if g.segment == "block0"}
    expert, neuron = (readings.readings(program, groups[k]) for k in ("expert", "neuron"))
    assert [r.kind for r in expert] == [r.kind for r in neuron] == ["inside"]
    assert expert[0].unit_of.tolist() == [e for e in range(4) for _ in range(24)]
    assert neuron[0].unit_of.tolist() == list(range(24)) * 4


def test_hidden_channels_are_read_by_every_matrix_on_the_stream():
    program = zoo.build("moe")
    hidden = next(g for g in Analysis(program).groups if g.kind == "hidden")
    kinds = [r.kind for r in readings.readings(program, hidden)]
    # q, k, v and router of two blocks, the head, and the experts' gate and up rows.
    assert sorted(kinds) == ["into"] * 2 + ["linear"] * 9
    for r in readings.readings(program, hidden):
        assert r.matrix(program.weights.load(r.param.name)).shape[1] == 16


@pytest.mark.parametrize("method", ["flap", "wanda"])
def test_scores_of_experts_are_their_formula(method):
    program = zoo.build("moe")
    group = next(g for g in Analysis(program).groups if g.kind == "expert")
    found = importance.scores(program, [group], Scoring(method), tokens(), OPTIONS)[group.id]
    (r,) = readings.readings(program, group)
    rows = inner(program, r.node, observed(program))
    w = r.matrix(program.weights.load(r.param.name))
    if method == "flap":
        each = (rows.var(0, correction=0) * w.square().sum(0)).view(4, 24)
        want, spread = each.mean(1), float(each.std(correction=0))
    else:
        each = (rows.square().mean(0).sqrt() * w.abs()).sum(0).view(4, 24)
        want, spread = each.sum(1), float(each.sum(1).std(correction=0))
    torch.testing.assert_close(found.values.float(), want, rtol=1e-4, atol=1e-6)
    assert found.spread == pytest.approx(spread, rel=1e-3)


def test_michel_of_experts_is_the_gradient_of_a_mask_on_their_output():
    """Mean over samples of |∂loss/∂m_e|, m_e a factor on all that expert e gives."""
    program = zoo.build("moe")
    group = next(g for g in Analysis(program).groups if g.kind == "expert")
    how = Scoring("michel", samples=3)
    found = importance.scores(program, [group], how, tokens(), OPTIONS)[group.id].values
    (r,) = readings.readings(program, group)
    slopes = []
    for sample in tokens()[:3].split(1):
        mask = torch.ones(4, requires_grad=True)

        def fetch(name, mask=mask):
            value = program.fetch(name)
            return value * mask[:, None, None] if name == r.param.name else value

        logits = run(program, model_inputs(sample), fetch=fetch)
        flat = logits[:, :-1].reshape(-1, logits.shape[-1])
        loss = torch.nn.functional.cross_entropy(flat, sample[:, 1:].reshape(-1))
        slopes.append(torch.autograd.grad(loss, mask)[0].abs())
    want = torch.stack(slopes).mean(0)
    torch.testing.assert_close(found.float(), want, rtol=1e-3, atol=1e-6)
