"""What is run on the paper device, in a process of its own: prints what it saw as JSON.

python tests/codegen/paper_runs.py FOLDER, which gets the driver and Triton's cache.
"""

from __future__ import annotations

import json
import sys
import warnings
from collections.abc import Callable
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).parents[2] / "benchmarks"))

import torch
from paper_device import DEVICE, GPU, Refused, launches
from paper_tensors import paper


def decode(scheme: str) -> dict[str, Any]:
    """A decode step as the GPU suite times it: first calls, recording, replays."""
    import gpu_clock
    import gpu_decode

    shapes = gpu_decode.Shapes(hidden=256, heads=4, kv_heads=2, width=64, inner=256, vocab=512,
                               layers=2, context=32)  # fmt: skip
    return gpu_decode.timed(scheme, shapes, gpu_clock.Limits(3e12, 8e14))


def page(name: str, tokens: int, **fields: Any) -> list[dict[str, Any]]:
    """A row of the kernel page."""
    import gpu_clock
    import gpu_kernels

    from llmc.codegen.problem import Problem

    problem = Problem(128, 1024, x_dtype="bf16", **fields)
    return gpu_kernels.page(name, name, problem, [tokens], gpu_clock.Limits(3e12, 8e14))


def tuned() -> dict[str, float]:
    """Tiles as `llmc tune` times them: one that shares its columns, and one that cannot be had."""
    from llmc.codegen.problem import Problem
    from llmc.codegen.row import TileConfig
    from llmc.codegen.rows.int4 import W4A16
    from llmc.codegen.tuning.triton import graph_seconds

    tiles = [TileConfig(8, 32), TileConfig(8, 32, split=2), TileConfig(8, 7)]
    found = graph_seconds(W4A16, Problem(96, 1024, x_dtype="bf16"), 1, tiles)
    return {f"{c.BN}/{c.split}": s for c, s in found.items()}


def refusals() -> dict[str, str]:
    """What a recording must not do, and what no launch may."""
    from llmc.codegen.graphs import captured

    x = torch.ones(4, device="cuda")
    inner: dict[str, Callable[[], object]] = {
        "item": lambda: x.sum().item(),
        "truth": lambda: bool((x > 0).all()),
        "mask": lambda: x[x > 0],
        "to the host": lambda: x.cpu(),
        "from the host": lambda: torch.ones(4).to("cuda"),
        "list": lambda: x.tolist(),
        "synchronize": lambda: torch.cuda.synchronize(),
    }
    told = {}
    for name, step in inner.items():
        try:
            captured(step, device=GPU)
            told[name] = ""
        except Refused as error:
            told[name] = str(error)
    try:
        x + torch.ones(4)
    except Refused as error:
        told["two places"] = str(error)
    return told


def seen(run: Callable[[], Any]) -> dict[str, Any]:
    """What a run returned, and what reached the device meanwhile."""
    before, DEVICE.log[:], DEVICE.recorded[:] = DEVICE.launched, [], []
    result = run()
    here = launches()[before:]
    return {
        "result": result, "streams": sorted({found[4] for found in here}), "log": DEVICE.log[:],
        "launches": [[found[0], found[1]] for found in here], "recorded": DEVICE.recorded[:],
    }  # fmt: skip


def main() -> None:
    """Each run once."""
    warnings.simplefilter("ignore")
    with paper(Path(sys.argv[1])), torch.no_grad():
        print(json.dumps({
            "decode": seen(lambda: decode("w4 + rank 64")),
            "dense": seen(lambda: decode("bf16 graph")),
            "many": seen(lambda: page("w4a16", 2048, bits=4, group=128)),
            "tuned": seen(tuned),
            "refused": refusals(),
        }))  # fmt: skip


if __name__ == "__main__":
    main()
