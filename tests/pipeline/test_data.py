"""Text to tokens: readers, the built-in corpus, calibration windows."""

from __future__ import annotations

import json
import sys
from pathlib import Path

import numpy
import pytest
import torch
from safetensors.torch import save_file

from llmc.compiler.ir.errors import ModelError, UsageError
from llmc.compiler.pipeline.data import (
    Tokenizer,
    built_in_text,
    calibration,
    calibration_tokens,
    read_stream,
)


@pytest.fixture(scope="module")
def tokenizer(pylm: Path) -> Tokenizer:
    return Tokenizer(pylm)


def test_tokenizer_round_trip(tokenizer: Tokenizer) -> None:
    text = "def main():\n    return 'ü'\n"
    assert tokenizer.decode(tokenizer.encode(text)) == text
    assert tokenizer.eos == {0}
    assert tokenizer.size == 2048


def test_missing_or_broken_tokenizer_is_named(tmp_path: Path) -> None:
    with pytest.raises(ModelError, match=r"tokenizer\.json in .*found none"):
        Tokenizer(tmp_path)
    (tmp_path / "tokenizer.json").write_text("{}")
    with pytest.raises(ModelError, match="expected a tokenizer"):
        Tokenizer(tmp_path)


def test_eos_comes_from_the_first_file_that_knows_it(tmp_path: Path, pylm: Path) -> None:
    (tmp_path / "tokenizer.json").write_bytes((pylm / "tokenizer.json").read_bytes())
    assert Tokenizer(tmp_path).eos == frozenset()
    token = Tokenizer(tmp_path).decode([5])
    (tmp_path / "tokenizer_config.json").write_text(json.dumps({"eos_token": {"content": token}}))
    assert Tokenizer(tmp_path).eos == {5}
    (tmp_path / "config.json").write_text('{"eos_token_id": 7}')
    assert Tokenizer(tmp_path).eos == {7}
    (tmp_path / "generation_config.json").write_text('{"eos_token_id": [3, 4]}')
    assert Tokenizer(tmp_path).eos == {3, 4}
    (tmp_path / "generation_config.json").write_text("{")
    with pytest.raises(ModelError, match=r"expected JSON.*generation_config\.json"):
        Tokenizer(tmp_path)


def test_text_files(tmp_path: Path, tokenizer: Tokenizer) -> None:
    (tmp_path / "a.txt").write_text("import os\n\nimport sys")
    lines = [json.dumps({"text": t}) for t in ("import os", "import sys")]
    (tmp_path / "a.jsonl").write_text("\n".join(lines) + "\n\n")
    plain = read_stream(tmp_path / "a.txt", tokenizer)
    lined = read_stream(str(tmp_path / "a.jsonl"), tokenizer)
    assert torch.equal(plain.tokens, lined.tokens)
    assert torch.equal(plain.tokens, read_stream(["import os", "import sys"], tokenizer).tokens)
    assert plain.sha256 != lined.sha256
    assert plain.to_json()["data"] == "a.txt"
    assert plain.tokens.dtype == torch.int64


def test_token_files(tmp_path: Path) -> None:
    tokens = torch.arange(12, dtype=torch.int32)
    numpy.save(tmp_path / "t.npy", tokens.numpy().astype("uint16").reshape(3, 4))
    save_file({"tokens": tokens}, tmp_path / "t.safetensors")
    for name in ("t.npy", "t.safetensors"):
        assert torch.equal(read_stream(tmp_path / name, None).tokens, tokens.long())
    with pytest.raises(UsageError, match=r"integer tokens, found torch\.float32"):
        read_stream(torch.zeros(3), None)
    with pytest.raises(UsageError, match="tokens >= 0, found -1"):
        read_stream(torch.tensor([3, -1]), None)
    save_file({"a": tokens, "b": tokens + 1}, tmp_path / "two.safetensors")
    with pytest.raises(UsageError, match="one tensor of tokens, found 2"):
        read_stream(tmp_path / "two.safetensors", None)


