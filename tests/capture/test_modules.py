"""The other doors: live transformers modules, plain modules, and the graphs of torch.compile."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import nn

from llmc.compiler.capture import capture
from llmc.compiler.capture.module import DynamoCapture, capture_dynamo, capture_module
from llmc.compiler.ir.errors import CaptureError
from llmc.compiler.ir.interpret import run
from llmc.compiler.ir.ops import row_of
from llmc.compiler.ir.verifier import verify

Build = Callable[..., Any]
Tokens = Callable[..., dict[str, torch.Tensor]]


def close(a: torch.Tensor, b: torch.Tensor) -> None:
    torch.testing.assert_close(a, b, rtol=1e-5, atol=1e-5)


class Block(nn.Module):
    """A pre-norm block as people write it by hand: fused qkv, a triangle buffer, eager softmax."""

    def __init__(self, size: int, context: int) -> None:
        super().__init__()
        self.norm, self.norm2 = nn.LayerNorm(size), nn.LayerNorm(size)
        self.qkv, self.out = nn.Linear(size, 3 * size), nn.Linear(size, size)
        self.up, self.down = nn.Linear(size, 2 * size), nn.Linear(2 * size, size)
        triangle = torch.tril(torch.ones(context, context)).view(1, 1, context, context)
        self.register_buffer("triangle", triangle)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        b, s, h = x.shape
        parts = self.qkv(self.norm(x)).split(h, dim=2)
        q, k, v = (t.view(b, s, 2, h // 2).transpose(1, 2) for t in parts)
        scores = (q @ k.transpose(-2, -1)) * (h // 2) ** -0.5
        scores = scores.masked_fill(self.triangle[:, :, :s, :s] == 0, float("-inf"))
        y = torch.softmax(scores, -1) @ v
        x = x + self.out(y.transpose(1, 2).contiguous().view(b, s, h))
        return x + self.down(nn.functional.gelu(self.up(self.norm2(x))))


class Plain(nn.Module):
    """Two blocks, tied head, dropout that evaluation turns off."""

    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.embed = nn.Embedding(40, 16)
        self.drop = nn.Dropout(0.5)
        self.blocks = nn.ModuleList([Block(16, 32), Block(16, 32)])
        self.head = nn.Linear(16, 40, bias=False)
        self.head.weight = self.embed.weight

    def forward(self, tokens: torch.Tensor, offset: torch.Tensor | None = None) -> torch.Tensor:
        x = self.drop(self.embed(tokens))
        for block in self.blocks:
            x = block(x)
        out: torch.Tensor = self.head(x)
        return out if offset is None else out + offset


def state_of(module: nn.Module) -> Any:
    pointers = {k: (v.data_ptr(), v._version) for k, v in module.state_dict().items()}
    return pointers, module.training, [p.requires_grad for p in module.parameters()]


def test_plain_module() -> None:
    module = Plain()
    before = state_of(module)
    assert module.training
    program = capture(module, inputs={"tokens": torch.zeros(2, 12, dtype=torch.long)})
    assert state_of(module) == before
    verify(program)
    found = Counter(row_of(n).name for n in program.calls())
    assert found["llmc.attention"] == 2
    assert found["llmc.layer_norm"] == 4
    assert found["llmc.activation"] == 2
    assert found["aten.linear.default"] == 9
    assert program.facts["refusals"] == []
    tokens = torch.randint(0, 40, (3, 17))
    module.eval()
    close(run(program, {"tokens": tokens}), module(tokens))
    assert {n.meta["llmc"].path for n in program.calls("llmc.layer_norm")} == {
        "blocks.0.norm", "blocks.0.norm2", "blocks.1.norm", "blocks.1.norm2",
    }  # fmt: skip


def test_tensors_are_referred_to_not_copied() -> None:
    module = Plain().eval()
    program = capture(module, inputs=[torch.zeros(2, 12, dtype=torch.long)])
    tied = next(p for p in program.params.values() if len(p.names) == 2)
    assert set(tied.names) == {"embed.weight", "head.weight"}
    assert program.weights.load(tied.name).data_ptr() == module.embed.weight.data_ptr()
    tokens = torch.randint(0, 40, (2, 5))
    with torch.no_grad():
        module.head.weight.mul_(2.0)
    close(run(program, {"tokens": tokens}), module(tokens))


@pytest.mark.parametrize(
    ("inputs", "says"),
    [
        ({"words": torch.zeros(2, 3)}, "inputs that forward takes"),
        ({"tokens": 3}, "inputs that are tensors"),
        ({}, "inputs that forward takes"),
    ],
)
def test_inputs_that_do_not_fit(inputs: Any, says: str) -> None:
    with pytest.raises(CaptureError, match=says):
        capture_module(Plain(), inputs)


def test_plain_module_without_inputs() -> None:
    with pytest.raises(CaptureError, match="expected example inputs for a Plain"):
        capture(Plain())


class Odd(nn.Module):
    def __init__(self, function: Any) -> None:
        super().__init__()
        self.function = function
        self.register_buffer("count", torch.zeros(3))

    def forward(self, x: torch.Tensor) -> Any:
        return self.function(self, x)


@pytest.mark.parametrize(
    ("function", "says"),
    [
        (lambda m, x: x[: int(x.sum())], "expected a module that exports"),
        (lambda m, x: torch.linalg.svdvals(x), "expected an op that llmc knows, found aten.linalg"),
        (lambda m, x: x + m.count.add_(1.0), "expected a module that writes nothing"),
        (lambda m, x: x[x > 0], "expected an integer index"),
        (lambda m, x: (x + 1, 3), "results that are tensors or sizes"),
    ],
)
def test_modules_that_cannot_be_expressed(function: Any, says: str) -> None:
    with pytest.raises(CaptureError, match=says) as caught:
        capture_module(Odd(function), [torch.randn(2, 3)], {"x": ("B", None)})
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize("name", ["llama", "falcon", "qwen3_moe"])
def test_live_transformers_module(build: Build, tokens: Tokens, name: str) -> None:
    """Captured as it is in memory, in bf16 even, and left as it was."""
    model = build(name).to(torch.bfloat16)
    before = state_of(model), model.config.to_dict(), model.config._attn_implementation
    program = capture(model)
    assert (state_of(model), model.config.to_dict(), model.config._attn_implementation) == before
    verify(program)
    assert program.facts["refusals"] == []
    assert Counter(row_of(n).name for n in program.calls())["llmc.attention"] == 2
    trained = [p for p in program.params.values() if p.trained]
    assert {p.dtype for p in trained} == {torch.bfloat16}
    inputs = tokens(3, 9)
    with torch.no_grad():
        want = model.to(torch.float32)(input_ids=inputs["input_ids"]).logits
        # The rotary table went through bf16 with the model; the program saw that table too.
        close(run(program, inputs), want)


def test_folder_and_live_module_give_one_program(
    build: Build, tokens: Tokens, tmp_path: Any
) -> None:
    """The same nodes, names and types through both doors."""
    model = build("llama")
    model.save_pretrained(tmp_path)
    one, two = capture(tmp_path), capture(model)
    two.facts = one.facts
    assert one.print_python() == two.print_python()


def compiled(model: Any, dynamic: bool | None = None) -> tuple[Any, list[DynamoCapture]]:
    seen: list[DynamoCapture] = []

    def backend(gm: Any, examples: Any) -> Any:
        found = capture_dynamo(gm, examples)
        seen.append(found)

        def call(*given: Any) -> Any:
            inputs = {k: v for k, v in zip(found.order, given, strict=True) if k is not None}
            out = run(found.program, inputs)
            return out if isinstance(out, tuple) else (out,)

        return call

    torch._dynamo.reset()
    return torch.compile(model, backend=backend, dynamic=dynamic), seen


def test_dynamo_gives_the_same_op_level(build: Build, tokens: Tokens) -> None:
    """A static graph, then one with a symbolic length; weights are known by identity."""
    model = build("llama")
    model.set_attn_implementation("sdpa")
    call, seen = compiled(model)
    with torch.no_grad():
        for length in (7, 12, 15):
            ids = tokens(2, length)["input_ids"]
            close(call(input_ids=ids, use_cache=False).logits, model(input_ids=ids).logits)
    assert len(seen) == 2
    ours = {id(p) for p in model.parameters()}
    for found in seen:
        verify(found.program)
        ops = Counter(row_of(n).name for n in found.program.calls())
        assert ops["aten.linear.default"] == 15
        assert ops["llmc.rms_norm"] == 5
        assert ops["llmc.rope"] == 4
        assert ops["llmc.gated"] == 2
        trained = {k for k, p in found.program.params.items() if p.trained}
        assert {id(found.sources[k]) for k in trained} == ours
    static, symbolic = (f.program.inputs[0].meta["llmc"].type.shape for f in seen)
    assert static == (2, 7)
    assert [str(d) for d in symbolic] == ["2", "S"]


def test_dynamo_graph_that_requires_grad(build: Build, tokens: Tokens) -> None:
    call, _ = compiled(build("llama"))
    with pytest.raises(Exception, match="requires grad"):
        call(input_ids=tokens(2, 7)["input_ids"], use_cache=False)


def test_dynamo_plain_module() -> None:
    module = Plain().eval()
    call, seen = compiled(module)
    tokens = torch.randint(0, 40, (2, 9))
    with torch.no_grad():
        close(call(tokens), module(tokens))
    ops = Counter(row_of(n).name for n in seen[0].program.calls())
    assert ops["llmc.attention"] == 2
