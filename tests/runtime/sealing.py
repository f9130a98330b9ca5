"""A hostile artefact: files that were changed, under a manifest that agrees with them again."""

from __future__ import annotations

import json
from collections.abc import Callable, Collection
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file

from llmc.compiler.ir.errors import ModelError
from llmc.compiler.runtime import files
from llmc.compiler.runtime.artefact import load
from llmc.compiler.runtime.manifest import File, Tensor, make_manifest
from llmc.compiler.runtime.tensors import tensor_sha256
from llmc.compiler.runtime.verify import verify

Tensors = dict[str, Tensor]


def reseal(out: Path, change: Callable[[Tensors], Tensors] = lambda tensors: tensors) -> None:
    """Make the manifest agree with the files again, as an attacker would.

    change: of what it says about tensors.
    """
    body = json.loads((out / "manifest.json").read_bytes())
    listed = {
        name: File(
            sha256=files.file_sha256(out / name), size=(out / name).stat().st_size,
            content=body["files"].get(name, {}).get("content", False),
        )
        for name in files.all_files(out) if name != "manifest.json"
    }  # fmt: skip
    tensors = change({n: Tensor(**t) for n, t in body["tensors"].items()})
    told = {name: body[name] for name in ("passes", "fallbacks", "versions")}
    (out / "manifest.json").write_bytes(make_manifest(listed, tensors, **told))


def reseal_weights(out: Path, file: str, names: Collection[str], role: str) -> None:
    """The same, where tensors called ``names`` are those that ``file`` now holds as floats."""
    found = load_file(out / file) if (out / file).exists() else {}
    short = {torch.float32: "f32", torch.float64: "f64"}
    mine = {
        name: Tensor(file=file, dtype=short[t.dtype], shape=list(t.shape), role=role,
                     sha256=tensor_sha256(t))
        for name, t in found.items()
    }  # fmt: skip
    reseal(out, lambda told: {n: t for n, t in told.items() if n not in names} | mine)


def refused(out: Path, message: str, **options: Any) -> None:
    """Loading it is refused by ``message`` in one line with exit code 3, and verify finds it."""
    with pytest.raises(ModelError, match=message) as caught:
        load(out, **options)
    assert caught.value.exit_code == 3
    assert "\n" not in str(caught.value)
    assert verify(out) != []
