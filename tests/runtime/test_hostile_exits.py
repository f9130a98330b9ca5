"""Exits of a broken or hostile artefact: refused at load, by name, with exit code 3."""

from __future__ import annotations

import json
import shutil
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import save_file

sys.path.insert(0, str(Path(__file__).parent))

from sealing import refused, reseal_weights

from llmc.compiler.analysis.blocks import apply_segments
from llmc.compiler.ir.exits import CLASSIFIER, Exits, set_exits
from llmc.compiler.runtime import files
from llmc.compiler.runtime.artefact import Contents, load, save
from llmc.compiler.runtime.verify import verify

WEIGHTS = "weights-exits.safetensors"


@pytest.fixture(scope="module")
def original(tmp_path_factory: pytest.TempPathFactory, make_tiny: Any) -> Path:
    program = make_tiny(layers=3)
    apply_segments(program)
    set_exits(program, Exits("classifier", ("block0", "block1"), 0.5), torch.ones(2, 3))
    out = tmp_path_factory.mktemp("made") / "out"
    save(out, Contents(program))
    return out


@pytest.fixture
def out(original: Path, tmp_path: Path) -> Path:
    return Path(shutil.copytree(original, tmp_path / "out"))


def test_the_original_is_sound(out: Path) -> None:
    reseal_weights(out, WEIGHTS, [CLASSIFIER], "classifier")
    assert verify(out) == []
    program = load(out).program
    assert program.exits == Exits("classifier", ("block0", "block1"), 0.5)
    assert torch.equal(program.weights.load(CLASSIFIER), torch.ones(2, 3))


@pytest.mark.parametrize(
    ("tensor", "message"),
    [
        (torch.full((2, 3), float("nan")), "finite numbers in tensor exits.classifier"),
        (torch.full((2, 3), float("inf")), "finite numbers in tensor exits.classifier"),
        (torch.ones(3, 3), r"exits\.classifier f32\[2, 3\] as in the program, found f32\[3, 3\]"),
        (torch.ones(2, 3).double(), r"exits\.classifier f32\[2, 3\] as in the program, found f64"),
    ],
)
def test_classifier_that_does_not_fit(out: Path, tensor: torch.Tensor, message: str) -> None:
    save_file({CLASSIFIER: tensor}, out / WEIGHTS, metadata={"format": "pt"})
    reseal_weights(out, WEIGHTS, [CLASSIFIER], "classifier")
    refused(out, message)


def test_classifier_that_is_missing_or_too_much(out: Path) -> None:
    (out / WEIGHTS).unlink()
    reseal_weights(out, WEIGHTS, [CLASSIFIER], "classifier")
    refused(out, "exits.classifier in both, found it only in the program")


def test_classifier_of_a_rule_that_has_none(out: Path) -> None:
    edit(out, lambda e: e.update(rule="softmax"))
    refused(out, "exits.classifier in both, found it only in the manifest")


def edit(out: Path, change: Callable[[dict[str, Any]], Any]) -> None:
    body = json.loads((out / "program.json").read_bytes())
    change(body["exits"])
    (out / "program.json").write_bytes(files.canonical_json(body))
    reseal_weights(out, WEIGHTS, [CLASSIFIER], "classifier")


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"rule": "pickle"}, "expected an exit rule"),
        ({"rule": 3}, "a rule of at most"),
        ({"blocks": ["block0", "block9"]}, "after blocks in order, found 'block9'"),
        ({"blocks": ["block1", "block0"]}, "after blocks in order, found 'block0'"),
        ({"blocks": ["prologue", "block0"]}, "after blocks in order, found 'prologue'"),
        ({"blocks": ["block0", "block0"]}, "after blocks that differ"),
        ({"blocks": []}, "after blocks that differ"),
        ({"blocks": {"block0": 1}}, "a list of names"),
        ({"blocks": [["block0"], "block1"]}, "a name of at most"),
        ({"threshold": "nan"}, "threshold in -1..2, found nan"),
        ({"threshold": "inf"}, "threshold in -1..2, found inf"),
        ({"threshold": (3.0).hex()}, "threshold in -1..2, found 3"),
        ({"threshold": "0.5"}, "expected '0x1.4000000000000p-2', found '0.5'"),
        ({"threshold": "a threshold"}, "a number in hex"),
        ({"threshold": 0.5}, "a number of at most"),
        ({"decay": 0}, "a decay of 1"),
        ({"decay": True}, "a whole number or null, found True"),
        ({"decay": 1 << 40}, "a decay of 1"),
        ({"extra": 1}, "exits with fields"),
    ],
)  # fmt: skip
def test_record_that_is_wrong(out: Path, change: dict[str, Any], message: str) -> None:
    edit(out, lambda e: e.update(change))
    refused(out, message)
