"""Windows and tables of a broken or hostile artefact: refused at load or by verify, exit code 3."""

from __future__ import annotations

import json
import shutil
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file

sys.path.insert(0, str(Path(__file__).parent))

from sealing import reseal

from llmc.compiler.analysis.blocks import apply_segments
from llmc.compiler.ir.errors import ModelError
from llmc.compiler.pipeline.compile import compile_plan
from llmc.compiler.pipeline.plan import make_plan
from llmc.compiler.pipeline.recipe import from_strings
from llmc.compiler.pipeline.zoo import decoder
from llmc.compiler.runtime import files
from llmc.compiler.runtime.artefact import Contents, load, save
from llmc.compiler.runtime.lowering import runner_for
from llmc.compiler.runtime.tensors import tensor_sha256
from llmc.compiler.runtime.verify import verify

Change = Callable[[dict[str, Any]], Any]


@pytest.fixture(scope="module")
def original(tmp_path_factory: pytest.TempPathFactory) -> Path:
    program = decoder(tied=True)
    apply_segments(program)
    passes = ["window:size=4,dilation=2,globals=1", "tt_embed:cores=2"]
    out = tmp_path_factory.mktemp("made") / "out"
    save(out, Contents(compile_plan(make_plan(program, from_strings(passes)), None).program))
    return out


@pytest.fixture
def out(original: Path, tmp_path: Path) -> Path:
    return Path(shutil.copytree(original, tmp_path / "out"))


def edit(out: Path, op: str, change: Change) -> None:
    body = json.loads((out / "program.json").read_bytes())
    found = [n for n in body["nodes"] if n.get("target") == op]
    assert found
    for node in found:
        change(node)
    (out / "program.json").write_bytes(files.canonical_json(body))
    reseal(out)


def test_the_original_is_sound(out: Path) -> None:
    reseal(out)
    assert verify(out) == []


@pytest.mark.parametrize(
    ("op", "change"),
    [
        ("llmc.attention", lambda n: n["kwargs"].update(window=0)),
        ("llmc.attention", lambda n: n["kwargs"].update(dilation=0)),
        ("llmc.attention", lambda n: n["kwargs"].update(dilation=1 << 50)),
        ("llmc.attention", lambda n: n["kwargs"].update(first=-1)),
        ("llmc.attention", lambda n: n["kwargs"].update(first="all")),
        ("llmc.attention", lambda n: n["kwargs"].pop("window")),
        ("llmc.tt_lookup", lambda n: n["kwargs"].update(rows=[])),
        ("llmc.tt_lookup", lambda n: n["kwargs"].update(rows=[1 << 60, 2])),
        ("llmc.tt_linear", lambda n: n["kwargs"].update(rows="xy")),
        ("llmc.tt_linear", lambda n: n["kwargs"].pop("rows")),
        ("llmc.tt_lookup", lambda n: n["args"].__setitem__(3, n["args"][3][::-1])),
        ("llmc.tt_lookup", lambda n: n["args"].__setitem__(3, n["args"][3][:1])),
        ("llmc.tt_lookup", lambda n: n["args"].__setitem__(3, 7)),
        ("llmc.tt_lookup", lambda n: n["args"].__setitem__(1, n["args"][2])),
        ("llmc.tt_linear", lambda n: n["args"].__setitem__(2, n["args"][1])),
    ],
)
def test_calls_that_do_not_fit(out: Path, op: str, change: Change) -> None:
    edit(out, op, change)
    with pytest.raises(ModelError) as caught:
        load(out)
    assert caught.value.exit_code == 3
    assert "\n" not in str(caught.value)
    assert verify(out) != []


@pytest.mark.parametrize(
    ("end", "change", "told"),
    [
        ("_order", lambda t: t - 1, "distinct places"),
        ("_order", lambda t: t * 0, "distinct places"),
        ("_order", lambda t: t + 1000, "distinct places"),
        ("_core0", lambda t: t * float("nan"), "finite"),
        ("_scale", lambda t: t / 0, "finite"),
    ],
)
def test_tensors_that_do_not_fit(out: Path, end: str, change: Any, told: str) -> None:
    spoil(out, end, change)
    assert any(told in f.message for f in verify(out))


def test_places_outside_of_the_table_are_refused_when_they_are_read(out: Path) -> None:
    """Where nobody verified: one line and exit code 3 instead of an IndexError."""
    spoil(out, "_order", lambda t: t + 1000)
    runner = runner_for(load(out).program)
    with pytest.raises(ModelError, match="expected tokens and stored indices in range") as caught:
        runner.forward(torch.tensor([[1]]))
    assert caught.value.exit_code == 3
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize("token", [-1, 1000])
def test_tokens_outside_of_a_factored_table(out: Path, token: int) -> None:
    with pytest.raises(ModelError, match="in range"):
        runner_for(load(out).program).forward(torch.tensor([[token]]))


def test_a_mask_with_more_bits_than_values(tmp_path: Path) -> None:
    program = decoder()
    apply_segments(program)
    plan = make_plan(program, from_strings(["prune:sparsity=0.5,solver=magnitude"]))
    save(tmp_path / "out", Contents(compile_plan(plan, None).program))
    spoil(tmp_path / "out", ".bitmap", lambda t: t.fill_(-1))
    with pytest.raises(ModelError, match="values for the bits of a mask"):
        runner_for(load(tmp_path / "out").program).forward(torch.tensor([[1]]))


def spoil(out: Path, end: str, change: Any) -> None:
    """Change the first tensor whose name ends so, sealed as an attacker would."""
    body = json.loads((out / "manifest.json").read_bytes())
    name = next(n for n in body["tensors"] if n.endswith(end))
    path = out / body["tensors"][name]["file"]
    held = load_file(path)
    held[name] = change(held[name])
    save_file(held, path, metadata={"format": "pt"})
    sha = tensor_sha256(held[name])
    reseal(out, lambda told: told | {name: told[name].model_copy(update={"sha256": sha})})
