"""torch's sparse rows for the sparse entries beside a decoded weight (`llmc.csr_linear`)."""

from __future__ import annotations

import warnings

import torch

WIDE = {torch.bfloat16: torch.float32, torch.float16: torch.float32}
"""What the CPU's sparse product computes those dtypes in."""


def available(device: torch.device) -> bool:
    """Whether they are used there: on a CPU with MKL. Elsewhere the row's reference runs."""
    with warnings.catch_warnings():
        # The first such tensor of a process says that the format is young; nothing follows from it.
        warnings.simplefilter("ignore")
        torch.sparse_csr_tensor([0, 0], torch.zeros(0, dtype=torch.int64), [], (1, 1))
    return device.type == "cpu" and torch.backends.mkl.is_available()


def csr_linear(
    y: torch.Tensor,
    x: torch.Tensor,
    values: torch.Tensor,
    index: torch.Tensor,
    starts: torch.Tensor,
) -> torch.Tensor:
    """As the op row's reference, at the cost of the stored entries alone; no dense S is made."""
    flat = x.reshape(-1, x.shape[-1])
    if not len(flat) or not len(values):
        return y
    dtype = WIDE.get(x.dtype, x.dtype)
    weight = torch.sparse_csr_tensor(
        starts, index.to(torch.int32), values.to(dtype), (y.shape[-1], x.shape[-1]),
        check_invariants=False,
    )  # fmt: skip
    side = (weight @ flat.to(dtype).T).T
    return y + side.to(y.dtype).reshape(y.shape)
