"""Counters by which the programs of a launch know each other: zero before it and after it.

Launches of one stream follow each other, so they share them; two streams never do.
"""

from __future__ import annotations

import torch

LEAST = 4096
_SETS: dict[tuple[str, torch.device, int], list[torch.Tensor]] = {}


def counters(name: str, count: int, device: torch.device) -> torch.Tensor:
    """int32 zeros, ``count`` or more, for a launch on the current stream of ``device``.

    One launch may take several, by ``name``. A recorded graph points to its own for good, so an
    outgrown set is kept. What a graph records on a stream that has none yet is that graph's alone:
    it is made anew in each replay.
    """
    stream = torch.cuda.current_stream(device).cuda_stream if device.type == "cuda" else 0
    sets = _SETS.setdefault((name, device, stream), [])
    if not sets or sets[-1].numel() < count:
        room = max(LEAST, count, 2 * sets[-1].numel() if sets else 0)
        made = torch.zeros(room, dtype=torch.int32, device=device)
        if device.type == "cuda" and torch.cuda.is_current_stream_capturing():
            return made
        sets.append(made)
    return sets[-1]


def forget(device: torch.device) -> None:
    """Let go of a device's counters: an interpreted launch that broke off leaves any numbers."""
    for key in [k for k in _SETS if k[1] == device]:
        del _SETS[key]
