"""Text to tokens: the tokenizer, readers of text and token files, and calibration windows.

A text is tokenised once, as one stream, so a beginning-of-text token stands only at its start.
"""

from __future__ import annotations

import hashlib
import json
import sysconfig
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, TypeAlias

import torch

from ..ir.errors import ModelError, UsageError

DOCUMENT_JOIN = "\n\n"
_TEXT_BYTES = 1 << 30
_TOKENIZER_BYTES = 256 << 20
_BUILT_IN_CHARS = 1_200_000
# As in examples/make_text.py: no table-like giants, no stubs, no tests, no data written as Python.
_FILE_CHARS = range(1_500, 60_000)
_SKIPPED = {"site-packages", "dist-packages", "test", "tests", "idle_test", "__pycache__",
            "pydoc_data", "encodings", "config"}  # fmt: skip

# Windows outside of calibration that are enough to judge by.
SPARE = 4

Source: TypeAlias = "str | Path | Sequence[str] | torch.Tensor | None"


class Tokenizer:
    """The tokenizer of a model or artefact folder, read from its tokenizer.json.

    Attributes:
        sha256: of tokenizer.json.
        eos: ids that end a text (generation_config.json, config.json or tokenizer_config.json).
    """

    def __init__(self, folder: str | Path) -> None:
        from tokenizers import Tokenizer as Rust

        self.folder = Path(folder)
        path = self.folder / "tokenizer.json"
        if not path.is_file():
            raise ModelError(
                f"expected tokenizer.json in {self.folder}, found none",
                hint="save the tokenizer in its fast form",
            )
        if path.stat().st_size > _TOKENIZER_BYTES:
            raise ModelError(f"expected at most {_TOKENIZER_BYTES} bytes", where=str(path))
        data = path.read_bytes()
        self.sha256 = hashlib.sha256(data).hexdigest()
        try:
            self._rust = Rust.from_str(data.decode("utf-8"))
        except Exception as e:  # the library raises bare Exception
            raise ModelError(
                f"expected a tokenizer, found ({str(e)[:100]})", where=str(path)
            ) from e
        self._rust.no_truncation()
        self._rust.no_padding()
        self.eos = self._find_eos()

    @property
    def size(self) -> int:
        """Number of ids, added tokens included."""
        return int(self._rust.get_vocab_size(with_added_tokens=True))

    def encode(self, text: str) -> list[int]:
        """Ids of a text, with the special tokens that the tokenizer itself adds."""
        ids: list[int] = self._rust.encode(text).ids
        return ids

    def decode(self, ids: Sequence[int]) -> str:
        """Text of ids; special tokens are left out."""
        text: str = self._rust.decode(list(ids), skip_special_tokens=True)
        return text

    def _find_eos(self) -> frozenset[int]:
        for name in ("generation_config.json", "config.json"):
            found = self._config(name).get("eos_token_id")
            if isinstance(found, int):
                return frozenset({found})
            if isinstance(found, list) and found:
                return frozenset(int(i) for i in found)
        token = self._config("tokenizer_config.json").get("eos_token")
        text = token.get("content") if isinstance(token, dict) else token
        found = self._rust.token_to_id(text) if isinstance(text, str) else None
        return frozenset() if found is None else frozenset({found})

    def _config(self, name: str) -> dict[str, Any]:
        path = self.folder / name
        if not path.is_file() or path.stat().st_size > _TOKENIZER_BYTES:
            return {}
        try:
            out = json.loads(path.read_text(encoding="utf-8"))
        except (ValueError, RecursionError) as e:
            raise ModelError(f"expected JSON, found ({e})", where=str(path)) from None
        return out if isinstance(out, dict) else {}


@dataclass(frozen=True)
class Stream:
    """One stream of tokens, int64 [n], its name, and the SHA-256 of what it was read from."""

    tokens: torch.Tensor
    name: str
    sha256: str
    characters: int | None = None

    def to_json(self) -> dict[str, Any]:
        return {
            "data": self.name, "sha256": self.sha256, "tokens": int(self.tokens.numel()),
            "characters": self.characters,
        }  # fmt: skip


@dataclass(frozen=True)
class Calibration:
    """Calibration windows: tokens int64 [n, length], and how they were drawn, for the manifest."""

    tokens: torch.Tensor
    record: dict[str, Any] = field(default_factory=dict)


