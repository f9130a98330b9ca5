"""quip: rotations change nothing but the rounding; LDLQ, invariants, and what goes beside them."""

import pytest
import torch

from llmc.compiler.ir.errors import ModelError, UsageError
from llmc.compiler.ir.graph import Param
from llmc.compiler.ir.interpret import run
from llmc.compiler.ir.levels import levels
from llmc.compiler.ir.scheme import Transform
from llmc.compiler.pipeline import recipe, rotating, zoo
from llmc.compiler.pipeline.analysis import Analysis
from llmc.compiler.pipeline.compile import compile_plan
from llmc.compiler.pipeline.measure import model_inputs
from llmc.compiler.pipeline.plan import make_plan
from llmc.compiler.pipeline.registry import all_passes
from llmc.compiler.runtime.artefact import Contents, load, save
from llmc.compiler.runtime.sizes import sizes
from llmc.compiler.solvers import prepare, solve
from llmc.compiler.solvers.tables import TableGrid

F64 = torch.float64
BOTH = Transform("orthogonal", False)


def randn(*shape, seed=0):
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=F64)


def tokens(samples=8, length=16):
    return torch.randint(0, 20, (samples, length), generator=torch.Generator().manual_seed(1))


def compiled(text, program=None):
    plan = make_plan(program or zoo.decoder(), recipe.from_strings([text]))
    return compile_plan(plan, tokens())


def logits(program):
    return run(program, model_inputs(tokens(2)))


def problem(rows=24, inputs=28, seed=0):
    """A weight with a few loud columns, correlated inputs, and the rotations around it."""
    w = randn(rows, inputs, seed=seed)
    w[:, ::9] *= 20
    x = randn(400, inputs, seed=seed + 1) @ randn(inputs, inputs, seed=seed + 2)
    h = x.t() @ x
    d = rotating.rescale(h.diagonal(), w.square().sum(0))
    into = rotating.signs(inputs, 3, "in") / d
    return w, h, rotating.Turn(into, rotating.signs(rows, 3, "out"))


def test_without_rounding_nothing_changes():
    w, _, turn = problem()
    torch.testing.assert_close(turn.back(turn.weight(w)), w, rtol=1e-12, atol=1e-12)
    b = zoo.Builder(dtype=F64)
    x = b.call("aten.mul.Tensor", b.param(5, 28), 1.0)
    y = b.call("aten.linear.default", x, b.param(24, 28), b.param(24))
    program = b.finish(y)
    want = run(program, {})
    (linear,) = program.calls("aten.linear.default")
    name = str(linear.args[1].target)
    made = rotating.encode_rotation(program, linear.name, BOTH, BOTH, made_by="test")
    assert made == [f"{name}.turn_in", f"{name}.turn_out"]
    turn = rotating.Turn(rotating.signs(28, 0, "a"), rotating.signs(24, 0, "b"))
    for param, tensor in zip(made, (turn.into, turn.out), strict=True):
        program.set_tensor(param, tensor)
    program.set_tensor(name, turn.weight(program.fetch(name)))
    torch.testing.assert_close(run(program, {}), want, rtol=1e-12, atol=1e-12)


def test_the_proxy_loss_is_that_of_the_unrotated_weight():
    w, h, turn = problem()
    delta = randn(*w.shape, seed=9)
    rotated, gram = turn.weight(delta), turn.gram(h)
    torch.testing.assert_close(
        torch.trace(rotated @ gram @ rotated.t()), torch.trace(delta @ h @ delta.t()),
        rtol=1e-11, atol=0.0,
    )  # fmt: skip


def test_rescaling_is_the_best_diagonal():
    w, h, _ = problem()
    d = rotating.rescale(h.diagonal(), w.square().sum(0))

    def cost(d):
        return float((h.diagonal() / d**2).sum() * (w * d).square().sum())

    best = float((h.diagonal().sqrt() * w.square().sum(0).sqrt()).sum() ** 2)
    assert cost(d) == pytest.approx(best, rel=1e-10)
    assert all(best <= cost(torch.exp(0.3 * randn(28, seed=s))) for s in range(20))
    dead = rotating.rescale(h.diagonal() * 0, w.square().sum(0))
    assert torch.equal(dead, torch.ones_like(dead))


