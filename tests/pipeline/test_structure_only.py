"""Structure decides, names do not: renaming everything changes nothing; an injected reader does."""

import dataclasses
import random
import string

import pytest
import torch

import llmc
from llmc.compiler.capture import capture
from llmc.compiler.ir.graph import Info, info
from llmc.compiler.ir.serial import to_json
from llmc.compiler.pipeline import recipe, zoo
from llmc.compiler.pipeline.analysis import Analysis
from llmc.compiler.pipeline.compile import compile_plan
from llmc.compiler.pipeline.plan import make_plan
from llmc.compiler.pipeline.registry import find

RECIPE = "smooth,w4:group=8,prune24"


def scrambled(program, seed):
    """The same program with every name for people replaced by a random string."""
    rng = random.Random(seed)

    def word() -> str:
        return "".join(rng.choices(string.ascii_letters, k=12))

    out = program.clone()
    for name, param in list(out.params.items()):
        out.params[name] = dataclasses.replace(param, names=tuple(word() for _ in param.names))
    for node in out.graph.nodes:
        old = info(node)
        node.meta["llmc"] = Info(old.type, word(), old.made_by, word())
    return out


def tokens():
    return torch.randint(0, 20, (8, 16), generator=torch.Generator().manual_seed(1))


def no_paths(plan):
    data = plan.to_json(64, 8)
    for row in data["sites"]:
        row.pop("path")
    for refusal in data["refusals"]:
        refusal.pop("path")
    return data


@pytest.mark.parametrize("seed", range(3))
def test_plans_and_results_do_not_depend_on_names(seed):
    program = zoo.decoder(hidden=16, inner=32)
    other = scrambled(program, seed)
    plans = [make_plan(p, recipe.from_strings([RECIPE])) for p in (program, other)]
    assert no_paths(plans[0]) == no_paths(plans[1])
    a, b = (compile_plan(p, tokens()).program for p in plans)
    assert to_json(a) == to_json(b)
    assert all(torch.equal(a.weights.load(n), b.weights.load(n)) for n in a.params)


class Tiny(torch.nn.Module):
    """A residual MLP language model whose attributes carry the given names."""

    def __init__(self, names: list[str]) -> None:
        super().__init__()
        self.names = names
        torch.manual_seed(0)
        made = [torch.nn.Embedding(20, 16), torch.nn.LayerNorm(16), torch.nn.Linear(16, 32),
                torch.nn.Linear(32, 16), torch.nn.Linear(16, 20)]  # fmt: skip
        for name, module in zip(names, made, strict=True):
            setattr(self, name, module)

    def forward(self, input_ids: torch.Tensor) -> torch.Tensor:
        embed, norm, up, down, head = (getattr(self, n) for n in self.names)
        x = embed(input_ids)
        x = x + down(torch.relu(up(norm(x))))
        return head(x)


def test_a_renamed_module_gives_the_same_artefact(tmp_path):
    hashes = []
    for i, names in enumerate(
        (["embed", "norm", "up", "down", "head"], ["q", "x9", "zz", "k", "lm"])
    ):
        ids = torch.zeros(2, 8, dtype=torch.int64)
        program = capture(Tiny(names), inputs={"input_ids": ids})
        small = llmc.compile(program, RECIPE, calibration=tokens(), samples=8, length=16)
        hashes.append(small.save(tmp_path / str(i)).content_hash)
    assert hashes[0] == hashes[1]


@pytest.mark.parametrize("value", ["rms_norm_default", "rms_norm_default_3", "gated_default_1"])
def test_explain_names_an_injected_reader(value):
    program = zoo.decoder()
    node = program.node(value)
    last = next(iter(program.output.all_input_nodes))
    spy = program.emit("aten.neg.default", node, before=program.output, made_by="test")
    flat = program.emit("aten.sum.default", spy, before=program.output, made_by="test")
    both = program.emit("aten.add.Tensor", last, flat, before=program.output, made_by="test")
    program.output.replace_input_with(last, both)
    program.segments = []
    _, refused = find("smooth").build("smooth", {}).sites(Analysis(program))
    assert spy.name in {r.node for r in refused if r.predicate == "all_users_rewritten"}
