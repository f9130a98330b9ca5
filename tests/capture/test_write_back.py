"""Cut programs written back: from_pretrained gives the same logits, or a refusal says why not."""

from __future__ import annotations

import math
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from tiny_models import capture_tiny, make, random_tokens
from torch import fx

from llmc.compiler.analysis.blocks import apply_segments
from llmc.compiler.analysis.cut import cut
from llmc.compiler.analysis.depth import leave_out
from llmc.compiler.analysis.groups import dependency_groups
from llmc.compiler.capture.bisimulate import bisimulate
from llmc.compiler.capture.checkpoint import Checkpoint
from llmc.compiler.capture.folds import fold_counts, move_eps
from llmc.compiler.ir.errors import UsageError
from llmc.compiler.ir.exits import Exits
from llmc.compiler.ir.graph import Info, Param, Program
from llmc.compiler.ir.interpret import run
from llmc.compiler.ir.types import TensorType
from llmc.compiler.runtime.export import export


@pytest.fixture(scope="module")
def tiny() -> Callable[[str], Program]:
    """``tiny(name)``: a clone of a program that is captured once."""
    made: dict[str, Program] = {}

    def get(name: str) -> Program:
        if name not in made:
            made[name] = capture_tiny(name)
        return made[name].clone()

    return get


def narrowed(program: Program, kind: str, count: int) -> Program:
    """The first ``count`` units of every group of a kind stay."""
    keep = {g: torch.arange(count) for g in dependency_groups(program) if g.kind == kind}
    assert keep
    cut(program, keep)
    return program


def written(program: Program, folder: Path) -> tuple[dict[str, Any], Any]:
    """What an export says, and the model that plain transformers loads from it."""
    from transformers import AutoModelForCausalLM

    record = export(program, folder)
    return record, AutoModelForCausalLM.from_pretrained(str(folder)).eval()


def assert_same_logits(program: Program, model: Any) -> None:
    """Program and model agree on random tokens, to 1e-4 of the largest logit (fp32 sums)."""
    inputs = random_tokens(3, 9, seed=7)
    with torch.no_grad():
        want = run(program, inputs)
        have = model(input_ids=inputs["input_ids"]).logits
    assert float((have - want).abs().max()) <= 1e-4 * float(want.abs().max())


CUTS = [
    # The config leaves head_dim open: it is written out, else fewer heads would be wider ones.
    ("qwen2", "kv_group", 1, {"num_key_value_heads": 1, "head_dim": 8}),
    # Two constants follow the width: the norms' eps, and the factor of a tied embedding.
    ("gemma2", "hidden", 24, {"hidden_size": 24, "rms_norm_eps": 1e-6 * 32 / 24}),
    # The norms of queries and keys keep their eps, which the config has but once.
    ("qwen3", "hidden", 24, {"hidden_size": 24, "head_dim": 8}),
    # The other way round: the norms of the stream keep theirs.
    ("olmo2", "kv_group", 1, {"num_key_value_heads": 1, "rms_norm_eps": 1e-5}),
    # Stored turned (Conv1D), and the field is open.
    ("gpt2", "neuron", 40, {"n_inner": 40}),
]


@pytest.mark.parametrize(("name", "kind", "count", "fields"), CUTS)
def test_uniform_cut_loads_with_the_same_logits(
    tiny: Callable[[str], Program], tmp_path: Path, name: str, kind: str, count: int,
    fields: dict[str, Any],
) -> None:  # fmt: skip
    """The config is found, and the loaded model computes what the cut program does."""
    program = narrowed(tiny(name), kind, count)
    before = program.print_python()
    record, model = written(program, tmp_path / "out")
    assert program.print_python() == before
    assert_same_logits(program, model)
    for field, value in fields.items():
        assert getattr(model.config, field) == value
    assert record["changes"]
    assert record["difference"] <= 1e-4


def test_fewer_layers_keep_their_own_kinds(tiny: Callable[[str], Program], tmp_path: Path) -> None:
    """Lists with an entry per block lose those of the blocks that went."""
    program = tiny("gemma2")
    kinds = program.facts["config"]["layer_types"]
    leave_out(program, ["block0"])
    _, model = written(program, tmp_path / "out")
    assert_same_logits(program, model)
    assert model.config.num_hidden_layers == 1
    assert model.config.layer_types == kinds[1:]