def test_a_spike_is_spread():
    w = 0.1 * randn(64, 96)
    w[3, 5] = 50.0
    turn = rotating.Turn(rotating.signs(96, 0, "a"), rotating.signs(64, 0, "b"))

    def peak(w):
        return float(w.abs().max() / w.square().mean().sqrt())

    assert peak(w) > 50
    assert peak(turn.weight(w)) < 6


def ldlq(w, h, scale, values):
    """Feedback of all rounded columns through H = R Rᵀ, R upper; levels times the row's scale."""
    r = torch.linalg.cholesky(h.flip(0, 1)).flip(0, 1)
    out = torch.zeros_like(w)
    for j in range(w.shape[1]):
        wanted = w[:, j] + (w[:, :j] - out[:, :j]) @ (r[:j, j] / r[j, j])
        index = (wanted[:, None] / scale[:, None] - values).abs().argmin(1)
        out[:, j] = values[index] * scale
    return out


@pytest.mark.parametrize("bits", [2, 3, 4])
def test_the_sweep_is_ldlq(bits):
    w, h, turn = problem()
    w, h = turn.weight(w).float(), turn.gram(h)
    values = levels("midrise", bits)
    grid = TableGrid(bits, None, clip="mse", values=tuple(values.tolist()))
    found = solve(w, grid=grid, factor=prepare(h.float(), 0.01))
    damped = h + 0.01 * h.diagonal().mean() * torch.eye(len(h), dtype=F64)
    want = ldlq(w.double(), damped, found.scale[:, 0].double(), values.double())
    kept = (found.weight.double() - want).abs() > 1e-6
    # Rows that the plain answer serves better are kept as they were.
    assert int(kept.any(1).sum()) <= found.rows_rtn
    assert all(len(row.unique()) <= 2**bits for row in found.codes)


def test_the_dense_equivalent_is_what_runs():
    program = zoo.build("with_bias")
    done = compiled("quip:bits=3", program)
    rotations = list(done.program.calls("llmc.rotate"))
    # Of 14 weights each turns its outputs; q, k, v share one turn of the inputs, gate and up too.
    assert [bool(n.kwargs.get("inverse")) for n in rotations].count(True) == 14
    assert [bool(n.kwargs.get("inverse")) for n in rotations].count(False) == 8
    turned = {n.args[0]: n.args[1] for n in rotations if n.kwargs.get("inverse")}
    seen = {}
    run(done.program, model_inputs(tokens(2)), observe=lambda n, v: seen.__setitem__(n.name, v))
    for linear, out in turned.items():
        into = linear.args[0].args[1]
        turn = rotating.Turn(*(done.program.weights.load(str(p.target)) for p in (into, out)))
        dense = turn.back(seen[linear.args[1].name])
        program.set_tensor(str(out.target).partition(".")[0], dense)
    torch.testing.assert_close(logits(done.program), logits(program), rtol=1e-4, atol=1e-4)


def test_planned_bytes_are_exact_and_an_artefact_runs_the_same(tmp_path):
    plan = make_plan(zoo.decoder(), recipe.from_strings(["quip:bits=3,sides=in"]))
    done = compile_plan(plan, tokens())
    assert plan.exact
    assert plan.program.weight_bytes() == done.program.weight_bytes()
    save(tmp_path / "out", Contents(done.program))
    assert torch.equal(logits(load(tmp_path / "out").program), logits(done.program))
    assert not any(n.kwargs.get("inverse") for n in done.program.calls("llmc.rotate"))


def test_signs_follow_the_seed():
    def made(text):
        done = compiled(text, zoo.decoder(blocks=1))
        return [done.program.weights.load(n) for n in done.program.params if ".turn_" in n]

    def same(a, b):
        return all(torch.equal(x, y) for x, y in zip(made(a), made(b), strict=True))

    assert same("quip", "quip")
    assert not same("quip", "quip:seed=1")
    assert {t.dtype for t in made("quip:rescale=false")} == {torch.int8}


