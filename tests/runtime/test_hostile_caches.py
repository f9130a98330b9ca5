"""Cache records of a broken or hostile artefact: refused at load, by name, with exit code 3."""

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
from llmc.compiler.ir.caches import CacheScheme, set_caches
from llmc.compiler.pipeline.zoo import decoder
from llmc.compiler.runtime import files
from llmc.compiler.runtime.artefact import Contents, load, save
from llmc.compiler.runtime.verify import verify

WEIGHTS = "weights-caches.safetensors"
FIRST = CacheScheme("kvquant", 2, first=1, outliers=0.25, turned=True, slot=0)
SECOND = CacheScheme("int8", 8, keys="channel", slot=1)
TENSORS = {
    "cache.0.key_range": torch.stack([-torch.ones(2, 4), torch.ones(2, 4)]),
    "cache.0.key_levels": torch.linspace(-1, 1, 4).expand(2, -1).contiguous(),
    "cache.0.value_levels": torch.linspace(-1, 1, 4).expand(2, -1).contiguous(),
    "cache.1.key_scale": torch.ones(2, 4),
}


def nodes(path: Path) -> list[str]:
    return list(json.loads((path / "program.json").read_bytes())["caches"])


@pytest.fixture(scope="module")
def original(tmp_path_factory: pytest.TempPathFactory) -> Path:
    program = decoder(rope=1.0)
    apply_segments(program)
    one, two = (n.name for n in program.calls("llmc.attention"))
    set_caches(program, {one: FIRST, two: SECOND}, TENSORS)
    out = tmp_path_factory.mktemp("made") / "out"
    save(out, Contents(program))
    return out


@pytest.fixture
def out(original: Path, tmp_path: Path) -> Path:
    return Path(shutil.copytree(original, tmp_path / "out"))


def test_the_original_is_sound(out: Path) -> None:
    reseal_weights(out, WEIGHTS, TENSORS, "cache")
    assert verify(out) == []
    program = load(out).program
    assert list(program.caches.values()) == [FIRST, SECOND]
    for name, tensor in TENSORS.items():
        assert torch.equal(program.weights.load(name), tensor)
    assert program.clone().caches == program.caches


@pytest.mark.parametrize(
    ("name", "tensor", "message"),
    [
        ("cache.0.key_range", torch.full((2, 2, 4), float("nan")), "finite numbers in tensor"),
        ("cache.0.key_range", torch.ones(2, 2, 4), "ranges that are not empty"),
        ("cache.0.key_levels", torch.ones(2, 8), r"f32\[2, 4\] as in the program, found f32\[2, 8"),
        ("cache.0.key_levels", torch.linspace(1, -1, 4).expand(2, -1).contiguous(), "ascending"),
        ("cache.0.value_levels", torch.ones(2, 4).double(), "as in the program, found f64"),
        ("cache.1.key_scale", torch.zeros(2, 4), "scales above 0"),
        ("cache.1.key_scale", torch.full((2, 4), float("inf")), "finite numbers"),
    ],
)
def test_tensor_that_does_not_fit(
    out: Path, name: str, tensor: torch.Tensor, message: str
) -> None:  # fmt: skip
    save_file({**TENSORS, name: tensor}, out / WEIGHTS, metadata={"format": "pt"})
    reseal_weights(out, WEIGHTS, TENSORS, "cache")
    refused(out, message)


def test_tensors_that_are_missing(out: Path) -> None:
    (out / WEIGHTS).unlink()
    reseal_weights(out, WEIGHTS, TENSORS, "cache")
    refused(out, r"cache\.0\.key_levels in both, found it only in the program")


def edit(out: Path, change: Callable[[dict[str, Any]], Any]) -> None:
    body = json.loads((out / "program.json").read_bytes())
    change(body["caches"])
    (out / "program.json").write_bytes(files.canonical_json(body))
    reseal_weights(out, WEIGHTS, TENSORS, "cache")


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"kind": "pickle"}, "a cache of .* found 'pickle'"),
        ({"kind": 3}, "expected str, found 3"),
        ({"bits": 5}, "bits of kvquant, found 5"),
        ({"bits": True}, "expected int, found True"),
        ({"group": 4}, "group and residual of kivi"),
        ({"residual": 32}, "group and residual of kivi"),
        ({"residual": 1 << 60}, "counts in range"),
        ({"first": -1}, "counts in range"),
        ({"slot": 1 << 20}, "counts in range"),
        ({"slot": -1}, "counts in range"),
        ({"outliers": "nan"}, "outliers in 0..0.5, found nan"),
        ({"outliers": (0.9).hex()}, "outliers in 0..0.5, found 0.9"),
        ({"outliers": "0.25"}, "expected '0x1.2800000000000p-3', found '0.25'"),
        ({"outliers": 0.25}, "expected str, found 0.25"),
        ({"keys": "both"}, "keys per token or channel"),
        ({"keys": "token"}, "keys per channel of kvquant"),
        ({"turned": False}, "the record does not say what the graph does"),
        ({"turned": 1}, "expected bool, found 1"),
        ({"kind": "kivi", "group": 3, "residual": 8}, "first, outliers and turned of kvquant"),
        ({"extra": 1}, "a cache with fields"),
        ({"slot": 1}, r"cache\.0\.key_levels in both, found it only in"),
    ],
)  # fmt: skip
def test_record_that_is_wrong(out: Path, change: dict[str, Any], message: str) -> None:
    edit(out, lambda c: c[nodes(out)[0]].update(change))
    refused(out, message)


def test_group_that_does_not_divide_a_value(out: Path) -> None:
    left = {n: t for n, t in TENSORS.items() if n != "cache.1.key_scale"}
    save_file(left, out / WEIGHTS, metadata={"format": "pt"})
    new = CacheScheme("kivi", 4, 3, 6, slot=1).to_json()
    edit(out, lambda c: c.update({nodes(out)[1]: new}))
    refused(out, "a group that divides 4 channels of a value, found 3")


@pytest.mark.parametrize("name", ["nobody", "linear_default", ""])
def test_record_of_no_attention(out: Path, name: str) -> None:
    edit(out, lambda c: c.update({name: c.pop(nodes(out)[1])}))
    refused(out, "an attention named|a name")


def test_two_records_of_one_slot(out: Path) -> None:
    edit(out, lambda c: c.update({nodes(out)[1]: c[nodes(out)[0]]}))
    refused(out, "tensors of its own|in both")


def test_no_records_at_all(out: Path) -> None:
    edit(out, lambda c: c.clear())
    refused(out, "caches by name, found none")
