"""Capture: from a model folder, a hub id or a module to a normalised program.

Nothing else in llmc knows transformers.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    import torch

    from ..ir.graph import Program

__all__ = ["capture"]


def capture(
    source: str | Path | torch.nn.Module,
    *,
    inputs: Mapping[str, torch.Tensor] | Sequence[torch.Tensor] | None = None,
    axes: Mapping[str, Sequence[str | None]] | None = None,
    trust_remote_code: bool = False,
) -> Program:
    """Capture a model as a normalised program.

    Args:
        source: a folder as ``save_pretrained`` writes it, a hub id, or a live module. From a folder
            no tensor is read before it is asked for; a module is never modified. Linears that a
            GPTQ, AWQ or compressed-tensors checkpoint holds as codes stay codes.
        inputs: example inputs, for a module that is not one of transformers.
        axes: symbols of their axes (see :func:`.module.capture_module`).
        trust_remote_code: run modelling code that lies in the model's repository.
    Returns:
        A program that computes in fp32. A transformers model has the inputs ``input_ids``,
        ``position_ids`` (int64 [B, S]) and ``attention_mask`` (bool [B, S]); all three exist even
        where the model reads fewer, and the result is its logits (else its first output).
        ``facts["refusals"]`` lists what nearly was a semantic op and was left as it is.
    Raises:
        UsageError: something that is no model at all.
        ModelError: no such model, or a checkpoint that is not sound.
        CaptureError: a model that cannot be expressed without guessing.
    """
    import torch

    from ..ir.errors import CaptureError, UsageError

    coded = None

    if not isinstance(source, (str, Path, torch.nn.Module)):
        raise UsageError(
            "expected a model: a folder, a hub id, an nn.Module or a Program, "
            f"found {type(source).__name__}"
        )
    if isinstance(source, torch.nn.Module):
        from transformers import PreTrainedModel

        if inputs is not None:
            from .module import capture_module

            return capture_module(source, inputs, axes)
        if not isinstance(source, PreTrainedModel):
            raise CaptureError(
                f"expected example inputs for a {type(source).__name__}, found none",
                hint="pass inputs={name: tensor}",
            )
        from .huggingface import capture_model

        program = capture_model(source)
    else:
        from .huggingface import capture_folder, find

        program, coded = capture_folder(find(source), trust_remote_code)
    from .normalise import normalise

    program.facts["refusals"] = [r.to_json() for r in normalise(program)]
    if coded is not None:
        from .foreign.attach import attach

        attach(program, coded.layers, coded.method)
    return program
