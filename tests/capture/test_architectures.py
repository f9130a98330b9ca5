"""Every architecture, captured from its folder, equals transformers' eager model."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

from llmc.compiler.ir.interpret import run
from llmc.compiler.ir.ops import row_of

Case = Any
Get = Callable[[str], Case]
Tokens = Callable[..., dict[str, torch.Tensor]]
# Norms, linears and rope calls per layer of each family, and what follows the last layer.
NORMED = {"llmc.layer_norm": 2, "llmc.activation": 1}
LAYER = {
    "llama": {"llmc.rms_norm": 2, "aten.linear.default": 7, "llmc.rope": 2, "llmc.gated": 1},
    "qwen3": {"llmc.rms_norm": 4, "aten.linear.default": 7, "llmc.rope": 2, "llmc.gated": 1},
    "gemma2": {"llmc.rms_norm": 4, "aten.linear.default": 7, "llmc.rope": 2, "llmc.gated": 1},
    "phi3": {"llmc.rms_norm": 2, "aten.linear.default": 4, "llmc.rope": 2, "llmc.gated": 1},
    # q, k, v, o and the router
    "mixtral": {"llmc.rms_norm": 2, "aten.linear.default": 5, "llmc.rope": 2, "llmc.experts": 1},
    "gpt2": {**NORMED, "aten.linear.default": 4},
    "gpt_neox": {**NORMED, "aten.linear.default": 4, "llmc.rope": 2},
    "opt": {**NORMED, "aten.linear.default": 6},
    "falcon": {
        "llmc.layer_norm": 1,
        "llmc.activation": 1,
        "aten.linear.default": 4,
        "llmc.rope": 2,
    },
}


def close(a: torch.Tensor, b: torch.Tensor) -> None:
    torch.testing.assert_close(a, b, rtol=1e-5, atol=1e-5)


def test_equals_eager_at_other_sizes(case: Get, tokens: Tokens, arch: str) -> None:
    """Traced at 2 x 12, run at 3 x 19 (beyond the windows of 5) and 1 x 1."""
    c = case(arch)
    for batch, length in ((3, 19), (1, 1)):
        inputs = tokens(batch, length)
        close(c.run(**inputs), c.eager(**inputs))


def test_more_architectures_equal_eager(case: Get, tokens: Tokens, more: str) -> None:
    from llmc.compiler.ir.verifier import verify

    c = case(more)
    verify(c.program)
    inputs = tokens(3, 19)
    close(c.run(**inputs), c.eager(**inputs))


def test_reads_no_weight_to_capture(case: Get, arch: str) -> None:
    assert case(arch).loads_to_capture == 0


def test_has_one_attention_per_layer(case: Get, arch: str) -> None:
    """No mask arithmetic, no softmax outside the routers, and nothing nearly lifted."""
    c = case(arch)
    found = Counter(row_of(n).name for n in c.program.calls())
    assert found["llmc.attention"] == 2
    assert not found["aten.scaled_dot_product_attention.default"] + found["llmc.may_read"]
    assert found["aten.softmax.int"] == found["llmc.experts"]
    assert not any("rsqrt" in op or "addmm" in op or "split" in op for op in found)
    assert c.program.facts["refusals"] == []


@pytest.mark.parametrize("name", LAYER)
def test_normal_form(case: Get, name: str) -> None:
    c = case(name)
    found = Counter(row_of(n).name for n in c.program.calls())
    for op, per_layer in LAYER[name].items():
        extra = 1 if "norm" in op or "linear" in op else 0
        assert found[op] == 2 * per_layer + extra, op


def test_program_obeys_the_verifier(case: Get, arch: str) -> None:
    from llmc.compiler.ir.verifier import verify

    verify(case(arch).program)


def test_names_are_canonical_and_provenance_is_portable(case: Get, arch: str) -> None:
    """Nothing of the model's own names is left to decide by; no path of this machine."""
    program = case(arch).program
    used = [str(n.target) for n in program.graph.nodes if n.op == "get_attr"]
    assert sorted(used) == sorted(program.params)
    assert set(used) == {f"p{i}" for i in range(len(used))}
    own = {n for p in program.params.values() for n in p.names}
    assert not own & {n.name for n in program.graph.nodes}
    for node in program.graph.nodes:
        assert node.meta["llmc"].source[:1] != "/"
        assert set(node.meta) == {"llmc"}
    sources = [n.meta["llmc"].source for n in program.calls("aten.linear.default")]
    assert all(s.startswith("transformers/") for s in sources)