def test_experts_are_taken_apart_again(tmp_path: Path) -> None:
    """The graph holds them stacked, the checkpoint one by one: what stays, stays to the bit."""
    from llmc.compiler.capture import capture

    make("qwen3_moe").save_pretrained(tmp_path / "source")
    program = capture(tmp_path / "source")
    apply_segments(program)
    narrowed(program, "expert", 3)
    _, model = written(program, tmp_path / "out")
    assert_same_logits(program, model)
    before, after = (Checkpoint(tmp_path / n) for n in ("source", "out"))
    assert set(after) == {n for n in before if ".experts.3." not in n}
    same = [n for n in after if not n.endswith("mlp.gate.weight")]
    assert len(same) == len(after.entries) - 2
    assert all(torch.equal(before.load(n), after.load(n)) for n in same)


def test_biases_go_where_the_config_has_a_place(
    tiny: Callable[[str], Program], tmp_path: Path
) -> None:
    """A bias that a pass added is stored; the others of its switch are zero."""
    program = tiny("llama")
    _add_bias(program, "mlp.down_proj")
    record, model = written(program, tmp_path / "out")
    assert_same_logits(program, model)
    assert record["changes"] == ["mlp_bias = True"]
    assert not model.model.layers[1].mlp.up_proj.bias.any()


def _add_bias(program: Program, path: str) -> None:
    """Give the first linear of a module a random bias."""
    for node in program.calls("aten.linear.default"):
        if node.meta["llmc"].path.endswith(path):
            size = program.params[str(node.args[1].target)].shape[0]
            g = torch.Generator().manual_seed(1)
            bias = program.add_param(
                Param("new", (size,), torch.float32),
                torch.randn(size, generator=g),
                before=node,
                made_by="flap",
            )
            node.args = (*node.args[:2], bias)
            return
    raise AssertionError(path)


# ** refusals **


def test_heads_that_follow_the_width_are_refused(
    tiny: Callable[[str], Program], tmp_path: Path
) -> None:
    """GPT-2's heads always fill its width: the parameter and the two sizes are named."""
    program = narrowed(tiny("gpt2"), "head", 3)
    wanted = r"expected 32 along axis 1 of .*c_proj\.weight, .* found 24: .* refuses n_head = 3"
    with pytest.raises(UsageError, match=wanted):
        export(program, tmp_path / "out")


def test_bias_without_a_place_is_refused(tiny: Callable[[str], Program], tmp_path: Path) -> None:
    """The layer and the way out are named."""
    program = tiny("gemma2")
    _add_bias(program, "mlp.down_proj")
    wanted = r"no bias beside .*layers\.0\.mlp\.down_proj\.weight.* by flap .*compensate=none"
    with pytest.raises(UsageError, match=wanted):
        export(program, tmp_path / "out")


def test_narrow_layer_norms_are_refused(tiny: Callable[[str], Program], tmp_path: Path) -> None:
    """A cut LayerNorm has no scalar fold."""
    program = narrowed(tiny("gpt2"), "hidden", 24)
    with pytest.raises(UsageError, match=r"a LayerNorm over 24 that divides by 32 at .*ln_1"):
        export(program, tmp_path / "out")


def test_exits_are_refused_or_dropped(tiny: Callable[[str], Program], tmp_path: Path) -> None:
    """Early exits have no place in the format; --drop-exits writes the full model."""
    program = tiny("llama")
    program.exits = Exits("softmax", ("block0",), 0.9)
    with pytest.raises(UsageError, match=r"without early exits, found 1: .*--drop-exits"):
        export(program, tmp_path / "out")
    record = export(program, tmp_path / "out", drop_exits=True)
    assert record["changes"] == []
    assert program.exits is not None


def test_other_modules_are_refused(tmp_path: Path) -> None:
    """A module that is not of transformers has no config."""
    from llmc.compiler.capture import capture

    program = capture(torch.nn.Linear(3, 2), inputs=(torch.zeros(2, 3),))
    with pytest.raises(UsageError, match="expected a model of transformers to write back"):
        export(program, tmp_path / "out")


# ** laws **