def test_more_bits_lose_less():
    program = zoo.decoder(blocks=1)
    lost = [sum(r["loss"] for r in compiled(f"quip:bits={b}", program).records) for b in (2, 3, 4)]
    assert lost[0] > 2 * lost[1] > 4 * lost[2]


def test_loud_columns_cost_less_when_rotated():
    """The layer sum, on weights with a loud channel and on the same levels."""
    program = zoo.decoder(hidden=32, inner=48)
    for node in program.calls("aten.linear.default"):
        name = str(node.args[1].target)
        w = program.weights.load(name).clone()
        w[:, 3] *= 20
        program.set_tensor(name, w)
    rotated = compiled("quip:bits=3,grid=uniform", program).records
    plain = compiled("w3:group=row", program).records
    assert sum(r["loss"] for r in rotated) < sum(r["loss"] for r in plain)


@pytest.mark.parametrize(
    ("text", "match"),
    [
        ("prune24,quip", "codes alone beside an online rotation, found mask"),
        ("prune,quip:grid=uniform", "codes alone beside an online rotation, found mask"),
        ("smooth,quip", "channel scales or a rotation"),
        ("quip,lorc:rank=2", "codes alone beside an online rotation, found low_rank"),
        ("quip,w4", "one pass that writes codes"),
        ("quip:bits=9", "expected 2..8"),
        ("quip:sides=left", "expected one of in, out, both"),
        ("quip:group=5", "expected 8..65536"),
    ],
)
def test_what_goes_nowhere_beside_it(text, match):
    with pytest.raises(UsageError, match=match):
        compiled(text)


def test_one_value_is_rotated_alike():
    given = recipe.from_strings(["quip"])
    over = recipe.Override(roles=("k",), knobs=(("quip", (("rescale", False),)),))
    with pytest.raises(UsageError, match="one rotation for all"):
        make_plan(zoo.decoder(), recipe.Recipe(given.stages, (over,)))


def test_other_bits_on_one_value_share_its_rotation():
    given = recipe.from_strings(["quip"])
    over = recipe.Override(roles=("k",), knobs=(("quip", (("bits", 4),)),))
    done = compile_plan(make_plan(zoo.decoder(), recipe.Recipe(given.stages, (over,))), tokens())
    lost = {r["site"]: r["loss"] for r in done.records}
    assert lost["block0/linear1"] < lost["block0/linear0"] / 4


def test_widths_without_a_fast_mix_are_refused():
    found, refused = (
        all_passes()["quip"].build("quip", {}).sites(Analysis(zoo.decoder(inner=4099, blocks=1)))
    )
    assert {r.predicate for r in refused} == {"mixable", "not_head"}
    assert "odd factor" in next(r.reason for r in refused if r.predicate == "mixable")
    assert {s.role for s in found} == {"q", "k", "v", "o"}


def test_a_param_of_another_name_is_not_shared():
    """A rotation that something else has put on a value is no rotation of quip's."""
    b = zoo.Builder()
    x = b.call("aten.mul.Tensor", b.param(5, 8), 1.0)
    signs = b.program.add_param(
        Param("other", (8,), torch.int8, keep=True), rotating.signs(8, 0, ""), before=b.end
    )
    both = [b.call("llmc.rotate", x, signs), b.linear(x, 8, 8)]
    program = b.finish(b.call("aten.add.Tensor", *both))
    rotating.encode_rotation(program, both[1].name, BOTH, None, made_by="test")
    assert len(list(program.calls("llmc.rotate"))) == 2


def test_stored_bits_hold_the_scales_of_both_sides():
    done = compiled("quip")
    turns = sum(p.bytes for n, p in done.program.params.items() if ".turn_" in n)
    coded = sum(p.bytes for n, p in done.program.params.items() if ".codes" in n or ".scale" in n)
    assert sizes(done.program).linear_bytes == turns + coded


def test_broken_facts_are_named():
    program = zoo.decoder(blocks=1)
    program.facts["rotated"] = {"p1": "in"}
    with pytest.raises(ModelError, match="rotated sides"):
        make_plan(program, recipe.from_strings(["quip"]))
