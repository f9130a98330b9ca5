"""Early exits of captured models: experts, alternating windows, fused QKV; compressed ones too."""

from __future__ import annotations

from typing import Any

import pytest
import torch

from llmc.compiler.analysis.blocks import apply_segments
from llmc.compiler.analysis.exits import exit_spans
from llmc.compiler.ir.exits import Exits, set_exits
from llmc.compiler.ir.graph import Program
from llmc.compiler.ir.refusal import Refusal
from llmc.compiler.pipeline.exits import ExitWalk
from llmc.compiler.pipeline.measure import Options
from llmc.compiler.runtime.generate import generate
from llmc.compiler.runtime.lowering import runner_for
from llmc.compiler.runtime.stepwise import Stepwise

SIZES: dict[str, Any] = {
    "vocab_size": 40, "hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 3,
    "num_attention_heads": 4, "num_key_value_heads": 2, "head_dim": 8,
    "max_position_embeddings": 64, "pad_token_id": 0, "bos_token_id": 1, "eos_token_id": 2,
}  # fmt: skip
MODELS: dict[str, tuple[str, dict[str, Any]]] = {
    "gemma3": ("Gemma3TextConfig", {
        "sliding_window": 5,
        "layer_types": ["sliding_attention", "full_attention", "sliding_attention"]}),
    "qwen3_moe": ("Qwen3MoeConfig", {
        "num_experts": 4, "num_experts_per_tok": 2, "moe_intermediate_size": 16}),
    "phi3": ("Phi3Config", {}),
}  # fmt: skip
IDS = torch.randint(1, 40, (3, 16), generator=torch.Generator().manual_seed(1))


@pytest.fixture(scope="module", params=list(MODELS))
def program(request: pytest.FixtureRequest) -> Program:
    import transformers

    from llmc.compiler.capture import capture

    kind, more = MODELS[request.param]
    torch.manual_seed(0)
    config = getattr(transformers, kind)(**SIZES, **more)
    model = transformers.AutoModelForCausalLM.from_config(config).eval()
    with torch.no_grad():
        for p in model.parameters():
            if p.dim() > 1:
                p.mul_(3)
    out = capture(model)
    apply_segments(out)
    return out


def leaving(program: Program, threshold: float, rule: str) -> Program:
    spans = exit_spans(program)
    assert not isinstance(spans, Refusal)
    out = program.clone()
    set_exits(out, Exits(rule, tuple(s.block for s in spans[:-1]), threshold))
    return out


@pytest.mark.parametrize("threshold", [0.7, -1.0])
def test_one_by_one_equals_all_at_once(program: Program, threshold: float) -> None:
    """Decoding with skipped blocks against windows that run whole, exits taken token by token."""
    left = leaving(program, threshold, "cosine")
    full = runner_for(left)
    stepwise = Stepwise(runner_for(left, cached=True), full)
    said, final = stepwise.forward(IDS).argmax(-1), full.forward(IDS).argmax(-1)
    spans = exit_spans(left)
    assert not isinstance(spans, Refusal)
    found = ExitWalk(left, spans[:-1], IDS, Options()).run(left.exits, None, final)
    counts = torch.bincount(found.depth[:, 1:].flatten(), minlength=4)[1:]
    assert stepwise.counts == counts.tolist()
    assert torch.equal(said == final, found.agrees)
    assert stepwise.blocks < 3


@pytest.mark.parametrize("target", ["reference", "cpu"])
def test_rows_alone_and_above_one(program: Program, target: str) -> None:
    prompts = [[3, 1, 4], [1, 5, 9, 12, 6, 5, 8], [7]]
    runner = runner_for(leaving(program, 0.7, "cosine"), target, cached=True)
    alone = [generate(runner, [p], max_new_tokens=8)[0] for p in prompts]
    assert generate(runner, prompts, max_new_tokens=8) == alone
    never = runner_for(leaving(program, 2.0, "cosine"), target, cached=True)
    full = runner_for(program, target, cached=True)
    assert generate(never, prompts, max_new_tokens=8) == generate(full, prompts, max_new_tokens=8)