def read_stream(source: Source, tokenizer: Tokenizer | None) -> Stream:
    """One token stream from a file, texts, tokens, or the built-in corpus.

    Args:
        source: a path to .txt, .jsonl (field ``text``), .npy or .safetensors (one integer tensor);
            or texts, joined by a blank line; or an integer tensor; or None for the built-in corpus.
        tokenizer: needed for anything but tokens.
    Raises:
        UsageError: a file that cannot be read, an unknown ending, no text in it.
    """
    if isinstance(source, torch.Tensor):
        return _stream_of_tokens(source, "tokens in memory", None)
    if isinstance(source, (str, Path)):
        path = Path(source)
        data = _read(path)
        if path.suffix in (".npy", ".safetensors"):
            return _stream_of_tokens(
                _token_file(path, data), path.name, hashlib.sha256(data).hexdigest()
            )
        text, name = _text_file(path, data), path.name
        digest = hashlib.sha256(data).hexdigest()
    else:
        text = built_in_text() if source is None else DOCUMENT_JOIN.join(source)
        name = "python-standard-library" if source is None else "texts in memory"
        digest = hashlib.sha256(text.encode("utf-8", "surrogatepass")).hexdigest()
    if not text.strip():
        raise UsageError(f"expected text, found none in {name}")
    if tokenizer is None:
        raise UsageError(
            f"expected a tokenizer for {name}, found none", hint="give tokens as .npy instead"
        )
    return Stream(torch.tensor(tokenizer.encode(text)), name, digest, len(text))


def calibration(
    source: Source, tokenizer: Tokenizer | None, samples: int, length: int, seed: int = 0
) -> Calibration:
    """Random windows of one stream, drawn by token offset (algorithms.md §0.3), with replacement.

    A tensor [n, length] is taken as it is when it holds ``samples`` rows of ``length`` tokens.
    Raises:
        UsageError: fewer tokens than one window, naming both counts.
    """
    if samples < 1 or length < 2:
        raise UsageError(f"expected samples >= 1 and length >= 2, found {samples} and {length}")
    if isinstance(source, torch.Tensor) and source.dim() == 2:
        if tuple(source.shape) != (samples, length):
            raise UsageError(
                f"expected calibration tokens [{samples}, {length}], found {list(source.shape)}"
            )
        stream = _stream_of_tokens(source, "tokens in memory", None)
        drawn = {"samples": samples, "length": length, "drawn": "as given"}
        return Calibration(source.long(), stream.to_json() | drawn)
    stream = read_stream(source, tokenizer)
    found = int(stream.tokens.numel())
    if found < length:
        raise UsageError(
            f"expected at least {length} tokens for one calibration window, found {found}",
            where=stream.name,
            hint="give more text or a shorter length",
        )
    starts = _starts(found, samples, length, seed)
    tokens = stream.tokens[starts[:, None] + torch.arange(length)]
    record = stream.to_json() | {
        "samples": samples, "length": length, "seed": seed, "drawn": "random token offsets",
        "tokenizer": None if tokenizer is None else tokenizer.sha256,
    }  # fmt: skip
    return Calibration(tokens, record)


def calibration_tokens(
    source: Source, tokenizer: Tokenizer | None, samples: int, length: int, seed: int = 0
) -> torch.Tensor:
    """The tokens of :func:`calibration`, int64 [samples, length]."""
    return calibration(source, tokenizer, samples, length, seed).tokens


def built_in_text(root: Path | None = None) -> str:
    """Source of the installed Python standard library: text that every machine already has.

    The modules that ``examples/make_text.py`` holds out are left out, so that the demo's
    evaluation never sees its own calibration text. One Python version gives one text.
    """
    root = root or Path(sysconfig.get_paths()["stdlib"])
    found = [p.relative_to(root) for p in root.rglob("*.py")]
    parts: list[str] = []
    size = 0
    for path in sorted(found, key=lambda p: _digest(p.as_posix())):
        top = path.parts[0].removesuffix(".py")
        if int(_digest(top), 16) % 5 < 2 or not _SKIPPED.isdisjoint(path.parts):
            continue
        if (root / path).stat().st_size not in _FILE_CHARS:
            continue
        parts.append((root / path).read_text(encoding="utf-8", errors="replace").strip())
        size += len(parts[-1])
        if size >= _BUILT_IN_CHARS:
            break
    return "\n\n\n".join(parts) + "\n"


def _digest(name: str) -> str:
    return hashlib.sha256(name.encode()).hexdigest()


def _read(path: Path) -> bytes:
    try:
        if not path.is_file():
            found = "a folder" if path.is_dir() else "none"
            raise UsageError(f"expected a data file, found {found} at {path}")
        if path.stat().st_size > _TEXT_BYTES:
            raise UsageError(f"expected a data file of at most {_TEXT_BYTES} bytes at {path}")
        return path.read_bytes()
    except OSError as e:
        raise UsageError(f"expected to read {path}, found {e.strerror}") from e


