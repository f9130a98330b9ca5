"""drop_layers on captured architectures: logits are those of the model with its layers bypassed."""

from __future__ import annotations

import inspect
import sys
from pathlib import Path
from typing import Any

import pytest
import torch

from llmc.compiler.capture import capture
from llmc.compiler.ir.interpret import run
from llmc.compiler.pipeline import recipe
from llmc.compiler.pipeline.compile import compile_plan
from llmc.compiler.pipeline.plan import make_plan
from llmc.compiler.runtime.cache import add_cache, cache_refusals
from llmc.compiler.runtime.executor import Runner

sys.path.insert(0, str(Path(__file__).parents[1]))

from tiny_models import make, random_tokens

SLIDING = ["sliding_attention", "sliding_attention", "full_attention", "sliding_attention"]


def bypass(model: Any, indices: set[int], count: int) -> None:
    """Let the layers of the Hugging Face model give back what they were given."""

    def give_back(module: Any, args: Any, kwargs: Any, out: Any) -> Any:
        x = args[0] if args else kwargs["hidden_states"]
        return (x, *out[1:]) if isinstance(out, tuple) else x

    stacks = (m for m in model.modules() if isinstance(m, torch.nn.ModuleList) and len(m) == count)
    layers = next(stacks)
    for i in indices:
        layers[i].register_forward_hook(give_back, with_kwargs=True)


@pytest.mark.parametrize(
    ("arch", "config", "dropped"),
    [
        ("gemma3_text", {"num_hidden_layers": 4, "layer_types": SLIDING}, {1, 2}),
        ("qwen3_moe", {"num_hidden_layers": 3}, {1}),
        ("gpt2", {"n_layer": 4}, {0, 2}),
        ("t5", {"num_layers": 3}, {0}),  # its first block makes the bias that all of them read
    ],
)
def test_logits_are_those_of_bypassed_layers(
    arch: str, config: dict[str, Any], dropped: set[int]
) -> None:
    model = make(arch, **config)
    program = capture(model)
    listed = "+".join(map(str, sorted(dropped)))
    calls = recipe.from_strings([f"drop_layers:method=list,losses=false,blocks={listed}"])
    done = compile_plan(make_plan(program, calls), None)
    (count,) = {v for k, v in config.items() if k != "layer_types"}
    assert done.structure[0]["before"]["blocks"] == count
    assert done.structure[0]["after"]["blocks"] == count - len(dropped)
    bypass(model, dropped, count)
    inputs = random_tokens(2, 12)
    known = inspect.signature(model.forward).parameters
    with torch.no_grad():
        out = model(**{k: v for k, v in inputs.items() if k in known})
        want = out.logits if hasattr(out, "logits") else out.last_hidden_state
        got = run(done.program, {n.name: inputs[n.name] for n in done.program.inputs})
    torch.testing.assert_close(got, want, rtol=1e-5, atol=1e-5)
    if cache_refusals(program):
        assert arch == "t5"
        return
    cached = add_cache(done.program)
    assert list(cached.states) == [f"kv{i}" for i in range(count - len(dropped))]
    runner = Runner(cached)
    kept = runner.start(2)
    rows = [runner.forward(inputs["input_ids"][:, i : i + 1], cache=kept) for i in range(12)]
    torch.testing.assert_close(torch.cat(rows, 1), want, rtol=1e-5, atol=1e-5)
