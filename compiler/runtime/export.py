"""Writing a program in other people's formats: whole, checked by loading it back, or not at all."""

from __future__ import annotations

import os
from pathlib import Path
from typing import Any

import torch

from ..ir.errors import UsageError, nearest
from ..ir.graph import Program
from .exporting import FORMATS
from .exporting.job import RECORD, Job, Tell

__all__ = ["FORMATS", "check_format", "check_target", "export"]


def export(
    program: Program,
    folder: str | Path,
    *,
    format: str = "hf",
    dtype: torch.dtype | None = None,
    force: bool = False,
    drop_exits: bool = False,
    side: Path | None = None,
    tell: Tell = lambda text: None,
) -> dict[str, Any]:
    """Write ``program`` to ``folder`` in another format.

    Args:
        format: one of :data:`FORMATS`.
        dtype: of the floating weights; by default the one that most of them are stored in, and of
            gptq and awq never fp32.
        force: replace an earlier export, by one rename after the new one is complete.
        drop_exits: write the full model of a program with early exits.
        side: folder with tokenizer and generation config.
        tell: hears what is being done.
    Returns:
        What was written: architecture, changed fields of the config, dtype, bytes, tensors of the
        source that its model has no place for and that are left out; as shares of the
        largest logit, the largest difference of a logit after loading, and how far rounding the
        weights to ``dtype`` moved one. Of quantised formats also how many linears have which
        scheme, what is left dense, and notes for who loads it.
    Raises:
        UsageError: an unknown format, a folder that may not be written, or a program that the
            format has no place for: which layer, and which size, bias or op.
        GateError: what was written does not load with the same logits; nothing is left.
        ResourceError: no space; nothing was changed.
    """
    check_format(format)
    target = Path(folder).expanduser()
    check_target(target, force)
    if program.caches:
        kinds = sorted({c.kind for c in program.caches.values()})
        raise UsageError(
            f"expected a program with a plain KV cache, found {', '.join(kinds)}: {format} has no "
            "place for it",
            hint="compile without the pass; most engines have a cache option of their own",
        )
    if program.exits is not None:
        if not drop_exits:
            raise UsageError(
                f"expected a program without early exits, found {len(program.exits.blocks)}: "
                f"{format} has no place for them",
                hint="--drop-exits writes the full model, which runs every block",
            )
        program = program.clone()
        program.exits = None
    return FORMATS[format].write(Job(program, target, format, dtype, force, side, tell))


def check_format(name: str) -> None:
    """Raises UsageError for an unknown format, the nearest named."""
    if name not in FORMATS:
        known = ", ".join(FORMATS)
        raise UsageError(
            f"format: expected one of {known}, found {name!r}", hint=nearest(name, FORMATS)
        )


def check_target(folder: Path, force: bool) -> None:
    """Refuse a target that exists, unless it is an earlier export and ``force`` is given.

    Raises:
        UsageError: it exists, or holds something else than an export.
    """
    if not os.path.lexists(folder):
        return
    if folder.is_symlink() or not folder.is_dir():
        raise UsageError(f"expected a folder to write, found a file or a link at {folder}")
    if not force:
        raise UsageError(f"expected a new folder, found {folder}", hint="--force replaces it")
    if any(folder.iterdir()) and not (folder / RECORD).is_file():
        raise UsageError(
            f"expected an export to replace, found a folder of something else at {folder}",
            hint="--force replaces exports only; choose a new folder",
        )
