"""Tracing a module with torch.export: non-strict, symbolic batch and sequence, no decompositions."""

from __future__ import annotations

import warnings
from collections.abc import Mapping, Sequence
from typing import Any

import torch

from ..ir.errors import CaptureError, LlmcError

# Two unlike sizes above 1, so that neither is specialised nor taken for the other.
TRACE_BATCH, TRACE_SEQ = 2, 12


def trace(
    module: torch.nn.Module,
    inputs: Mapping[str, torch.Tensor],
    axes: Mapping[str, Sequence[str | None]],
    limits: Mapping[str, int] | None = None,
) -> torch.export.ExportedProgram:
    """Export a module, with ``linear``, ``embedding`` and attention kept whole.

    Args:
        module: in evaluation mode; its parameters may be fake.
        inputs: keyword arguments of ``forward``.
        axes: per input the symbol of each axis, None for a fixed one.
        limits: largest value of a symbol, where the module bounds it.
    Raises:
        CaptureError: the module cannot be traced with symbolic sizes.
    """
    limits = limits or {}
    dims: dict[str, Any] = {}
    for names in axes.values():
        for name in names:
            if name is not None and name not in dims:
                low = 1 if name == "B" else 2
                dims[name] = torch.export.Dim(name, min=low, max=limits.get(name, 1 << 30))
    shapes = {
        key: {i: dims[n] for i, n in enumerate(axes.get(key, ())) if n is not None}
        for key in inputs
    }
    try:
        with torch.no_grad(), warnings.catch_warnings():
            warnings.simplefilter("ignore")
            program = torch.export.export(
                module, (), dict(inputs), dynamic_shapes=shapes, strict=False
            )
            return program.run_decompositions({})
    except LlmcError:
        raise
    except Exception as e:  # torch.export raises dozens of unrelated types; all mean the same here
        cause: BaseException | None = e
        while cause is not None:
            if isinstance(cause, LlmcError):
                raise cause from None
            cause = cause.__cause__ or cause.__context__
        text = " ".join(str(e).split())[:300]
        raise CaptureError(
            f"expected a module that exports with symbolic {sorted(dims)}, found {type(e).__name__}: {text}",
            where=type(module).__name__,
        ) from e
