"""The demo model, its texts and the script that trains one like it."""

from __future__ import annotations

import hashlib
import importlib.util
import json
import sys
from pathlib import Path
from types import ModuleType


def load_example(repo: Path, name: str) -> ModuleType:
    """Import ``examples/<name>.py`` by path; examples are scripts, not a package."""
    spec = importlib.util.spec_from_file_location(name, repo / "examples" / f"{name}.py")
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    sys.modules[name] = module
    spec.loader.exec_module(module)
    return module


def test_text_is_deterministic_disjoint_and_big_enough(repo: Path, tmp_path: Path) -> None:
    """Two runs give the same bytes, no top-level module is in both texts, and both are long."""
    make_text = load_example(repo, "make_text")
    first = make_text.make_text(tmp_path / "a")
    second = make_text.make_text(tmp_path / "b")
    assert [t.sha256 for t in first] == [t.sha256 for t in second]
    tops = [{f.split("/")[0].removesuffix(".py") for f in t.files} for t in first]
    assert tops[0].isdisjoint(tops[1])
    assert min(len(top) for top in tops) >= 10
    assert first[0].characters >= 1_000_000
    assert first[1].characters >= 700_000
    manifest = json.loads((tmp_path / "a" / "manifest.json").read_text())
    for text in manifest["texts"]:
        data = (tmp_path / "a" / f"{text['name']}.txt").read_bytes()
        assert hashlib.sha256(data).hexdigest() == text["sha256"]


def test_demo_model_is_the_one_in_the_card(pylm: Path) -> None:
    """The committed model predicts Python far better than chance, as its card says (about 9)."""
    import torch
    from transformers import AutoModelForCausalLM, AutoTokenizer

    model = AutoModelForCausalLM.from_pretrained(pylm, dtype=torch.float32).eval()
    tokenizer = AutoTokenizer.from_pretrained(pylm)
    assert sum(p.numel() for p in model.parameters()) == 5_246_208
    text = "def add(self, other):\n    if other is None:\n        return self\n" * 8
    ids = torch.tensor([tokenizer.encode(text)])
    assert tokenizer.decode(ids[0]) == text
    with torch.no_grad():
        loss = model(ids, labels=ids).loss.item()
    assert loss < 2.0, f"expected below 2 nats per token (chance is 7.6), found {loss:.3f}"


def test_training_script_lowers_the_loss_and_saves_a_model(repo: Path, tmp_path: Path) -> None:
    """A tiny run learns something, and what it saves loads again and runs."""
    import torch
    from transformers import AutoModelForCausalLM, AutoTokenizer

    train_pylm = load_example(repo, "train_pylm")
    options = "--steps 200 --batch 4 --context 64 --vocabulary 512 --width 64 --blocks 2"
    argv = [*options.split(), "--files", "20", "--device", "cpu", "--out", str(tmp_path / "m")]
    losses = train_pylm.main(argv)
    assert sum(losses[-10:]) / 10 < losses[0] - 1.0
    tokenizer = AutoTokenizer.from_pretrained(tmp_path / "m")
    model = AutoModelForCausalLM.from_pretrained(tmp_path / "m", dtype=torch.float32)
    ids = torch.tensor([tokenizer.encode("import os\n")])
    assert model(ids).logits.shape == (1, ids.shape[1], 512)