def test_pickles_are_not_opened(tmp_path: Path) -> None:
    numpy.save(tmp_path / "t.npy", numpy.array([{}], dtype=object), allow_pickle=True)
    with pytest.raises(UsageError, match="expected tokens"):
        read_stream(tmp_path / "t.npy", None)
    (tmp_path / "t.pt").write_bytes(b"x")
    with pytest.raises(UsageError, match=r"found t\.pt"):
        read_stream(tmp_path / "t.pt", None)


@pytest.mark.parametrize(
    ("name", "data", "message"),
    [
        ("a.txt", b" \n", "expected text, found none in a.txt"),
        ("a.txt", b"\xff\xfe", "UTF-8"),
        ("a.jsonl", b'{"text": "x"}\n{"txt": "x"}\n', r"a\.jsonl:2"),
        ("a.jsonl", b"[", r"a\.jsonl:1"),
        ("a.parquet", b"x", "found a.parquet"),
        ("a.npy", b"x", "expected tokens"),
    ],
)
def test_unreadable_data_is_named(
    tmp_path: Path, tokenizer: Tokenizer, name: str, data: bytes, message: str
) -> None:
    (tmp_path / name).write_bytes(data)
    with pytest.raises(UsageError, match=message) as caught:
        read_stream(tmp_path / name, tokenizer)
    assert "\n" not in str(caught.value)


def test_missing_file_and_missing_tokenizer(tmp_path: Path) -> None:
    with pytest.raises(UsageError, match="expected a data file, found none"):
        read_stream(tmp_path / "gone.txt", None)
    with pytest.raises(UsageError, match="expected a tokenizer"):
        read_stream(["text"], None)


def test_windows_are_drawn_by_offset_and_recorded(tokenizer: Tokenizer) -> None:
    source = torch.arange(1000)
    got = calibration(source, tokenizer, 8, 16, seed=3)
    assert got.tokens.shape == (8, 16)
    assert torch.equal(got.tokens[:, 1:] - got.tokens[:, :-1], torch.ones(8, 15).long())
    assert torch.equal(got.tokens, calibration_tokens(source, None, 8, 16, 3))
    assert not torch.equal(got.tokens, calibration_tokens(source, None, 8, 16, 4))
    record = got.record
    assert (record["samples"], record["length"], record["seed"]) == (8, 16, 3)
    assert record["tokenizer"] == tokenizer.sha256
    json.dumps(record)


def test_offsets_reach_both_ends() -> None:
    starts = calibration_tokens(torch.arange(20), None, 500, 16)[:, 0]
    assert set(starts.tolist()) == {0, 1, 2, 3, 4}


def test_calibration_as_given() -> None:
    rows = torch.arange(12).view(3, 4)
    assert torch.equal(calibration_tokens(rows, None, 3, 4), rows)
    with pytest.raises(UsageError, match=r"\[2, 4\], found \[3, 4\]"):
        calibration_tokens(rows, None, 2, 4)


def test_too_little_calibration_text(tokenizer: Tokenizer) -> None:
    with pytest.raises(UsageError, match="at least 512 tokens for one calibration window, found"):
        calibration(["import os"], tokenizer, 4, 512)
    with pytest.raises(UsageError, match="samples >= 1"):
        calibration(["import os"], tokenizer, 0, 512)


def test_built_in_text_is_one_text_and_shares_nothing_with_the_held_out_one(repo: Path) -> None:
    text = built_in_text()
    assert text == built_in_text()
    assert 1_000_000 < len(text) < 1_400_000
    import importlib.util
    import sysconfig

    spec = importlib.util.spec_from_file_location("held", repo / "examples" / "make_text.py")
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    sys.modules["held"] = module
    spec.loader.exec_module(module)
    root = Path(sysconfig.get_paths()["stdlib"])
    held = [f for f in module.library_files(root) if module.is_heldout(f)]
    assert len(held) > 50
    for path in held:
        source = (root / path).read_text(encoding="utf-8", errors="replace").strip()
        assert source not in text, path
