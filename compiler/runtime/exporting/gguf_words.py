"""A byte-level BPE tokenizer as GGUF keeps it: tokens by id, their kinds, and merges."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from ...ir.errors import ModelError

# Kinds of tokens, as llama.cpp numbers them.
_NORMAL, _CONTROL, _OWN, _UNUSED = 1, 3, 4, 5


def words(folder: Path | None, size: int, facts: dict[str, Any]) -> dict[str, Any] | str:
    """Keys and values of the tokenizer in a folder, or why it is left out.

    Args:
        size: entries of the embedding; ids without a token are filled up. facts: bos, eos, pad.
    Raises:
        ModelError: a tokenizer.json that cannot be read, or a token beyond the embedding.
    """
    path = None if folder is None else folder / "tokenizer.json"
    if path is None or not path.is_file():
        return "there is none beside the model"
    try:
        told = json.loads(path.read_text(encoding="utf-8"))
        model, steps = told["model"], told.get("pre_tokenizer") or {}
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise ModelError(f"expected a tokenizer, found {error}", where=str(path)) from None
    parts = steps.get("pretokenizers", [steps])
    if model.get("type") != "BPE" or not any(p.get("type") == "ByteLevel" for p in parts):
        return f"it is no byte-level BPE but {model.get('type')}"
    tokens = [f"[unused{i}]" for i in range(size)]
    kinds = [_UNUSED] * size
    added = {t["id"]: t for t in told.get("added_tokens", ())}
    for text, i in {**model["vocab"], **{t["content"]: i for i, t in added.items()}}.items():
        if not 0 <= i < size:
            raise ModelError(f"expected tokens below {size}, found {i}", where=str(path))
        tokens[i] = text
        own = added.get(i)
        kinds[i] = _NORMAL if own is None else _CONTROL if own.get("special") else _OWN
    merges = [m if isinstance(m, str) else " ".join(m) for m in model["merges"]]
    out: dict[str, Any] = {"tokens": tokens, "kinds": kinds, "merges": merges}
    for name in ("bos", "eos", "pad"):
        ids = facts.get(name)
        if isinstance(ids, (list, tuple)) and ids:
            out[name] = int(ids[0])
    return out