def ragged(tokens: Tokens, side: str) -> tuple[dict[str, torch.Tensor], list[int]]:
    lengths = [9, 4, 7, 1]
    whole = tokens(4, 9, seed=3)
    mask = torch.zeros(4, 9, dtype=torch.bool)
    for i, n in enumerate(lengths):
        mask[i, 9 - n :] = True if side == "left" else mask[i, 9 - n :]
        if side == "right":
            mask[i, :n] = True
    position = (mask.long().cumsum(-1) - 1).clamp(min=0)
    return {**whole, "attention_mask": mask, "position_ids": position}, lengths


@pytest.mark.parametrize("side", ["left", "right"])
def test_ragged_batch_equals_ones(case: Get, tokens: Tokens, arch: str, side: str) -> None:
    c = case(arch)
    inputs, lengths = ragged(tokens, side)
    together = c.run(**inputs)
    for i, n in enumerate(lengths):
        at = inputs["attention_mask"][i]
        alone = {
            "input_ids": inputs["input_ids"][i : i + 1, at],
            "position_ids": torch.arange(n)[None],
            "attention_mask": torch.ones(1, n, dtype=torch.bool),
        }
        close(together[i : i + 1, at], c.run(**alone))


def test_window_matters(case: Get, tokens: Tokens) -> None:
    """The windows of mistral and gemma are in the program, not lost: full attention differs."""
    for name in ("mistral", "gemma2", "gemma3_text"):
        program = case(name).program
        windows = [n.kwargs.get("window") for n in program.calls("llmc.attention")]
        assert 5 in windows
        wide = program.clone()
        for node in wide.calls("llmc.attention"):
            node.kwargs = {**node.kwargs, "window": None}
        inputs = tokens(2, 19)
        assert (run(wide, inputs) - run(program, inputs)).abs().max() > 1e-3


@pytest.mark.parametrize("name", ["llama", "gpt2"])
def test_ties_are_one_parameter(case: Get, name: str) -> None:
    c = case(name)
    tied = [p for p in c.program.params.values() if len(p.names) > 1]
    assert len(tied) == 1
    node = c.program.param_node(tied[0].name)
    assert {row_of(u).name for u in node.users} == {"aten.embedding.default", "aten.linear.default"}


def test_stored_dtype_stays(tmp_path: Path, build: Callable[..., Any]) -> None:
    """A bf16 checkpoint computes in fp32 and keeps its stored dtype in the parameter table."""
    from llmc.compiler.capture import capture

    build("llama").to(torch.bfloat16).save_pretrained(tmp_path)
    program = capture(tmp_path)
    assert {p.dtype for p in program.params.values() if p.trained} == {torch.bfloat16}
    assert program.dtype == torch.float32
    assert program.fetch("p0").dtype == torch.float32


@pytest.mark.parametrize("name", ["llama", "qwen3_moe", "gpt2"])
def test_gradients_equal_eager(case: Get, tokens: Tokens, name: str) -> None:
    """Gradients of a scalar loss by every parameter, through the whole graph."""
    c = case(name)
    inputs = tokens(2, 8)
    model = c.model
    model.zero_grad()
    out = model(input_ids=inputs["input_ids"]).logits
    weight = torch.randn(out.shape, generator=torch.Generator().manual_seed(1))
    (out * weight).mean().backward()
    made: dict[str, torch.Tensor] = {}

    def fetch(key: str) -> torch.Tensor:
        if key not in made:
            tensor = c.program.fetch(key).clone()
            made[key] = tensor.requires_grad_() if c.program.params[key].trained else tensor
        return made[key]

    (run(c.program, inputs, fetch=fetch) * weight).mean().backward()
    theirs = dict(model.named_parameters(remove_duplicate=False))
    checked = 0
    for key, param in c.program.params.items():
        if param.trained:
            grad, want = made[key].grad, theirs[param.names[0]].grad
            assert grad is not None
            # gpt2 stores its products as [in, out]; the program reads them as [out, in].
            stored = theirs[param.names[0]].detach()
            turned = grad.ndim == 2 and not (
                stored.shape == grad.shape and torch.equal(stored, made[key].detach())
            )
            close(grad, want.t() if turned else want)
            checked += 1
    assert checked == len({id(p) for p in theirs.values()})


def test_decoders_state_their_facts(case: Get) -> None:
    for name in ("llama", "gpt2", "falcon"):
        facts = case(name).program.facts
        assert facts["vocab"] == 96
        assert facts["context"] in (64, None)
        assert facts["model_type"] == name
        assert facts["config"]["model_type"] == name
