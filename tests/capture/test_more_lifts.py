"""Lifts that single families need: routers of one group, alibi, regrouped rope, patches."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import nn

from llmc.compiler.capture import capture
from llmc.compiler.capture.module import capture_module
from llmc.compiler.ir.graph import Program
from llmc.compiler.ir.interpret import run
from llmc.compiler.ir.ops import row_of

F = nn.functional
Get = Callable[[str], Any]


class Of(nn.Module):
    """A module from a function of one input."""

    def __init__(self, function: Any) -> None:
        super().__init__()
        self.function = function

    def forward(self, x: torch.Tensor) -> Any:
        return self.function(x)


def captured(function: Any, *shape: int) -> tuple[Program, Counter[str]]:
    """The program of a function of x [B, *shape], checked against it at another batch size."""
    axes = {"x": ("B", *(None for _ in shape))}
    program = capture_module(Of(function), {"x": torch.randn(2, *shape)}, axes)
    x = torch.randn(5, *shape)
    torch.testing.assert_close(run(program, {"x": x}), function(x), rtol=1e-6, atol=1e-6)
    return program, Counter(row_of(n).name for n in program.calls())


def grouped_router(x: torch.Tensor, groups: int, chosen: int) -> torch.Tensor:
    """Scores outside of the chosen groups are never taken (DeepSeek-V3)."""
    scores = x.sigmoid()
    best = scores.view(-1, groups, 8 // groups).topk(2, -1)[0].sum(-1)
    index = best.topk(chosen, -1, sorted=False)[1]
    mask = torch.zeros_like(best).scatter_(1, index, 1)
    wide = mask.unsqueeze(-1).expand(-1, groups, 8 // groups).reshape(-1, 8)
    return scores.masked_fill(~wide.bool(), -1.0)


def test_router_of_one_group_masks_nothing() -> None:
    _, ops = captured(lambda x: grouped_router(x, 1, 1), 8)
    assert ops == {"aten.sigmoid.default": 1}


def test_router_of_two_groups_stays() -> None:
    _, ops = captured(lambda x: grouped_router(x, 2, 1), 8)
    assert ops["aten.masked_fill.Scalar"] == 1
    assert ops["aten.topk.default"] == 2


def regrouped(x: torch.Tensor, cos: torch.Tensor, sin: torch.Tensor) -> torch.Tensor:
    a, b = x[..., ::2], x[..., 1::2]
    return torch.cat((a * cos - b * sin, b * cos + a * sin), -1)


def test_rope_that_regroups_its_pairs() -> None:
    cos, sin = torch.randn(2, 6, 4)
    _, ops = captured(lambda x: regrouped(x, cos, sin), 3, 6, 8)
    assert ops["llmc.rope"] == 1
    assert not ops["aten.sub.Tensor"] + ops["aten.mul.Tensor"]


def test_rotation_by_two_angles_is_no_rope() -> None:
    cos, sin = torch.randn(2, 6, 4)

    def odd(x: torch.Tensor) -> torch.Tensor:
        a, b = x[..., ::2], x[..., 1::2]
        return torch.cat((a * cos - b * sin, b * cos + a * sin.flip(0)), -1)

    _, ops = captured(odd, 3, 6, 8)
    assert not ops["llmc.rope"]


def filled(x: torch.Tensor) -> torch.Tensor:
    out = x.new_empty(*x.shape[:-1], 2 * x.shape[-1])
    out[..., : x.shape[-1]] = x * 2
    out[..., x.shape[-1] :] = x + 1
    return out


def test_parts_written_into_an_empty_tensor_are_a_concatenation() -> None:
    _, ops = captured(filled, 3, 4)
    assert ops == {"aten.mul.Tensor": 1, "aten.add.Tensor": 1, "aten.cat.default": 1}


def test_part_of_a_concatenation_that_cuts_a_piece_stays() -> None:
    _, ops = captured(lambda x: torch.cat((x, -x, x + 1), -1)[..., 4:12], 4)
    assert ops == {"aten.neg.default": 1, "aten.add.Tensor": 1, "aten.cat.default": 1}
    _, ops = captured(lambda x: torch.cat((x, -x), -1)[..., 3:8], 4)
    assert ops["aten.slice.Tensor"] == 1


def test_table_of_literals_is_stored() -> None:
    program, ops = captured(lambda x: x * torch.full((), 0.5).pow(torch.arange(1, 5)), 4)
    assert ops == {"aten.mul.Tensor": 1}
    (table,) = program.params.values()
    assert not table.trained
    assert program.weights.load(table.name).tolist() == [0.5, 0.25, 0.125, 0.0625]


@pytest.mark.parametrize(("allowed", "causal"), [(torch.ge, False), (torch.le, True)])
def test_masks_spread_over_the_batch(allowed: Any, causal: bool) -> None:
    """One that masks nothing is two-sided attention, whatever its batch axis."""

    def attend(x: torch.Tensor) -> torch.Tensor:
        at = torch.arange(6)
        mask = allowed(at[None, :] if causal else at[:, None], at[:, None] if causal else 0)
        mask = mask.expand(x.shape[0], 1, 6, 6)
        return F.scaled_dot_product_attention(x, x * 2, x + 1, attn_mask=mask)

    program, ops = captured(attend, 2, 6, 4)
    assert ops["llmc.attention"] == 1
    (node,) = program.calls("llmc.attention")
    assert node.kwargs.get("causal", True) is causal


def test_bloom_is_attention_with_a_bias(case: Get) -> None:
    program = case("bloom").program
    nodes = list(program.calls("llmc.attention"))
    assert len(nodes) == 2
    assert all(len(n.args) == 7 for n in nodes)
    ops = Counter(row_of(n).name for n in program.calls())
    assert ops["llmc.activation"] == 2
    assert not ops["aten.baddbmm.default"] + ops["aten.softmax.int"]
    slopes = [p for p in program.params.values() if not p.trained]
    assert [p.shape for p in slopes] == [(4, 1)]


def test_t5_encoder_keeps_its_position_bias() -> None:
    from transformers import T5Config, T5EncoderModel

    torch.manual_seed(0)
    sizes = {"vocab_size": 64, "d_model": 16, "d_kv": 4, "d_ff": 16, "num_layers": 2}
    model = T5EncoderModel(T5Config(**sizes, num_heads=4)).eval()
    program = capture(model)
    assert Counter(row_of(n).name for n in program.calls())["llmc.attention"] == 2
    ids = torch.randint(0, 64, (3, 9))
    given = {
        "input_ids": ids,
        "position_ids": torch.arange(9)[None].expand(3, -1),
        "attention_mask": torch.arange(9)[None] < torch.tensor([[9], [5], [7]]),
    }
    with torch.no_grad():
        want = model(input_ids=ids, attention_mask=given["attention_mask"].long())[0]
    found, kept = run(program, given), given["attention_mask"]
    torch.testing.assert_close(found[kept], want[kept], rtol=1e-5, atol=1e-5)


def test_vision_transformer() -> None:
    from transformers import ViTConfig, ViTModel

    torch.manual_seed(0)
    sizes = {"hidden_size": 16, "num_hidden_layers": 2, "num_attention_heads": 4}
    config = ViTConfig(**sizes, intermediate_size=24, image_size=8, patch_size=4)
    model = ViTModel(config, add_pooling_layer=False).eval()
    pixels = torch.randn(2, 3, 8, 8)
    axes = {"pixel_values": ("B", None, None, None)}
    program = capture(model, inputs={"pixel_values": pixels}, axes=axes)
    assert Counter(row_of(n).name for n in program.calls())["llmc.attention"] == 2
    pixels = torch.randn(3, 3, 8, 8)
    with torch.no_grad():
        want = model(pixels)[0]
    torch.testing.assert_close(run(program, {"pixel_values": pixels}), want, rtol=1e-5, atol=1e-5)


def interleaved(x: torch.Tensor, cos: torch.Tensor, sin: torch.Tensor) -> torch.Tensor:
    turned = torch.stack((-x[..., 1::2], x[..., ::2]), -1).flatten(-2)
    return x * cos.repeat_interleave(2, -1) + turned * sin.repeat_interleave(2, -1)


def test_rope_of_neighbouring_channels() -> None:
    cos, sin = torch.randn(2, 6, 4)
    program, ops = captured(lambda x: interleaved(x, cos, sin), 3, 6, 8)
    assert ops["llmc.rope"] == 1
    assert not ops["aten.stack.default"]
    (node,) = program.calls("llmc.rope")
    assert node.kwargs == {"interleaved": True}


@pytest.mark.parametrize("family", ["gptj", "cohere", "glm4", "deepseek_v3"])
def test_families_with_such_a_rope(case: Get, family: str) -> None:
    ops = Counter(row_of(n).name for n in case(family).program.calls())
    assert ops["llmc.rope"] == 4
    assert not ops["aten.stack.default"] + ops["aten.neg.default"]
