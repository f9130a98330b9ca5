"""A tiny Llama folder, an artefact made from it, and a way to call the command line in-process."""

from __future__ import annotations

import hashlib
import json
import shutil
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest

TEXT = "\n".join(f"def f{i}(x, y={i}):\n    return x * {i} + y" for i in range(400))


@dataclass(frozen=True)
class Result:
    """What a command did: exit code, stdout, stderr."""

    code: int
    out: str
    err: str

    @property
    def error(self) -> str:
        """The one line that says what went wrong."""
        lines = [line for line in self.err.splitlines() if line.startswith("llmc: ")]
        assert len(lines) == 1, f"expected one line, found {self.err!r}"
        return lines[0]

    @property
    def json(self) -> dict[str, Any]:
        """The one object on stdout."""
        value = json.loads(self.out)
        assert value["format_version"] == 1
        return dict(value)


def call(*args: object) -> Result:
    """Run ``llmc args...`` in this process."""
    from click.testing import CliRunner

    from llmc.compiler.cli import app

    done = CliRunner().invoke(app, [str(a) for a in args], catch_exceptions=False)
    return Result(done.exit_code, done.stdout, done.stderr)


@pytest.fixture(scope="session")
def llmc() -> Callable[..., Result]:
    """The command line as a function."""
    return call


def build_tiny(folder: Path, tokenizer: Path, **changes: Any) -> None:
    """A random Llama of two blocks, 64 channels, GQA, with the demo model's tokenizer."""
    import torch
    from transformers import LlamaConfig, LlamaForCausalLM

    given: dict[str, Any] = {
        "vocab_size": 2048, "hidden_size": 64, "intermediate_size": 96, "num_hidden_layers": 2,
        "num_attention_heads": 4, "num_key_value_heads": 2, "max_position_embeddings": 128,
        "bos_token_id": 0, "eos_token_id": 0, "pad_token_id": 0,
    }  # fmt: skip
    torch.manual_seed(0)
    LlamaForCausalLM(LlamaConfig(**{**given, **changes})).save_pretrained(folder)
    for name in ("tokenizer.json", "tokenizer_config.json"):
        shutil.copy(tokenizer / name, folder / name)


@pytest.fixture(scope="session")
def tiny(tmp_path_factory: pytest.TempPathFactory, pylm: Path) -> Path:
    """The folder of a tiny random model; tests copy it before they break it."""
    folder = tmp_path_factory.mktemp("models") / "tiny"
    build_tiny(folder, pylm)
    return folder


@pytest.fixture(scope="session", autouse=True)
def captured_once(tiny: Path) -> Iterator[None]:
    """The tiny model is captured for real once; after that each caller gets a clone."""
    from llmc.compiler import api

    real = api.capture
    kept: list[Any] = []

    def capture(source: Any, **more: Any) -> Any:
        if not isinstance(source, (str, Path)) or Path(source) != tiny:
            return real(source, **more)
        if not kept:
            kept.append(real(source, **more))
        return kept[0].clone()

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(api, "capture", capture)
        yield


@pytest.fixture(scope="session")
def text(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A calibration text of some thousand tokens."""
    path = tmp_path_factory.mktemp("text") / "text.txt"
    path.write_text(TEXT, encoding="utf-8")
    return path


@pytest.fixture(scope="session")
def small_run(text: Path) -> list[object]:
    """Options that keep calibration short."""
    return ["--calibration", text, "--samples", 4, "--length", 32]


@pytest.fixture(scope="session")
def artefact(tmp_path_factory: pytest.TempPathFactory, tiny: Path, small_run: list[object]) -> Path:
    """``smooth,w4,prune24`` of the tiny model; read only."""
    out = tmp_path_factory.mktemp("artefacts") / "joint"
    done = call("compile", tiny, "--passes", "smooth,w4:group=32,prune24", "-o", out, *small_run)
    assert done.code == 0, done.err
    return out


def digest(folder: Path) -> str:
    """One hash over the names and bytes of a folder's files."""
    total = hashlib.sha256()
    for path in sorted(p for p in folder.rglob("*") if p.is_file()):
        total.update(path.relative_to(folder).as_posix().encode() + path.read_bytes())
    return total.hexdigest()


@pytest.fixture(scope="session")
def folder_digest() -> Callable[[Path], str]:
    """``folder_digest(path)``: changes when anything in the folder does."""
    return digest
