"""Broken and hostile artefacts: every one refused, by name, and nothing of it ever runs."""

from __future__ import annotations

import json
import os
import random
import shutil
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import fx

sys.path.insert(0, str(Path(__file__).parent))

from sealing import refused, reseal

from llmc.compiler.ir import packing
from llmc.compiler.ir.errors import ModelError
from llmc.compiler.ir.graph import Program
from llmc.compiler.runtime import files
from llmc.compiler.runtime.artefact import Contents, load, save
from llmc.compiler.runtime.executor import Runner
from llmc.compiler.runtime.manifest import File, Tensor, make_manifest
from llmc.compiler.runtime.tensors import tensor_sha256
from llmc.compiler.runtime.verify import verify

WEIGHTS = "weights-main.safetensors"


def packed(b: Any, n: int, k: int) -> fx.Node:
    q = torch.randint(0, 16, (n, k), generator=b.generator)
    scale = (torch.rand(n, 2, generator=b.generator) * 0.1 + 0.01).half()
    zero = torch.full((n, 2), 8, dtype=torch.uint8)
    parts = [b.tensor(t, trained=False, keep=True) for t in (packing.pack(q, 4), scale, zero)]
    return b.emit("llmc.dequantize", *parts, bits=4, group=k // 2, columns=k)


@pytest.fixture(scope="module")
def original(tmp_path_factory: pytest.TempPathFactory, make_tiny: Any, pylm: Path) -> Path:
    out = tmp_path_factory.mktemp("made") / "out"
    save(out, Contents(make_tiny(layers=1, matrix=packed), tokenizer=pylm))
    return out


@pytest.fixture
def out(original: Path, tmp_path: Path) -> Path:
    return Path(shutil.copytree(original, tmp_path / "out"))


def rewrite_tensors(out: Path, change: Callable[[dict[str, torch.Tensor]], None]) -> None:
    tensors = load_file(out / WEIGHTS)
    change(tensors)
    save_file(tensors, out / WEIGHTS, metadata={"format": "pt"})


def test_the_original_is_sound(out: Path) -> None:
    assert verify(out) == []
    reseal(out)
    assert verify(out) == []
    load(out, verify=True)


def test_single_bit_flips_are_detected(out: Path) -> None:
    """Random flips over every file, each seen by a load and by verify."""
    rng = random.Random(0)
    names = files.all_files(out)
    for name in names:
        data = (out / name).read_bytes()
        for _ in range(12):
            at, bit = rng.randrange(len(data)), rng.randrange(8)
            broken = bytearray(data)
            broken[at] ^= 1 << bit
            (out / name).write_bytes(broken)
            with pytest.raises(ModelError):
                load(out)
            assert verify(out), (name, at, bit)
        (out / name).write_bytes(data)
    load(out)


@pytest.mark.slow
def test_ten_thousand_bit_flips(out: Path) -> None:
    """One flip at a time, spread over all files by their size: a load sees every one."""
    rng = random.Random(1)
    names = files.all_files(out)
    sizes = [(out / n).stat().st_size for n in names]
    for name in rng.choices(names, sizes, k=10_000):
        with open(out / name, "r+b") as f:
            at, bit = rng.randrange(os.path.getsize(out / name)), rng.randrange(8)
            f.seek(at)
            old = f.read(1)
            f.seek(at)
            f.write(bytes([old[0] ^ 1 << bit]))
            f.flush()
            with pytest.raises(ModelError):
                load(out)
            f.seek(at)
            f.write(old)
    load(out)


def test_missing_and_extra_files(out: Path) -> None:
    (out / "evil.py").write_text("import os")
    refused(out, r"no file evil\.py")
    (out / "evil.py").unlink()
    (out / "schemes.json").unlink()
    refused(out, r"expected file schemes\.json, found none")


def test_file_of_another_size(out: Path) -> None:
    with open(out / "plan.json", "ab") as f:
        f.write(b"\n")
    refused(out, r"plan\.json of \d+ bytes")


def test_missing_tensor(out: Path) -> None:
    rewrite_tensors(out, lambda t: t.pop("p4"))  # type: ignore[arg-type, return-value]
    reseal(out)
    refused(out, f"expected tensor p4 in {WEIGHTS}, found none")
    refused(out, "expected tensor p4", verify=False)


def test_extra_tensor(out: Path) -> None:
    rewrite_tensors(out, lambda t: t.update(extra=torch.zeros(2)))
    reseal(out)
    refused(out, f"no tensor extra in {WEIGHTS}, found one")


def test_tensor_of_another_shape(out: Path) -> None:
    rewrite_tensors(out, lambda t: t.update(p0=t["p0"][:-1].clone()))
    reseal(out)
    refused(out, r"tensor p0 f32\[32, 16\] in .*, found f32\[31, 16\]")


def test_tensor_of_another_dtype(out: Path) -> None:
    rewrite_tensors(out, lambda t: t.update(p0=t["p0"].half()))
    reseal(out)
    refused(out, r"tensor p0 f32\[32, 16\] in .*, found f16")


def test_manifest_and_program_disagree(out: Path) -> None:
    def drop(tensors: dict[str, Tensor]) -> dict[str, Tensor]:
        return {n: t for n, t in tensors.items() if n != "p0"}

    rewrite_tensors(out, lambda t: t.pop("p0"))  # type: ignore[arg-type, return-value]
    reseal(out, drop)
    refused(out, "tensor p0 in both, found it only in the program")


def test_shape_that_manifest_and_file_agree_on_but_the_program_does_not(out: Path) -> None:
    rewrite_tensors(out, lambda t: t.update(p0=torch.zeros(3, 3)))

    def other(tensors: dict[str, Tensor]) -> dict[str, Tensor]:
        return tensors | {"p0": tensors["p0"].model_copy(update={"shape": [3, 3]})}

    reseal(out, other)
    refused(out, r"tensor p0 f32\[32, 16\] as in the program, found f32\[3, 3\]")


@pytest.mark.parametrize("value", [float("nan"), float("inf")])
def test_scale_that_is_not_finite(out: Path, value: float) -> None:
    def spoil(tensors: dict[str, torch.Tensor]) -> None:
        tensors["p4"].view(-1)[3] = value

    assert json.loads((out / "manifest.json").read_text())["tensors"]["p4"]["role"] == "scale"
    rewrite_tensors(out, spoil)

    def rehash(tensors: dict[str, Tensor]) -> dict[str, Tensor]:
        sha = tensor_sha256(load_file(out / WEIGHTS)["p4"])
        return tensors | {"p4": tensors["p4"].model_copy(update={"sha256": sha})}

    reseal(out, rehash)
    with pytest.raises(ModelError, match=f"finite numbers in tensor p4, .* at {WEIGHTS}"):
        Runner(load(out).program)
    assert any("p4" in f.message for f in verify(out))


def test_zero_point_out_of_range(out: Path) -> None:
    rewrite_tensors(out, lambda t: t["p5"].fill_(16))  # type: ignore[arg-type, return-value]
    reseal(out)
    assert {f.check for f in verify(out)} == {"tensor", "packed"}
    assert any("below 16, found 16" in f.message for f in verify(out))


def test_path_that_leaves_the_folder(out: Path, tmp_path: Path) -> None:
    (tmp_path / "secret").write_text("x")
    body = json.loads((out / "manifest.json").read_text())
    listed = {n: File(**f) for n, f in body["files"].items()}
    for name in ("../secret", "/etc/passwd", "a/../../secret"):
        tensors = {n: Tensor(**t) for n, t in body["tensors"].items()}
        data = make_manifest(
            listed | {name: listed["plan.json"]}, tensors, passes=[], fallbacks=[], versions={}
        )
        (out / "manifest.json").write_bytes(data)
        refused(out, "plain relative file name")


def test_links(out: Path, tmp_path: Path) -> None:
    data = (out / "plan.json").read_bytes()
    (tmp_path / "elsewhere").write_bytes(data)
    (out / "plan.json").unlink()
    (out / "plan.json").symlink_to(tmp_path / "elsewhere")
    refused(out, r"symbolic link, found plan\.json")
    (out / "plan.json").unlink()
    os.link(tmp_path / "elsewhere", out / "plan.json")
    refused(out, r"hard link, found plan\.json")


def test_linked_folder(out: Path, tmp_path: Path) -> None:
    (tmp_path / "graphs").mkdir()
    (out / "graphs").symlink_to(tmp_path / "graphs")
    refused(out, "no file graphs")


@pytest.mark.parametrize(
    ("name", "data", "message"),
    [
        ("schemes.json", b'{"a":1,"a":2}\n', "'a' twice at schemes.json"),
        ("plan.json", b"[" * 200_000, "nested at most 64 deep at plan.json"),
        ("program.json", b'{"a":' * 100 + b"0" + b"}" * 100, "nested at most"),
        ("report.json", b"NaN\n", "found NaN at report.json"),
        ("program.json", b"[]", "expected program as an object"),
        ("program.json", b"{}", "missing"),
        ("provenance.json", b'{"program":{}}', "fields program and facts"),
    ],
)
def test_bad_json(out: Path, name: str, data: bytes, message: str) -> None:
    (out / name).write_bytes(data)
    reseal(out)
    refused(out, message)


def change_program(out: Path, change: Callable[[dict[str, Any]], object]) -> None:
    body = json.loads((out / "program.json").read_text())
    change(body)
    (out / "program.json").write_bytes(files.canonical_json(body))
    reseal(out)


def first_call(body: dict[str, Any]) -> dict[str, Any]:
    return next(n for n in body["nodes"] if n["op"] == "call_function")


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda b: b.update(extra=1), "extra"),
        (lambda b: first_call(b).update(target="aten.from_file.default"), "from_file"),
        (lambda b: first_call(b).update(target="os.system"), "os.system"),
        (lambda b: first_call(b).update(type="__import__('os')"), "type"),
        (lambda b: b.update(version=99), "version"),
        (lambda b: b["params"][0].update(shape=[1 << 62]), "2\\*\\*48"),
        (lambda b: b["params"][0].update(shape=[8, 8]), "p0"),
        (lambda b: b["nodes"].pop(5), "expected"),
        (lambda b: b.update(facts={"x": "y" * 20_000_000}), "expected"),
    ],
)
def test_bad_programs(out: Path, change: Callable[[dict[str, Any]], object], message: str) -> None:
    change_program(out, change)
    refused(out, message)


