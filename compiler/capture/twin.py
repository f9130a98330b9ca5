"""A weightless copy of a live module: same structure, fake fp32 tensors, the original untouched."""

from __future__ import annotations

import copy
from typing import Any

import torch

from ..ir.errors import CaptureError
from .checkpoint import check_finite
from .sources import Leaf


def weightless_copy(module: torch.nn.Module) -> torch.nn.Module:
    """A deep copy in evaluation mode whose parameters and buffers are fake CPU tensors.

    Floating tensors are fp32 in the copy. Ties stay ties; hooks are copied too.
    Raises:
        CaptureError: something in the module cannot be copied.
    """
    from torch._subclasses.fake_tensor import FakeTensorMode

    mode = FakeTensorMode(allow_non_fake_inputs=True)
    memo: dict[int, Any] = {}
    tensors = [
        *module.named_parameters(remove_duplicate=False),
        *module.named_buffers(remove_duplicate=False),
    ]
    for _, tensor in tensors:
        if id(tensor) not in memo:
            dtype = torch.float32 if tensor.is_floating_point() else tensor.dtype
            with mode:
                empty = torch.empty(tensor.shape, dtype=dtype)
            trained = isinstance(tensor, torch.nn.Parameter)
            memo[id(tensor)] = torch.nn.Parameter(empty, requires_grad=False) if trained else empty
    try:
        twin = copy.deepcopy(module, memo)
    except Exception as e:  # deepcopy runs the module's own code
        text = " ".join(str(e).split())[:200]
        raise CaptureError(
            f"expected a module that can be copied, found {type(e).__name__}: {text}",
            where=type(module).__name__,
        ) from None
    return twin.eval()


def live_leaves(module: torch.nn.Module, compute: torch.dtype = torch.float32) -> dict[str, Leaf]:
    """Leaves by name that refer to the module's own tensors; equal storage is one leaf.

    Args:
        compute: floating dtype in which the program computes; buffers stored in it are kept as they
            are at run time.
    """
    persistent = set(module.state_dict())
    by_storage: dict[Any, Leaf] = {}
    out: dict[str, Leaf] = {}
    tensors = [
        *module.named_parameters(remove_duplicate=False),
        *module.named_buffers(remove_duplicate=False),
    ]
    for name, tensor in tensors:
        key = storage_key(tensor)
        leaf = by_storage.get(key)
        if leaf is None:
            leaf = by_storage[key] = live_leaf(name, tensor, name in persistent, compute)
        else:
            leaf.names = (*leaf.names, name)
        out[name] = leaf
    return out


def live_leaf(name: str, tensor: torch.Tensor, persistent: bool, compute: torch.dtype) -> Leaf:
    """A leaf that refers to one live tensor."""
    kept = tensor.detach()
    trained = isinstance(tensor, torch.nn.Parameter)
    floating = tensor.is_floating_point()
    keep = not floating or (not trained and not persistent and tensor.dtype == compute)

    def load() -> torch.Tensor:
        if trained:
            check_finite(kept, name, "the module")
        return kept

    return Leaf((name,), tuple(kept.shape), kept.dtype, load, trained, keep, in_memory=not trained)


def storage_key(tensor: torch.Tensor) -> tuple[Any, ...]:
    """Equal for tensors that are the same view of the same memory."""
    if tensor.numel() == 0 or tensor.device.type == "meta":
        return (id(tensor),)
    return (
        tensor.data_ptr(), tuple(tensor.shape), tuple(tensor.stride()), tensor.dtype, tensor.device,
    )  # fmt: skip
