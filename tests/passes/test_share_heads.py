"""share_heads on captured models: planted copies of heads are found and cost nothing."""

from __future__ import annotations

import sys
from dataclasses import replace
from functools import cache
from math import prod
from pathlib import Path
from typing import Any

import pytest
import torch

from llmc.compiler.analysis.blocks import apply_segments
from llmc.compiler.analysis.heads import found_sites, units_of
from llmc.compiler.analysis.unweave import unweave
from llmc.compiler.ir.errors import GateError, UsageError
from llmc.compiler.ir.graph import info, tensor_type
from llmc.compiler.ir.interpret import run
from llmc.compiler.ir.verifier import verify
from llmc.compiler.pipeline import recipe, zoo
from llmc.compiler.pipeline.compile import compile_plan
from llmc.compiler.pipeline.encode import refresh_types
from llmc.compiler.pipeline.plan import make_plan
from llmc.compiler.pipeline.sharing import Sharing
from llmc.compiler.runtime.cache import Cache, add_cache
from llmc.compiler.runtime.executor import Runner
from llmc.compiler.solvers.heads import Maps, share

sys.path.insert(0, str(Path(__file__).parents[1]))

from tiny_models import FAMILIES, make, random_inputs

WIDE = {"num_attention_heads": 8, "num_key_value_heads": 4, "head_dim": 4}
MODELS: dict[str, tuple[str, dict[str, Any]]] = {
    "llama_8_4": ("llama", WIDE),
    "qwen3_8_4": ("qwen3", WIDE),
    "falcon_mha": ("falcon", {"multi_query": False}),
    "falcon_new": ("falcon", {"new_decoder_architecture": True, "num_kv_heads": 2}),
}
# One of each way to make heads: plain, biased, fused in runs or per head, normed, without rotation.
QUICK = ("llama_8_4", "phi3", "gpt2", "gpt_neox", "qwen3_8_4", "olmo2", "gptj", "bloom")
SINGLE = ("falcon", "deepseek_v3")
EVERY = [
    pytest.param(n, marks=() if n in QUICK else pytest.mark.slow)
    for n in sorted({*FAMILIES, *MODELS} - set(SINGLE))
]


@cache
def captured(name: str) -> Any:
    """The model's program in fp64, segmented."""
    from llmc.compiler.capture import capture

    kind, over = MODELS.get(name, (name, {}))
    if kind == "vit":
        axes = {"pixel_values": ("B", None, None, None)}
        program = capture(make(kind), inputs=random_inputs(kind, 2), axes=axes)
    else:
        program = capture(make(kind, **over))
    return doubled(program)


def doubled(program: Any) -> Any:
    """The program with floating parameters stored and computed in fp64."""
    program = program.clone()
    program.dtype = torch.float64
    for name, p in program.params.items():
        if p.dtype.is_floating_point:
            program.set_tensor(name, program.weights.load(name).double())
            assert p.shape == program.params[name].shape
    for node in program.inputs:
        kind = tensor_type(node)
        if kind.dtype.is_floating_point:
            node.meta["llmc"] = replace(info(node), type=replace(kind, dtype=torch.float64))
    refresh_types(program)
    program.segments = []
    apply_segments(program)
    return program


def logits(name: str, program: Any) -> torch.Tensor:
    inputs = random_inputs(MODELS.get(name, (name, {}))[0], 2)
    with torch.no_grad():
        given = {n.name: inputs[n.name].to(tensor_type(n).dtype) for n in program.inputs}
        out = run(program, given)
    return (out[0] if isinstance(out, (tuple, list)) else out).double()


def near(a: torch.Tensor, b: torch.Tensor, tol: float = 1e-9) -> None:
    # Some models compute rotary angles or a softmax in fp32 inside: equal inputs, equal results.
    assert (a - b).abs().max() <= tol * b.abs().max()


def shared(program: Any, passes: str, tokens: torch.Tensor | None = None) -> Any:
    return compile_plan(make_plan(program, recipe.from_strings([passes])), tokens)


def free_map(maps: Maps, size: int, g: torch.Generator) -> torch.Tensor:
    """A random map [size, size] of those that are free."""
    out = torch.eye(size, dtype=torch.float64)
    for i, j in maps.pairs.tolist():
        a = torch.rand((), generator=g, dtype=torch.float64) * 6
        s = 1.7 if maps.scale else 1.0
        out[i, i] = out[j, j] = a.cos() * s
        out[i, j], out[j, i] = -a.sin() * s, a.sin() * s
    f = maps.free
    if len(f):
        q = torch.linalg.qr(torch.randn(len(f), len(f), generator=g, dtype=torch.float64))[0]
        out[f[:, None], f] = q
    return out


