"""Tensors of the paper device: they say ``cuda:0`` and hold CPU numbers.

torch computes with what they hold; kernels compute nothing, so what they would have written is
whatever lay there, and numbers mean nothing. An op over tensors of both places, and one that would
wait for the device in a recording, is refused as CUDA does.
"""

from __future__ import annotations

import contextlib
import os
from collections.abc import Iterator
from pathlib import Path
from typing import Any
from unittest import mock

import torch
from paper_device import (
    DEVICE,
    GPU,
    PROPERTIES,
    TAG,
    Device,
    Event,
    Graph,
    Recording,
    Refused,
    Stream,
    driver,
    on_stream,
)  # fmt: skip
from torch.overrides import TorchFunctionMode
from torch.utils import _pytree as pytree
from torch.utils._python_dispatch import TorchDispatchMode, return_and_correct_aliasing

WAITS = ("_local_scalar_dense", "nonzero", "is_nonzero", "equal", "masked_select", "_unique2",
         "unique_consecutive", "unique_dim", "bincount", "item")  # fmt: skip


def dispatched(_: Any, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
    """A call of torch's that a tensor or the mode meets."""
    return run(func, args, kwargs or {})


class PaperTensor(torch.Tensor):
    """A tensor of the paper device, over one of the CPU."""

    held: torch.Tensor

    @staticmethod
    def __new__(cls, held: torch.Tensor) -> PaperTensor:
        made = torch.Tensor._make_wrapper_subclass(
            cls, held.shape, strides=held.stride(), storage_offset=held.storage_offset(),
            dtype=held.dtype, layout=held.layout, device="meta",
        )  # fmt: skip
        made.held = held
        return made

    @property
    def device(self) -> torch.device:
        return GPU

    is_cuda, is_meta = property(lambda self: True), property(lambda self: False)

    def data_ptr(self) -> int:
        return self.held.data_ptr() | TAG

    def item(self) -> Any:
        DEVICE.waits("item")
        return self.held.item()

    def tolist(self) -> Any:
        DEVICE.waits("tolist")
        return self.held.tolist()

    def __bool__(self) -> bool:
        return bool(self.item())

    def __int__(self) -> int:
        return int(self.item())

    def __float__(self) -> float:
        return float(self.item())

    __index__ = __int__

    def __getitem__(self, index: Any) -> PaperTensor:
        masked(index)
        return PaperTensor(self.held[unwrapped(index)])

    def __setitem__(self, index: Any, value: Any) -> None:
        masked(index)
        if isinstance(value, torch.Tensor) and not isinstance(value, PaperTensor) and value.dim():
            DEVICE.waits("a copy from the host")
        self.held[unwrapped(index)] = unwrapped(value)

    def numpy(self, **_: Any) -> Any:
        raise Refused("can't convert cuda:0 device type tensor to numpy")

    __torch_dispatch__ = classmethod(dispatched)


class Generator(torch.Generator):
    """Of the device that was asked for."""

    def __new__(cls, device: Any = "cpu") -> Generator:
        made = super().__new__(cls, "cpu")
        made.where = torch.device(device)
        return made

    @property
    def device(self) -> torch.device:  # type: ignore[override]
        return GPU if self.where.type == "cuda" else self.where


def unwrapped(value: Any) -> Any:
    return pytree.tree_map_only(PaperTensor, lambda t: t.held, value)


def masked(index: Any) -> None:
    """An index by a mask counts it first, which waits for the device."""
    if any(getattr(t, "dtype", None) in (torch.bool, torch.uint8) and not isinstance(t, bool)
           for t in pytree.tree_leaves(index)):  # fmt: skip
        DEVICE.waits("index by a mask")


def run(func: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
    """An op of torch, over what the tensors hold; refused where a GPU would."""
    flat = pytree.tree_leaves((args, kwargs))
    tensors = [t for t in flat if isinstance(t, torch.Tensor)]
    paper = [t for t in tensors if isinstance(t, PaperTensor)]
    name = func._schema.name.removeprefix("aten::")
    target = kwargs.get("device")
    to = None if target is None else torch.device(target).type
    to = "cuda" if to == "meta" else to  # what torch's own code calls them
    here = to == "cuda" or (bool(paper) and to is None)
    plain = [t for t in tensors if not isinstance(t, PaperTensor) and t.dim() > 0]
    crosses = name in ("_to_copy", "copy_") and bool(tensors) and (
        (here and bool(plain)) or (bool(paper) and to == "cpu")
    )  # fmt: skip
    if paper and plain and name not in ("copy_", "index", "index_put_", "_index_put_impl_"):
        raise Refused(
            f"{name}: expected all tensors to be on the same device, found cuda:0 and cpu"
        )
    if DEVICE.recording is not None and paper and (name in WAITS or crosses):
        raise Refused(f"{name}: operation not permitted when stream is capturing")
    if paper and name in ("index", "index_put_") and DEVICE.recording is not None:
        masked(args[1])
    if here and DEVICE.recording is not None:
        DEVICE.recorded.append(name)
    inner = dict(kwargs)
    if here and to == "cuda":
        inner["device"] = torch.device("cpu")
    a, k = unwrapped((args, inner))
    out = func(*a, **k)
    if not here:
        return out
    wrapped = pytree.tree_map_only(torch.Tensor, lambda t: PaperTensor(t), out)
    if name in WAITS[:1]:
        return out
    return return_and_correct_aliasing(func, args, kwargs, wrapped) if paper else wrapped


class Mode(TorchDispatchMode):
    """Makes tensors of the device."""

    __torch_dispatch__ = dispatched


def there(tensor: torch.Tensor, dtype: torch.dtype) -> torch.Tensor:
    """A tensor on the device."""
    if isinstance(tensor, PaperTensor):
        return tensor if tensor.dtype == dtype else tensor.to(dtype)
    DEVICE.waits("a copy from the host")
    return PaperTensor(tensor.detach().to(dtype, copy=True))


class There(TorchFunctionMode):
    """Takes tensors of the host to the device, which torch's binding would look for itself."""

    def __torch_function__(
        self,
        func: Any,
        types: Any,
        args: tuple[Any, ...] = (),
        kwargs: dict[str, Any] | None = None,
    ) -> Any:
        kwargs = kwargs or {}
        if func in (torch.Tensor.to, torch.Tensor.cuda):
            given = (GPU,) if func is torch.Tensor.cuda else args[1:]
            where, dtype, *_ = torch._C._nn._parse_to(*given, **kwargs)
            if where is not None and where.type == "cuda":
                return there(args[0], dtype or args[0].dtype)
        if func is torch.tensor and str(kwargs.get("device", "")).startswith("cuda"):
            DEVICE.waits("a copy from the host")
            return PaperTensor(func(*args, **{**kwargs, "device": "cpu"}))
        return func(*args, **kwargs)


@contextlib.contextmanager
def paper(folder: Path) -> Iterator[Device]:
    """torch and Triton find the device, as long as this lasts."""
    import triton
    from triton.backends.nvidia.driver import CudaDriver

    DEVICE.__init__()
    DEVICE.driver = driver(folder)
    stands = {
        "is_available": lambda: True, "device_count": lambda: 1, "current_device": lambda: 0,
        "get_device_name": lambda device=None: "paper",
        "get_device_capability": lambda device=None: (9, 0),
        "get_device_properties": lambda device=None: PROPERTIES,
        "is_initialized": lambda: True, "empty_cache": lambda: None,
        "synchronize": lambda device=None: DEVICE.waits("synchronize"),
        "current_stream": lambda device=None: DEVICE.stream,
        "set_stream": lambda stream: setattr(DEVICE, "stream", stream),
        "stream": on_stream, "Stream": Stream, "Event": Event, "CUDAGraph": Graph,
        "graph": Recording, "is_current_stream_capturing": lambda: DEVICE.recording is not None,
        "device": lambda device: contextlib.nullcontext(), "_lazy_init": lambda: None,
    }  # fmt: skip
    with contextlib.ExitStack() as stack:
        for name, stand in stands.items():
            stack.enter_context(mock.patch.object(torch.cuda, name, stand))
        stack.enter_context(mock.patch.object(torch, "Generator", Generator))
        stack.enter_context(mock.patch.dict(os.environ, TRITON_LIBCUDA_PATH=str(folder)))
        made = CudaDriver()
        made.get_current_stream = lambda index: DEVICE.stream.cuda_stream
        triton.runtime.driver.set_active(made)
        stack.enter_context(Mode())
        stack.enter_context(There())
        yield DEVICE