def _text_file(path: Path, data: bytes) -> str:
    if path.suffix not in (".txt", ".jsonl", ".py", ".md"):
        raise UsageError(f"expected a .txt, .jsonl, .npy or .safetensors file, found {path.name}")
    try:
        text = data.decode("utf-8")
    except UnicodeDecodeError as e:
        raise UsageError(f"expected UTF-8 text, found byte {e.start}", where=str(path)) from None
    if path.suffix != ".jsonl":
        return text
    documents = []
    for number, line in enumerate(text.splitlines(), 1):
        if not line.strip():
            continue
        try:
            record = json.loads(line)
        except (ValueError, RecursionError):
            record = None
        if not isinstance(record, dict) or not isinstance(record.get("text"), str):
            raise UsageError(
                'expected a JSON object with a "text" string', where=f"{path}:{number}"
            )
        documents.append(record["text"])
    return DOCUMENT_JOIN.join(documents)


def _token_file(path: Path, data: bytes) -> torch.Tensor:
    import io

    try:
        if path.suffix == ".npy":
            import numpy

            # Pickled arrays are refused by the library itself.
            array = numpy.load(io.BytesIO(data), allow_pickle=False)
            return torch.from_numpy(array.astype("int64") if array.dtype.kind in "iu" else array)
        from safetensors.torch import load

        tensors = load(data)
    except Exception as e:  # numpy and safetensors raise many types; all mean a bad file
        raise UsageError(f"expected tokens, found ({str(e)[:100]})", where=str(path)) from e
    if len(tensors) != 1:
        raise UsageError(f"expected one tensor of tokens, found {len(tensors)}", where=str(path))
    return next(iter(tensors.values()))


def _stream_of_tokens(tokens: torch.Tensor, name: str, digest: str | None) -> Stream:
    if tokens.is_floating_point() or tokens.is_complex() or tokens.dtype == torch.bool:
        raise UsageError(f"expected integer tokens, found {tokens.dtype}", where=name)
    flat = tokens.detach().to("cpu", torch.int64).flatten()
    if flat.numel() and int(flat.min()) < 0:
        raise UsageError(f"expected tokens >= 0, found {int(flat.min())}", where=name)
    return Stream(flat, name, digest or hashlib.sha256(flat.numpy().tobytes()).hexdigest())


def held_out(
    source: Source, tokenizer: Tokenizer | None, drawn: Calibration, count: int
) -> tuple[torch.Tensor, Calibration]:
    """Windows to calibrate choices on, int64 [n, length], and others to judge them by.

    These are ``count`` whole windows of the stream, evenly apart, that share no token with those
    ``drawn``. Where fewer than :data:`SPARE` lie free, the last quarter of the drawn windows is
    left out of choosing instead.
    Raises:
        UsageError: one window, which leaves none to judge by.
    """
    tokens, record = drawn.tokens, drawn.record
    if "seed" in record:
        free = _free(read_stream(source, tokenizer).tokens, record)
        if len(free) >= min(count, SPARE):
            picked = torch.arange(min(count, len(free))) * len(free) // min(count, len(free))
            told = {"windows": len(picked), "from": "text between the calibration windows"}
            return tokens, Calibration(free[picked], told)
    if len(tokens) < 2:
        raise UsageError(
            "expected at least 2 calibration windows, one of them to judge choices by, found 1",
            hint="give more --samples or more text",
        )
    left = max(1, len(tokens) // 4)
    told = {"windows": left, "from": "the last calibration windows, left out of choosing"}
    return tokens[:-left], Calibration(tokens[-left:], told)


def _free(stream: torch.Tensor, record: dict[str, Any]) -> torch.Tensor:
    """Whole windows of the stream between those that were drawn, int64 [n, length]."""
    length, end = record["length"], 0
    out = []
    starts = _starts(len(stream), record["samples"], length, record["seed"])
    for start in [*starts.sort().values.tolist(), len(stream)]:
        while end + length <= start:
            out.append(stream[end : end + length])
            end += length
        end = max(end, start + length)
    return torch.stack(out) if out else stream.new_zeros(0, length)


def _starts(found: int, samples: int, length: int, seed: int) -> torch.Tensor:
    generator = torch.Generator().manual_seed(seed)
    return torch.randint(0, found - length + 1, (samples,), generator=generator)
