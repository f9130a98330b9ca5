"""Capture: from a model folder, a hub id or a module to a normalised program. Nothing else knows transformers."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    import torch

    from ..ir.graph import Program

__all__ = ["capture"]


def capture(source: str | Path | torch.nn.Module, *, trust_remote_code: bool = False) -> Program:
    """Capture a model as a normalised program.

    Args:
        source: a folder as ``save_pretrained`` writes it, a hub id, or a live module of transformers.
            From a folder no tensor is read before it is asked for; a module is never modified.
        trust_remote_code: run modelling code that lies in the model's repository.
    Returns:
        A program in fp32 with inputs ``input_ids``, ``position_ids`` (int64 [B, S]) and
        ``attention_mask`` (bool [B, S]); all three exist even where the model reads fewer.
    Raises:
        ModelError: no such model, or a checkpoint that is not sound.
        CaptureError: a model that cannot be expressed without guessing.
    """
    from .huggingface import capture_folder, find
    from .normalise import normalise

    program = capture_folder(find(source), trust_remote_code)
    normalise(program)
    return program
