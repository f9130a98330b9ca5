"""Launches of a decode step of real architectures behind layer norms, most of them with attention
and MLP side by side."""

from __future__ import annotations

from typing import Any

import pytest
from test_survey_models import GROUPED, surveyed

ROTARY = {**GROUPED, "bos_token_id": 0, "eos_token_id": 0}
SIZES: dict[str, dict[str, Any]] = {
    "gpt2": {
        "n_embd": 256, "n_layer": 2, "n_head": 4, "vocab_size": 512, "n_positions": 64,
        "bos_token_id": 0, "eos_token_id": 0,
    },
    "falcon": {
        "hidden_size": 256, "num_attention_heads": 4, "num_hidden_layers": 2, "vocab_size": 512,
    },
    "phi": ROTARY, "stablelm": ROTARY, "starcoder2": ROTARY, "cohere": ROTARY, "gpt_neox": ROTARY,
}  # fmt: skip
FAST = ("gpt2", "falcon", "phi")


@pytest.mark.parametrize(
    "name", [n if n in FAST else pytest.param(n, marks=pytest.mark.slow) for n in SIZES]
)
def test_a_decode_step_starts_six_kernels_per_block(name: str) -> None:
    """Norms, activations and sums are in the launches of linears."""
    page = surveyed(name, SIZES[name])
    assert page["launches_per_block"] == 6
    assert page["not_fused"] == []
    problems = [r["problem"] for r in page["fused"]]
    assert [p["centred"] for p in problems].count(True) == 5, "the head too"
    assert [p["residual"] for p in problems].count(True) == 4
    linears = [r["linears"] for r in page["fused"]]
    assert sum(map(len, linears)) == len(set().union(*linears))
