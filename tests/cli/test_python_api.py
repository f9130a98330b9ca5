"""The Python door: nothing given is touched, everything that decides the result is recorded."""

from __future__ import annotations

import hashlib
from pathlib import Path
from typing import Any

import pytest
import torch

import llmc
from llmc.compiler.ir.errors import GateError, UsageError

TEXTS = [f"def f{i}(x):\n    return x + {i}\n" for i in range(300)]


@pytest.fixture(scope="module")
def module(tiny: Path) -> torch.nn.Module:
    """The tiny model as transformers loads it."""
    from transformers import AutoModelForCausalLM

    found: torch.nn.Module = AutoModelForCausalLM.from_pretrained(tiny, dtype=torch.float32)
    return found.eval()


@pytest.fixture(scope="module")
def small(module: torch.nn.Module) -> Any:
    """``smooth,w4,prune24`` of the module."""
    return llmc.compile(
        module, passes="smooth,w4:group=32,prune24", calibration=TEXTS, samples=4, length=32
    )


def state_of(module: torch.nn.Module) -> tuple[str, str, list[int]]:
    """Bytes of the state, the config, and the number of hooks of each kind."""
    total = hashlib.sha256()
    for name, tensor in module.state_dict().items():
        total.update(name.encode() + str(tensor.dtype).encode())
        total.update(tensor.contiguous().view(torch.uint8).numpy().tobytes())
    hooks = [
        sum(len(getattr(m, kind)) for m in module.modules())
        for kind in ("_forward_hooks", "_forward_pre_hooks", "_backward_hooks")
    ]
    config: Any = module.config
    return total.hexdigest(), repr(config.to_json_string()), hooks


def test_the_given_module_is_not_touched(module: torch.nn.Module) -> None:
    """State bytes, config, hooks, training flag, storages and outputs stay as they were."""
    module.train()
    ids = torch.arange(12).view(1, 12)
    before, places = state_of(module), [p.data_ptr() for p in module.parameters()]
    grads = [p.requires_grad for p in module.parameters()]
    with torch.no_grad():
        logits = module(ids).logits
    llmc.compile(
        module, passes="smooth,w4:group=32,prune24", calibration=TEXTS, samples=2, length=32
    )
    assert state_of(module) == before
    assert module.training
    assert [p.data_ptr() for p in module.parameters()] == places
    assert [p.requires_grad for p in module.parameters()] == grads
    with torch.no_grad():
        assert torch.equal(module(ids).logits, logits)
    module.eval()


def test_smooth_alone_is_exact(module: torch.nn.Module) -> None:
    """Folding scales moves fp32 logits by at most 1e-4 relative."""
    made = llmc.compile(module, passes="smooth", calibration=TEXTS, samples=4, length=32)
    ids = torch.randint(0, 2048, (2, 24), generator=torch.Generator().manual_seed(1))
    with torch.no_grad():
        want = module(ids).logits
    assert float((made(ids) - want).norm() / want.norm()) < 1e-4
    assert {f["kind"] for f in made.folds} == {"norm", "value", "product"}


def test_save_and_load_give_the_same_bits(small: Any, tmp_path: Path) -> None:
    """Logits, text, records and recipe survive a save, and so does a second save."""
    small.save(tmp_path / "a")
    back = llmc.load(tmp_path / "a")
    ids = torch.arange(20).view(2, 10)
    assert torch.equal(back(ids), small(ids))
    assert back.generate("def", max_new_tokens=5) == small.generate("def", max_new_tokens=5)
    assert [r["site"] for r in back.records] == [r["site"] for r in small.records]
    assert back.record == small.record
    first = (tmp_path / "a" / "manifest.json").read_bytes()
    back.save(tmp_path / "b")
    with pytest.raises(UsageError, match="--force"):
        back.save(tmp_path / "a")
    back.save(tmp_path / "a", force=True)
    one, two = (llmc.load(tmp_path / n).loaded.manifest.content_hash for n in "ab")
    assert one == two
    assert one in first.decode()


def test_what_decided_the_result_is_recorded(small: Any) -> None:
    """Recipe, data with hash, window, seed, propagation and tokens per weight."""
    record = small.record
    data = record["calibration"]
    assert (data["samples"], data["length"], data["seed"]) == (4, 32, 0)
    assert data["data"] == "texts in memory"
    assert len(data["sha256"]) == 64
    assert record["settings"]["propagate"] == "compressed"
    assert record["passes"] == "smooth,prune24,w4:group=32"
    assert {r["tokens"] for r in small.records} == {128}
    assert small.report["totals"]["sites"] == 14
    assert small.report["totals"]["bits_per_weight"] == pytest.approx(3.5)


