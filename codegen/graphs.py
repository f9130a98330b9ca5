"""CUDA graphs: one recorded step, replayed without Python between its kernels."""

from __future__ import annotations

from collections.abc import Callable

import torch

from ..compiler.ir.errors import ResourceError

Step = Callable[[], torch.Tensor]


def record(step: Step, *, device: torch.device, warm: int = 2) -> Step:
    """Record ``step`` and return what replays it; both give the same tensor, filled anew.

    ``step`` reads and writes tensors that stay where they are, asks the device nothing and may be
    called any number of times for one result: it runs ``warm`` times before it is recorded, so
    that kernels are compiled and memory is at hand.
    ResourceError without a CUDA device.
    """
    if device.type != "cuda" or not torch.cuda.is_available():
        raise ResourceError(
            f"cannot record a CUDA graph on {device}", hint="decode without graphs on this machine"
        )
    beside = torch.cuda.Stream(device)
    beside.wait_stream(torch.cuda.current_stream(device))
    with torch.cuda.stream(beside):
        for _ in range(warm):
            step()
    torch.cuda.current_stream(device).wait_stream(beside)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        out = step()

    def replay() -> torch.Tensor:
        graph.replay()
        return out

    return replay