def test_manifest_fields(out: Path) -> None:
    path = out / "manifest.json"
    good = json.loads(path.read_text())
    cases: list[tuple[dict[str, Any], str]] = [
        ({"extra": 1}, "extra: Extra inputs"),
        ({"format": "zip"}, "expected an llmc artefact"),
        ({"format_version": 2}, "format 1, found 2"),
        ({"content_hash": "0" * 64}, "changed bytes"),
        ({"sealed": "0" * 64}, "changed bytes"),
        ({"content_hash": "x"}, "content_hash"),
        ({"files": {}}, "changed bytes"),
        ({"versions": {"python": 3}}, "versions.python"),
    ]
    for changed, message in cases:
        path.write_bytes(files.canonical_json(good | changed))
        refused(out, message)
    path.write_bytes(json.dumps(good).encode())
    refused(out, "changed bytes")
    path.write_bytes(b'{"format":"llmc.artefact","format":"x"}')
    refused(out, "'format' twice")
    path.unlink()
    refused(out, r"expected file manifest\.json")
    refused(out.with_name("gone"), "expected an artefact's folder")


@pytest.mark.parametrize(
    ("header", "message"),
    [
        (b'{"a":{"dtype":"F32","shape":[1],"data_offsets":[0,4]},"a":1}', "'a' twice"),
        (b'{"__metadata__":{"format":"pt","x":"y"}}', "no metadata"),
        (b'{"a":{"dtype":"F32","shape":[1],"data_offsets":[4,8]}}', "gap at 0"),
        (b'{"a":{"dtype":"F32","shape":[2],"data_offsets":[0,4]}}', "8 bytes of tensor a"),
        (b'{"a":{"dtype":"Q4","shape":[1],"data_offsets":[0,4]}}', "known dtype"),
        (b'{"a":{"dtype":"F32","shape":[4611686018427387904],"data_offsets":[0,4]}}', "sizes"),
        (b'{"a":{"dtype":"F32","shape":[-1],"data_offsets":[0,4]}}', "sizes"),
        (b'{"a":{"dtype":"F32","shape":[1]}}', "of tensor 'a'"),
        (b"[]", "no object"),
    ],
)
def test_bad_tensor_headers(out: Path, header: bytes, message: str) -> None:
    (out / WEIGHTS).write_bytes(len(header).to_bytes(8, "little") + header + b"\0" * 4)
    reseal(out)
    refused(out, message)
    (out / WEIGHTS).write_bytes((1 << 60).to_bytes(8, "little") + header)
    reseal(out)
    refused(out, "found length")


def test_nothing_of_an_artefact_runs_and_nothing_outside_is_opened(out: Path) -> None:
    """Under an audit hook: no code compiled from it, no process, no socket, no file elsewhere."""
    load(out)
    events: list[tuple[str, str]] = []
    watching = True

    def hook(event: str, args: tuple[object, ...]) -> None:
        if not watching:
            return
        # The name <unknown> is that of ast.parse, which makes nothing that could run.
        runs = event in ("exec", "subprocess.Popen", "os.system", "socket.connect", "import")
        if runs or (event == "compile" and args[1] != "<unknown>"):
            events.append((event, str(args)[:200]))
        elif event == "open" and isinstance(args[0], str):
            events.append((event, args[0]))

    sys.addaudithook(hook)
    try:
        program: Program = load(out).program
        for name in program.params:
            program.weights.load(name)
    finally:
        watching = False
    ours = [e for e in events if e[0] != "open" or not e[1].startswith(str(out))]
    assert ours == []
