"""Where kernels can run: a CUDA device that they are built for, or Triton's interpreter."""

from __future__ import annotations

import functools
import importlib.util

import torch


def installed() -> bool:
    """Whether there is a Triton to import."""
    return importlib.util.find_spec("triton") is not None


def unavailable(device: torch.device | None = None) -> str | None:
    """Why kernels cannot be launched on a CUDA device, the current one when None; None when they
    can."""
    if not installed():
        return "triton is not installed"
    if interpreting():
        return None
    if not torch.cuda.is_available():
        return "no CUDA device, and TRITON_INTERPRET=1 is not set"
    found = torch.cuda.get_device_capability(device)
    if torch.version.hip is None and found >= (8, 0):
        return None
    what = "ROCm" if torch.version.hip else ".".join(map(str, found))
    return f"expected a CUDA device of compute capability 8.0 or more, found {what}"


def machine(device: torch.device) -> str:
    """The target of a CUDA device, "sm_80" or "sm_90"; "" where kernels are interpreted."""
    if device.type != "cuda":
        return ""
    return "sm_90" if torch.cuda.get_device_capability(device) >= (9, 0) else "sm_80"


def interpreting() -> bool:
    """Whether Triton is there and runs kernels on the CPU (its flag as it stands now)."""
    if not installed():
        return False
    import triton

    return bool(triton.knobs.runtime.interpret)


@functools.cache
def processor_count(device: torch.device) -> int:
    """Multiprocessors of a CUDA device."""
    return int(torch.cuda.get_device_properties(device).multi_processor_count)
