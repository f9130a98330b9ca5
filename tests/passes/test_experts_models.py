"""Experts of transformers' models: compressed, stored, loaded, written back as a checkpoint."""

from __future__ import annotations

import sys
from pathlib import Path
from typing import Any

import pytest
import torch

import llmc

sys.path.insert(0, str(Path(__file__).parents[1]))

from tiny_models import make, random_tokens

CASES = [("mixtral", "smooth,w4,prune24", 4), ("qwen3_moe", "prune_width:experts=3,w4", 3)]


def compiled(name: str, passes: str) -> Any:
    ids = random_tokens(8, 24)["input_ids"]
    return llmc.compile(make(name, num_hidden_layers=1), passes=passes, calibration=ids)


@pytest.mark.parametrize(("name", "passes", "experts"), CASES)
def test_compressed_experts_survive_storing_and_write_back(
    name: str, passes: str, experts: int, tmp_path: Path
) -> None:
    from transformers import AutoModelForCausalLM

    made = compiled(name, passes)
    rows = {s["role"]: s for s in made.report["sites"] if "experts" in s}
    assert set(rows) == {"gate_up", "down"}
    for row in rows.values():
        assert len(row["experts"]) == row["shape"][0] == experts
        assert sum(e["tokens"] for e in row["experts"]) == row["tokens"] == 8 * 24 * 2
        assert row["bits"] < 6
    given = random_tokens(2, 12, seed=1)
    want = made(**given)
    made.save(tmp_path / "a")
    assert torch.equal(llmc.load(tmp_path / "a")(**given), want)
    made.export(tmp_path / "hf")
    model = AutoModelForCausalLM.from_pretrained(tmp_path / "hf", attn_implementation="eager")
    with torch.no_grad():
        back = model(input_ids=given["input_ids"]).logits
    torch.testing.assert_close(back, want, rtol=1e-4, atol=1e-4)