def planted(program: Any, *, apart: bool = True, plain: bool = False) -> Any:
    """Heads i and i + KV/2 (neighbours where not ``apart``) of every layer made copies.

    Up to a random free map of keys and of values, unless ``plain``; gains told by head follow.
    """
    program = program.clone()
    unweave(program, list(found_sites(program).values()))
    work, g = Sharing(program), torch.Generator().manual_seed(0)
    for site in found_sites(program).values():
        maps, _ = work.key_maps(site)
        values = Maps.none() if site.fixed_values else Maps.orthogonal(site.v.index.shape[1])
        half = site.kv // 2
        for i in range(half):
            a, b = (i, i + half) if apart else (2 * i, 2 * i + 1)
            for group in (site.keys, site.values):
                for m in group.members:
                    rows = units_of(m, site.kv)
                    work.load(m.param)[rows[b]] = work.load(m.param)[rows[a]]
            for rows, free in ((site.k, maps), (site.v, values)) if not plain else ():
                turn = free_map(free, rows.index.shape[1], g)
                for name in filter(None, (rows.param, rows.bias)):
                    t = work.load(name)
                    t[rows.index[b]] = turn @ t[rows.index[b]]
    for name, tensor in work.results().items():
        program.set_tensor(name, tensor)
    return program


def even_gains(program: Any) -> Any:
    """Every gain between a projection and attention made the same within rotary pairs."""
    program = program.clone()
    for site in found_sites(program).values():
        for _, norm in site.norms:
            gain = program.weights.load(norm.gain).clone()
            for i, j in site.pairs.tolist():
                gain[norm.index[:, j]] = gain[norm.index[:, i]]
            program.set_tensor(norm.gain, gain)
    return program


@pytest.mark.parametrize("name", EVERY)
def test_planted_copies_lose_nothing(name: str) -> None:
    program = even_gains(captured(name))
    sites = found_sites(program)
    assert sites
    if not any(s.kv > 1 for s in sites.values()):
        pytest.fail(f"{name} has one key head everywhere")
    fixed = any(s.fixed_order for s in found_sites(unwoven(program)).values())
    before = planted(program, apart=not fixed)
    kv = next(iter(sites.values())).kv
    done = shared(before, f"share_heads:kv={kv // 2}")
    near(logits(name, done.program), logits(name, before))
    for row in done.structure[0]["records"]:
        assert row["after"] == kv // 2
        assert row["k_error"] < 1e-12
        assert row["v_error"] < 1e-12
        assert max(row["k_error_unaligned"], row["v_error_unaligned"]) > 0.01
        if kv == 4 and not fixed:
            assert row["groups"] == [[0, 2], [1, 3]]


def unwoven(program: Any) -> Any:
    program = program.clone()
    unweave(program, list(found_sites(program).values()))
    return program


@pytest.mark.parametrize("name", ["llama_8_4", "gpt2", "gpt_neox", "qwen3_8_4", "gptj"])
def test_alignment_alone_is_exact(name: str) -> None:
    """Turned but neither ordered nor pooled, the model gives the same logits."""
    before = even_gains(captured(name))
    program = unwoven(before)
    work = Sharing(program)
    for site in found_sites(program).values():
        keys, why = work.key_maps(site)
        assert not why
        assert not keys.trivial
        values = Maps.orthogonal(site.v.index.shape[1])
        done = share(work.heads(site), 2, keys, values)
        old = work.load(site.k.param).clone(), work.load(site.v.param).clone()
        work.write(site, done.aligned)
        assert not torch.allclose(old[0], work.load(site.k.param))
        assert not torch.allclose(old[1], work.load(site.v.param))
    for param, tensor in work.results().items():
        program.set_tensor(param, tensor)
    near(logits(name, program), logits(name, before), 1e-10)


def test_order_and_back_is_identity() -> None:
    program = captured("llama_8_4")
    work = Sharing(program)
    site = next(iter(found_sites(program).values()))
    groups = torch.tensor([[2, 0], [3, 1]])
    work.order(site, groups)
    moved = {k: v.clone() for k, v in work.tensors.items()}
    assert len(moved) == 2
    work.order(site, torch.argsort(groups.flatten())[:, None])
    for name, tensor in work.tensors.items():
        assert torch.equal(tensor, program.weights.load(name))
        assert not torch.equal(tensor, moved[name])


