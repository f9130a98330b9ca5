"""CUDA graphs: one recorded step, replayed without Python between its kernels."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

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
    graph, out = captured(step, device=device, warm=warm)

    def replay() -> torch.Tensor:
        graph.replay()
        return out

    return replay


def captured(
    step: Callable[[], object], *, device: torch.device, warm: int = 1
) -> tuple[torch.cuda.CUDAGraph, Any]:
    """A CUDA graph of ``step`` after ``warm`` calls of it, and what the recorded call returned.

    It is recorded on the stream of those calls: what launches and libraries keep for each stream,
    such as counters and workspaces, is made by then and lies outside of the graph's own memory.
    RuntimeError when a call cannot be recorded; the current stream is the same afterwards.
    """
    current = torch.cuda.current_stream(device)
    beside = torch.cuda.Stream(device)
    beside.wait_stream(current)
    graph = torch.cuda.CUDAGraph()
    try:
        with torch.cuda.device(device):
            with torch.cuda.stream(beside):
                for _ in range(warm):
                    step()
            with torch.cuda.graph(graph, stream=beside):
                out = step()
    finally:
        torch.cuda.set_stream(current)
    current.wait_stream(beside)
    return graph, out
