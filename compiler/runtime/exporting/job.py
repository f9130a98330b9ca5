"""What an export is asked to do."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import torch

from ...ir.graph import Program

Tell = Callable[[str], None]
# What an export was made of; a folder with it may be replaced.
RECORD = "llmc.json"
# Room for config, tokenizer and headers beside the weights.
OVERHEAD = 64 << 20


@dataclass(frozen=True)
class Job:
    """One export.

    Attributes:
        program: without early exits and cache schemes; it is not changed.
        folder: to write. force: it may replace an earlier export.
        format: a key of :data:`.FORMATS`.
        dtype: of the floating weights; None for the format's choice.
        side: folder with tokenizer and generation config. tell: hears what is being done.
    """

    program: Program
    folder: Path
    format: str
    dtype: torch.dtype | None
    force: bool
    side: Path | None
    tell: Tell