def test_gains_that_differ_in_a_pair_are_refused_and_named() -> None:
    program = captured("qwen3_8_4")
    row = shared(program, "share_heads:kv=2").structure[0]["records"][0]
    assert row["keys"].startswith("2 of 2 rotary pairs")
    assert "gains" in row["keys"]
    assert row["values"] == "aligned"
    # Plain copies need no map.
    before = planted(program, plain=True)
    done = shared(before, "share_heads:kv=2")
    near(logits("qwen3_8_4", done.program), logits("qwen3_8_4", before))


def test_slopes_of_all_layers_keep_the_order_of_heads() -> None:
    row = shared(captured("bloom"), "share_heads:kv=2").structure[0]["records"][0]
    assert row["groups"] == [[0, 1], [2, 3]]
    assert row["order"] == "other attention has the same query heads"
    assert row["keys"] == row["values"] == "aligned"


def test_align_and_similar_can_be_left_out() -> None:
    program = captured("llama_8_4")
    rows = {
        knobs: shared(program, f"share_heads:kv=2,{knobs}").structure[0]["records"]
        for knobs in ("align=true", "align=false", "group=adjacent", "align=false,group=adjacent")
    }
    for row in rows["align=false,group=adjacent"]:
        assert row["groups"] == [[0, 1], [2, 3]]
        assert row["k_error"] == row["k_error_unaligned"]
        assert (row["keys"], row["values"], row["order"]) == ("not asked", "not asked", "kept")
    for a, b in zip(rows["group=adjacent"], rows["align=false,group=adjacent"], strict=True):
        assert a["k_error"] < b["k_error"]
        assert a["v_error"] < b["v_error"]
    total = {k: sum(r["k_error"] + r["v_error"] for r in v) for k, v in rows.items()}
    assert total["align=true"] <= total["group=adjacent"] + 1e-9
    assert total["align=true"] < total["align=false"]


@pytest.mark.parametrize(("name", "kv"), [("llama_8_4", 2), ("llama_8_4", 1), ("gpt_neox", 2)])
def test_the_cache_shrinks_with_the_heads(name: str, kv: int) -> None:
    """Bytes of keys and values by KV/N exactly; token by token equals all at once."""
    before = captured(name)
    done = shared(before, f"share_heads:kv={kv}")
    kept = [add_cache(p) for p in (before, done.program)]
    sizes = [
        sum(prod(t.shape[i] for i in (1, 3)) for s in p.states.values() for t in s.types)
        for p in kept
    ]
    assert sizes[1] * 4 == sizes[0] * kv
    whole = [Cache(p.states.values(), 2, 16).bytes for p in kept]
    assert whole[0] - whole[1] == (sizes[0] - sizes[1]) * 2 * 16 * 8
    want = logits(name, done.program)
    runner, ids = Runner(kept[1]), random_inputs(MODELS.get(name, (name, {}))[0], 2)
    cache = runner.start(2)
    rows = [runner.forward(ids["input_ids"][:, i : i + 1], cache=cache) for i in range(12)]
    near(torch.cat(rows, 1).double(), want, 1e-6)


def test_sizes_are_those_of_the_plan() -> None:
    plan = make_plan(captured("phi3"), recipe.from_strings(["share_heads:kv=1"]))
    done = compile_plan(plan, None)
    assert plan.steps[0].choice.exact
    assert plan.steps[0].after == done.plan.steps[0].after
    verify(done.program)
    for site in found_sites(done.program).values():
        assert (site.heads, site.kv) == (4, 1)


def test_activations_weigh_what_is_seen() -> None:
    """Heads that differ only where inputs are zero are one head to the data."""
    program = doubled(zoo.decoder(kv=4, blocks=1))
    program = planted(program, plain=True)
    site = next(iter(found_sites(program).values()))
    norm = program.node(site.k.reads)
    gain = str(norm.args[1].target)
    program.set_tensor(gain, program.weights.load(gain).index_fill(0, torch.tensor([3]), 0.0))
    for rows in (site.k, site.v):
        w = program.weights.load(rows.param).clone()
        w[rows.index[2:], 3] += 5.0
        program.set_tensor(rows.param, w)
    tokens = torch.randint(0, 20, (4, 8), generator=torch.Generator().manual_seed(0))
    found = {
        metric: shared(program, f"share_heads:kv=2,align=false,metric={metric}", tokens)
        for metric in ("weights", "activations")
    }
    rows = {m: done.structure[0]["records"][0] for m, done in found.items()}
    assert rows["activations"]["groups"] == [[0, 2], [1, 3]]
    assert rows["activations"]["k_error"] < 1e-6 < 0.02 < rows["weights"]["k_error"]
    inputs = {"input_ids": tokens, "position_ids": torch.arange(8).expand(4, 8)}
    inputs["attention_mask"] = torch.ones(4, 8, dtype=torch.bool)
    near(run(found["activations"].program, inputs), run(program, inputs), 1e-9)
    assert make_plan(program, recipe.from_strings(["share_heads:metric=activations"])).needing