def test_padding_and_positions(small: Any) -> None:
    """Left padding does not change the logits of real tokens."""
    ids = torch.randint(1, 2048, (1, 9), generator=torch.Generator().manual_seed(2))
    padded = torch.cat([torch.zeros(1, 3, dtype=torch.int64), ids], 1)
    mask = torch.tensor([[0] * 3 + [1] * 9])
    torch.testing.assert_close(small(padded, mask)[:, 3:], small(ids), rtol=1e-4, atol=1e-4)


def test_cached_generation_equals_uncached(small: Any) -> None:
    """Greedy decoding with the cache gives the tokens that whole forward passes give."""
    ids = torch.arange(5, 17).view(1, 12)
    made = small.generate(ids, max_new_tokens=8)[0]
    text = ids
    for token in made:
        assert int(small(text)[0, -1].argmax()) == token
        text = torch.cat([text, torch.tensor([[token]])], 1)
    assert small.generator.cached


def test_graph_is_readable(small: Any) -> None:
    """``graph.print_python()`` shows the decode ops; repr says what was done."""
    assert "llmc.dequantize" in small.graph.print_python()
    assert "prune24" in repr(small)


def test_plan_loads_no_weight(tiny: Path) -> None:
    """Capturing and planning a folder reads headers alone."""
    from llmc.compiler.capture import capture

    plan = llmc.plan(capture(tiny), ["prune24", "w4:group=32"])
    assert len(plan.stages) == 2
    weights: Any = plan.source.weights
    while hasattr(weights, "base"):
        weights = weights.base
    assert weights.loads == 0


def test_tokens_as_calibration(tiny: Path) -> None:
    """A tensor [samples, length] is taken as it is."""
    tokens = torch.randint(0, 2048, (3, 16), generator=torch.Generator().manual_seed(3))
    made = llmc.compile(tiny, passes="w4:group=32", calibration=tokens)
    assert made.record["calibration"]["drawn"] == "as given"
    assert {r["tokens"] for r in made.records} == {48}


def test_no_data_where_none_is_needed(tiny: Path) -> None:
    """Nearest codes need no text, so none is read."""
    made = llmc.compile(tiny, passes="w4:group=32,solver=rtn")
    assert made.record["calibration"] is None


def test_strict_turns_a_fallback_into_an_error(tiny: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """``strict`` names the first weight that fell back."""
    from llmc.compiler.pipeline import rounds

    real = rounds.solve_group

    def fallen(*args: Any) -> Any:
        return [r | {"fallbacks": ["damping raised to 0.1"]} for r in real(*args)]

    monkeypatch.setattr(rounds, "solve_group", fallen)
    tokens = torch.randint(0, 2048, (2, 16), generator=torch.Generator().manual_seed(3))
    with pytest.raises(GateError, match="damping raised"):
        llmc.compile(tiny, passes="w4:group=32", calibration=tokens, strict=True)
    made = llmc.compile(tiny, passes="w4:group=32", calibration=tokens)
    assert len(made.report["fallbacks"]) == 14


@pytest.mark.parametrize(
    ("given", "says"),
    [
        ({}, "passes or a recipe"),
        ({"passes": "w4", "recipe": {"version": 1}}, "found both"),
        ({"passes": "w4", "propagate": "half"}, "propagate"),
        ({"passes": "w4", "samples": 0}, "samples"),
        ({"passes": "w4", "target": "tpu"}, "tpu"),
    ],
)
def test_wrong_arguments(tiny: Path, given: dict[str, Any], says: str) -> None:
    """Each is refused before the work, by name."""
    with pytest.raises(UsageError, match=says):
        llmc.compile(tiny, **given)


def test_text_without_a_tokenizer(small: Any) -> None:
    """A model without a tokenizer takes token ids and refuses text."""
    from llmc.compiler.model import Model

    bare = Model(small.program, None, {"passes": "dense"})
    with pytest.raises(UsageError, match="tokenizer"):
        bare.generate("def")
    assert len(bare.generate([[1, 2, 3]], max_new_tokens=2)[0]) <= 2
    with pytest.raises(UsageError, match="dense"):
        bare.save("nowhere")


def test_plain_module() -> None:
    """A module that is no language model keeps its call; passes with data are refused."""
    torch.manual_seed(0)
    net = torch.nn.Sequential(torch.nn.Linear(32, 64), torch.nn.ReLU(), torch.nn.Linear(64, 16))
    net = torch.nn.Sequential(net, torch.nn.ReLU(), torch.nn.Linear(16, 4)).eval()
    x = torch.randn(6, 32)
    made = llmc.compile(net, passes="w8:solver=rtn,group=16", inputs=[x])
    with torch.no_grad():
        want = net(x)
    assert 0 < float((made(x) - want).norm() / want.norm()) < 0.05
    with pytest.raises(UsageError, match="token"):
        llmc.compile(net, passes="w4:group=16", inputs=[x], calibration=torch.zeros(2, 8).long())
