"""Quantised checkpoints written and decoded from the formats' own definitions, bit by bit.

Nothing here uses llmc: numbers are moved one at a time, as the formats' authors describe them.
"""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

AWQ_ORDER = (0, 2, 4, 6, 1, 3, 5, 7)


def bits_of(words: Tensor, bits: int, count: int) -> list[int]:
    """``count`` numbers of a little-endian stream in int32 words."""
    stream = 0
    for i, word in enumerate(words.tolist()):
        stream |= (word & 0xFFFFFFFF) << (32 * i)
    return [(stream >> (bits * i)) & ((1 << bits) - 1) for i in range(count)]


def words_of(numbers: list[int], bits: int) -> list[int]:
    """The inverse of :func:`bits_of`, as signed int32."""
    stream = sum(n << (bits * i) for i, n in enumerate(numbers))
    count = -(-len(numbers) * bits // 32)
    words = [(stream >> (32 * i)) & 0xFFFFFFFF for i in range(count)]
    return [w - (1 << 32) if w >= 1 << 31 else w for w in words]


def decode_gptq(
    get: Callable[[str], Tensor], bits: int, version: int, rows: int, columns: int
) -> Tensor:
    """fp32 [N, K] of qweight, qzeros, scales and g_idx: (q - z)·s, z stored minus one in v1."""
    q = torch.tensor([bits_of(c, bits, columns) for c in get("qweight").t()])
    z = torch.tensor([bits_of(r, bits, rows) for r in get("qzeros")]) + (version == 1)
    which = get("g_idx").long()
    return ((q - z[which].t()) * get("scales").float()[which].t()).float()


def decode_awq(get: Callable[[str], Tensor]) -> Tensor:
    """fp32 [N, K] of qweight, qzeros and scales; nibble k of a word is output ORDER[k]."""

    def outputs(words: Tensor) -> Tensor:
        out = torch.zeros(words.shape[0], words.shape[1] * 8, dtype=torch.int64)
        for k, place in enumerate(AWQ_ORDER):
            out[:, place::8] = (words.long() >> (4 * k)) & 15
        return out

    q, z, s = outputs(get("qweight")), outputs(get("qzeros")), get("scales").float()
    which = torch.arange(len(q)) // (len(q) // len(z))
    return ((q - z[which]) * s[which]).t().contiguous()


def random_gptq(
    rows: int, columns: int, bits: int, group: int, version: int, symmetric: bool,
    order: Tensor | None, g: torch.Generator,
) -> tuple[dict[str, Tensor], Tensor]:  # fmt: skip
    """Random tensors of one layer, and the weight fp32 [N, K] that they mean."""
    top, count = 1 << bits, columns // group
    q = torch.randint(top, (rows, columns), generator=g)
    z = torch.full((rows, count), top // 2)
    if not symmetric:
        z = torch.randint(int(version == 1), top, (rows, count), generator=g)
    s = (torch.rand(rows, count, generator=g) * 0.05 + 0.01).half()
    index = torch.arange(columns) // group
    if order is not None:
        index = index[order]
    tensors = {
        "qweight": torch.tensor([words_of(r, bits) for r in q.tolist()], dtype=torch.int32).t(),
        "qzeros": torch.tensor(
            [words_of(c, bits) for c in (z - int(version == 1)).t().tolist()], dtype=torch.int32
        ),
        "scales": s.t(),
        "g_idx": index.int(),
    }
    weight = (q - z[:, index]) * s.float()[:, index]
    return {k: t.contiguous() for k, t in tensors.items()}, weight


def rewrite(folder: Path, change: Callable[[dict[str, Tensor]], Any]) -> None:
    """Change the tensors of a folder in place; a returned dict replaces them."""
    from safetensors.torch import load_file, save_file

    file = folder / "model.safetensors"
    tensors = load_file(file)
    changed = change(tensors)
    tensors = changed if isinstance(changed, dict) else tensors
    save_file(tensors, file, metadata={"format": "pt"})


def config(folder: Path, change: Callable[[dict[str, Any]], Any]) -> None:
    """Change a folder's config.json in place."""
    path = folder / "config.json"
    raw = json.loads(path.read_text())
    change(raw)
    path.write_text(json.dumps(raw))