def test_composes_with_codes_in_one_string() -> None:
    program = zoo.decoder(kv=4)
    done = shared(program, "w4:group=8,solver=rtn,share_heads:kv=2")
    verify(done.program)
    alone = shared(program, "share_heads:kv=2").program
    inputs = {"input_ids": torch.arange(8)[None], "position_ids": torch.arange(8)[None]}
    inputs["attention_mask"] = torch.ones(1, 8, dtype=torch.bool)
    got, want = run(done.program, inputs), run(alone, inputs)
    assert 0 < float((got - want).norm() / want.norm()) < 0.5
    assert done.program.weight_bytes() < alone.weight_bytes()


@pytest.mark.parametrize(("kv", "words"), [(3, "these fit: 1, 2"), (5, "no more than 5")])
def test_bad_numbers_of_heads(kv: int, words: str) -> None:
    expected = UsageError if kv < 4 else GateError
    with pytest.raises(expected, match=words) as found:
        make_plan(zoo.decoder(kv=4), recipe.from_strings([f"share_heads:kv={kv}"]))
    assert found.value.exit_code == (2 if kv < 4 else 4)
    assert "\n" not in str(found.value)


def test_as_many_heads_as_there_are_is_no_place() -> None:
    with pytest.raises(GateError, match="it has 2 key heads already"):
        make_plan(zoo.decoder(), recipe.from_strings(["share_heads:kv=2"]))


def test_the_source_is_left_alone() -> None:
    program = zoo.decoder(kv=4)
    before = {n: program.weights.load(n).clone() for n in program.params}
    shared(program, "share_heads:kv=1")
    for name, tensor in before.items():
        assert torch.equal(program.weights.load(name), tensor)
        assert replace(program.params[name], shape=tuple(tensor.shape)) == program.params[name]


@pytest.mark.parametrize(
    "name", ["llama_8_4", *(pytest.param(n, marks=pytest.mark.slow) for n in ("phi3", "olmo2"))]
)
def test_the_result_is_a_checkpoint_that_from_pretrained_loads(name: str, tmp_path: Path) -> None:
    from transformers import AutoModelForCausalLM

    from llmc.compiler.capture import capture
    from llmc.compiler.runtime.export import export

    kind, over = MODELS.get(name, (name, {}))
    make(kind, **over).save_pretrained(tmp_path / "from")
    done = shared(capture(tmp_path / "from"), "share_heads:kv=1")
    found = export(done.program, tmp_path / "hf")
    assert found["changes"] == ["num_key_value_heads = 1"]
    model = AutoModelForCausalLM.from_pretrained(tmp_path / "hf", attn_implementation="eager")
    inputs = random_inputs(kind, 2)
    with torch.no_grad():
        near(model(inputs["input_ids"]).logits, logits(name, done.program).float(), 1e-5)


def test_on_the_demo_model_alignment_pays(pylm: Path, pylm_text: Path) -> None:
    """Half the key heads of a trained model: turned, their mean loses much less than plain."""
    from tokenizers import Tokenizer

    from llmc.compiler.capture import capture
    from llmc.compiler.pipeline.measure import Options, loss

    text = (pylm_text / "heldout.txt").read_text(encoding="utf-8")[:16000]
    ids = Tokenizer.from_file(str(pylm / "tokenizer.json")).encode(text).ids
    windows = torch.tensor(ids[: 8 * 256]).view(8, 256)
    program = capture(pylm)
    apply_segments(program)
    dense = loss(program, windows, Options())
    plain, turned = (
        loss(shared(program, f"share_heads:kv=2,{knobs}").program, windows, Options())
        for knobs in ("align=false,group=adjacent", "align=true")
    )
    assert dense < turned < plain
    assert turned - dense < 0.75 * (plain - dense)
