"""``llmc groups``: the table, the data, the pictures, and what is refused."""

from __future__ import annotations

import xml.etree.ElementTree as ET
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

Llmc = Callable[..., Any]


def test_table_says_what_moves_together(llmc: Llmc, tiny: Path) -> None:
    done = llmc("groups", tiny)
    assert done.code == 0
    lines = done.out.splitlines()
    kv = next(line for line in lines if "kv_group0" in line)
    assert "block0/kv_group0 … block1/kv_group0" in kv
    assert "KV head with its query heads" in kv
    assert "2 blocks" in kv
    blocked = next(line for line in lines if line.startswith("prologue/channel0"))
    assert "node embedding" in blocked
    assert "model.embed_tokens" in blocked
    assert lines[-1] == "10 groups, 2 of them blocked"


def test_every_axis_with_its_names(llmc: Llmc, tiny: Path) -> None:
    done = llmc("groups", tiny, "--kind", "neuron", "--all", "-v")
    assert done.code == 0
    for i in range(2):
        for name in ("gate_proj", "up_proj", "down_proj"):
            assert f"model.layers.{i}.mlp.{name}.weight" in done.out
    assert "q_proj" not in done.out


def test_data(llmc: Llmc, tiny: Path) -> None:
    found = llmc("groups", tiny, "--block", 1, "--json").json
    assert found["command"] == "groups"
    by_id = {g["id"]: g for g in found["groups"]}
    assert set(by_id) == {"block1/kv_group0", "block1/value_channel0", "block1/neuron0"}
    neuron = by_id["block1/neuron0"]
    assert neuron["units"] == 96
    # gate, up and down: a row, a row and a column of 64 numbers in fp32.
    assert neuron["bytes_per_unit"] == 3 * 64 * 4
    assert neuron["flops_per_unit"] == 3 * 64 * 2
    assert neuron["members"][2] == {
        "param": neuron["members"][2]["param"], "axis": 1, "role": "reads", "indices_per_unit": 1,
        "names": ["model.layers.1.mlp.down_proj.weight"],
    }  # fmt: skip


def test_pictures(llmc: Llmc, tiny: Path, tmp_path: Path) -> None:
    done = llmc("groups", tiny, "--picture", tmp_path / "g.svg")
    assert done.code == 0
    root = ET.parse(tmp_path / "g.svg").getroot()
    texts = [e.text for e in root.iter("{http://www.w3.org/2000/svg}text")]
    assert "block0/neuron0, in 2 blocks: 96 units" in texts
    assert "model.layers.0.mlp.down_proj.weight [1] reads 1" in texts
    assert any(str(t).startswith("blocked: aten.embedding.default") for t in texts)
    # q, k, v and o of the first block lie in the group of heads and in that of hidden channels.
    assert len(list(root.iter("{http://www.w3.org/2000/svg}path"))) >= 4
    assert llmc("groups", tiny, "--block", 0, "--picture", tmp_path / "g.dot").code == 0
    text = (tmp_path / "g.dot").read_text(encoding="utf-8")
    assert text.startswith("graph groups {")
    assert text.count("subgraph cluster_") == 3
    assert text.count("{") == text.count("}")
    assert " -- " in text


@pytest.mark.parametrize(
    ("args", "says", "code"),
    [
        (["--kind", "neurons"], "did you mean 'neuron'?", 2),
        (["--block", 7], "--block: expected 0..1, found 7", 2),
        (["--picture", "g.png"], "ending in .svg or .dot", 2),
        (["--picture", "no/such/folder/g.svg"], "a file that can be written", 2),
    ],
)
def test_bad_options(llmc: Llmc, tiny: Path, args: list[Any], says: str, code: int) -> None:
    done = llmc("groups", tiny, *args)
    assert done.code == code
    assert says in done.error


def test_dense_artefact(llmc: Llmc, tiny: Path, tmp_path: Path, small_run: list[object]) -> None:
    out = tmp_path / "smoothed"
    assert llmc("compile", tiny, "--passes", "smooth", "-o", out, *small_run).code == 0
    ids = [g["id"] for g in llmc("groups", out, "--json").json["groups"]]
    assert ids == [g["id"] for g in llmc("groups", tiny, "--json").json["groups"]]


def test_sources_that_have_no_groups(llmc: Llmc, artefact: Path, tmp_path: Path) -> None:
    done = llmc("groups", artefact)
    assert done.code == 2
    assert "expected dense weights" in done.error
    assert llmc("groups", tmp_path).code == 3