def _norm(width: int, count: int | None, eps: float, offset: float) -> Program:
    """linear, then a root-mean-square norm of its output, fp64."""
    g = torch.Generator().manual_seed(0)
    program = Program(fx.Graph(), {}, _none(), torch.float64)
    x = program.graph.placeholder("x")
    x.meta["llmc"] = Info(TensorType((4, 5), torch.float64))
    result = program.graph.output(x)
    tensors = {"w": torch.randn(width, 5, generator=g, dtype=torch.float64),
               "b": torch.randn(width, generator=g, dtype=torch.float64),
               "g": torch.randn(width, generator=g, dtype=torch.float64)}  # fmt: skip
    w, b, gain = (
        program.add_param(Param(n, tuple(t.shape), t.dtype), t, before=result)
        for n, t in tensors.items()
    )
    y = program.emit("aten.linear.default", x, w, b, before=result, made_by="test")
    more: dict[str, Any] = {"count": count} if count else {}
    out = program.emit("llmc.rms_norm", y, gain, eps=eps, offset=offset, **more, before=result,
                       made_by="test")  # fmt: skip
    result.args = (out,)
    result.meta["llmc"] = out.meta["llmc"]
    return program


def _none() -> Any:
    from llmc.compiler.ir.graph import DictWeights

    return DictWeights({})


@pytest.mark.parametrize("offset", [0.0, 1.0])
def test_folds_change_nothing(offset: float) -> None:
    """A kept divisor in gain and eps, and an eps in the matrix before, in fp64."""
    program = _norm(6, 9, 1e-2, offset)
    x = torch.randn(4, 5, generator=torch.Generator().manual_seed(3), dtype=torch.float64)
    want = run(program, {"x": x})
    fold_counts(program)
    (norm,) = program.calls("llmc.rms_norm")
    assert norm.kwargs.get("count") is None
    assert math.isclose(norm.kwargs["eps"], 1e-2 * 9 / 6)
    torch.testing.assert_close(run(program, {"x": x}), want, rtol=1e-12, atol=1e-12)
    assert move_eps(program, norm.name, 0.5)
    assert norm.kwargs["eps"] == 0.5
    torch.testing.assert_close(run(program, {"x": x}), want, rtol=1e-12, atol=1e-12)


def test_eps_stays_where_others_read_the_input() -> None:
    """The matrix may not be scaled for one of two readers."""
    program = _norm(6, None, 1e-2, 0.0)
    (linear,), (norm,) = program.calls("aten.linear.default"), program.calls("llmc.rms_norm")
    more = program.emit("aten.add.Tensor", norm, linear, before=program.output, made_by="test")
    program.output.args = (more,)
    assert not move_eps(program, norm.name, 0.5)
    assert norm.kwargs["eps"] == 1e-2


def test_walk_finds_one_changed_literal(tiny: Callable[[str], Program]) -> None:
    """A program is itself; with one attribute changed it is not, and the node is named."""
    theirs, ours = tiny("gpt2"), tiny("gpt2")
    stored = {n for p in theirs.params.values() for n in p.names}
    assert bisimulate(theirs, ours, stored).differences == []
    attention = list(ours.calls("llmc.attention"))[1]
    attention.kwargs = {**attention.kwargs, "scale": 0.5}
    (found,) = bisimulate(theirs, ours, stored).differences
    assert (found.kind, found.node, found.ours) == ("number", attention.name, 0.5)


def test_walk_finds_one_parameter_for_two_values(tiny: Callable[[str], Program]) -> None:
    """Where the model ties its head to the embedding, two tables are another model."""
    theirs, ours = tiny("llama"), tiny("llama")
    stored = {n for p in theirs.params.values() for n in p.names}
    head = list(ours.calls("aten.linear.default"))[-1]
    table = ours.fetch(str(head.args[1].target))
    own = ours.add_param(Param("own", tuple(table.shape), table.dtype), 2 * table, before=head)
    head.args = (head.args[0], own)
    (found,) = bisimulate(theirs, ours, stored).differences
    assert (found.kind, found.name) == ("param", "model.embed_tokens.weight")


def test_a_refusal_says_when_the_search_ended_early(monkeypatch: pytest.MonkeyPatch) -> None:
    """What no config was tried for is not told as what no config can do."""
    from llmc.compiler.capture import fit
    from llmc.compiler.capture.configs import Family
    from llmc.compiler.ir.errors import UsageError

    search = fit._Search.__new__(fit._Search)
    search.family = Family.__new__(Family)
    search.family.builds, search.family.captures = 3, 1
    why = UsageError("expected 4, found 3", where="node a", hint="keep it")
    assert search._told(why) is why
    monkeypatch.setattr(fit, "_BUILDS", 3)
    assert "the search stopped after 3 configs built and 1 captured" in str(search._told(why))
    assert str(search._told(why)).startswith("expected 4, found 3 at node a; keep it; ")
