"""What the attention and experts functions take, and what they refuse rather than guess."""

from __future__ import annotations

from collections.abc import Callable
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from torch import nn

from llmc.compiler.capture import capture, interface
from llmc.compiler.ir.errors import CaptureError

Q = torch.zeros(2, 4, 6, 8)
KV = torch.zeros(2, 2, 6, 8)
POS = torch.arange(6)[None].expand(2, -1)
VALID = torch.ones(2, 6, dtype=torch.bool)


def causal(b: Any, h: Any, q: torch.Tensor, k: torch.Tensor) -> torch.Tensor:
    return k <= q


def banded(width: int) -> Callable[..., torch.Tensor]:
    return lambda b, h, q, k: (k <= q) & (k > q - width)


def test_mask_rule_reaches_the_node() -> None:
    with interface.session(POS) as found:
        mask = interface.mask(mask_function=banded(3), attention_mask=VALID, local_size=3)
        out, _ = interface.attention(nn.Module(), Q, KV, KV, mask, scaling=0.5)
    assert out.shape == (2, 6, 4, 8)
    assert found.rules[id(mask)] == interface.Rule(True, 3)
    found.check()


@pytest.mark.parametrize(
    ("function", "local"),
    [
        (causal, 4),
        (banded(4), None),
        (lambda b, h, q, k: k >= q, None),
        (lambda b, h, q, k: (k // 4 == q // 4) & (k <= q), 4),
        (lambda b, h, q, k: (k <= q) | (k < 3), None),
    ],
)
def test_mask_that_the_rule_does_not_say(function: Any, local: int | None) -> None:
    """Chunked, prefix and mislabelled masks are found out entry by entry."""
    with interface.session(POS) as found:
        interface.mask(mask_function=function, attention_mask=VALID, local_size=local)
    with pytest.raises(CaptureError, match="found another one"):
        found.check()


def test_mask_that_needs_more_than_positions() -> None:
    table = torch.zeros(1, 2)
    with interface.session(POS) as found:
        interface.mask(
            mask_function=lambda b, h, q, k: table[b, q] == table[b, k], attention_mask=VALID
        )
    with pytest.raises(CaptureError, match="depends on positions only"):
        found.check()


@pytest.mark.parametrize(
    ("given", "says"),
    [
        ({"attention_mask": None}, "found none"),
        ({"attention_mask": torch.ones(2, 1, 6, 6)}, "found rank 4"),
        ({"attention_mask": VALID, "q_offset": 3}, "with an offset"),
    ],
)
def test_masks_refused(given: dict[str, Any], says: str) -> None:
    with interface.session(POS), pytest.raises(CaptureError, match=says):
        interface.mask(mask_function=causal, **given)


@pytest.mark.parametrize(
    ("given", "says"),
    [
        ({"attention_mask": torch.zeros(2, 1, 6, 6)}, "a custom one"),
        ({"attention_mask": VALID}, "a custom one"),
        ({"attention_mask": None}, "expected a mask from the mask function"),
        ({"attention_mask": None, "dropout": 0.1}, "expected no dropout"),
        ({"attention_mask": None, "head_mask": Q}, "found head_mask"),
        ({"attention_mask": None, "block_table": Q}, "found block_table"),
        ({"attention_mask": None, "key": torch.zeros(2, 2, 9, 8)}, "keys of another length"),
    ],
)
def test_attention_refused(given: dict[str, Any], says: str) -> None:
    given = {"key": KV, **given}
    with interface.session(POS), pytest.raises(CaptureError, match=says):
        interface.attention(nn.Module(), Q, value=KV, **given)


def test_outside_a_capture() -> None:
    with pytest.raises(CaptureError, match=r"inside llmc\.capture only"):
        interface.attention(nn.Module(), Q, KV, KV, None)


def experts_module(**over: Any) -> Any:
    plain = {
        "has_gate": True, "has_bias": False, "is_transposed": False, "is_concatenated": True,
        "act_fn": nn.SiLU(), "gate_up_proj": torch.randn(3, 12, 4),
        "down_proj": torch.randn(3, 4, 6),
    }  # fmt: skip
    from transformers.integrations import moe

    kind = type("Experts", (SimpleNamespace,), {"_apply_gate": moe._default_apply_gate})
    return kind(**{**plain, **over})


def test_experts() -> None:
    x, index = torch.randn(5, 4), torch.tensor([[0, 1], [1, 2], [2, 0], [0, 2], [1, 0]])
    out = interface.experts(experts_module(), x, index, torch.rand(5, 2))
    assert out.shape == x.shape


@pytest.mark.parametrize(
    ("over", "says"),
    [
        ({"has_bias": True}, "has_bias"),
        ({"is_transposed": True}, "is_transposed"),
        ({"is_concatenated": False}, "is_concatenated"),
        ({"has_gate": False}, "has_gate"),
        ({"act_fn": nn.Softplus()}, "known activation"),
    ],
)
def test_experts_refused(over: dict[str, Any], says: str) -> None:
    with pytest.raises(CaptureError, match=says):
        interface.experts(
            experts_module(**over), torch.randn(5, 4), torch.zeros(5, 2), torch.rand(5, 2)
        )


def test_encoder_decoder_is_refused() -> None:
    """Cross attention has no place in the op; T5 says so in one line."""
    from transformers import T5Config, T5ForConditionalGeneration

    config = T5Config(
        vocab_size=64,
        d_model=16,
        d_kv=4,
        d_ff=16,
        num_layers=1,
        num_heads=4,
        decoder_start_token_id=0,
    )  # fmt: skip
    with pytest.raises(CaptureError) as caught:
        capture(T5ForConditionalGeneration(config))
    assert "\n" not in str(caught.value)


def test_registering_changes_no_other_model(build: Callable[..., Any]) -> None:
    """The masks that fallback models are traced with are put back."""
    from transformers.masking_utils import AttentionMaskInterface

    table = AttentionMaskInterface._global_mapping
    before = dict(table)
    capture(build("falcon"))
    assert {k: table[k] for k in before} == before
